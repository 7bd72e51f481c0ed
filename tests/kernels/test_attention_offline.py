"""prefix_attention's kernels compile for GPUs that are not here, in every tile that tiling.py lists: no register is
spilled, shared memory is within its limit, and the chip's own matrix and copy instructions are there."""

import pytest
import torch

from synpo_kernels import prefix_attention_cuda, tiling
from synpo_kernels.tiling import ATTENTION, TILES, AttentionTiles
from tests.offline import Kernel, compile_for

# A soft cap is the heaviest form: two loops, without a mask and with one, and the slope. The others in Llama's width.
CASES = [(arch, place, "capped") for arch, listed in ATTENTION.items() for place in range(len(listed))]
CASES += [(90, 1, "plain"), (90, 1, "window")]
FORMS = {"plain": (0, 0.0), "window": (16, 0.0), "capped": (0, 30.0)}
# Of the architecture's matrix unit, which takes tiles of 64 rows and more; the older one runs smaller tiles.
MATRIX_UNIT = {80: "mma.sync", 90: "wgmma.mma_async", 100: "tcgen05.mma"}


def compile_case(arch: int, tiles: AttentionTiles, form: str) -> list[Kernel]:
    """Both ops as a model calls them, on tokens of 8 heads that share 4."""
    query, key = (torch.empty(64, heads, tiles.size, dtype=torch.bfloat16) for heads in (8, 4))
    settings = (0, 48, 0, 0, 48, 64, 0, 20), 0.1, *FORMS[form]

    def launch() -> None:
        out, lse = prefix_attention_cuda.prefix_attention(query, key, key, *settings)
        prefix_attention_cuda.prefix_attention_backward(out, query, key, key, out, lse, *settings)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiling, "attention", lambda *_: tiles)
        return compile_for(arch, launch)


@pytest.mark.parametrize(("arch", "place", "form"), CASES, ids=str)
def test_every_listed_tile_compiles(arch: int, place: int, form: str) -> None:
    kernels = compile_case(arch, ATTENTION[arch][place], form)
    assert [kernel.name for kernel in kernels] == ["forward_kernel", "grad_query_kernel", "grad_key_kernel"]
    faults = [fault for kernel in kernels for fault in kernel.faults(TILES[arch].shared_memory)]
    assert not faults, faults
    for kernel, tile in zip(kernels, ATTENTION[arch][place][1:], strict=True):
        rows = tile.keys if kernel.name == "grad_key_kernel" else tile.queries
        assert (MATRIX_UNIT[arch] if rows >= 64 else "mma.sync") in kernel.ptx, kernel.name
        assert "cp.async.cg" in kernel.ptx or tile.stages == 1, kernel.name


def test_narrow_heads_come_first() -> None:
    for listed in ATTENTION.values():
        assert [tiles.size for tiles in listed] == sorted(tiles.size for tiles in listed)
