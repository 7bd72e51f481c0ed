"""linear_logps against the closed forms in float64: values and all gradients, in every dtype, on rows of every kind."""

import pytest
import torch
from torch import Tensor

from synpo_kernels import linear_logps, reference
from tests.closeness import assert_close, tolerance
from tests.kernels.oracle import Head, exact, largest_logit, naive
from tests.kernels.problems import MARGINS, PROBLEMS, confident, margins, ordinary, rising, upstream

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
pytestmark = pytest.mark.usefixtures("passes", "poison")


def run(head: Head, c: Tensor, trainable: bool, **options: object) -> tuple[Tensor, ...]:
    """Log-probs and gradients of sum(c * logps) in hidden, and in weight and bias where trainable."""
    leaves = [head.hidden.clone().requires_grad_()]
    weight, bias = head.weight, head.bias
    if trainable:
        weight = weight.clone().requires_grad_()
        bias = (torch.zeros_like(weight[:, 0].detach()) if bias is None else bias.clone()).requires_grad_()
        leaves += [weight, bias]
    logps = linear_logps(leaves[0], weight, head.targets, bias=bias, **head.options(), **options)
    return logps.detach(), *torch.autograd.grad(logps, leaves, c.to(logps.dtype))


def check(head: Head, trainable: bool, **options: object) -> None:
    """The comparison of this file: every output within its derived tolerance of the closed forms."""
    c = upstream(len(head.targets))
    truth, plain, dtype = exact(head, c), naive(head, c), head.hidden.dtype
    (V, H), n = head.weight.shape, len(head.targets)
    result = torch.float64 if dtype == torch.float64 else torch.float32
    got = run(head, c, trainable, **options)
    # A logit is a sum of H products; through the exponential its absolute error becomes a relative one of p.
    logit = H**0.5 * (1 + largest_logit(head))
    assert_close(got[0], truth.logps, tolerance(truth.logps, plain.logps, result, dtype, 1, logit), "logps")
    names = ("hidden", "weight", "bias") if trainable else ("hidden",)
    for name, gradient in zip(names, got[1:], strict=True):
        assert gradient.dtype == dtype
        want, by_plain = getattr(truth, name), getattr(plain, name)
        summand = abs(head.logit_scale) * float(c.abs().max()) * (
            {"hidden": head.weight, "weight": head.hidden}[name].double().abs().max().item() if name != "bias" else 1.0
        )  # fmt: skip
        terms = V if name == "hidden" else n
        allowed = tolerance(want, by_plain, dtype, dtype, 1, (terms**0.5 + logit) * summand)
        assert_close(gradient, want, allowed, f"gradient of {name}")


@pytest.mark.parametrize("trainable", [False, True], ids=["frozen", "trainable"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("problem", PROBLEMS)
def test_values_and_gradients(problem: str, dtype: torch.dtype, trainable: bool) -> None:
    check(PROBLEMS[problem]().to(dtype), trainable)


def test_the_margins_are_what_they_say() -> None:
    head = margins()
    logps = exact(head, upstream(len(head.targets))).logps
    assert logps.min() < -295
    assert logps.max() > -1e-6
    first = logps[: len(MARGINS)]
    assert ((first > -45) & (first < -40)).any()
    assert ((first > -40) & (first < -35)).any()


@pytest.mark.parametrize("trainable", [False, True], ids=["frozen", "trainable"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_a_confident_token_keeps_its_relative_accuracy(dtype: torch.dtype, trainable: bool) -> None:
    """p_y near 1 leaves log p and its gradient small differences of large numbers, unless they are never taken."""
    head = confident().to(dtype)
    ones = torch.ones(len(head.targets))
    truth = exact(head, ones)
    assert truth.logps.max() > -1e-6
    logps, gradient, *_ = run(head, ones, trainable)
    (V, H), acc = head.weight.shape, torch.finfo(logps.dtype).eps
    relative = acc * (H**0.5 * (1 + largest_logit(head)) + V**0.5)
    assert_close(logps, truth.logps, relative * truth.logps.abs(), "logps")
    error = (gradient.double() - truth.hidden).norm(dim=1) / truth.hidden.norm(dim=1)
    assert error.max() <= relative + torch.finfo(dtype).eps, error


# 1 MB makes several chunks of the vocabulary (and of rows, for a bias alone) at these sizes, 64 MB makes one.
@pytest.mark.parametrize("trainable", [False, True], ids=["frozen", "trainable"])
@pytest.mark.parametrize("workspace_mb", [1, 2, 64])
@pytest.mark.parametrize("make", [ordinary, rising])
def test_any_workspace(make: object, workspace_mb: int, trainable: bool) -> None:
    head = make(n=201, H=33, V=1501)  # type: ignore[operator]
    check(head, trainable, workspace_mb=workspace_mb)


@pytest.mark.parametrize(
    "needs", [(False, False, True), (True, False, True), (False, True, False), (False, True, True)]
)
def test_only_the_gradients_that_are_asked_for(needs: tuple[bool, bool, bool]) -> None:
    head = ordinary(n=151, V=1003)._replace(bias=torch.randn(1003))
    c = upstream(151)
    tensors = [
        t.clone().requires_grad_(need) for t, need in zip((head.hidden, head.weight, head.bias), needs, strict=True)
    ]
    logps = linear_logps(tensors[0], tensors[1], head.targets, bias=tensors[2], workspace_mb=1)
    logps.backward(c)
    truth, plain = exact(head, c), naive(head, c)
    for tensor, need, name in zip(tensors, needs, ("hidden", "weight", "bias"), strict=True):
        assert (tensor.grad is not None) == need
        if need:
            want = getattr(truth, name)
            scale = 10 * float(c.abs().max()) * (1003**0.5 + 40**0.5 * largest_logit(head))
            assert_close(
                tensor.grad, want, tolerance(want, getattr(plain, name), torch.float32, torch.float32, 1, scale), name
            )


def test_nothing_is_differentiable_when_nothing_asks() -> None:
    head = ordinary()
    assert not linear_logps(head.hidden, head.weight, head.targets).requires_grad
    with torch.no_grad():
        assert not linear_logps(head.hidden.clone().requires_grad_(), head.weight, head.targets).requires_grad


@pytest.mark.parametrize("ignore_index", [-100, -1, 0, 5, 300, 999])
def test_ignored_positions_are_zero_and_get_no_gradient(ignore_index: int) -> None:
    head = ordinary()
    targets = head.targets.where(head.targets != -100, torch.tensor(ignore_index))
    head = head._replace(targets=targets, ignore_index=ignore_index)
    check(head, trainable=True)
    logps, gradient = run(head, torch.ones(37), trainable=False)
    ignored = targets == ignore_index
    assert ignored.any()
    assert (logps[ignored] == 0).all()
    assert (gradient[ignored] == 0).all()


@pytest.mark.parametrize("trainable", [False, True], ids=["frozen", "trainable"])
@pytest.mark.parametrize("n", [0, 1, 6])
def test_no_valid_token(n: int, trainable: bool) -> None:
    head = ordinary()._replace(hidden=torch.randn(n, 40), targets=torch.full((n,), -100))
    for value in run(head, torch.ones(n), trainable):
        assert (value == 0).all()


@pytest.mark.parametrize("trainable", [False, True], ids=["frozen", "trainable"])
def test_a_vocabulary_of_one_token_is_certain(trainable: bool) -> None:
    head = Head(torch.randn(3, 4), torch.randn(1, 4), torch.tensor([0, -100, 0]))
    for value in run(head, torch.ones(3), trainable):
        assert (value == 0).all()


@pytest.mark.parametrize("trainable", [False, True], ids=["frozen", "trainable"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_strided_and_expanded_inputs(dtype: torch.dtype, trainable: bool) -> None:
    head = ordinary().to(dtype)
    c = upstream(37)
    want = run(head, c, trainable)
    strided = head._replace(
        hidden=torch.stack([head.hidden, -head.hidden], 1)[:, 0],
        weight=head.weight.T.contiguous().T,
        targets=torch.stack([head.targets, head.targets + 1], 1)[:, 0],
    )
    assert not strided.hidden.is_contiguous()
    assert not strided.weight.is_contiguous()
    leaf, weight = head.hidden.clone().requires_grad_(), head.weight.T.contiguous().requires_grad_(trainable)
    logps = linear_logps(torch.stack([leaf, -leaf], 1)[:, 0], weight.T, strided.targets)
    logps.backward(c)
    assert torch.equal(logps.detach(), want[0])
    assert torch.equal(leaf.grad, want[1])
    if trainable:
        assert torch.equal(weight.grad.T, want[2])
    # One row and one token for all: strides of 0.
    one = linear_logps(head.hidden[1:2].expand(5, -1), head.weight, head.targets[1].expand(5))
    torch.testing.assert_close(one, want[0][1].expand(5), rtol=1e-6, atol=0)


@pytest.mark.parametrize("shape", [(36,), (4, 9), (2, 3, 6), (4, 0), (0, 3)])
def test_leading_dimensions(shape: tuple[int, ...]) -> None:
    hidden, weight, targets = torch.randn(*shape, 8), torch.randn(19, 8), torch.randint(0, 19, shape)
    hidden.requires_grad_()
    logps = linear_logps(hidden, weight, targets)
    assert logps.shape == shape
    flat = linear_logps(hidden.reshape(-1, 8), weight, targets.reshape(-1))
    assert torch.equal(logps.reshape(-1), flat)
    logps.sum().backward()
    assert hidden.grad.shape == hidden.shape


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("trainable", [False, True], ids=["frozen", "trainable"])
def test_a_hidden_state_that_is_not_finite_spoils_its_own_row_alone(value: float, trainable: bool) -> None:
    head = ordinary()
    clean = run(head, torch.ones(37), trainable)
    head.hidden[2, 7] = value  # a valid row
    head.hidden[5, 3] = value  # an ignored one: nobody reads it
    logps, gradient, *_ = run(head, torch.ones(37), trainable)
    rows = torch.arange(37) != 2
    assert logps[2].isnan()
    assert torch.equal(logps[rows], clean[0][rows])
    assert torch.equal(gradient[rows], clean[1][rows])


@pytest.mark.parametrize("trainable", [False, True], ids=["frozen", "trainable"])
def test_backward_twice_gives_the_same(trainable: bool) -> None:
    head = ordinary()
    leaves = [head.hidden.requires_grad_(), *([head.weight.requires_grad_()] if trainable else [])]
    logps = linear_logps(head.hidden, head.weight, head.targets)
    first = torch.autograd.grad(logps, leaves, upstream(37), retain_graph=True)
    second = torch.autograd.grad(logps, leaves, upstream(37))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_an_expanded_upstream_gradient() -> None:
    """sum() hands back a gradient of stride 0."""
    head = Head(torch.randn(9, 8), torch.randn(17, 8), torch.randint(0, 17, (9,)))
    want = exact(head, torch.ones(9))
    weight = head.weight.clone().requires_grad_()
    linear_logps(head.hidden, weight, head.targets).sum().backward()
    torch.testing.assert_close(weight.grad.double(), want.weight, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("problem", PROBLEMS)
def test_the_reference_is_right_too(problem: str) -> None:
    head = PROBLEMS[problem]().to(torch.float64)
    logps = reference.linear_logps(head.hidden, head.weight, head.targets, bias=head.bias, **head.options())
    truth = exact(head, upstream(len(head.targets)))
    torch.testing.assert_close(logps, truth.logps, rtol=1e-12, atol=1e-12 * (1 + largest_logit(head)))
