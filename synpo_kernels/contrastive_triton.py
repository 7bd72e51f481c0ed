"""The ops of contrastive.py on CUDA: Triton kernels that cut each row into blocks, and their launchers.

    scan      one program a block of a row: the softmax sums of l; the largest c, the sum of exp((c - top) / T)
    draw      one program a row: from its blocks' numbers, and a second look at a few tokens, to the token drawn
              greedy: the first block that holds the row's largest c names the token
              plain sampling: the block in which u falls, then the token in that block
              top-k <= 64: the scan also keeps the largest c of each group of tokens. In the order (c falling, id
              rising) the first k tokens lie in the first k groups, for a token outside them has k tokens before it.
    combine, sort, walk   the second path: top-p without top-k, and top-k > 64, need c in order beyond 64 places

With a plausibility constraint the maximum of l must come first: a scan of l alone, then one of both views that reads
only blocks which hold a plausible token. docs/contrastive.md counts the passes.

A block is the unit of summation and its size does not depend on the batch; blocks are added in the order of the
vocabulary and nothing is added by atomics. So a row's result is the same in any batch and on any device of one kind.
Products are rounded before they are subtracted (no fused multiply-add), as on the CPU: greedy tokens, plausible sets
and top-k sets are the CPU's; a sampled token is too, unless u falls within rounding (1e-6) of a boundary.

``m_`` masks; ``c`` and ``l`` as in contrastive.py. Every launcher is a plain function on tensors of one device: CUDA,
or CPU under Triton's interpreter (TRITON_INTERPRET=1).
"""

# Device kernels have no Python types.
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

import struct

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import contrastive, tiling
from .contrastive import ALL_MASKED, NOT_FINITE, inverse_temperature
from .contrastive_scan import combine, combine_tokens, law_of, padded, row_stride, row_top, scan, weights_of

_K = 64  # top-k up to here is sorted on chip
_WIDEST = 1 << 19  # a row's blocks are held by one program; wider vocabularies run the plain PyTorch kernel
# Numbers that change from step to step: a kernel for step 1 and one for steps divisible by 16 would be compiled in the
# middle of a run.
_COUNTS = ("step", "top_k", "top_p", "limit")

_NOT_FINITE = tl.constexpr(NOT_FINITE)
_ALL_MASKED = tl.constexpr(ALL_MASKED)
_LAST_ID = tl.constexpr(0x7FFFFFFF)


@triton.jit
def _first_of(c, k):
    """Which ``k`` of the c come first in the order (c falling, place rising); -0 equals 0."""
    bits = tl.where(c == 0, 0.0, c).to(tl.int32, bitcast=True)
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)  # integers in the order of the numbers
    # The k-th largest of them, from its sign down to its last bit.
    edge = tl.where(tl.sum((ordered >= 0).to(tl.int32), axis=0) >= k, 0, -2147483648)
    for n in range(31):
        higher = edge + (1 << (30 - n))
        edge = tl.where(tl.sum((ordered >= higher).to(tl.int32), axis=0) >= k, higher, edge)
    tied = (ordered == edge).to(tl.int32)
    room = k - tl.sum((ordered > edge).to(tl.int32), axis=0)
    return (ordered > edge) | ((tied > 0) & (tl.cumsum(tied, axis=0) <= room))


@triton.jit
def _pack(numbers, m, space, K: tl.constexpr):
    """The numbers under ``m``, K at most, side by side in their order; what stands behind them is left as it was."""
    tl.store(space + tl.cumsum(m.to(tl.int32), axis=0) - 1, numbers, mask=m)
    tl.debug_barrier()  # one program is one block of threads: after this each sees what the others stored
    packed = tl.load(space + tl.arange(0, K))
    tl.debug_barrier()
    return packed


@triton.jit
def _uniform(seeds, row, seed_stride, step):
    """contrastive.philox of one row: a multiple of 2^-53 in [0, 1), float64."""
    step = tl.cast(step, tl.int64)
    low = (step & 0xFFFFFFFF).to(tl.uint32)
    x0, x1, _, _ = tl.philox(tl.load(seeds + row * seed_stride), low, (step >> 32).to(tl.uint32), low * 0, low * 0)
    return ((x0 >> 5).to(tl.int64) * 67108864 + (x1 >> 6).to(tl.int64)).to(tl.float64) * 1.1102230246251565e-16


@triton.jit
def _invert(weights, target):
    """The first place at which the running sum passes ``target``; the last with a weight where rounding let none."""
    i = tl.arange(0, weights.shape[0])
    first = tl.min(tl.where(tl.cumsum(weights, axis=0) > target, i, weights.shape[0]), axis=0)
    return tl.minimum(first, tl.max(tl.where(weights > 0, i, 0), axis=0))


@triton.jit
def _log_norm(l_tops, l_sums, row, blocks, BLOCKS: tl.constexpr):
    """log sum exp(l) of a row; NaN where l holds NaN or +inf."""
    i = tl.arange(0, BLOCKS)
    tops = tl.load(l_tops + row * blocks + i, mask=i < blocks, other=float("-inf"))
    sums = tl.load(l_sums + row * blocks + i, mask=i < blocks, other=0.0)
    top = tl.max(tops, axis=0)
    return top + tl.log(tl.sum(sums * weights_of(tops, top, 1.0), axis=0))


@triton.jit
def _finish(logits, row, token, logp, log_norm, failed, masked, tokens, logps, model_logps, status):
    """Writes a row's result."""
    wrong = failed | masked
    l = tl.load(logits + tl.where(wrong, 0, token)).to(tl.float32)
    tl.store(tokens + row, tl.where(wrong, -1, token).to(tl.int64))
    tl.store(logps + row, tl.where(wrong, float("nan"), logp))
    tl.store(model_logps + row, tl.where(wrong, float("nan"), l - log_norm))
    tl.store(status + row, tl.where(failed, _NOT_FINITE, tl.where(masked, _ALL_MASKED, 0)).to(tl.uint8))


@triton.jit(do_not_specialize=_COUNTS)
def _draw_kernel(
    logits, contrast, seeds, l_tops, l_sums, c_tops, c_sums, c_firsts, group_tops, space,
    tokens, logps, model_logps, status,
    V, blocks, groups, logits_stride, contrast_stride, seed_stride, step,
    plus, alpha, log_plausibility, scale, top_k, top_p,
    GREEDY: tl.constexpr, FLOOR: tl.constexpr, BLOCK: tl.constexpr, BLOCKS: tl.constexpr, GROUP: tl.constexpr,
    GROUPS: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    """One row: greedy, plain sampling, or, with group_tops, top-k and then top-p. top_p: the bits of a float64."""
    row = tl.program_id(0).to(tl.int64)
    logits += row * logits_stride
    if contrast is not None:
        contrast += row * contrast_stride
    i = tl.arange(0, BLOCKS)
    block_tops = tl.load(c_tops + row * blocks + i, mask=i < blocks, other=float("-inf"))
    firsts = tl.load(c_firsts + row * blocks + i, mask=i < blocks, other=_LAST_ID)
    log_norm = _log_norm(l_tops, l_sums, row, blocks, BLOCKS)
    failed = (log_norm != log_norm) | (tl.min(firsts, axis=0) < 0)
    top = tl.max(block_tops, axis=0)
    floor = float("-inf")
    if FLOOR:
        floor = row_top(l_tops, row, blocks, BLOCKS) + log_plausibility
    if GREEDY:
        token = tl.min(tl.where(block_tops == top, firsts, _LAST_ID), axis=0)
        logp = 0.0
    else:
        u = _uniform(seeds, row, seed_stride, step)
        if group_tops is not None:
            g = tl.arange(0, GROUPS)
            tops = tl.load(group_tops + row * groups + g, mask=g < groups, other=float("-inf"))
            best = _pack(g, _first_of(tops, K), space + row * K, K)
            near = tl.reshape(best[:, None] * GROUP + tl.arange(0, GROUP)[None, :], (K * GROUP,))
            _, c, _ = combine_tokens(logits, contrast, near, V, floor, plus, alpha)
            ids = _pack(near, _first_of(c, top_k), space + row * K, K)
            k = tl.arange(0, K)
            _, c, _ = combine_tokens(logits, contrast, tl.where(k < top_k, ids, V), V, floor, plus, alpha)
            weights = weights_of(c, top, scale).to(tl.float64)
            # The k lie by id. c falling, id rising: who stands before whom, and how much weight before each.
            before = (c[None, :] > c[:, None]) | ((c[None, :] == c[:, None]) & (k[None, :] < k[:, None]))
            rank = tl.sum(before.to(tl.int32), axis=1)
            above = tl.sum(tl.where(before, weights[None, :], 0.0), axis=1)
            share = tl.cast(top_p, tl.int64).to(tl.float64, bitcast=True)
            cut = tl.where(share == 1, float("inf"), share * tl.sum(weights, axis=0))
            m_kept = (weights > 0) & (above < cut)
            total = tl.sum(tl.where(m_kept, weights, 0.0), axis=0)
            hit = tl.min(tl.where(m_kept & (above + weights > u * total), rank, K), axis=0)
            place = tl.minimum(hit, tl.max(tl.where(m_kept, rank, 0), axis=0))
            token = tl.sum(tl.where(rank == place, ids, 0), axis=0)
            chosen_c = tl.sum(tl.where(rank == place, c, 0.0), axis=0)
        else:
            masses = tl.load(c_sums + row * blocks + i, mask=i < blocks, other=0.0).to(tl.float64)
            masses *= weights_of(block_tops, top, scale)
            total = tl.sum(masses, axis=0)
            chosen = _invert(masses, u * total)
            rest = u * total - tl.sum(tl.where(i < chosen, masses, 0.0), axis=0)
            inside = tl.arange(0, BLOCK)
            _, c, _ = combine_tokens(logits, contrast, chosen * BLOCK + inside, V, floor, plus, alpha)
            place = _invert(weights_of(c, top, scale).to(tl.float64), rest)
            token = chosen * BLOCK + place
            chosen_c = tl.sum(tl.where(inside == place, c, 0.0), axis=0)
        # Of a row without a law these name nothing; its status is written instead.
        logp = (chosen_c - top) * scale - tl.log(total.to(tl.float32))
    _finish(logits, row, token, logp, log_norm, failed, top == float("-inf"), tokens, logps, model_logps, status)


@triton.jit(do_not_specialize=_COUNTS)
def _walk_kernel(
    logits, values, ids, seeds, l_tops, l_sums, c_firsts, tokens, logps, model_logps, status,
    V, blocks, logits_stride, seed_stride, step, scale, limit, top_p, BLOCK: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """One row whose c lie in order: the mass of the first ``limit``, then top-p's cut, then the draw. Each walk ends
    as soon as it can: behind a weight of 0 there are no others."""
    row = tl.program_id(0).to(tl.int64)
    values += row * V
    i = tl.arange(0, BLOCKS)
    firsts = tl.load(c_firsts + row * blocks + i, mask=i < blocks, other=_LAST_ID)
    log_norm = _log_norm(l_tops, l_sums, row, blocks, BLOCKS)
    failed = (log_norm != log_norm) | (tl.min(firsts, axis=0) < 0)
    top = tl.load(values)
    end = tl.where(failed, 0, limit)
    j = tl.arange(0, BLOCK)

    total = tl.cast(0.0, tl.float64)
    least = tl.cast(1.0, tl.float32)
    begin = tl.cast(0, tl.int32)
    while (begin < end) & (least > 0):
        weights = weights_of(tl.load(values + begin + j, mask=begin + j < end, other=float("-inf")), top, scale)
        total += tl.sum(weights.to(tl.float64), axis=0)
        least = tl.min(weights, axis=0)
        begin += BLOCK

    share = tl.cast(top_p, tl.int64).to(tl.float64, bitcast=True)
    cut = tl.where(share == 1, float("inf"), share * total)
    above = tl.cast(0.0, tl.float64)
    mass = tl.cast(0.0, tl.float64)
    kept = tl.cast(0, tl.int32)
    least = tl.cast(1.0, tl.float32)
    begin = tl.cast(0, tl.int32)
    while (begin < end) & (least > 0) & (above < cut):
        weights = weights_of(tl.load(values + begin + j, mask=begin + j < end, other=float("-inf")), top, scale)
        least = tl.min(weights, axis=0)
        wide = weights.to(tl.float64)
        m_kept = (wide > 0) & (above + tl.cumsum(wide, axis=0) - wide < cut)
        kept += tl.sum(m_kept.to(tl.int32), axis=0)
        mass += tl.sum(tl.where(m_kept, wide, 0.0), axis=0)
        above += tl.sum(wide, axis=0)
        begin += BLOCK

    u = _uniform(seeds, row, seed_stride, step)
    above = tl.cast(0.0, tl.float64)
    place = tl.cast(_LAST_ID, tl.int32)
    begin = tl.cast(0, tl.int32)
    while (begin < kept) & (place == _LAST_ID):
        weights = weights_of(tl.load(values + begin + j, mask=begin + j < kept, other=float("-inf")), top, scale)
        wide = weights.to(tl.float64)
        m_hit = (begin + j < kept) & (above + tl.cumsum(wide, axis=0) > u * mass)
        place = tl.min(tl.where(m_hit, begin + j, _LAST_ID), axis=0)
        above += tl.sum(wide, axis=0)
        begin += BLOCK

    place = tl.maximum(tl.minimum(place, kept - 1), 0)
    token = place
    if ids is not None:
        token = tl.load(ids + row * V + place).to(tl.int32)
    logp = (tl.load(values + place) - top) * scale - tl.log(mass.to(tl.float32))
    logits += row * logits_stride
    _finish(logits, row, token, logp, log_norm, failed, top == float("-inf"), tokens, logps, model_logps, status)


def _bits(x: float) -> int:
    """A float64 as an integer: a float argument would reach the kernel as a float32."""
    bits: int = struct.unpack("<q", struct.pack("<d", x))[0]
    return bits


def contrastive_logits(logits: Tensor, contrast: Tensor, alpha: float, plausibility: float) -> Tensor:
    """contrastive.py's op; float64 and very wide rows take its plain form."""
    B, V = logits.shape
    if logits.dtype == torch.float64 or V > _WIDEST or B == 0:
        return contrastive._logits(logits, contrast, alpha, plausibility)
    law, tile = law_of(alpha, plausibility), tiling.ROW
    tops = scan(logits, None, law_of(0.0, 0.0), tile, 0.0, False).l_tops if law.floor else None
    return combine(logits, contrast, law, tops, tile)


def contrastive_sample(
    logits: Tensor,
    contrast: Tensor | None,
    seeds: Tensor,
    step: int,
    alpha: float,
    plausibility: float,
    temperature: float,
    top_k: int,
    top_p: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """contrastive.py's op; very wide rows take its plain form."""
    B, V = logits.shape
    if V > _WIDEST or B == 0:
        return contrastive._sample(
            logits, contrast, seeds, step, alpha, plausibility, temperature, top_k, top_p
        )  # fmt: skip
    law, tile = law_of(alpha, plausibility), tiling.ROW
    greedy = temperature == 0
    walks = not greedy and (top_k > _K or (top_k == 0 and top_p < 1))
    groups = not greedy and 0 < top_k <= _K
    scale = inverse_temperature(temperature)
    found = scan(logits, contrast, law, tile, 0.0 if greedy or groups or walks else scale, groups)
    blocks = found.l_tops.shape[1]

    tokens = torch.empty(B, dtype=torch.int64, device=logits.device)
    logps, model_logps = (torch.empty(B, dtype=torch.float32, device=logits.device) for _ in range(2))
    status = torch.empty(B, dtype=torch.uint8, device=logits.device)
    if walks:
        c = combine(logits, contrast, law, found.l_tops, tile)
        values, ids = c.add_(0.0).sort(dim=1, descending=True, stable=True)  # -0 + 0 = 0: the two tie
        _walk_kernel[(B,)](
            logits, values, ids, seeds, found.l_tops, found.l_sums, found.c_firsts, tokens, logps, model_logps, status,
            V, blocks, logits.stride(0), seeds.stride(0), step, scale, min(top_k or V, V), _bits(top_p),
            BLOCK=tile.block, BLOCKS=padded(blocks), num_warps=tile.draw_warps, enable_fp_fusion=False,
        )  # fmt: skip
        return tokens, logps, model_logps, status
    K = max(2, triton.next_power_of_2(top_k)) if groups else 2
    in_row = 1 if found.group_tops is None else found.group_tops.shape[1]
    space = torch.empty((B, K), dtype=torch.int32, device=logits.device) if groups else None
    _draw_kernel[(B,)](
        logits, contrast, seeds, *found, space, tokens, logps, model_logps, status,
        V, blocks, in_row, logits.stride(0), row_stride(contrast), seeds.stride(0), step,
        *law, scale, top_k, _bits(top_p),
        GREEDY=greedy, FLOOR=law.floor, BLOCK=tile.block, BLOCKS=padded(blocks), GROUP=tile.group,
        GROUPS=max(K, padded(in_row)), K=K, num_warps=tile.draw_warps, enable_fp_fusion=False,
    )  # fmt: skip
    return tokens, logps, model_logps, status
