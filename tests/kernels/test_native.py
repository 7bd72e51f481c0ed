"""The C++ kernels of the inner ops on every instruction set of this processor, held to float64."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from synpo_kernels import native, vocab_passes
from synpo_kernels.vocab_passes import GUARD, accumulator
from tests.closeness import assert_close
from tests.kernels.passes_oracle import Problem, logits, matrix_product, weights

if not native.status()["built"]:
    pytest.skip(f"the C++ kernels are {native.status()['reason']}", allow_module_level=True)

pytestmark = pytest.mark.usefixtures("poison")
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def _supported(name: str) -> bool:
    try:
        with native.forced_isa(name):
            return True
    except ValueError:
        return False


ISAS = [
    name for name in ("avx512_bf16", "avx512", "avx2", "portable", "avx2_pairs", "portable_pairs") if _supported(name)
]
PAIRED = ("avx512_bf16", "avx2_pairs", "portable_pairs")

# n, H, V: no rows; hidden states of no numbers; one of everything; one below, at and above the widths of vectors (4 to
# 16), panels (8 to 64), segments of the tile (256, 512) and blocks of rows (6, 96), and odd where bf16 goes in pairs.
SHAPES = (
    *((0, 5, 7), (3, 0, 5), (1, 1, 1), (1, 1, 2), (2, 1, 3), (1, 64, 64), (1, 65, 63), (3, 2, 257), (5, 1, 513)),
    *((6, 31, 65), (7, 33, 255), (95, 3, 17), (97, 33, 301), (13, 257, 511), (2, 130, 1100), (193, 17, 1025)),
)


@contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def make(
    n: int,
    H: int,
    V: int,
    dtype: torch.dtype,
    *,
    bias: bool = False,
    logit_scale: float = 1.0,
    softcap: float = 0.0,
    spread: float = 1.0,
    rising: bool = False,
    seed: int = 0,
) -> Problem:
    """Logits of the given spread, some targets on another rank. References sit between -2 spread and +2 spread, so a
    spread of 50 makes rows whose reference must be raised and rows whose target has p_y = e^-100."""
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    hidden, weight = randn(n, H) * spread, randn(V, H) / max(H, 1) ** 0.5
    if rising and H:
        weight[:, 0] = torch.linspace(-2, 2, V)
        hidden[:, 0] = torch.where(torch.arange(n) % 2 == 0, 100.0, -100.0)
    targets = torch.randint(-2, V + 2, (n,), generator=generator)
    acc = accumulator(dtype)
    problem = Problem(
        hidden.to(dtype),
        weight.to(dtype),
        randn(V).to(dtype) if bias else None,
        targets,
        torch.empty(n, dtype=acc),
        randn(n).to(acc),
        logit_scale,
        softcap,
    )
    z = logits(problem)[0]
    own = z.gather(1, ((targets + 1) % V)[:, None])[:, 0] if n else z.new_zeros(0)
    return problem._replace(reference=own.nan_to_num(neginf=0.0).to(acc))


def check_shift(p: Problem, shift: Tensor) -> None:
    """A reference is the given one, or a logit that passes it by more than the guard; no logit passes it by more."""
    z, _, error, _ = logits(p)
    top, slack = z.amax(1), error.amax(1) + torch.finfo(shift.dtype).eps * z.nan_to_num(neginf=0).abs().amax(1)
    raised = shift != p.reference
    assert (shift[raised].double() > p.reference[raised].double() + GUARD).all()
    assert (top - shift.double() <= GUARD + 2 * slack).all()
    assert (raised == (top - p.reference > GUARD))[(top - p.reference - GUARD).abs() > 2 * slack].all()


def check_sums(p: Problem, pairs: bool, workspace_mb: int = 64) -> None:
    acc = p.reference.dtype
    options = (p.reference, p.logit_scale, p.softcap)
    shift, sums, product = vocab_passes.softmax_sums(*p.head, *options, True, workspace_mb)
    check_shift(p, shift)
    truth = weights(p, shift)
    allowed = truth.e_error.sum(1) + torch.finfo(acc).eps * 16 * truth.e.sum(1) + torch.finfo(acc).tiny
    assert_close(sums, truth.e.sum(1), allowed, "sums")
    assert_close(product, *matrix_product(truth.ed, truth.ed_error, p.weight, acc, int(pairs)), "product")
    again = vocab_passes.softmax_sums(*p.head, *options, False, workspace_mb)
    assert again[2].shape == (0, p.hidden.shape[1])
    check_shift(p, again[0])
    truth = weights(p, again[0])
    allowed = truth.e_error.sum(1) + torch.finfo(acc).eps * 16 * truth.e.sum(1) + torch.finfo(acc).tiny
    assert_close(again[1], truth.e.sum(1), allowed, "sums alone")


def check_grads(p: Problem, pairs: bool, workspace_mb: int = 64) -> None:
    acc, (V, H) = p.reference.dtype, p.weight.shape
    # The denominators of the softmax, as linear_logps hands them over, so that no weight is above 1.
    p = p._replace(reference=torch.logsumexp(logits(p)[0], 1).nan_to_num(neginf=0.0).to(acc))
    start_weight, start_bias = torch.randn(V, H, dtype=acc), torch.randn(V, dtype=acc)
    grad_weight, grad_bias = start_weight.clone(), start_bias.clone()
    product = vocab_passes.softmax_grads(
        *p.head, p.reference, p.coef, p.logit_scale, p.softcap, grad_weight, grad_bias, True, workspace_mb
    )
    truth = weights(p, p.reference)
    assert_close(product, *matrix_product(truth.ed, truth.ed_error, p.weight, acc, int(pairs)), "product")
    check_head(p, truth.ed, truth.ed_error, (start_weight, grad_weight), (start_bias, grad_bias), pairs)
    alone = start_weight.clone()
    nothing = vocab_passes.softmax_grads(
        *p.head, p.reference, p.coef, p.logit_scale, p.softcap, alone, None, False, workspace_mb
    )
    assert nothing.shape == (0, H)
    assert torch.equal(alone, grad_weight)


def check_head(
    p: Problem, ed: Tensor, ed_error: Tensor, weight: tuple[Tensor, Tensor], bias: tuple[Tensor, Tensor], pairs: bool
) -> None:
    """The head's gradients, (before, after): what was added is -(E d).T @ (coef hidden) and -(E d).T @ coef."""
    acc, c = p.reference.dtype, p.coef.double()[:, None]
    for (before, after), right, roundings, name in (
        (weight, c * p.hidden.double(), 2, "gradient of weight"),
        (bias, c, 1, "gradient of bias"),
    ):
        want, allowed = matrix_product(ed.T, ed_error.T, right, acc, roundings * int(pairs))
        if name == "gradient of bias":
            want, allowed = want[:, 0], allowed[:, 0]
        start = before.double()
        steps = torch.finfo(acc).eps * (2 + len(c) ** 0.5) * (start.abs() + want.abs())
        assert_close(after, start - want, allowed + steps, name)


def check_stored(p: Problem, pairs: bool) -> None:
    """softmax_store, in tiles of the accumulator and of bf16, and tile_grads from what it left."""
    acc, (V, H) = p.reference.dtype, p.weight.shape
    for dtype in (acc, torch.bfloat16):
        tile = torch.empty(len(p.hidden), V + 3, dtype=dtype)[:, :V]
        shift, sums = vocab_passes.softmax_store(*p.head, p.reference, p.logit_scale, p.softcap, tile)
        check_shift(p, shift)
        truth = weights(p, shift)
        allowed = truth.e_error.sum(1, keepdim=True) + torch.finfo(acc).eps * 16 * truth.e.sum(1, keepdim=True)
        tiny = torch.finfo(dtype).tiny
        assert_close(sums[:, None], truth.e.sum(1, keepdim=True), allowed + tiny, "sums")
        # A piece of a row whose reference was raised later is rounded to the tile's dtype twice.
        rounding = torch.finfo(dtype).eps * truth.ed.abs()
        assert_close(tile, truth.ed, truth.ed_error + rounding + tiny, "tile")
        start_weight, start_bias = torch.randn(V, H, dtype=acc), torch.randn(V, dtype=acc)
        grad_weight, grad_bias = start_weight.clone(), start_bias.clone()
        coef = p.coef / (sums + torch.exp(p.reference - shift))
        product = vocab_passes.tile_grads(tile, p.hidden, p.weight, coef, grad_weight, grad_bias, True)
        stored, exact = tile.double(), torch.zeros_like(tile, dtype=torch.float64)
        assert_close(product, *matrix_product(stored, exact, p.weight, acc, int(pairs)), "product of the tile")
        q = p._replace(coef=coef)
        check_head(q, stored, exact, (start_weight, grad_weight), (start_bias, grad_bias), pairs)
        nothing = vocab_passes.tile_grads(tile, p.hidden, p.weight, coef, None, None, False)
        assert nothing.shape == (0, H)


CHECKS: dict[str, Callable[[Problem, bool], None]] = {
    "softmax_sums": check_sums,
    "softmax_grads": check_grads,
    "softmax_store and tile_grads": check_stored,
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("op", CHECKS)
def test_odd_shapes(op: str, isa: str, dtype: torch.dtype) -> None:
    pairs = isa in PAIRED and dtype == torch.bfloat16
    with native.forced_isa(isa):
        for n, H, V in SHAPES:
            CHECKS[op](make(n, H, V, dtype), pairs)
            CHECKS[op](make(n, H, V, dtype, bias=True, logit_scale=-0.7, softcap=3.0), pairs)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("isa", ISAS)
def test_references_that_must_be_raised(isa: str, dtype: torch.dtype) -> None:
    pairs = isa in PAIRED and dtype == torch.bfloat16
    with native.forced_isa(isa):
        for options in ({"spread": 50.0}, {"rising": True}, {"rising": True, "bias": True, "softcap": 90.0}):
            problem = make(21, 24, 1301, dtype, **options)  # type: ignore[arg-type]
            assert (logits(problem)[0].amax(1) - problem.reference > GUARD).sum() > 3
            check_sums(problem, pairs, workspace_mb=1)
            check_grads(problem, pairs, workspace_mb=1)
            check_stored(problem, pairs)


def _strided(x: Tensor, layout: str) -> Tensor:
    """The same numbers in another layout of memory."""
    if layout == "transposed":
        return x.T.contiguous().T
    if layout == "every third column":
        return torch.stack([x, x + 1, -x], 2).flatten(1)[:, ::3]
    if layout == "odd offset":  # of rows, of elements, and off every alignment
        room = torch.zeros(x.shape[0] + 1, x.shape[1] + 3, dtype=x.dtype)
        room[1:, 1:-2] = x
        return room[1:, 1:-2]
    return x


LAYOUTS = ("contiguous", "transposed", "every third column", "odd offset")


def _everything(p: Problem) -> list[Tensor]:
    """All results of the four ops."""
    acc, (V, H) = p.reference.dtype, p.weight.shape
    options = (p.logit_scale, p.softcap)
    results = list(vocab_passes.softmax_sums(*p.head, p.reference, *options, True, 1))
    tile, low = torch.empty(len(p.hidden), V, dtype=acc), p.reference + 5 * p.reference.abs()
    results += [tile, *vocab_passes.softmax_store(*p.head, p.reference, *options, tile)]
    for run in (
        lambda *grads: vocab_passes.softmax_grads(*p.head, low, p.coef, *options, *grads, True, 1),
        lambda *grads: vocab_passes.tile_grads(tile, p.hidden, p.weight, p.coef, *grads, True),
    ):
        grads = torch.zeros(V, H, dtype=acc), torch.zeros(V, dtype=acc)
        results += [run(*grads), *grads]
    return results


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("isa", ISAS)
def test_the_layout_of_memory_changes_no_bit(isa: str, dtype: torch.dtype) -> None:
    problem = make(29, 35, 530, dtype, bias=True, softcap=20.0)
    with native.forced_isa(isa):
        want = _everything(problem)
        for layout in LAYOUTS[1:]:
            hidden, weight, bias = (_strided(x, layout) for x in (problem.hidden, problem.weight, problem.bias[None]))
            got = _everything(problem._replace(hidden=hidden, weight=weight, bias=bias[0]))
            assert all(map(torch.equal, got, want)), layout
        hidden, weight = problem.hidden[:1], problem.weight[:1]  # one row that stands for all: a stride of 0
        expanded = problem._replace(hidden=hidden.expand(29, -1), weight=weight.expand(530, -1))
        repeated = problem._replace(hidden=hidden.repeat(29, 1), weight=weight.repeat(530, 1))
        assert all(map(torch.equal, _everything(expanded), _everything(repeated)))


@settings(max_examples=100, deadline=None, derandomize=True)
@example(n=200, H=700, V=300, dtype=torch.float32, bias=False, scale=1.0, softcap=0.0, spread=1.0, rising=True,
         seed=0, isa=ISAS[0], workers=3, workspace_mb=1, layouts=("contiguous", "contiguous"))  # fmt: skip
@given(
    n=st.integers(0, 210),
    H=st.integers(1, 140),
    V=st.integers(1, 1400),
    dtype=st.sampled_from(DTYPES),
    bias=st.booleans(),
    scale=st.sampled_from([1.0, 0.31, -2.0]),
    softcap=st.sampled_from([0.0, 0.0, 2.5, 60.0]),
    spread=st.sampled_from([0.1, 1.0, 8.0, 60.0]),
    rising=st.booleans(),
    seed=st.integers(0, 1000),
    isa=st.sampled_from(ISAS),
    workers=st.integers(1, 4),
    workspace_mb=st.sampled_from([1, 2, 64]),
    layouts=st.tuples(st.sampled_from(LAYOUTS), st.sampled_from(LAYOUTS)),
)
def test_any_input(
    n: int,
    H: int,
    V: int,
    dtype: torch.dtype,
    bias: bool,
    scale: float,
    softcap: float,
    spread: float,
    rising: bool,
    seed: int,
    isa: str,
    workers: int,
    workspace_mb: int,
    layouts: tuple[str, str],
) -> None:
    problem = make(
        n, H, V, dtype, bias=bias, logit_scale=scale, softcap=softcap, spread=spread, rising=rising, seed=seed
    )
    hidden, weight = _strided(problem.hidden, layouts[0]), _strided(problem.weight, layouts[1])
    problem = problem._replace(hidden=hidden, weight=weight)
    pairs = isa in PAIRED and dtype == torch.bfloat16
    with native.forced_isa(isa), threads(workers):
        check_sums(problem, pairs, workspace_mb)
        check_grads(problem, pairs, workspace_mb)
        if seed % 2:
            check_stored(problem, pairs)
