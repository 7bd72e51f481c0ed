"""The first half of contrastive_triton.py: what one block of a row leaves, and c itself where a path must write it.

    scan      one program a block of a row: the softmax sums of l; the largest c, the sum of exp((c - top) / T), and,
              where asked, the largest c of each group of tokens
    combine   one program a block of a row: c, written

With a plausibility constraint the maximum of l must come first: a scan of l alone, then one of both views that reads
only blocks which hold a plausible token. ``m_`` masks; ``c`` and ``l`` as in contrastive.py.
"""

# Device kernels have no Python types.
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import tiling

_LAST_ID = tl.constexpr(0x7FFFFFFF)


@triton.jit
def combine_tokens(logits, contrast, tokens, V, floor, plus, alpha):
    """l and c of some tokens of a row in float32, and where a number is not finite that must be."""
    m = tokens < V
    l = tl.load(logits + tokens, mask=m, other=float("-inf")).to(tl.float32)
    masked = (l == float("-inf")) | (l < floor)
    wrong = (l < float("inf")) == 0
    c = l
    if contrast is not None:
        other = tl.load(contrast + tokens, mask=m, other=0.0).to(tl.float32)
        masked = masked | (other == float("-inf"))
        c = l * plus - other * alpha
        number = (other < float("inf")) & (c < float("inf"))
        wrong = wrong | ((masked == 0) & (number == 0))
    return l, tl.where(masked, float("-inf"), c), wrong


@triton.jit
def weights_of(c, top, scale):
    """exp((c - top) scale), 0 where c or top is -inf."""
    return tl.exp((c - tl.where(top > float("-inf"), top, 0.0)) * scale)


@triton.jit
def _largest(values):
    """The largest number; NaN where there are none but NaN is left out."""
    return tl.max(tl.where(values == values, values, float("-inf")), axis=0)


@triton.jit
def row_top(tops, row, blocks, BLOCKS: tl.constexpr):
    i = tl.arange(0, BLOCKS)
    return tl.max(tl.load(tops + row * blocks + i, mask=i < blocks, other=float("-inf")), axis=0)


@triton.jit
def _scan_kernel(
    logits, contrast, l_tops, l_sums, c_tops, c_sums, c_firsts, group_tops,
    V, blocks, groups, logits_stride, contrast_stride, plus, alpha, log_plausibility, scale,
    FLOOR: tl.constexpr, MASS: tl.constexpr, BLOCK: tl.constexpr, BLOCKS: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """One block of a row. FLOOR: l_tops are known, and c is made under the plausibility constraint; else they are
    written. c_firsts: the first token with the block's largest c, -1 where a number is not finite."""
    row = (tl.program_id(0) // blocks).to(tl.int64)
    block = tl.program_id(0) % blocks
    at = row * blocks + block
    logits += row * logits_stride
    if contrast is not None:
        contrast += row * contrast_stride
    tokens = block * BLOCK + tl.arange(0, BLOCK)
    floor = float("-inf")
    end = V
    if FLOOR:
        floor = row_top(l_tops, row, blocks, BLOCKS) + log_plausibility
        end = tl.where(tl.load(l_tops + at) < floor, 0, V)  # nothing plausible here: nothing is read
    l, c, wrong = combine_tokens(logits, contrast, tokens, end, floor, plus, alpha)
    if not FLOOR:
        l_top = _largest(l)
        tl.store(l_tops + at, l_top)
        tl.store(l_sums + at, tl.sum(weights_of(l, l_top, 1.0), axis=0))  # NaN where l holds NaN or +inf
    if c_tops is not None:
        c_top = _largest(c)
        first = tl.min(tl.where(c == c_top, tokens, _LAST_ID), axis=0)
        tl.store(c_tops + at, c_top)
        tl.store(c_firsts + at, tl.where(tl.max(wrong.to(tl.int32), axis=0) > 0, -1, first))
        if MASS:
            tl.store(c_sums + at, tl.sum(weights_of(c, c_top, scale), axis=0))
        if group_tops is not None:
            tops = tl.max(tl.reshape(c, (BLOCK // GROUP, GROUP)), axis=1)
            tl.store(group_tops + row * groups + block * (BLOCK // GROUP) + tl.arange(0, BLOCK // GROUP), tops)


@triton.jit
def _combine_kernel(
    logits, contrast, l_tops, out, V, blocks, logits_stride, contrast_stride, plus, alpha, log_plausibility,
    FLOOR: tl.constexpr, BLOCK: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """c of one block of a row, written."""
    row = (tl.program_id(0) // blocks).to(tl.int64)
    tokens = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    logits += row * logits_stride
    if contrast is not None:
        contrast += row * contrast_stride
    floor = float("-inf")
    if FLOOR:
        floor = row_top(l_tops, row, blocks, BLOCKS) + log_plausibility
    _, c, _ = combine_tokens(logits, contrast, tokens, V, floor, plus, alpha)
    tl.store(out + row * V + tokens, c, mask=tokens < V)


class Law(NamedTuple):
    """The numbers of contrastive_sample as the kernels take them."""

    plus: float  # 1 + alpha
    alpha: float
    log_plausibility: float  # -inf = no constraint

    @property
    def floor(self) -> bool:
        return self.log_plausibility > -math.inf


def law_of(alpha: float, plausibility: float) -> Law:
    return Law(1 + alpha, alpha, math.log(plausibility) if plausibility > 0 else -math.inf)


class Blocks(NamedTuple):
    """What the scan leaves of every block of every row."""

    l_tops: Tensor  # (B, blocks) float32
    l_sums: Tensor  # (B, blocks) float32, of exp(l - top)
    c_tops: Tensor  # (B, blocks) float32
    c_sums: Tensor  # (B, blocks) float32, of exp((c - top) / temperature); unwritten where nobody asked
    c_firsts: Tensor  # (B, blocks) int32, the first token with the block's largest c; -1: a number is not finite
    group_tops: Tensor | None  # (B, groups) float32, for top-k


def row_stride(x: Tensor | None) -> int:
    return 0 if x is None else x.stride(0)


def padded(blocks: int) -> int:
    """A count as the kernels hold it: a power of two."""
    return max(2, int(triton.next_power_of_2(blocks)))


def scan(logits: Tensor, contrast: Tensor | None, law: Law, tile: tiling.RowTile, scale: float, groups: bool) -> Blocks:
    """The numbers of all blocks. scale: 1 / temperature, 0 where the sums of c are not wanted."""
    B, V = logits.shape
    blocks = triton.cdiv(V, tile.block)
    l_tops, l_sums, c_tops, c_sums = torch.empty((4, B, blocks), dtype=torch.float32, device=logits.device).unbind()
    firsts = torch.empty((B, blocks), dtype=torch.int32, device=logits.device)
    in_row = blocks * tile.block // tile.group
    tops = torch.empty((B, in_row), dtype=torch.float32, device=logits.device) if groups else None
    found = Blocks(l_tops, l_sums, c_tops, c_sums, firsts, tops)

    def launch(other: Tensor | None, of_c: tuple[Tensor | None, ...], floor: bool) -> None:
        _scan_kernel[(B * blocks,)](
            logits, other, l_tops, l_sums, *of_c,
            V, blocks, in_row, logits.stride(0), row_stride(other), *law, scale,
            FLOOR=floor, MASS=scale > 0, BLOCK=tile.block, BLOCKS=padded(blocks), GROUP=tile.group,
            num_warps=tile.warps, enable_fp_fusion=False,
        )  # fmt: skip

    if law.floor:
        launch(None, (None, None, None, None), False)
    launch(contrast, (c_tops, c_sums, firsts, tops), law.floor)
    return found


def combine(logits: Tensor, contrast: Tensor | None, law: Law, l_tops: Tensor | None, tile: tiling.RowTile) -> Tensor:
    """c (B, V) float32; l_tops as the scan leaves them, under a plausibility constraint."""
    B, V = logits.shape
    blocks = triton.cdiv(V, tile.block)
    c = torch.empty((B, V), dtype=torch.float32, device=logits.device)
    _combine_kernel[(B * blocks,)](
        logits, contrast, l_tops, c, V, blocks, logits.stride(0), row_stride(contrast), *law,
        FLOOR=law.floor, BLOCK=tile.block, BLOCKS=padded(blocks), num_warps=tile.warps, enable_fp_fusion=False,
    )  # fmt: skip
    return c
