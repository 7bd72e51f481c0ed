"""Triton kernels of the passes over the vocabulary, and their launchers.

The equations are those of vocab_passes.py. With z the logits of a row and ``reference`` its target's logit, a tile of
``columns`` columns makes

    shift_j = max of z over the tile where it passes the reference by more than GUARD, else the reference
    E_j = exp(z - shift_j) d, 0 at the target's column        s_j = row sums of exp(z - shift_j), target left out

and writes E_j (when asked) and the pair (shift_j, s_j): no tile waits for another, none can overflow, and nothing is
added by atomics. A second kernel reduces a row's pairs in the order of the vocabulary,

    shift = max_j shift_j        s = sum_j s_j exp(shift_j - shift)

and a third multiplies the stored tiles whose shift_j is not the row's with exp(shift_j - shift); for a row no logit of
which passes its target's by GUARD, the common case, it returns after reading the shifts.

Letters: n rows of hidden, H, V; ``m_`` masks. Every launcher is a plain function on tensors of one device: CUDA, or
CPU under Triton's interpreter (TRITON_INTERPRET=1).
"""

# Device kernels have no Python types.
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from .tiling import PassTile, ScoreTile
from .vocab_passes import GUARD

# A block of this looks at once whether a row was raised: one for every part would be 64,000 of them that do nothing.
_RESCALE_ROWS, _RESCALE_PARTS = 16, 64
# Arguments that change from batch to batch and help no address: a kernel for n = 1 and one for n divisible by 16
# would be compiled in the middle of a run.
_COUNTS = ("n", "parts", "first_part")


@triton.jit
def _exponentials(
    raw, rows, columns, bias, targets, reference, n, V, logit_scale, softcap, guard, SOFTCAP: tl.constexpr
):
    """E * d of a tile of raw = hidden @ weight.T, and its rows' sums and shifts."""
    if bias is not None:
        raw += tl.load(bias + columns, mask=columns < V, other=0.0).to(tl.float32)[None, :]
    z = raw * logit_scale
    if SOFTCAP:
        # softcap * tanh(z / softcap) without a library call, so that the interpreter runs it too.
        z = softcap - 2.0 * softcap / (1.0 + tl.exp(z * (2.0 / softcap)))
    m_rows = rows < n
    target = tl.load(targets + rows, mask=m_rows, other=-1).to(tl.int32)
    ref = tl.load(reference + rows, mask=m_rows, other=0.0)
    z = tl.where((columns[None, :] < V) & (columns[None, :] != target[:, None]), z, float("-inf"))
    top = tl.max(z, axis=1)
    shift = tl.where(top - ref > guard, top, ref)
    e = tl.exp(z - shift[:, None])
    sums = tl.sum(e, axis=1)
    # The slope is made from z again, late: carried along it would cost as many registers as the tile.
    if SOFTCAP:
        t = tl.maximum(z / softcap, -1.0)
        e *= logit_scale * (1.0 - t * t)
    else:
        e *= logit_scale
    return e, sums, shift


@triton.jit
def _finish_part(
    raw, row_start, column_start, part, tile, bias, targets, reference, sums, shifts,
    n, V, parts, tile_stride, logit_scale, softcap, guard,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, SOFTCAP: tl.constexpr, DESCRIPTORS: tl.constexpr,
):  # fmt: skip
    """Epilogue of one part of the vocabulary: its pair (shift, sums), and its tile where one is kept."""
    rows = row_start + tl.arange(0, ROWS)
    columns = column_start + tl.arange(0, COLUMNS)
    e, s, shift = _exponentials(
        raw, rows, columns, bias, targets, reference, n, V, logit_scale, softcap, guard, SOFTCAP
    )
    m_rows = rows < n
    pair = rows.to(tl.int64) * parts + part
    tl.store(sums + pair, s, mask=m_rows)
    tl.store(shifts + pair, shift, mask=m_rows)
    if tile is not None:
        if DESCRIPTORS:
            tile.store([row_start, column_start], e.to(tile.dtype))
        else:
            corner = tile + tl.cast(row_start, tl.int64) * tile_stride + column_start
            at = corner + tl.arange(0, ROWS)[:, None] * tile_stride + tl.arange(0, COLUMNS)[None, :]
            tl.store(at, e.to(tile.dtype.element_ty), mask=m_rows[:, None] & (columns < V)[None, :])


@triton.jit(do_not_specialize=_COUNTS)
def _score_kernel(
    hidden, weight, tile, bias, targets, reference, sums, shifts,
    n, H, V, parts, hidden_stride, weight_stride, tile_stride, logit_scale, softcap, guard,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, PARTS: tl.constexpr, BAND: tl.constexpr,
    FLATTEN: tl.constexpr, SOFTCAP: tl.constexpr, DESCRIPTORS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A persistent product hidden @ weight.T whose tiles end in the epilogue; hidden, weight and tile are TMA
    descriptors or pointers."""
    row_tiles = tl.cdiv(n, ROWS)
    column_tiles = tl.cdiv(V, COLUMNS)
    for i in tl.range(tl.program_id(0), row_tiles * column_tiles, tl.num_programs(0), flatten=FLATTEN):
        first = i // (BAND * column_tiles) * BAND
        height = min(row_tiles - first, BAND)
        inside = i % (BAND * column_tiles)
        row_start = (first + inside % height) * ROWS
        column_start = inside // height * COLUMNS
        acc = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
        if not DESCRIPTORS:
            # Rows and columns beyond the edge read the tile's first ones again; the epilogue leaves them out. 64-bit
            # offsets of the tile's corner, 32-bit ones inside it.
            a_rows = tl.arange(0, ROWS)
            b_rows = tl.arange(0, COLUMNS)
            a_rows = tl.where(row_start + a_rows < n, a_rows, 0)
            b_rows = tl.where(column_start + b_rows < V, b_rows, 0)
            depth = tl.arange(0, DEPTH)
            a_at = hidden + tl.cast(row_start, tl.int64) * hidden_stride
            b_at = weight + tl.cast(column_start, tl.int64) * weight_stride
            a_at += a_rows[:, None] * hidden_stride + depth[None, :]
            b_at += b_rows[None, :] * weight_stride + depth[:, None]
        for k in range(0, H, DEPTH):
            if DESCRIPTORS:
                a = hidden.load([row_start, k])
                b = weight.load([column_start, k]).T
            else:
                a = tl.load(a_at + k, mask=(depth < H - k)[None, :], other=0.0)
                b = tl.load(b_at + k, mask=(depth < H - k)[:, None], other=0.0)
            acc = tl.dot(a, b, acc, input_precision=PRECISION)
        part = column_start // COLUMNS * PARTS
        if PARTS == 2:
            left, right = acc.reshape(ROWS, 2, COLUMNS // 2).permute(0, 2, 1).split()
            _finish_part(
                left, row_start, column_start, part, tile, bias, targets, reference, sums, shifts,
                n, V, parts, tile_stride, logit_scale, softcap, guard, ROWS, COLUMNS // 2, SOFTCAP, DESCRIPTORS,
            )  # fmt: skip
            _finish_part(
                right, row_start, column_start + COLUMNS // 2, part + 1, tile, bias, targets, reference, sums, shifts,
                n, V, parts, tile_stride, logit_scale, softcap, guard, ROWS, COLUMNS // 2, SOFTCAP, DESCRIPTORS,
            )  # fmt: skip
        else:
            _finish_part(
                acc, row_start, column_start, part, tile, bias, targets, reference, sums, shifts,
                n, V, parts, tile_stride, logit_scale, softcap, guard, ROWS, COLUMNS, SOFTCAP, DESCRIPTORS,
            )  # fmt: skip


@triton.jit(do_not_specialize=_COUNTS)
def _pass_kernel(
    raw, tile, bias, targets, reference, sums, shifts,
    n, V, parts, first_part, raw_stride, tile_stride, logit_scale, softcap, guard,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, SOFTCAP: tl.constexpr,
):  # fmt: skip
    """The epilogue on float32 logits that the library has multiplied; raw starts at column first_part * COLUMNS."""
    row_start = tl.program_id(0) * ROWS
    part = first_part + tl.program_id(1)
    rows = row_start + tl.arange(0, ROWS)
    columns = tl.arange(0, COLUMNS)
    at = raw + rows.to(tl.int64)[:, None] * raw_stride + tl.program_id(1) * COLUMNS + columns[None, :]
    mask = (rows < n)[:, None] & (part * COLUMNS + columns < V)[None, :]
    z = tl.load(at, mask=mask, other=0.0)
    _finish_part(
        z, row_start, part * COLUMNS, part, tile, bias, targets, reference, sums, shifts,
        n, V, parts, tile_stride, logit_scale, softcap, guard, ROWS, COLUMNS, SOFTCAP, False,
    )  # fmt: skip


@triton.jit(do_not_specialize=_COUNTS)
def _reduce_kernel(part_sums, part_shifts, sums, shifts, parts, BLOCK: tl.constexpr):
    """One row's shift and sum from its parts, in the order of the vocabulary whatever the grid was."""
    row = tl.program_id(0)
    start = row.to(tl.int64) * parts
    tops = tl.full((BLOCK,), float("-inf"), dtype=tl.float32)
    for first in range(0, parts, BLOCK):
        i = first + tl.arange(0, BLOCK)
        tops = tl.maximum(tops, tl.load(part_shifts + start + i, mask=i < parts, other=float("-inf")))
    shift = tl.max(tops, axis=0)
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    for first in range(0, parts, BLOCK):
        i = first + tl.arange(0, BLOCK)
        part_shift = tl.load(part_shifts + start + i, mask=i < parts, other=float("-inf"))
        total += tl.load(part_sums + start + i, mask=i < parts, other=0.0) * tl.exp(part_shift - shift)
    tl.store(shifts + row, shift)
    tl.store(sums + row, tl.sum(total, axis=0))


@triton.jit(do_not_specialize=_COUNTS)
def _rescale_kernel(
    tile, part_shifts, shifts, n, V, parts, tile_stride,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """Parts of the stored tile brought to their row's shift; nothing else is read or written where all stand there."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    m_rows = rows < n
    shift = tl.load(shifts + rows, mask=m_rows, other=0.0)
    row_shifts = part_shifts + rows.to(tl.int64) * parts
    first = tl.program_id(1) * PARTS
    seen = first + tl.arange(0, PARTS)
    m_seen = m_rows[:, None] & (seen < parts)[None, :]
    gaps = tl.load(row_shifts[:, None] + seen[None, :], mask=m_seen, other=float("inf")) - shift[:, None]
    if tl.min(tl.min(gaps, axis=1), axis=0) < 0:
        for part in range(first, min(first + PARTS, parts)):
            gap = tl.load(row_shifts + part, mask=m_rows, other=0.0) - shift
            if tl.min(gap, axis=0) < 0:
                columns = part * COLUMNS + tl.arange(0, COLUMNS)
                at = tile + rows.to(tl.int64)[:, None] * tile_stride + columns[None, :]
                mask = (m_rows & (gap < 0))[:, None] & (columns < V)[None, :]
                e = tl.load(at, mask=mask, other=0.0).to(tl.float32) * tl.exp(gap)[:, None]
                tl.store(at, e.to(tile.dtype.element_ty), mask=mask)


class Rows(NamedTuple):
    """What the passes need of n rows beside their hidden states."""

    bias: Tensor | None  # (V,)
    targets: Tensor  # (n,) int64, the column left out of a row
    reference: Tensor  # (n,) float32
    logit_scale: float
    softcap: float  # 0.0 = none


class Pairs(NamedTuple):
    """(shift_j, s_j) of every row and part of the vocabulary, float32."""

    sums: Tensor  # (n, parts)
    shifts: Tensor  # (n, parts)
    columns: int  # of a part


def empty_pairs(n: int, parts: int, columns: int, device: torch.device) -> Pairs:
    sums, shifts = (torch.empty((n, parts), dtype=torch.float32, device=device) for _ in range(2))
    return Pairs(sums, shifts, columns)


def has_descriptors(matrix: Tensor) -> bool:
    """Whether TMA can address a matrix: 16-byte aligned rows, that do not overlap, of adjacent elements."""
    stride = matrix.stride(0) * matrix.element_size()
    return matrix.stride(1) == 1 and stride > 0 and stride % 16 == 0 and matrix.data_ptr() % 16 == 0


def score(
    hidden: Tensor, weight: Tensor, rows: Rows, tile: Tensor | None, config: ScoreTile, descriptors: bool, programs: int
) -> Pairs:
    """Fused product and epilogue: hidden (n, H), weight (V, H), rows of adjacent elements. Fills ``tile`` (n, V) part
    by part, each relative to its own shift: ``reduce`` brings them together. programs: blocks of the persistent grid.
    """
    (n, H), V = hidden.shape, weight.shape[0]
    width = config.columns // config.parts
    # Every part of a tile counts, also one that lies beyond the vocabulary: its sum is 0.
    pairs = empty_pairs(n, triton.cdiv(V, config.columns) * config.parts, width, hidden.device)
    operands: list[Tensor | TensorDescriptor | None] = [hidden, weight, tile]
    if descriptors:
        blocks = [config.rows, config.depth], [config.columns, config.depth], [config.rows, width]
        operands = [
            None if matrix is None else TensorDescriptor(matrix, list(matrix.shape), list(matrix.stride()), block)
            for matrix, block in zip((hidden, weight, tile), blocks, strict=True)
        ]
    grid = (min(programs, triton.cdiv(n, config.rows) * triton.cdiv(V, config.columns)),)
    _score_kernel[grid](
        *operands, rows.bias, rows.targets, rows.reference, pairs.sums, pairs.shifts,
        n, H, V, pairs.sums.shape[1], hidden.stride(0), weight.stride(0), 0 if tile is None else tile.stride(0),
        rows.logit_scale, rows.softcap, GUARD,
        ROWS=config.rows, COLUMNS=config.columns, DEPTH=config.depth, PARTS=config.parts, BAND=config.band,
        FLATTEN=config.flatten, SOFTCAP=rows.softcap > 0, DESCRIPTORS=descriptors, PRECISION="ieee",
        num_warps=config.warps, num_stages=config.stages, enable_fp_fusion=True,
    )  # fmt: skip
    return pairs


def exponentiate(
    raw: Tensor, first: int, V: int, rows: Rows, tile: Tensor | None, pairs: Pairs, block: PassTile
) -> None:
    """The epilogue alone, on raw (n, m) = float32 hidden @ weight[first : first + m].T; raw may be a part of tile."""
    n, columns = raw.shape
    grid = (triton.cdiv(n, block.rows), triton.cdiv(columns, block.columns))
    _pass_kernel[grid](
        raw, tile, rows.bias, rows.targets, rows.reference, pairs.sums, pairs.shifts,
        n, V, pairs.sums.shape[1], first // block.columns, raw.stride(0), 0 if tile is None else tile.stride(0),
        rows.logit_scale, rows.softcap, GUARD,
        ROWS=block.rows, COLUMNS=block.columns, SOFTCAP=rows.softcap > 0, num_warps=block.warps, enable_fp_fusion=True,
    )  # fmt: skip


def reduce(pairs: Pairs, tile: Tensor | None) -> tuple[Tensor, Tensor]:
    """(shift, sums) of the rows, (n,) each; brings the parts of ``tile`` to their row's shift."""
    n, parts = pairs.sums.shape
    sums, shifts = (torch.empty(n, dtype=torch.float32, device=pairs.sums.device) for _ in range(2))
    _reduce_kernel[(n,)](pairs.sums, pairs.shifts, sums, shifts, parts, BLOCK=1024, num_warps=4, enable_fp_fusion=True)
    if tile is not None:
        _rescale_kernel[(triton.cdiv(n, _RESCALE_ROWS), triton.cdiv(parts, _RESCALE_PARTS))](
            tile, pairs.shifts, shifts, n, tile.shape[1], parts, tile.stride(0),
            ROWS=_RESCALE_ROWS, COLUMNS=pairs.columns, PARTS=_RESCALE_PARTS, num_warps=8, enable_fp_fusion=True,
        )  # fmt: skip
    return shifts, sums
