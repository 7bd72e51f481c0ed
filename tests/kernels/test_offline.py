"""Every Triton kernel, in every tile that tiling.py lists for an architecture, compiles for it: no register is spilled,
shared memory is within its limit, and the chip's own matrix and copy instructions are there. No GPU is needed."""

import multiprocessing
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from pathlib import Path
from types import ModuleType

import pytest
import torch
from triton.compiler.errors import CompilationError

from synpo_kernels import loss_triton, vocab_triton
from synpo_kernels.tiling import PASS, TILES, ScoreTile
from tests.kernels.planted import COMPILING, load
from tests.offline import Kernel, compile_for

Case = tuple[int, str, int, bool]  # architecture, table in Tiles, place in it, with a bias

CASES: list[Case] = [
    (arch, table, i, bias)
    for arch, tiles in TILES.items()
    for table in ("store", "sums", "capped")
    for i in range(len(getattr(tiles, table)))
    # The tile in use is compiled as most models run it too, without a bias; a bias costs registers.
    for bias in ((True, False) if i == 0 and table != "capped" else (True,))
]


def score(arch: int, tile: ScoreTile, store: bool, bias: bool, softcap: float, triton_kernels: ModuleType) -> None:
    """One launch of the fused kernel and of what follows it, on sizes with a Llama's alignment."""
    n, H, V = 256, 512, 1024
    hidden, weight = torch.empty(n, H, dtype=torch.bfloat16), torch.empty(V, H, dtype=torch.bfloat16)
    rows = triton_kernels.Rows(
        torch.empty(V, dtype=torch.bfloat16) if bias else None,
        torch.zeros(n, dtype=torch.int64),
        torch.zeros(n),
        0.5,
        softcap,
    )
    kept = torch.empty(n, V, dtype=torch.bfloat16) if store else None
    pairs = triton_kernels.score(hidden, weight, rows, kept, tile, TILES[arch].descriptors, 132)
    triton_kernels.reduce(pairs, kept)


def compile_case(case: Case) -> list[Kernel]:
    arch, table, i, bias = case
    tile = getattr(TILES[arch], table)[i]
    stores = (True, False) if table == "capped" else (table == "store",)
    return [
        kernel
        for store in stores
        for kernel in compile_for(
            arch, lambda store=store: score(arch, tile, store, bias, 30.0 if table == "capped" else 0.0, vocab_triton)
        )
    ]


def compile_rest(arch: int) -> list[Kernel]:
    """The pass over the library's logits in all its forms, and the loss."""

    def launch() -> None:
        n, V = 64, 4096
        raw, pairs = (
            torch.empty(n, V),
            vocab_triton.empty_pairs(n, V // PASS.columns, PASS.columns, torch.device("cpu")),
        )
        for bias, softcap in ((None, 0.0), (torch.empty(V, dtype=torch.bfloat16), 30.0)):
            rows = vocab_triton.Rows(bias, torch.zeros(n, dtype=torch.int64), torch.zeros(n), 1.0, softcap)
            for tile in (None, torch.empty(n, V, dtype=torch.bfloat16), torch.empty(n, V)):
                vocab_triton.exponentiate(raw, 0, V, rows, tile, pairs, PASS)
                vocab_triton.reduce(pairs, tile)
        for form in ("sigmoid", "logsigmoid"):
            for want_coef in (False, True):
                loss_triton.synpo_loss(torch.empty(96), torch.arange(0, 97, 16), 30.0, 0.2, form, 3, want_coef)

    return compile_for(arch, launch)


@pytest.fixture(scope="module")
def compiled() -> Iterator[dict[Case | int, Future[list[Kernel]]]]:
    """All of it, compiled by two processes side by side."""
    with ProcessPoolExecutor(2, mp_context=multiprocessing.get_context("spawn")) as pool:
        rest = {arch: pool.submit(compile_rest, arch) for arch in TILES}
        yield {**{case: pool.submit(compile_case, case) for case in CASES}, **rest}


@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_listed_tile_compiles(case: Case, compiled: dict[Case | int, Future[list[Kernel]]]) -> None:
    arch = case[0]
    kernels = compiled[case].result()
    faults = [fault for kernel in kernels for fault in kernel.faults(TILES[arch].shared_memory)]
    assert not faults, faults
    ptx = next(kernel.ptx for kernel in kernels if kernel.name == "_score_kernel")
    assert all(instruction in ptx for instruction in INSTRUCTIONS[arch])


# Of the architecture's matrix unit, and of the copies that feed it.
INSTRUCTIONS = {
    80: ("mma.sync.aligned.m16n8k16", "cp.async.cg"),
    90: ("wgmma.mma_async", "cp.async.bulk.tensor"),
    100: ("tcgen05.mma", "cp.async.bulk.tensor"),
}


@pytest.mark.parametrize("arch", TILES)
def test_the_pass_and_the_loss_compile(arch: int, compiled: dict[Case | int, Future[list[Kernel]]]) -> None:
    kernels = compiled[arch].result()
    assert {kernel.name for kernel in kernels} == {"_pass_kernel", "_reduce_kernel", "_rescale_kernel", "_synpo_kernel"}
    assert not [fault for kernel in kernels for fault in kernel.faults(TILES[arch].shared_memory)]


def test_a_tile_that_spills_or_does_not_fit_is_seen() -> None:
    """The test of this test: a tile too large for the registers, and one with too many stages."""
    spilling = compile_for(
        90, lambda: score(90, ScoreTile(128, 256, 64, 2, 4, 1, False), True, True, 30.0, vocab_triton)
    )
    assert any("spills" in fault for fault in spilling[0].faults(TILES[90].shared_memory))
    deep = compile_for(90, lambda: score(90, ScoreTile(128, 128, 64, 8, 8, 1, False), False, False, 0.0, vocab_triton))
    assert any("needs" in fault for fault in deep[0].faults(TILES[90].shared_memory))


@pytest.mark.parametrize("name", COMPILING)
def test_a_mistake_that_only_the_compiler_sees(name: str, tmp_path: Path) -> None:
    module = load(COMPILING[name], vocab_triton, tmp_path)
    tile = ScoreTile(128, 128, 64, 3, 8, 1, False)
    with pytest.raises(CompilationError):
        compile_for(80, lambda: score(80, tile, False, False, 0.0, module))
