"""Tile choices as committed data, per architecture: which form of a pass runs, and in which tiles.

NOT YET MEASURED. The tiles compile without spills and within the shared memory of their architecture
(tests/kernels/test_offline.py and test_attention_offline.py hold that); which is fastest, and from which H on the fused
form beats the library's product and an extra pass, is an estimate until it is timed on the hardware. docs/triton.md
says how it was made.
"""

from typing import NamedTuple

import torch


class ScoreTile(NamedTuple):
    """One tile of the fused product hidden @ weight.T with its epilogue."""

    rows: int  # of hidden
    columns: int  # of the vocabulary
    depth: int  # of H per step of the inner loop
    stages: int  # steps in flight
    warps: int
    parts: int  # pieces, along the columns, in which the epilogue works: fewer registers and less shared memory
    flatten: bool  # one loop over tiles and steps, so that loads of the next tile overlap the epilogue
    band: int = 8  # row tiles that walk the vocabulary together, so that the weight is read once per band


class PassTile(NamedTuple):
    """One block of the pass over logits that the library has multiplied."""

    rows: int
    columns: int
    warps: int


class RowTile(NamedTuple):
    """How contrastive decoding cuts a row of logits. The cut decides how sums are rounded: no choice by batch size."""

    block: int  # tokens of one program of a scan: 149 of them for one row of 152k tokens
    group: int  # tokens of which a scan keeps the largest, for top-k; with k = 64 the draw looks at 64 groups again
    warps: int  # of a scan
    draw_warps: int  # of the program that draws from one row


class AttentionTile(NamedTuple):
    """How one kernel of prefix_attention cuts its scores."""

    queries: int  # rows of a block of scores
    keys: int  # its columns
    stages: int  # blocks in flight
    warps: int


class AttentionTiles(NamedTuple):
    """The choices for heads of up to ``size`` numbers, one a kernel."""

    size: int
    forward: AttentionTile
    grad_query: AttentionTile
    grad_key: AttentionTile


class Tiles(NamedTuple):
    """The choices for one architecture: candidates, the one in use first."""

    descriptors: bool  # TMA tensor descriptors; plain pointers otherwise
    shared_memory: int  # bytes a block may use
    store: tuple[ScoreTile, ...]  # softmax_store
    sums: tuple[ScoreTile, ...]  # softmax_sums without a product
    capped: tuple[ScoreTile, ...]  # either, under a softcap: its epilogue needs more registers
    fused_store_until: int  # widest H at which a store runs fused; above it, library product and a pass


# Architecture (major * 10 + minor) -> its choices. Others run the library's product and a pass.
TILES: dict[int, Tiles] = {
    80: Tiles(
        descriptors=False,
        shared_memory=166_912,
        store=(ScoreTile(128, 128, 64, 4, 8, 1, False), ScoreTile(128, 128, 32, 5, 8, 1, False)),
        sums=(ScoreTile(128, 128, 64, 4, 8, 1, False),),
        capped=(ScoreTile(128, 128, 64, 4, 8, 1, False),),
        fused_store_until=2048,
    ),
    90: Tiles(
        descriptors=True,
        shared_memory=232_448,
        store=(
            ScoreTile(128, 256, 64, 3, 8, 1, False),
            ScoreTile(128, 256, 64, 4, 8, 2, False),
            ScoreTile(256, 128, 64, 3, 8, 1, False),
            ScoreTile(128, 128, 64, 4, 8, 1, True),
        ),
        sums=(ScoreTile(128, 256, 64, 3, 8, 1, False), ScoreTile(128, 256, 64, 4, 8, 1, False)),
        capped=(ScoreTile(128, 128, 64, 4, 8, 1, True),),
        fused_store_until=2048,
    ),
    100: Tiles(
        descriptors=True,
        shared_memory=232_448,
        store=(ScoreTile(128, 256, 64, 3, 8, 1, False), ScoreTile(128, 256, 64, 4, 8, 2, False)),
        sums=(ScoreTile(128, 256, 64, 4, 8, 1, False),),
        capped=(ScoreTile(128, 128, 64, 4, 8, 1, False),),
        fused_store_until=2048,
    ),
}
PASS = PassTile(rows=4, columns=1024, warps=4)
ROW = RowTile(block=1024, group=64, warps=4, draw_warps=8)

# Architecture -> choices for bfloat16 and float16, narrow heads first. Others run PyTorch's attention.
ATTENTION: dict[int, tuple[AttentionTiles, ...]] = {
    80: (
        AttentionTiles(64, AttentionTile(128, 128, 3, 8), AttentionTile(128, 64, 2, 8), AttentionTile(32, 128, 2, 8)),
        AttentionTiles(128, AttentionTile(128, 64, 3, 8), AttentionTile(64, 64, 2, 8), AttentionTile(32, 64, 2, 8)),
        AttentionTiles(256, AttentionTile(64, 64, 2, 8), AttentionTile(64, 32, 2, 8), AttentionTile(32, 32, 2, 8)),
    ),
    90: (
        AttentionTiles(64, AttentionTile(128, 128, 3, 8), AttentionTile(128, 64, 2, 8), AttentionTile(64, 128, 2, 8)),
        AttentionTiles(128, AttentionTile(128, 64, 3, 8), AttentionTile(128, 64, 2, 8), AttentionTile(32, 128, 2, 8)),
        AttentionTiles(256, AttentionTile(128, 32, 2, 8), AttentionTile(64, 16, 2, 8), AttentionTile(32, 32, 2, 8)),
    ),
    100: (
        AttentionTiles(64, AttentionTile(128, 64, 3, 4), AttentionTile(128, 64, 2, 8), AttentionTile(64, 64, 2, 8)),
        AttentionTiles(128, AttentionTile(128, 64, 3, 8), AttentionTile(64, 64, 2, 8), AttentionTile(64, 64, 2, 8)),
        AttentionTiles(256, AttentionTile(64, 32, 2, 8), AttentionTile(64, 32, 1, 8), AttentionTile(32, 32, 2, 8)),
    ),
}

LOGIT_BYTES = 32 << 20  # float32 logits between the library's product and the pass: within an H200's L2 cache
ROW_MULTIPLE = 128  # row chunks are multiples of this where the workspace allows


class Route(NamedTuple):
    """How a pass runs: fused in ``tile``, or, where that is None, as the library's product and a pass."""

    tile: ScoreTile | None
    descriptors: bool
    programs: int  # blocks of the persistent grid


LIBRARY = Route(None, False, 0)


def route(device: torch.device, dtype: torch.dtype, H: int, tile: torch.dtype | None, softcap: float) -> Route:
    """The committed choice for inputs of ``dtype`` and a tile of dtype ``tile``, None = sums alone.

    float32 goes to the library: in full precision Triton's product uses no matrix units, and a float32 tile does not
    fit beside the operands in shared memory.
    """
    store = tile is not None
    if device.type != "cuda" or torch.version.hip is not None or torch.float32 in (dtype, tile):
        return LIBRARY
    properties = torch.cuda.get_device_properties(device)
    tiles = TILES.get(properties.major * 10 + properties.minor)
    if tiles is None or (store and tiles.fused_store_until < H):
        return LIBRARY
    candidates = tiles.capped if softcap > 0 else tiles.store if store else tiles.sums
    return Route(candidates[0], tiles.descriptors, properties.multi_processor_count)


def attention(device: torch.device, dtype: torch.dtype, size: int) -> AttentionTiles | None:
    """The committed choice for heads of ``size`` numbers; None where prefix_attention has no kernels of its own.

    float32 has none: its products in full precision spill registers in all but the smallest tiles.
    """
    if device.type != "cuda" or torch.version.hip is not None or dtype not in (torch.bfloat16, torch.float16):
        return None
    properties = torch.cuda.get_device_properties(device)
    choices = ATTENTION.get(properties.major * 10 + properties.minor, ())
    return next((tiles for tiles in choices if size <= tiles.size), None)
