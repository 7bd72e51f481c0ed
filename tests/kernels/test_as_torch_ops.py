"""What PyTorch does with an op: gradcheck, opcheck, compile, autocast, checkpointing, inference mode, second order."""

import itertools
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from synpo_kernels import FusedPreferenceLoss, FusedSynPOLoss, linear_logps, reference
from synpo_kernels.door import open_options
from tests.kernels.oracle import exact
from tests.kernels.problems import ordinary, upstream

NEEDS = [needs for needs in itertools.product([False, True], repeat=3) if any(needs)]
OPTIONS = {"ignore_index": -100, "logit_scale": 1.0, "tp_group": None, "workspace_mb": None, "check": False}


def problem(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """hidden (4, 3, H), weight, labels (4, 3) with ignored tokens, bias: two pairs."""
    labels = torch.tensor([[-100, 3, 6], [5, -100, 0], [1, 2, 2], [-100, -100, 4]])
    return torch.randn(4, 3, 5, dtype=dtype), torch.randn(7, 5, dtype=dtype), labels, torch.randn(7, dtype=dtype)


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("needs", NEEDS)
def test_gradcheck_of_log_probs(needs: tuple[bool, bool, bool], softcap: float | None, passes: str) -> None:
    hidden, weight, labels, bias = problem()
    inputs = [t.requires_grad_(need) for t, need in zip((hidden, weight, bias), needs, strict=True)]
    assert torch.autograd.gradcheck(
        lambda h, w, b: linear_logps(h, w, labels, bias=b, logit_scale=0.7, softcap=softcap), inputs
    )


@pytest.mark.parametrize("form", ["sigmoid", "logsigmoid"])
@pytest.mark.parametrize("needs", NEEDS)
def test_gradcheck_of_a_pair_loss(needs: tuple[bool, bool, bool], form: str, passes: str) -> None:
    hidden, weight, labels, bias = problem()
    inputs = [t.requires_grad_(need) for t, need in zip((hidden, weight, bias), needs, strict=True)]
    loss_fn = FusedSynPOLoss(alpha=5.0, beta=0.3, form=form, logit_scale=0.7, softcap=3.0)
    assert torch.autograd.gradcheck(lambda h, w, b: 3 * loss_fn(h, w, labels, b).loss, inputs)


# opcheck runs the op under functionalisation and AOT autograd with both static and symbolic shapes.
@pytest.mark.parametrize(
    "needs", [(False, False, False), (True, False, False), (True, True, False), (True, True, True)]
)
def test_opcheck(needs: tuple[bool, bool, bool]) -> None:
    hidden, weight, labels, bias = problem(torch.float32)
    hidden, weight, bias = (t.requires_grad_(need) for t, need in zip((hidden, weight, bias), needs, strict=True))
    options = open_options(hidden, weight, bias, softcap=None, **OPTIONS)
    flat = hidden.detach().flatten(0, 1).requires_grad_(needs[0])
    torch.library.opcheck(torch.ops.synpo.linear_logps.default, (flat, weight, labels.flatten(), bias, *options))
    cu_seqlens, settings = torch.tensor([0, 3, 6, 9, 12]), '{"alpha": 30.0, "beta": 0.2, "form": "sigmoid"}'
    arguments = (flat, weight, labels, bias, cu_seqlens, None, "synpo", settings, *options)
    torch.library.opcheck(torch.ops.synpo.pair_loss.default, arguments)


@pytest.fixture
def dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize(("backend", "trainable"), [("aot_eager", False), ("aot_eager", True), ("inductor", True)])
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")  # torch.utils.mkldnn
def test_compiled_whole(backend: str, trainable: bool, dynamo: None) -> None:
    """fullgraph: no graph break; the second length makes the shapes symbolic."""
    loss_fn = FusedSynPOLoss()

    def work(hidden: Tensor, weight: Tensor, labels: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        logps = linear_logps(torch.tanh(hidden), weight, labels, bias=bias)
        return logps, loss_fn(torch.tanh(hidden), weight, labels, bias).loss

    compiled = torch.compile(work, fullgraph=True, backend=backend)
    for repeat in (1, 4):
        hidden, weight, labels, bias = problem(torch.float32)
        hidden, labels = hidden.repeat(1, repeat, 1).requires_grad_(), labels.repeat(1, repeat)
        leaves = [hidden, *([weight.requires_grad_(), bias.requires_grad_()] if trainable else [])]
        eager, traced = (
            (logps, loss, *torch.autograd.grad((logps * labels).sum() + 3 * loss, leaves))
            for logps, loss in (run(hidden, weight, labels, bias) for run in (work, compiled))
        )
        for ours, want in zip(traced, eager, strict=True):
            torch.testing.assert_close(ours, want, rtol=1e-5, atol=1e-5)  # inductor has its own tanh


@pytest.mark.parametrize("trainable", [False, True], ids=["frozen", "trainable"])
def test_autocast_casts_the_inputs_and_nothing_else(trainable: bool, passes: str) -> None:
    """Under autocast the op is the op on bfloat16 inputs: its own float32 products are not rounded."""
    head, c = ordinary(), upstream(37)
    hidden, weight = head.hidden.requires_grad_(), head.weight.requires_grad_(trainable)
    with torch.autocast(torch.get_default_device().type, torch.bfloat16):
        logps = linear_logps(hidden, weight, head.targets)
        logps.backward(c)  # inside, where autocast is on for the backward pass as well
    assert logps.dtype == torch.float32
    assert hidden.grad.dtype == torch.float32
    low = hidden.detach().bfloat16().requires_grad_(), weight.detach().bfloat16().requires_grad_(trainable)
    want = linear_logps(*low, head.targets)
    want.backward(c)
    assert torch.equal(logps, want)
    assert torch.equal(hidden.grad, low[0].grad.float())
    if trainable:
        assert torch.equal(weight.grad, low[1].grad.float())
    truth = exact(head._replace(hidden=low[0].detach(), weight=low[1].detach()), c)
    assert (logps.double() - truth.logps).abs().max() < 1e-4  # bfloat16 logits of this size are 1e-1 off


@pytest.mark.parametrize("trainable", [False, True], ids=["frozen", "trainable"])
def test_autocast_around_a_pair_loss(trainable: bool, passes: str) -> None:
    hidden, weight, labels, bias = problem(torch.float32)
    low = [t.bfloat16().requires_grad_() for t in (hidden, weight, bias)]
    leaves = [t.requires_grad_() for t in (hidden, weight, bias)]
    if not trainable:
        for group in (low, leaves):
            group[1].requires_grad_(False)
            group[2].requires_grad_(False)
    with torch.autocast(torch.get_default_device().type, torch.bfloat16):
        loss = FusedSynPOLoss()(leaves[0], leaves[1], labels, leaves[2]).loss
    want = FusedSynPOLoss()(low[0], low[1], labels, low[2]).loss
    loss.backward()
    want.backward()
    assert torch.equal(loss, want)
    assert torch.equal(leaves[0].grad, low[0].grad.float())


def test_float64_stays_float64_under_autocast() -> None:
    hidden, weight, labels, _ = problem()
    with torch.autocast(torch.get_default_device().type, torch.bfloat16):
        assert torch.equal(linear_logps(hidden, weight, labels), linear_logps(hidden, weight, labels))
        inside = linear_logps(hidden, weight, labels)
    assert inside.dtype == torch.float64
    torch.testing.assert_close(inside, reference.linear_logps(hidden, weight, labels), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("trainable", [False, True], ids=["frozen", "trainable"])
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_activation_checkpointing(use_reentrant: bool, trainable: bool) -> None:
    hidden, weight, labels, _ = problem(torch.float32)
    weight.requires_grad_(trainable)
    loss_fn, body = FusedSynPOLoss(), nn.Linear(5, 5)

    def step(x: Tensor) -> Tensor:
        h = body(x)
        return loss_fn(h, weight, labels).loss + linear_logps(h, weight, labels).sum()

    gradients = []
    for run in (step, lambda x: checkpoint(step, x, use_reentrant=use_reentrant)):
        leaves = [hidden.clone().requires_grad_(), *body.parameters(), *([weight] if trainable else [])]
        for leaf in leaves:
            leaf.grad = None
        run(leaves[0]).backward()
        gradients.append([leaf.grad.clone() for leaf in leaves])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


@pytest.mark.parametrize("trainable", [False, True], ids=["frozen", "trainable"])
def test_a_second_derivative_is_refused(trainable: bool) -> None:
    hidden, weight, labels, _ = problem()
    hidden.requires_grad_()
    weight.requires_grad_(trainable)
    for value in (linear_logps(hidden, weight, labels).square().sum(), FusedSynPOLoss()(hidden, weight, labels).loss):
        with pytest.raises(RuntimeError, match="differentiable once"):
            torch.autograd.grad(value, hidden, create_graph=True)


@pytest.mark.parametrize("objective", ["synpo", "kto", lambda logps, cu, ref_logps: logps[cu[:-1]][:2]])
def test_inference_mode(objective: object) -> None:
    hidden, weight, labels, _ = problem()
    loss_fn, refs = FusedPreferenceLoss(objective), torch.tensor([-3.0, -2.0, -4.0, -1.0])
    want = loss_fn(hidden.requires_grad_(), weight, labels, ref_logps=refs)
    for mode in (torch.no_grad(), torch.inference_mode()):
        with mode:
            out = loss_fn(hidden, weight, labels, ref_logps=refs)
            assert all(torch.equal(a, b) for a, b in zip(out, want, strict=True))
            assert not out.loss.requires_grad
            linear_logps(hidden, weight, labels)


def test_the_loss_scaler_of_fp16_reaches_small_gradients(passes: str) -> None:
    """Gradients below fp16's smallest number (6e-8) must not be rounded before the scaler's factor is in."""
    hidden, weight, labels, _ = problem()
    factor = 2.0**16
    for trainable in (False, True):
        low = [t.half().requires_grad_() for t in (hidden, weight)]
        low[1].requires_grad_(trainable)
        high = [t.detach().double().requires_grad_() for t in low]
        for leaves in (low, high):
            (FusedSynPOLoss(alpha=0.001, beta=1e-5)(*leaves, labels).loss * factor).backward()
        assert 0 < high[0].grad.abs().max() / factor < 6e-5
        for ours, want in zip(low[: 1 + trainable], high, strict=False):
            torch.testing.assert_close(ours.grad.double(), want.grad, rtol=2e-3, atol=2e-5)
