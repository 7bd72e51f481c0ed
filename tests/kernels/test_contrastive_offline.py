"""contrastive_triton.py compiles for GPUs that are not here, in every form that the laws of contrastive.py reach: no
register is spilled, shared memory is within its limit, and no product is fused with the subtraction behind it."""

import re

import pytest
import torch

from synpo_kernels import contrastive_triton
from synpo_kernels.tiling import TILES
from tests.offline import Kernel, compile_for

V = 4096  # a row of this many tokens has the alignment of a real vocabulary, and few blocks
# plausibility, temperature, top_k, top_p
LAWS = {
    "greedy": (0.0, 0.0, 0, 1.0),
    "plain": (0.0, 1.0, 0, 1.0),
    "top-k, top-p, plausible": (0.1, 0.5, 64, 0.9),
    "top-p alone": (0.0, 1.0, 0, 0.9),
}


def launch(name: str, both: bool) -> None:
    plausibility, temperature, top_k, top_p = LAWS[name]
    l = torch.zeros(2, V, dtype=torch.bfloat16)
    seeds = torch.zeros(2, dtype=torch.int64)
    contrastive_triton.contrastive_sample(
        l, l if both else None, seeds, 3, 0.5, plausibility, temperature, top_k, top_p
    )  # fmt: skip


@pytest.mark.parametrize("arch", TILES)
def test_every_kernel_compiles(arch: int) -> None:
    kernels: list[Kernel] = []
    for name in LAWS:
        kernels += compile_for(arch, lambda name=name: launch(name, both=True))
    assert {kernel.name for kernel in kernels} == {"_scan_kernel", "_combine_kernel", "_draw_kernel", "_walk_kernel"}
    assert not [fault for kernel in kernels for fault in kernel.faults(TILES[arch].shared_memory)]
    # c is l * plus - l' * alpha, rounded three times: its two products stand in the scan, and no fused form of them.
    scan = next(kernel.ptx for kernel in kernels if kernel.name == "_scan_kernel")
    assert not re.search(r"fma\.rn(\.ftz)?\.f32", scan)


def test_one_view_and_float32_compile() -> None:
    kernels = compile_for(90, lambda: launch("top-k, top-p, plausible", both=False))
    l = torch.zeros(2, V)
    kernels += compile_for(90, lambda: contrastive_triton.contrastive_logits(l, l, 0.5, 0.1))
    assert not [fault for kernel in kernels for fault in kernel.faults(TILES[90].shared_memory)]
