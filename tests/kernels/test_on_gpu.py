"""What only a GPU can show: waits of the host, the same bits at full size, streams, buffers past 2^31 elements."""

import warnings
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from synpo_kernels import FusedSynPOLoss, linear_logps, prefix_attention, reference
from tests.kernels.attention_problems import Problem, by_autograd, check, ordinary, pair
from tests.kernels.conftest import PASSES

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here"),
    pytest.mark.usefixtures("_on_cuda"),
]


@pytest.fixture
def _on_cuda() -> Iterator[None]:
    torch.set_default_device("cuda")
    yield
    torch.set_default_device(None)


def pairs(tokens: int, H: int, V: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """hidden, weight, labels and boundaries of answers of 256 tokens, packed; some labels ignored."""
    hidden = torch.randn(tokens, H, dtype=torch.bfloat16) / H**0.5
    labels = torch.randint(V, (tokens,))
    labels[::7] = -100
    cu_seqlens = torch.arange(0, tokens + 1, 256, dtype=torch.int32)
    return hidden, torch.randn(V, H, dtype=torch.bfloat16), labels, cu_seqlens


def loss_and_gradients(trainable: bool, problem: tuple[Tensor, ...], **options: int) -> tuple[Tensor, ...]:
    hidden, weight, labels, cu_seqlens = problem
    leaves = [hidden.clone().requires_grad_(), weight.clone().requires_grad_(trainable)]
    out = FusedSynPOLoss(**options)(leaves[0], leaves[1], labels, cu_seqlens=cu_seqlens)
    gradients = torch.autograd.grad(out.loss, leaves if trainable else leaves[:1])
    return out.loss.detach(), out.chosen_logps, *gradients


def test_the_kernels_are_ours() -> None:
    for op in (*PASSES, "synpo_loss", "prefix_attention", "prefix_attention_backward"):
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"synpo::{op}", "CUDA")


@pytest.mark.parametrize("trainable", [False, True], ids=["frozen", "trainable"])
def test_the_host_waits_once(trainable: bool) -> None:
    """For the count of valid tokens. A small workspace makes several chunks; none may wait for the one before."""
    problem = pairs(4096, 512, 4099)
    loss_and_gradients(trainable, problem, workspace_mb=8)  # compiles
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            loss_and_gradients(trainable, problem, workspace_mb=8)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    waits = [f"{w.filename}:{w.lineno}" for w in caught if "synchron" in str(w.message)]
    assert len(waits) == 1, waits


@pytest.mark.parametrize("trainable", [False, True], ids=["frozen", "trainable"])
@pytest.mark.parametrize(("H", "V"), [(1024, 32000), (4096, 128256)], ids=["fused", "library"])
def test_the_same_bits_on_every_run_and_stream(H: int, V: int, trainable: bool) -> None:
    problem = pairs(2048, H, V)
    first = loss_and_gradients(trainable, problem)
    again = loss_and_gradients(trainable, problem)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        elsewhere = loss_and_gradients(trainable, problem)
    torch.cuda.current_stream().wait_stream(stream)
    for a, b, c in zip(first, again, elsewhere, strict=True):
        assert torch.equal(a, b)
        assert torch.equal(a, c)


@pytest.mark.parametrize(("H", "V"), [(1024, 32000), (4096, 128256), (64, 50257)], ids=["fused", "library", "ragged"])
def test_at_full_size(H: int, V: int) -> None:
    """Log-probs within 1e-4 of float64, the bound the project promises."""
    hidden, weight, labels, _ = pairs(512, H, V)
    labels = labels.clamp(0)
    want = reference.linear_logps(hidden.double(), weight.double(), labels)
    assert float((linear_logps(hidden, weight, labels).double() - want).abs().max()) <= 1e-4


@pytest.mark.parametrize("H", [64, 4096], ids=["fused", "library"])
def test_a_workspace_past_two_to_the_31_elements(H: int) -> None:
    """One tile of all tokens against many small ones."""
    n, V = 18432, 128256
    assert n * V > 1 << 31
    problem = list(pairs(n, H, V))
    problem[2] = problem[2].clamp(0)  # every token is valid, so that the tile is n rows
    whole = loss_and_gradients(True, tuple(problem), workspace_mb=8 << 10)
    parts = loss_and_gradients(True, tuple(problem), workspace_mb=512)
    torch.testing.assert_close(whole[1], parts[1], rtol=0, atol=1e-5)
    for a, b in zip(whole[2:], parts[2:], strict=True):
        error = (a.double() - b.double()).norm() / b.double().norm()
        assert error < 1e-2, error  # bf16 gradients, summed in another order
        assert a[-1].isfinite().all()


def attention(d: int, **options: float) -> Problem:
    """Two pairs and padding, in bfloat16: several tiles of every kernel, ragged ones at every edge."""
    pieces = [*pair(0, 300, 129, 65), *pair(500, 64, 127, 300)]
    return ordinary(pieces, T=1000, h=8, g=2, d=d, **options).to(torch.bfloat16)


@pytest.mark.parametrize("options", [{}, {"window": 100}, {"softcap": 5.0}], ids=str)
@pytest.mark.parametrize("d", [64, 80, 128, 256])
def test_attention_in_the_tiles_in_use(d: int, options: dict[str, float]) -> None:
    p = attention(d, **options)
    check(p, by_autograd(prefix_attention, p))


def test_attention_never_makes_the_host_wait() -> None:
    p = attention(128)
    by_autograd(prefix_attention, p)  # compiles
    moved = p._replace(pieces=[*pair(1, 300, 129, 65), *pair(500, 64, 127, 300)])  # a work list that is not made yet
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        by_autograd(prefix_attention, moved)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_attention_gives_the_same_bits_on_every_run_and_stream() -> None:
    p = attention(128)
    first, again, stream = by_autograd(prefix_attention, p), by_autograd(prefix_attention, p), torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        elsewhere = by_autograd(prefix_attention, p)
    torch.cuda.current_stream().wait_stream(stream)
    for results in (again, elsewhere):
        assert all(torch.equal(a, b) for a, b in zip(first, results, strict=True))


def test_attention_copies_nothing() -> None:
    """Memory beyond the results: lse and D, 8 bytes a token and head, and work lists of a few kilobytes."""
    p = ordinary(pair(0, 4096, 512, 512), h=32, g=8, d=128).to(torch.bfloat16)
    by_autograd(prefix_attention, p)  # compiles
    torch.cuda.synchronize()
    held = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    results = by_autograd(prefix_attention, p)
    torch.cuda.synchronize()
    made = sum(x.numel() * x.element_size() for x in results)
    assert torch.cuda.max_memory_allocated() - held <= made + 8 * 5120 * 32 + (1 << 16)
