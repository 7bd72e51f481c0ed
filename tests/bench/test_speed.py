"""Speed and memory at a size that CI affords, gated on ratios taken in one run: a slower machine passes,
a slower loss does not.

``pytest tests/bench/test_speed.py --benchmark-only`` shows the times.
"""

import statistics
import time

import pytest
import torch

from bench.cases import Case, make_inputs
from bench.implementations import IMPLEMENTATIONS
from bench.measure import Spec, step
from bench.memory import Peak
from synpo_kernels import native

SMALL = Case("ci", H=256, V=32768, cpu_n=(256,), gpu_n=(256,))
INPUTS = make_inputs(SMALL, 256, torch.float32, torch.device("cpu"))


def _step(name: str, head: str = "frozen"):
    return step(Spec("synpo_loss", name, "ci", "fp32", 256, head, "forward+backward", "cpu", 1, 60), INPUTS)


@pytest.mark.parametrize("head", ["frozen", "trainable"])
@pytest.mark.parametrize("name", ["naive", "torch-chunked", "ours"])
def test_time(benchmark, name, head):
    benchmark.group = f"synpo_loss, {head} head"
    benchmark.pedantic(_step(name, head), rounds=5, warmup_rounds=1)


def test_ours_is_not_slower_than_naive_with_a_frozen_head():
    """Two products against three or more passes over (N, V) floats beside them: equal time would be a regression."""
    calls = {name: _step(name) for name in ("naive", "ours")}
    ratios = []
    for call in calls.values():
        call()
    for _ in range(9):
        seconds = {}
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            seconds[name] = time.perf_counter() - start
        ratios.append(seconds["ours"] / seconds["naive"])
    # The plain PyTorch path, where no compiler was at hand, is there for its memory: as fast as naive, give or take.
    assert statistics.median(ratios) < (1.0 if native.status()["built"] else 1.5)


def test_ours_holds_a_fraction_of_what_naive_holds():
    """Naive holds two or three (N, V) float32 tensors of 32 MB at once; ours tiles and one (N, H)."""
    peaks = {}
    for name in ("naive", "ours"):
        call = _step(name)
        peak = Peak(torch.device("cpu"))
        call()
        peaks[name] = peak.extra_mb()
    assert peaks["naive"] >= 2 * 256 * SMALL.V * 4 / 2**20
    assert peaks["ours"] <= peaks["naive"] / 2


def test_a_trainable_head_costs_its_gradient_twice_and_no_more():
    """Made in the forward pass, multiplied by the loss's gradient in the backward pass: 32 MB each. The stored tile of
    32 rows is 4 MB, packed weights are a few.
    """
    inputs = make_inputs(SMALL, 32, torch.float32, torch.device("cpu"))
    spec = Spec("synpo_loss", "ours", "ci", "fp32", 32, "trainable", "forward+backward", "cpu", 1, 60)
    call = step(spec, inputs)
    call()
    peak = Peak(torch.device("cpu"))
    call()
    assert 60 <= peak.extra_mb() <= 80


def test_every_implementation_is_in_the_comparison_or_needs_a_gpu():
    reasons = {name: entry.cannot("synpo_loss", SMALL, torch.device("cpu")) for name, entry in IMPLEMENTATIONS.items()}
    assert {name for name, reason in reasons.items() if reason} == {
        "cut-cross-entropy-exact", "liger-cute", "quack", "trl-chunked"
    }  # fmt: skip
