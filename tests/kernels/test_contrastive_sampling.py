"""Contrastive sampling as randomness and as a torch op: frequencies, streams, sets, compile, gradients, bad input."""

import math
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from synpo_kernels import contrastive, contrastive_logits, contrastive_sample, reference
from tests.kernels.views import philox

DRAWS = 200_000
INF = math.inf


def two_views(V: int, size: float = 0.7) -> tuple[Tensor, Tensor]:
    return size * torch.randn(1, V), size * torch.randn(1, V)


def chi_square(counts: Tensor, law: Tensor) -> float:
    """Pearson's statistic as a standard normal number (Wilson and Hilferty 1931); tokens expected less than ten times
    count as one."""
    expected = law * counts.sum()
    rare = expected < 10
    counts = torch.cat([counts[~rare], counts[rare].sum()[None]])
    expected = torch.cat([expected[~rare], expected[rare].sum()[None]])
    keep = expected > 0
    assert counts[~keep].sum() == 0, "a token without probability was drawn"
    freedom = int(keep.sum()) - 1
    if freedom == 0:
        return 0.0
    statistic = ((counts - expected)[keep] ** 2 / expected[keep]).sum().item()
    spread = 2 / (9 * freedom)
    return ((statistic / freedom) ** (1 / 3) - (1 - spread)) / spread**0.5


# 150 tokens: a whole group of the C++ kernel and a part of one. One row stands for all: expanded rows share memory.
@pytest.mark.parametrize("plausibility", [0.0, 0.02])
@pytest.mark.parametrize("top_k", [0, 12, 100])
@pytest.mark.parametrize("top_p", [1.0, 0.95])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_frequencies(temperature: float, top_p: float, top_k: int, plausibility: float) -> None:
    l, other = two_views(150)
    settings = {"temperature": temperature, "top_k": top_k, "top_p": top_p}
    out = contrastive_sample(
        l.expand(DRAWS, -1), other.expand(DRAWS, -1), seed=12345, plausibility=plausibility, **settings
    )
    combined = reference.contrastive_logits(l, other, plausibility=plausibility)
    law, _ = reference.contrastive_law(combined.double(), **settings)
    counts = out.tokens.bincount(minlength=150).double()
    assert chi_square(counts, law[0]) < 3.5
    # The test of the test: frequencies of a slightly warmer law are told apart.
    warmer = law[0] ** (1 / 1.1)
    assert chi_square(counts, warmer / warmer.sum()) > 10


def test_one_stream_over_its_steps_is_uniform() -> None:
    """Consecutive steps of one seed, and consecutive seeds at one step: sixteen bins each, and pairs of neighbours."""
    u = torch.tensor([philox(99, step) for step in range(20_000)], dtype=torch.float64)
    v = contrastive.philox(torch.arange(20_000), 7)
    for numbers in (u, v):
        bins = (16 * numbers).long()
        assert chi_square(bins.bincount(minlength=16).double(), torch.full((16,), 1 / 16).double()) < 3.5
        pairs = 16 * bins[::2] + bins[1::2]
        assert chi_square(pairs.bincount(minlength=256).double(), torch.full((256,), 1 / 256).double()) < 3.5


def test_the_generator_is_philox() -> None:
    """Known answers of Random123 for Philox4x32-10; the op's against those over seeds and steps of any size."""
    assert philox(0, 0) == ((0x6627E8D5 >> 5) * 2**26 + (0xE169C58D >> 6)) * 2.0**-53
    seeds = torch.tensor([0, 1, -1, 2**63 - 1, -(2**63), 1 << 32, 123456789])
    for step in (0, 1, 2**32 - 1, 2**32, 2**63 - 1):
        want = [philox(seed, step) for seed in seeds.tolist()]
        assert contrastive.philox(seeds, step).tolist() == want
        # A law of 2^-16 a token shows the first 16 bits of the number: the kernel's own generator.
        out = contrastive_sample(torch.zeros(1, 1 << 16).expand(len(seeds), -1), seed=seeds, step=step)
        assert out.tokens.tolist() == [int(u * 2**16) for u in want]


MIXES = [
    {"temperature": 0.0},
    {},
    {"temperature": 0.5, "top_k": 32, "top_p": 0.9},
    {"top_p": 0.9},
    {"top_k": 100},
    {"plausibility": 0.05, "top_p": 0.9},
]


def same(a: contrastive.SampleOutput, b: contrastive.SampleOutput) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("settings", MIXES, ids=str)
def test_a_row_is_the_same_in_any_batch_order_and_run(settings: dict[str, float]) -> None:
    l, other, seeds = torch.randn(9, 5000), torch.randn(9, 5000), torch.randint(1 << 62, (9,))
    whole = contrastive_sample(l, other, seed=seeds, step=3, **settings)
    assert same(whole, contrastive_sample(l, other, seed=seeds, step=3, **settings))
    order = torch.randperm(9)
    shuffled = contrastive_sample(l[order], other[order], seed=seeds[order], step=3, **settings)
    assert same(contrastive.SampleOutput(*(x[order] for x in whole)), shuffled)
    for row in (0, 4, 8):
        part = slice(row, row + 1)
        alone = contrastive_sample(l[part], other[part], seed=seeds[part], step=3, **settings)
        assert same(contrastive.SampleOutput(*(x[part] for x in whole)), alone)
    threads = torch.get_num_threads()
    torch.set_num_threads(1 if threads > 1 else 2)
    try:
        assert same(whole, contrastive_sample(l, other, seed=seeds, step=3, **settings))
    finally:
        torch.set_num_threads(threads)


def test_seeds() -> None:
    l = torch.zeros(6, 1 << 16)
    by_number = contrastive_sample(l, seed=40)
    assert same(by_number, contrastive_sample(l, seed=torch.arange(40, 46)))
    assert by_number.tokens.unique().numel() == 6
    assert not torch.equal(by_number.tokens, contrastive_sample(l, seed=40, step=1).tokens)
    torch.manual_seed(7)
    first, second = contrastive_sample(l), contrastive_sample(l)
    torch.manual_seed(7)
    assert same(first, contrastive_sample(l))
    assert not torch.equal(first.tokens, second.tokens)


@pytest.mark.parametrize(("top_k", "top_p"), [(0, 0.7), (5, 1.0), (8, 0.7), (8, 0.05), (1, 0.5)])
def test_top_k_then_top_p_keep_what_transformers_keeps(top_k: int, top_p: float) -> None:
    from transformers.generation.logits_process import TopKLogitsWarper, TopPLogitsWarper

    rows, draws = 4, 5000
    l, other = torch.randn(rows, 40), torch.randn(rows, 40)
    scores = contrastive_logits(l, other)
    ids = torch.zeros(rows, 1, dtype=torch.int64)
    if top_k:
        scores = TopKLogitsWarper(top_k)(ids, scores)
    if top_p < 1:
        scores = TopPLogitsWarper(top_p)(ids, scores)
    theirs = scores.softmax(1)
    drawn = contrastive_sample(
        l.repeat_interleave(draws, 0), other.repeat_interleave(draws, 0), seed=1, top_k=top_k, top_p=top_p
    )
    for row in range(rows):
        tokens, logps = (x[row * draws : (row + 1) * draws] for x in (drawn.tokens, drawn.logps))
        likely = (theirs[row] > 20 / draws).nonzero()[:, 0]
        assert set(likely.tolist()) <= set(tokens.tolist()) <= set((theirs[row] > 0).nonzero()[:, 0].tolist())
        torch.testing.assert_close(logps, theirs[row].log()[tokens], rtol=1e-5, atol=1e-5)


def test_gradcheck() -> None:
    l, other = (torch.randn(3, 11, dtype=torch.float64) for _ in range(2))
    l[0, 3] = other[1, 4] = -INF
    for needs in ((True, True), (True, False), (False, True)):
        inputs = [x.clone().requires_grad_(need) for x, need in zip((l, other), needs, strict=True)]
        for plausibility in (0.0, 0.1):

            def kept(a: Tensor, b: Tensor, plausibility: float = plausibility) -> Tensor:
                c = contrastive_logits(a, b, alpha=0.7, plausibility=plausibility)
                return c.masked_fill(c == -INF, 0.0)

            assert torch.autograd.gradcheck(kept, inputs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gradients_are_those_of_the_oracle(dtype: torch.dtype) -> None:
    l, other = ((2 * torch.randn(4, 301)).to(dtype).requires_grad_() for _ in range(2))
    low = [torch.autograd.grad(f(l, other).log_softmax(1)[:, 7].exp().sum(), (l, other)) for f in (
        lambda a, b: contrastive_logits(a, b, plausibility=1e-4),
        lambda a, b: reference.contrastive_logits(a.float(), b.float(), plausibility=1e-4),
    )]  # fmt: skip
    for ours, want in zip(*low, strict=True):
        assert ours.dtype == dtype
        assert want.abs().max() > 0
        torch.testing.assert_close(ours, want, rtol=2 * torch.finfo(dtype).eps, atol=1e-9)


def test_opcheck() -> None:
    l, other = two_views(40)
    for needs in (False, True):
        arguments = (l.requires_grad_(needs), other.requires_grad_(needs), 0.5, 0.1)
        torch.library.opcheck(torch.ops.synpo.contrastive_logits.default, arguments)
    seeds = torch.tensor([4])
    for contrast in (None, other.detach()):
        arguments = (l.detach(), contrast, seeds, 3, 0.5, 0.1, 0.7, 8, 0.9)
        torch.library.opcheck(torch.ops.synpo.contrastive_sample.default, arguments)


@pytest.fixture
def dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def test_compiled_whole(dynamo: None) -> None:
    """fullgraph: no graph break, in a step of decoding whose number changes, and in a differentiable one."""

    def decode(both: Tensor, seeds: Tensor, step: int) -> contrastive.SampleOutput:
        l, other = torch.tanh(both).chunk(2)
        return contrastive_sample(l, other, seed=seeds, step=step, top_k=8, top_p=0.9)

    def loss(l: Tensor, other: Tensor) -> Tensor:
        return contrastive_logits(torch.tanh(l), other, plausibility=0.1).log_softmax(1)[:, 3].exp().sum()

    compiled = torch.compile(decode, fullgraph=True, backend="aot_eager")
    both, seeds = torch.randn(6, 50), torch.tensor([5, 6, 7])
    for step in range(4):
        assert same(decode(both, seeds, step), compiled(both, seeds, step))
    l, other = (torch.randn(3, 50).requires_grad_() for _ in range(2))
    want, got = (
        torch.autograd.grad(f(l, other), (l, other))
        for f in (loss, torch.compile(loss, fullgraph=True, backend="aot_eager"))
    )
    assert all(torch.equal(a, b) for a, b in zip(want, got, strict=True))


GOOD = torch.zeros(2, 5)
BAD: list[tuple[Callable[[], object], type[Exception], str]] = [
    (lambda: contrastive_sample(GOOD.double(), seed=0), TypeError, "logits have dtype torch.float64; allowed: float32"),
    (lambda: contrastive_sample(GOOD.long(), seed=0), TypeError, "logits have dtype torch.int64"),
    (lambda: contrastive_logits(GOOD, GOOD.half()), TypeError, "logits are torch.float32 but contrast is torch.float1"),
    (lambda: contrastive_sample(GOOD[0], seed=0), ValueError, r"logits have shape \(5,\); expected \(B, V\)"),
    (lambda: contrastive_sample(GOOD[:, :0], seed=0), ValueError, r"logits have shape \(2, 0\).*V >= 1"),
    (lambda: contrastive_sample(GOOD, GOOD[:, :4], seed=0), ValueError, "vocabulary of 4 but logits one of 5"),
    (lambda: contrastive_sample(GOOD, GOOD[:1], seed=0), ValueError, r"contrast has shape \(1, 5\)"),
    (lambda: contrastive_logits(GOOD, GOOD.to("meta")), ValueError, "logits are on cpu but contrast on meta"),
    (lambda: contrastive_logits(GOOD, GOOD, alpha=-0.5), ValueError, r"alpha is -0.5; it must be finite and >= 0"),
    (lambda: contrastive_logits(GOOD, GOOD, alpha=math.nan), ValueError, "alpha is nan"),
    (lambda: contrastive_sample(GOOD, plausibility=1.5), ValueError, r"plausibility is 1.5; it must be in \[0, 1\]"),
    (lambda: contrastive_sample(GOOD, plausibility=-0.1), ValueError, "plausibility is -0.1"),
    (lambda: contrastive_sample(GOOD, temperature=-1.0), ValueError, "temperature is -1.0; it must be finite and >= 0"),
    (lambda: contrastive_sample(GOOD, temperature=INF), ValueError, "temperature is inf"),
    (lambda: contrastive_sample(GOOD, top_k=-1), ValueError, "top_k is -1; it must be >= 0"),
    (lambda: contrastive_sample(GOOD, top_p=0.0), ValueError, r"top_p is 0.0; it must be in \(0, 1\]"),
    (lambda: contrastive_sample(GOOD, top_p=1.1), ValueError, "top_p is 1.1"),
    (lambda: contrastive_sample(GOOD, step=-1), ValueError, "step is -1; it must be >= 0 and less"),
    (lambda: contrastive_sample(GOOD, step=2**63), ValueError, f"step is {2**63}"),
    (lambda: contrastive_sample(GOOD, seed=2**63), ValueError, "must fit a signed 64-bit integer"),
    (lambda: contrastive_sample(GOOD, seed=2**63 - 1), ValueError, "those of the rows behind it must fit"),
    (lambda: contrastive_sample(GOOD, seed=torch.zeros(2)), TypeError, "seed has dtype torch.float32; int64 is needed"),
    (lambda: contrastive_sample(GOOD, seed=torch.tensor([1])), ValueError, r"seed has shape \(1,\).*\(2,\)"),
    (lambda: contrastive_sample(GOOD, seed=torch.arange(2, device="meta")), ValueError, "on cpu but seed on meta"),
]


@pytest.mark.parametrize(("call", "error", "message"), BAD, ids=[message for *_, message in BAD])
def test_bad_input_is_named(call: Callable[[], object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()
