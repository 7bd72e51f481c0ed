"""Contrastive decoding on the CPU, C++ and plain PyTorch, against the oracle: every setting, dtype and kind of row."""

import itertools
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from synpo_kernels import contrastive, contrastive_logits, contrastive_sample, native, reference
from synpo_kernels.contrastive import SampleOutput
from tests.kernels.views import Views, check_sample, views

NATIVE = torch._C._dispatch_has_kernel_for_dispatch_key("synpo::contrastive_sample", "CPU")
SINGLE = torch.float32
LOW = (torch.bfloat16, torch.float16)
# One token; less than a group of 128; group and block edges of the kernel (2048) and one to each side.
SIZES = (1, 5, 127, 129, 2047, 2049)
INF = math.inf


@pytest.fixture(params=["plain", *(["native"] if NATIVE else [])])
def sample(request: pytest.FixtureRequest) -> Callable[..., SampleOutput]:
    """contrastive_sample with every setting given, by each kernel that this machine has."""
    if request.param == "native":
        return contrastive_sample

    def plain(
        logits: Tensor, contrast: Tensor | None, *, seed: Tensor, step: int, temperature: float, top_k: int,
        top_p: float, alpha: float, plausibility: float,
    ) -> SampleOutput:  # fmt: skip
        return SampleOutput(
            *contrastive._sample(logits, contrast, seed, step, alpha, plausibility, temperature, top_k, top_p)
        )

    return plain


def check(
    sample: Callable[..., SampleOutput],
    v: Views,
    plausibility: float,
    temperature: float,
    top_k: int,
    top_p: float,
    *,
    both: bool = True,
    step: int = 5,
    alpha: float = 0.5,
) -> None:
    seeds = torch.arange(len(v.logits)) * 7919 - (1 << 40)
    contrast = v.contrast if both else None
    settings = {"alpha": alpha, "plausibility": plausibility, "temperature": temperature}
    settings |= {"top_k": top_k, "top_p": top_p}
    out = sample(v.logits, contrast, seed=seeds, step=step, **settings)
    check_sample(out, v, contrast, seeds, step, **settings)


# Greedy; a temperature that leaves ties alone; plain; almost uniform.
TEMPERATURES = (0.0, 1e-300, 1.0, 100.0)
PLAUSIBILITIES = (0.0, 1e-3, 0.3, 1.0)
TOP_KS = (0, 1, 32, 64, 65, 1000)
TOP_PS = (1.0, 0.9, 0.3, 1e-9)


@pytest.mark.parametrize("plausibility", PLAUSIBILITIES)
@pytest.mark.parametrize("top_k", TOP_KS)
def test_every_mix_of_settings(top_k: int, plausibility: float, sample: Callable[..., SampleOutput]) -> None:
    v = views(301)
    for top_p, temperature in itertools.product(TOP_PS, TEMPERATURES):
        check(sample, v, plausibility, temperature, top_k, top_p)


MIXES = list(itertools.product((0.0, 0.1), (0.0, 0.7), (0, 64), (1.0, 0.9)))  # plausibility, temperature, k, p


@pytest.mark.parametrize("V", SIZES)
def test_every_size_and_dtype(V: int, sample: Callable[..., SampleOutput]) -> None:
    v = views(V)
    for dtype, mix in itertools.product((SINGLE, *LOW), MIXES):
        check(sample, v.to(dtype), *mix)


def test_one_view(sample: Callable[..., SampleOutput]) -> None:
    """Without a contrast, plausibility is min-p."""
    v = views(301)
    for dtype, mix in itertools.product((SINGLE, torch.bfloat16), MIXES):
        check(sample, v.to(dtype), *mix, both=False)


@pytest.mark.parametrize("alpha", [0.0, 3.0])
def test_other_strengths(alpha: float, sample: Callable[..., SampleOutput]) -> None:
    for mix in MIXES:
        check(sample, views(301), *mix, alpha=alpha)


@pytest.mark.parametrize("dtype", [SINGLE, torch.bfloat16], ids=str)
def test_a_whole_vocabulary(dtype: torch.dtype, sample: Callable[..., SampleOutput]) -> None:
    V = 151_936
    v = Views(2 * torch.randn(2, V), 2 * torch.randn(2, V), *(torch.zeros(2, dtype=torch.int64) for _ in range(2)))
    for mix in ((0.0, 0.0, 0, 1.0), (0.0, 1.0, 0, 1.0), (0.0, 0.5, 50, 0.9), (0.0, 1.0, 0, 0.9), (0.01, 1.0, 0, 0.9)):
        check(sample, v.to(dtype), *mix, step=1 << 40)


@pytest.mark.parametrize("plausibility", PLAUSIBILITIES)
@pytest.mark.parametrize("V", SIZES)
def test_combined_logits_to_the_bit(V: int, plausibility: float) -> None:
    """float32 rounds each product once on every path; bfloat16 and float16 are widened first, which is exact."""
    v = views(V)
    for dtype in (SINGLE, *LOW, torch.float64):
        l, other = v.logits.to(dtype), v.contrast.to(dtype)
        wide = torch.float64 if dtype == torch.float64 else SINGLE
        want = reference.contrastive_logits(l.to(wide), other.to(wide), alpha=0.7, plausibility=plausibility)
        for got in (
            contrastive_logits(l, other, alpha=0.7, plausibility=plausibility),
            contrastive._logits(l, other, 0.7, plausibility),
        ):
            assert got.dtype == wide
            assert torch.equal(got.isnan(), want.isnan())
            assert torch.equal(got.nan_to_num(nan=0.0, posinf=INF), want.nan_to_num(nan=0.0, posinf=INF))


def test_a_closed_form() -> None:
    """Numbers by hand: l = log(8, 4, 2, 1), l' = 0, alpha 1: c = log(64, 16, 4, 1)."""
    l, other = torch.tensor([[8.0, 4.0, 2.0, 1.0]]).log(), torch.zeros(1, 4)
    for top_k, top_p, plausibility, law in (
        (0, 1.0, 0.0, [64, 16, 4, 1]),
        (2, 1.0, 0.0, [64, 16]),
        (0, 64.5 / 85, 0.0, [64, 16]),  # the token that crosses stays
        (0, 63.5 / 85, 0.0, [64]),
        (2, 79.0 / 85, 0.0, [64, 16]),
        (3, 79.0 / 84, 0.0, [64, 16]),  # top-p counts what top-k left
        (0, 1.0, 0.24, [64, 16, 4]),
    ):
        seen = set()
        for seed in range(300):
            out = contrastive_sample(
                l, other, alpha=1.0, seed=seed, top_k=top_k, top_p=top_p, plausibility=plausibility
            )
            token = int(out.tokens)
            seen.add(token)
            assert math.isclose(float(out.logps), math.log(law[token] / sum(law)), rel_tol=1e-5, abs_tol=1e-6)
            assert math.isclose(float(out.model_logps), math.log([8, 4, 2, 1][token] / 15), rel_tol=1e-5)
        assert max(seen) == len(law) - 1


@pytest.mark.parametrize("name", ["avx512_bf16", "avx512", "avx2", "portable", "avx2_pairs", "portable_pairs"])
@pytest.mark.skipif(not NATIVE, reason="the C++ kernels are not built")
def test_every_instruction_set(name: str) -> None:
    try:
        with native.forced_isa(name):
            pass
    except ValueError:
        pytest.skip(f"this processor has no {name}")
    v = views(2049)
    with native.forced_isa(name):
        for dtype, mix in itertools.product((SINGLE, *LOW), MIXES):
            check(contrastive_sample, v.to(dtype), *mix)
        for dtype in (SINGLE, *LOW):
            l, other = v.logits.to(dtype), v.contrast.to(dtype)
            want = contrastive._logits(l, other, 0.7, 0.1)
            got = contrastive_logits(l, other, alpha=0.7, plausibility=0.1)
            assert torch.equal(got.nan_to_num(), want.nan_to_num())


def _halves(v: Views) -> tuple[Tensor, Tensor]:
    both = torch.cat([v.logits, v.contrast])
    return both.chunk(2)


def _apart(v: Views) -> tuple[Tensor, Tensor]:
    """Rows of a longer tensor, as the last position of (B, T, V) logits is, and with a hole after each row."""
    l = torch.full((len(v.logits), 3, v.logits.shape[1] + 5), math.nan, dtype=v.logits.dtype)
    l[:, 2, :-5] = v.logits
    return l[:, 2, :-5], v.contrast.flip(0).contiguous().flip(0)


def _columns(v: Views) -> tuple[Tensor, Tensor]:
    return v.logits.T.contiguous().T, v.contrast


@pytest.mark.parametrize("layout", [_halves, _apart, _columns], ids=["halves", "apart", "columns"])
@pytest.mark.parametrize("dtype", [SINGLE, torch.bfloat16], ids=str)
def test_any_layout(layout: Callable[[Views], tuple[Tensor, Tensor]], dtype: torch.dtype) -> None:
    v = views(301).to(dtype)
    l, other = layout(v)
    for plausibility, temperature, top_k, top_p in MIXES:
        settings = {"plausibility": plausibility, "temperature": temperature, "top_k": top_k, "top_p": top_p}
        want = contrastive_sample(v.logits, v.contrast, seed=3, **settings)
        got = contrastive_sample(l, other, seed=3, **settings)
        assert all(torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in zip(got, want, strict=True))
    want = contrastive_logits(v.logits, v.contrast, plausibility=0.1)
    assert torch.equal(contrastive_logits(l, other, plausibility=0.1).nan_to_num(), want.nan_to_num())


@pytest.mark.skipif(not NATIVE, reason="the C++ kernels are not built")
def test_the_halves_of_one_tensor_are_not_copied() -> None:
    both = torch.randn(4, 1 << 20)
    l, other = both.chunk(2)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        contrastive_sample(l, other, seed=3, top_k=32, top_p=0.9, temperature=0.5)
    assert sum(max(0, event.cpu_memory_usage) for event in profile.events()) < 1 << 16


def test_columns_that_torch_calls_contiguous() -> None:
    """One token, or no row: their strides say nothing to torch, but the kernels want neighbours side by side."""
    l = torch.randn(1, 3).T
    assert l.stride(1) != 1
    assert l.is_contiguous()
    assert contrastive_sample(l, l, seed=0).tokens.tolist() == [0, 0, 0]
    assert torch.equal(contrastive_logits(l, l), contrastive_logits(l.clone().view(3, 1), l))
    nothing = torch.randn(7, 4).T[:0]
    assert contrastive_sample(nothing, nothing, seed=0).tokens.shape == (0,)
    assert contrastive_logits(nothing, nothing).shape == (0, 7)


def test_no_rows(sample: Callable[..., SampleOutput]) -> None:
    empty = torch.empty(0, 7)
    for mix in MIXES:
        names = ("plausibility", "temperature", "top_k", "top_p")
        settings = dict(zip(names, mix, strict=True))
        out = sample(empty, empty, seed=torch.empty(0, dtype=torch.int64), step=0, alpha=0.5, **settings)
        assert [x.shape for x in out] == [(0,)] * 4
        assert [x.dtype for x in out] == [torch.int64, torch.float32, torch.float32, torch.uint8]
    assert contrastive_logits(empty, empty, plausibility=0.1).shape == (0, 7)
