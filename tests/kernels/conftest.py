"""Kernel tests hold every kernel that --device has and the plain PyTorch ones to the same oracle, on memory that starts
as NaN."""

from collections.abc import Iterator

import pytest
import torch

from synpo_kernels import native, vocab_passes

PASSES = ("softmax_sums", "softmax_grads", "softmax_store", "tile_grads")


@pytest.fixture
def device(request: pytest.FixtureRequest) -> Iterator[str]:
    """Tensors of tests that ask for this, or for passes, are made on --device."""
    name = request.config.getoption("--device")
    torch.set_default_device(name)
    yield name
    torch.set_default_device(None)


@pytest.fixture(params=["plain", "native"])
def passes(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, device: str) -> str:
    """Runs a test on each kernel of the passes over the vocabulary: PyTorch's, and C++ on a CPU or Triton on a GPU."""
    if request.param == "native":
        if not torch._C._dispatch_has_kernel_for_dispatch_key("synpo::softmax_sums", device.upper()):
            pytest.skip(f"no kernels of our own for {device}: {native.status()['reason']}")
    else:
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
