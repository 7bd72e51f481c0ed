"""The inner ops of vocab_passes.py on CUDA: Triton kernels around the library's matrix products.

    softmax_store   one fused product with its epilogue, or the library's product and one pass: tiling.py chooses
    tile_grads      products of the stored tile, the library's, into float32
    softmax_sums, softmax_grads   the two above, over chunks of rows that fit the workspace

float16 cannot hold exp(z - z_y) of a confident token, so tiles of float16 inputs are float32 and are brought to
float16's range, row by row, for their products. float64 runs the plain kernels of vocab_passes.py. Nothing here waits
for the device.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import tiling, vocab_passes
from .contrastive_triton import contrastive_logits, contrastive_sample
from .device import workspace_bytes
from .loss_triton import synpo_loss
from .prefix_attention_cuda import prefix_attention, prefix_attention_backward
from .vocab_triton import Pairs, Rows, empty_pairs, exponentiate, has_descriptors, reduce, score

_ALIGNMENT = 16  # bytes: TMA asks it of rows
# Where float32 values go for a float16 product, far from float16's overflow (65504) and its smallest number (6e-8); and
# the largest value below which a row counts as 0, so that the factor itself stays finite.
_TOP, _LEAST = 4096.0, 1e-30


def _tile_dtype(inputs: torch.dtype) -> torch.dtype:
    return torch.bfloat16 if inputs == torch.bfloat16 else torch.float32


def _gemm(out: Tensor, a: Tensor, b: Tensor, *, alpha: float = 1, beta: float = 0) -> None:
    """out = alpha a @ b + beta out in place, float32 out of operands of one dtype: the library's product."""
    if a.dtype == torch.float32:
        torch.addmm(out, a, b, alpha=alpha, beta=beta, out=out)
    elif a.is_cuda:
        torch.addmm(out, a, b, out_dtype=torch.float32, alpha=alpha, beta=beta, out=out)
    else:  # under the interpreter: the CPU's library does not multiply 16-bit operands into float32
        torch.addmm(out, a.float(), b.float(), alpha=alpha, beta=beta, out=out)


def _chunks(total: int, step: int) -> list[slice]:
    return [slice(start, min(start + step, total)) for start in range(0, total, step)]


def _fits(route: tiling.Route, hidden: Tensor, weight: Tensor, tile: Tensor | None) -> bool:
    """Whether the fused kernel can address these tensors; what it cannot goes to the library."""
    if route.descriptors:
        return all(has_descriptors(x) for x in (hidden, weight, tile) if x is not None)
    return hidden.stride(1) == weight.stride(1) == 1 and (tile is None or tile.stride(1) == 1)


def _pairs_by_library(hidden: Tensor, weight: Tensor, rows: Rows, tile: Tensor | None) -> Pairs:
    (n, _), V = hidden.shape, weight.shape[0]
    block = tiling.PASS
    pairs = empty_pairs(n, -(-V // block.columns), block.columns, hidden.device)
    step = max(1, tiling.LOGIT_BYTES // (4 * n * block.columns)) * block.columns
    buffer = torch.empty((n, min(step, V)), dtype=torch.float32, device=hidden.device)
    for part in _chunks(V, step):
        raw = buffer[:, : part.stop - part.start]
        _gemm(raw, hidden, weight[part].T)
        exponentiate(raw, part.start, V, rows, tile, pairs, block)
    return pairs


def store(hidden: Tensor, weight: Tensor, rows: Rows, tile: Tensor | None) -> tuple[Tensor, Tensor]:
    """(shift, sums) of n rows, filling ``tile`` (n, V) where one is given."""
    dtype = None if tile is None else tile.dtype
    route = tiling.route(hidden.device, hidden.dtype, hidden.shape[1], dtype, rows.softcap)
    if route.tile is not None and _fits(route, hidden, weight, tile):
        pairs = score(hidden, weight, rows, tile, route.tile, route.descriptors, route.programs)
    else:
        pairs = _pairs_by_library(hidden, weight, rows, tile)
    return reduce(pairs, tile)


def _new_tile(n: int, V: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """(n, V) whose rows start at multiples of what TMA asks."""
    unit = _ALIGNMENT // dtype.itemsize
    return torch.empty((n, -(-V // unit) * unit), dtype=dtype, device=device)[:, :V]


def _row_step(n: int, row_bytes: int, workspace: int) -> int:
    """Rows per chunk: as many as fit the workspace, evenly over the chunks, in whole tiles where possible."""
    most = max(1, min(n, workspace // row_bytes))
    most -= most % tiling.ROW_MULTIPLE if most > tiling.ROW_MULTIPLE else 0
    chunks = max(1, -(-n // most))
    even = max(1, -(-n // chunks))
    return min(most, -(-even // tiling.ROW_MULTIPLE) * tiling.ROW_MULTIPLE)


def _row_bytes(V: int, tile: torch.dtype | None) -> int:
    """Working memory of a row: its tile, and its pairs in the narrowest parts that tiling.py lists."""
    narrowest = min(t.columns // t.parts for tiles in tiling.TILES.values() for t in tiles.store + tiles.sums)
    return (0 if tile is None else tile.itemsize * V) + 8 * -(-V // narrowest)


def softmax_store(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    target_logits: Tensor,
    logit_scale: float,
    softcap: float,
    tile: Tensor,
) -> tuple[Tensor, Tensor]:
    """vocab_passes.softmax_store; the tile bfloat16 or float32."""
    if hidden.dtype == torch.float64:
        return vocab_passes._softmax_store(hidden, weight, bias, targets, target_logits, logit_scale, softcap, tile)
    if len(hidden) == 0:
        return target_logits.clone(), torch.zeros_like(target_logits)
    return store(hidden, weight, Rows(bias, targets, target_logits, logit_scale, softcap), tile)


def _narrowed_grads(
    tile: Tensor, hidden: Tensor, weight: Tensor, coef: Tensor, grad_weight: Tensor | None, product: Tensor | None
) -> None:
    """tile_grads of a float32 tile of 16-bit inputs, over vocabulary chunks: each row of the tile is brought to a
    largest value of _TOP, the hidden states with their coefficients and these factors to one of _TOP as a whole."""
    (n, H), V = hidden.shape, weight.shape[0]
    unit = _TOP / torch.linalg.vector_norm(tile, float("inf"), dim=1).clamp_min(_LEAST)
    scaled = hidden.float() * (coef / unit)[:, None]
    whole = torch.linalg.vector_norm(scaled, float("inf")).clamp_min(_LEAST) / _TOP
    scaled = (scaled / whole).to(hidden.dtype)
    for part in _chunks(V, max(16, tiling.LOGIT_BYTES // (4 * (n + H)))):
        e = (tile[:, part] * unit[:, None]).to(hidden.dtype)
        if product is not None:
            _gemm(product, e, weight[part], beta=1)
        if grad_weight is not None:
            change = torch.empty_like(grad_weight[part])
            _gemm(change, e.T, scaled)
            grad_weight[part] -= change.mul_(whole)
    if product is not None:
        product.div_(unit[:, None])


def tile_grads(
    tile: Tensor,
    hidden: Tensor,
    weight: Tensor,
    coef: Tensor,
    grad_weight: Tensor | None,
    grad_bias: Tensor | None,
    weighted: bool,
) -> Tensor:
    """vocab_passes.tile_grads."""
    if hidden.dtype == torch.float64:
        return vocab_passes._tile_grads(tile, hidden, weight, coef, grad_weight, grad_bias, weighted)
    (n, H), V = hidden.shape, weight.shape[0]
    product = torch.zeros((n if weighted else 0, H), dtype=torch.float32, device=hidden.device)
    if n == 0:
        return product
    if tile.dtype == hidden.dtype:
        if weighted:
            _gemm(product, tile, weight)
        if grad_weight is not None:
            # The coefficient goes to the narrow side: scaling hidden touches n * H numbers, scaling the tile n * V.
            _gemm(grad_weight, tile.T, (hidden.float() * coef[:, None]).to(hidden.dtype), alpha=-1, beta=1)
    else:
        _narrowed_grads(tile, hidden, weight, coef, grad_weight, product if weighted else None)
    if grad_bias is not None:
        for part in _chunks(V, max(1, tiling.LOGIT_BYTES // (4 * n))):
            grad_bias[part] -= coef @ tile[:, part].float()
    return product


def softmax_sums(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    target_logits: Tensor,
    logit_scale: float,
    softcap: float,
    weighted: bool,
    workspace_mb: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """vocab_passes.softmax_sums."""
    if hidden.dtype == torch.float64:
        return vocab_passes._softmax_sums(
            hidden, weight, bias, targets, target_logits, logit_scale, softcap, weighted, workspace_mb
        )
    (n, H), V = hidden.shape, weight.shape[0]
    shift, sums = torch.empty_like(target_logits), torch.empty_like(target_logits)
    product = torch.empty((n if weighted else 0, H), dtype=torch.float32, device=hidden.device)
    dtype = _tile_dtype(hidden.dtype)
    step = _row_step(n, _row_bytes(V, dtype if weighted else None), workspace_bytes(workspace_mb, hidden.device, False))
    tile = _new_tile(min(n, step), V, dtype, hidden.device) if weighted else None
    for part in _chunks(n, step):
        rows = Rows(bias, targets[part], target_logits[part], logit_scale, softcap)
        e = None if tile is None else tile[: part.stop - part.start]
        shift[part], sums[part] = store(hidden[part], weight, rows, e)
        if e is not None:
            product[part] = tile_grads(e, hidden[part], weight, sums[part], None, None, True)
    return shift, sums, product


def softmax_grads(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    log_norm: Tensor,
    coef: Tensor,
    logit_scale: float,
    softcap: float,
    grad_weight: Tensor,
    grad_bias: Tensor | None,
    weighted: bool,
    workspace_mb: int,
) -> Tensor:
    """vocab_passes.softmax_grads: relative to log_norm the stored tile is P'."""
    if hidden.dtype == torch.float64:
        return vocab_passes._softmax_grads(
            hidden, weight, bias, targets, log_norm, coef, logit_scale, softcap, grad_weight, grad_bias, weighted,
            workspace_mb,
        )  # fmt: skip
    (n, H), V = hidden.shape, weight.shape[0]
    product = torch.empty((n if weighted else 0, H), dtype=torch.float32, device=hidden.device)
    dtype = _tile_dtype(hidden.dtype)
    step = _row_step(n, _row_bytes(V, dtype), workspace_bytes(workspace_mb, hidden.device, True))
    tile = _new_tile(min(n, step), V, dtype, hidden.device)
    for part in _chunks(n, step):
        e = tile[: part.stop - part.start]
        store(hidden[part], weight, Rows(bias, targets[part], log_norm[part], logit_scale, softcap), e)
        g = tile_grads(e, hidden[part], weight, coef[part], grad_weight, grad_bias, weighted)
        if weighted:
            product[part] = g
    return product


def register() -> None:
    """Puts every op that has a CUDA form at its CUDA key. Not done by importing: tests load this on the CPU."""
    passes = (softmax_sums, softmax_grads, softmax_store, tile_grads)
    contrastive = (contrastive_logits, contrastive_sample)
    for op in (*passes, synpo_loss, *contrastive, prefix_attention, prefix_attention_backward):
        _LIBRARY.impl(op.__name__, _on_its_device(op), "CUDA")


def _on_its_device(op: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(op)
    def run(first: Tensor, *rest: Any) -> Any:
        with torch.cuda.device_of(first):  # Triton launches on the current device, which may be another one
            return op(first, *rest)

    return run


_LIBRARY = torch.library.Library("synpo", "FRAGMENT")
