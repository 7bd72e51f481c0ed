"""Tile choices as committed data, per architecture: which form of a pass runs, and in which tiles.

NOT YET MEASURED. The tiles compile without spills and within the shared memory of their architecture
(tests/kernels/test_offline.py holds that); which is fastest, and from which H on the fused form beats the library's
product and an extra pass, is an estimate until it is timed on the hardware. docs/triton.md says how it was made.
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


class Tiles(NamedTuple):
    """The choices for one architecture."""

    descriptors: bool  # TMA tensor descriptors; plain pointers otherwise
    shared_memory: int  # bytes a block may use
    store: tuple[ScoreTile, ...]  # candidates of softmax_store, the one in use first
    sums: tuple[ScoreTile, ...]  # candidates of softmax_sums without a product
    fused_store_until: int  # widest H at which softmax_store runs fused; above, library product and a pass


# Architecture (major * 10 + minor) -> its choices. Others run the library's product and a pass.
TILES: dict[int, Tiles] = {
    80: Tiles(
        descriptors=False,
        shared_memory=166_912,
        store=(ScoreTile(128, 256, 32, 3, 8, 1, False), ScoreTile(128, 128, 32, 4, 4, 1, False)),
        sums=(ScoreTile(128, 256, 32, 3, 8, 1, False),),
        fused_store_until=2048,
    ),
    90: Tiles(
        descriptors=True,
        shared_memory=232_448,
        store=(
            ScoreTile(128, 256, 64, 3, 8, 1, False),
            ScoreTile(128, 256, 64, 4, 8, 2, False),
            ScoreTile(128, 128, 64, 4, 8, 1, True),
        ),
        sums=(ScoreTile(128, 256, 64, 4, 8, 1, False), ScoreTile(256, 128, 64, 4, 8, 1, False)),
        fused_store_until=2048,
    ),
    100: Tiles(
        descriptors=True,
        shared_memory=232_448,
        store=(ScoreTile(128, 256, 64, 3, 8, 1, False), ScoreTile(128, 128, 64, 4, 4, 1, False)),
        sums=(ScoreTile(128, 256, 64, 4, 8, 1, False),),
        fused_store_until=2048,
    ),
}
PASS = PassTile(rows=4, columns=1024, warps=4)

# Columns of the vocabulary whose float32 logits are held between the library's product and the pass over them.
LOGIT_BYTES = 32 << 20
# Row chunks are multiples of this where the workspace allows.
ROW_MULTIPLE = 128


def architecture(device: torch.device) -> int:
    """major * 10 + minor of a CUDA device; 0 for any other."""
    if device.type != "cuda" or torch.version.hip is not None:
        return 0
    major, minor = torch.cuda.get_device_capability(device)
    return major * 10 + minor


def score_tile(arch: int, dtype: torch.dtype, H: int, store: bool) -> ScoreTile | None:
    """The tile in which the fused form runs, or None for the library's product and a pass.

    float32 goes to the library: its product in Triton does not use the matrix units in full precision.
    """
    tiles = TILES.get(arch)
    if tiles is None or dtype not in (torch.bfloat16, torch.float16) or (store and tiles.fused_store_until < H):
        return None
    return tiles.store[0] if store else tiles.sums[0]
