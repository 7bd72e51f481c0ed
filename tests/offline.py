"""Compiles Triton kernels for GPUs that are not there, as their launchers would, and reads the result.

    python -m tests.offline        the tables in docs/triton.md: registers and shared memory of every listed tile

The launchers run on small CPU tensors with Triton told of an absent device and launching switched off, so that what is
compiled is what would run: same constants, same alignment, same options.
"""

import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from tqdm import tqdm
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

_TOOL = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"


class Kernel(NamedTuple):
    """What one compiled kernel uses."""

    name: str
    registers: int  # per thread
    stack: int  # bytes per thread: registers that were spilled
    shared: int  # bytes per block
    ptx: str

    def faults(self, shared_memory: int) -> list[str]:
        """Why the kernel must not ship to a device whose blocks may use ``shared_memory`` bytes."""
        return [
            *([f"{self.name} spills {self.stack} bytes of registers"] if self.stack else []),
            *([f"{self.name} needs {self.shared} of {shared_memory} bytes"] if self.shared > shared_memory else []),
        ]


class _AbsentDevice:
    """The part of a Triton driver that compiling asks for."""

    def __init__(self, arch: int) -> None:
        self._arch = arch

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self._arch, 32)

    def get_current_device(self) -> int:
        return self._arch  # compiled kernels are kept per device: one for each architecture

    def get_current_stream(self, device: int | None = None) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")


@contextmanager
def _compile_only(arch: int, compiled: list[Any]) -> Iterator[None]:
    run = JITFunction.run

    def warm_up(self: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
        compiled.append(kernel)
        return kernel

    before = driver._active  # None where no GPU has been used: asking for it would look for one
    JITFunction.run = warm_up
    driver.set_active(_AbsentDevice(arch))
    try:
        yield
    finally:
        JITFunction.run = run
        driver.set_active(before)


def compile_for(arch: int, launch: Callable[[], object]) -> list[Kernel]:
    """The kernels that ``launch`` would run on compute capability arch / 10."""
    compiled: list[Any] = []
    with _compile_only(arch, compiled):
        launch()
    return [_read(kernel) for kernel in compiled]


def _read(compiled: Any) -> Kernel:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(compiled.asm["cubin"])
        cubin.flush()
        report = subprocess.run(
            [_TOOL, "-res-usage", cubin.name], capture_output=True, text=True, check=True
        ).stdout  # fmt: skip
    used = {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", report)}
    return Kernel(
        compiled.metadata.name,
        used["REG"],
        used["STACK"] + used["LOCAL"],
        compiled.metadata.shared,
        compiled.asm["ptx"],
    )


def table() -> str:
    """Markdown: what the fused kernel needs in every tile that tiling.py lists, with a bias, the heavier form."""
    from synpo_kernels.tiling import TILES
    from tests.kernels.test_offline import CASES, compile_case

    names = {"store": "store", "sums": "sums alone", "capped": "softcap, store"}
    columns = ("arch", "for", "tile and depth", "stages", "warps", "parts", "flat", "registers", "shared memory")
    out = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for arch, kind, place, bias in tqdm(CASES, unit="tile"):
        if not bias:
            continue
        tile = getattr(TILES[arch], kind)[place]
        kernel = next(k for k in compile_case((arch, kind, place, bias)) if k.name == "_score_kernel")
        shape = f"{tile.rows} x {tile.columns} x {tile.depth}"
        cells = (f"sm_{arch}", names[kind], shape, tile.stages, tile.warps, tile.parts, "yes" if tile.flatten else "no")
        shared = f"{kernel.shared:,} of {TILES[arch].shared_memory:,} B"
        out.append("| " + " | ".join(map(str, (*cells, kernel.registers, shared))) + " |")
    return "\n".join(out)


def attention_table() -> str:
    """Markdown: what prefix_attention's kernels need in every listed tile, with a soft cap, the heaviest form."""
    from synpo_kernels.tiling import ATTENTION, TILES
    from tests.kernels.test_attention_offline import compile_case

    columns = ("arch", "heads up to", "kernel", "queries x keys", "stages", "warps", "registers", "shared memory")
    out = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for arch, tiles in tqdm([(arch, tiles) for arch, listed in ATTENTION.items() for tiles in listed], unit="tiles"):
        kernels = compile_case(arch, tiles, "capped")
        for name, tile, kernel in zip(tiles._fields[1:], tiles[1:], kernels, strict=True):
            shape, shared = f"{tile.queries} x {tile.keys}", f"{kernel.shared:,} of {TILES[arch].shared_memory:,} B"
            cells = (f"sm_{arch}", tiles.size, name, shape, tile.stages, tile.warps, kernel.registers, shared)
            out.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(out)


if __name__ == "__main__":
    print(f"Triton {triton.__version__}\n\n{table()}\n\n{attention_table()}")
