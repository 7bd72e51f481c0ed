"""Kernel tests hold the C++ kernels and the plain PyTorch ones to the same oracle, on memory that starts as NaN."""

from collections.abc import Iterator

import pytest
import torch

from synpo_kernels import vocab_passes

NATIVE = torch._C._dispatch_has_kernel_for_dispatch_key("synpo::softmax_sums", "CPU")
PASSES = ("softmax_sums", "softmax_grads", "softmax_store", "tile_grads")


@pytest.fixture(params=["plain", *(["native"] if NATIVE else [])])
def passes(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Runs a test on each kernel of the passes over the vocabulary that this machine has."""
    if request.param == "plain":
        for name in PASSES:
            monkeypatch.setattr(vocab_passes, name, getattr(vocab_passes, f"_{name}"))
    return request.param


@pytest.fixture
def poison() -> Iterator[None]:
    """torch.empty gives NaN, so that a value nobody wrote shows."""
    torch.use_deterministic_algorithms(True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)
