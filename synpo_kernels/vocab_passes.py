"""Passes over the vocabulary: the inner ops, and the only place where hardware differs.

Four ops, each defined once here with a plain PyTorch kernel that runs on every device and float dtype. csrc overrides
them on the CPU, vocab_triton.py on CUDA; PyTorch's dispatcher chooses. Their callers hand them valid tokens only.

Letters: hidden (n, H), weight (V, H) of one dtype, bias (V,) or None, targets (n,) int64. Arithmetic and results are
in the accumulator dtype: float32, or float64 for float64 inputs.

    raw = hidden @ weight.T + bias,  z = logit_scale * raw,  then z = softcap * tanh(z / softcap) when softcap > 0
    d = dz / draw = logit_scale * (1 - (z / softcap)^2)

The column ``targets[t]`` is left out of row t; a target outside [0, V) leaves nothing out (vocab-parallel: it lives
on another rank).
"""

import torch
from torch import Tensor

from .device import workspace_bytes

# A row's reference is raised when one of its logits passes it by more than this: exp(40) is far below float32's and
# bfloat16's overflow, and the sums keep their full relative precision at any shift.
GUARD = 40.0

_LIBRARY = torch.library.Library("synpo", "FRAGMENT")
_COMMON = "Tensor hidden, Tensor weight, Tensor? bias, Tensor targets"
_LIBRARY.define(
    f"softmax_sums({_COMMON}, Tensor target_logits, float logit_scale, float softcap, bool weighted, int workspace_mb)"
    " -> (Tensor shift, Tensor sums, Tensor product)"
)
_LIBRARY.define(
    f"softmax_grads({_COMMON}, Tensor log_norm, Tensor coef, float logit_scale, float softcap, Tensor(a!) grad_weight,"
    " Tensor(b!)? grad_bias, bool weighted, int workspace_mb) -> Tensor product"
)
_LIBRARY.define(
    f"softmax_store({_COMMON}, Tensor target_logits, float logit_scale, float softcap, Tensor(a!) tile)"
    " -> (Tensor shift, Tensor sums)"
)
_LIBRARY.define(
    "tile_grads(Tensor tile, Tensor hidden, Tensor weight, Tensor coef, Tensor(a!)? grad_weight, Tensor(b!)? grad_bias,"
    " bool weighted) -> Tensor product"
)


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """The dtype of sums, log-probs and unit gradients for inputs of ``dtype``."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _matmul(a: Tensor, b: Tensor) -> Tensor:
    """a @ b with a result of the accumulator's precision; on CUDA the library multiplies bf16 into float32."""
    if a.is_cuda and b.dtype == torch.bfloat16:
        return torch.mm(a.to(b.dtype), b, out_dtype=torch.float32)
    acc = accumulator(b.dtype)
    return a.to(acc) @ b.to(acc)


def _columns(rows: int, weight: Tensor, workspace: int) -> list[slice]:
    """Vocabulary chunks whose temporaries (two float32 tiles and the widened weights) stay within the workspace."""
    V, H = weight.shape
    width = accumulator(weight.dtype).itemsize
    chunk = max(16, workspace // (width * (3 * rows + H)))
    return [slice(start, min(start + chunk, V)) for start in range(0, V, chunk)]


def _logits(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    part: slice,
    logit_scale: float,
    softcap: float,
) -> tuple[Tensor, Tensor | float]:
    """z of one vocabulary chunk with -inf at the target's column, and d."""
    z = _matmul(hidden, weight[part].T)
    if bias is not None:
        z += bias[part].to(z.dtype)
    z *= logit_scale
    d: Tensor | float = logit_scale
    if softcap > 0:
        z = softcap * torch.tanh(z / softcap)
        d = logit_scale * (1 - (z / softcap) ** 2)
    columns = torch.arange(part.start, part.stop, device=z.device)
    return z.masked_fill_(columns == targets[:, None], float("-inf")), d


def _raised(shift: Tensor, z: Tensor) -> Tensor:
    """The rows' reference: raised to the chunk's maximum where a logit passes it by more than GUARD."""
    top = z.amax(dim=1)
    return torch.where(top - shift > GUARD, top, shift)


def _softmax_sums(
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
    n, H = hidden.shape
    shift, sums = target_logits.clone(), torch.zeros_like(target_logits)
    product = target_logits.new_zeros((n if weighted else 0, H))
    for part in _columns(n, weight, workspace_bytes(workspace_mb, hidden.device, False)) if n else ():
        z, d = _logits(hidden, weight, bias, targets, part, logit_scale, softcap)
        raised = _raised(shift, z)
        rescale = torch.exp(shift - raised)
        shift = raised
        e = torch.exp(z - shift[:, None])
        sums = sums * rescale + e.sum(dim=1)
        if weighted:
            product.mul_(rescale[:, None]).add_(_matmul(e * d, weight[part]))
    return shift, sums, product


def _softmax_grads(
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
    n, H = hidden.shape
    product = log_norm.new_zeros((n if weighted else 0, H))
    for part in _columns(n, weight, workspace_bytes(workspace_mb, hidden.device, True)) if n else ():
        z, d = _logits(hidden, weight, bias, targets, part, logit_scale, softcap)
        p = torch.exp(z - log_norm[:, None]) * d
        if weighted:
            product += _matmul(p, weight[part])
        p *= coef[:, None]
        grad_weight[part] -= _matmul(p.T, hidden)
        if grad_bias is not None:
            grad_bias[part] -= p.sum(dim=0)
    return product


def _softmax_store(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    target_logits: Tensor,
    logit_scale: float,
    softcap: float,
    tile: Tensor,
) -> tuple[Tensor, Tensor]:
    n = hidden.shape[0]
    shift, sums = target_logits.clone(), torch.zeros_like(target_logits)
    for part in _columns(n, weight, max(tile.nbytes // 4, 1 << 20)) if n else ():
        z, d = _logits(hidden, weight, bias, targets, part, logit_scale, softcap)
        raised = _raised(shift, z)
        rescale = torch.exp(shift - raised)
        shift = raised
        e = torch.exp(z - shift[:, None])
        sums = sums * rescale + e.sum(dim=1)
        tile[:, : part.start] *= rescale[:, None].to(tile.dtype)
        tile[:, part] = e * d
    return shift, sums


def _tile_grads(
    tile: Tensor,
    hidden: Tensor,
    weight: Tensor,
    coef: Tensor,
    grad_weight: Tensor | None,
    grad_bias: Tensor | None,
    weighted: bool,
) -> Tensor:
    n, H = hidden.shape
    product = coef.new_zeros((n if weighted else 0, H))
    # The coefficient goes to the narrow side: scaling hidden touches n * H numbers, scaling the tile n * V. It is
    # divided by a row's norm, which may be e^GUARD: bf16 holds that, fp16 does not.
    scaled = hidden.to(coef.dtype) * coef[:, None]
    if hidden.is_cuda and hidden.dtype == torch.bfloat16:
        scaled = scaled.to(hidden.dtype)
    for part in _columns(n, weight, max(tile.nbytes // 4, 1 << 20)) if n else ():
        if weighted:
            product += _matmul(tile[:, part], weight[part])
        if grad_weight is not None:
            grad_weight[part] -= _matmul(tile[:, part].T, scaled)
        if grad_bias is not None:
            grad_bias[part] -= coef @ tile[:, part].to(coef.dtype)
    return product


for _name, _kernel in (
    ("softmax_sums", _softmax_sums),
    ("softmax_grads", _softmax_grads),
    ("softmax_store", _softmax_store),
    ("tile_grads", _tile_grads),
):
    _LIBRARY.impl(_name, _kernel, "CompositeExplicitAutograd")

softmax_sums = torch.ops.synpo.softmax_sums
softmax_grads = torch.ops.synpo.softmax_grads
softmax_store = torch.ops.synpo.softmax_store
tile_grads = torch.ops.synpo.tile_grads
