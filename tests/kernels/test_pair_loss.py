"""FusedPreferenceLoss and FusedSynPOLoss: every objective through every path, layouts, metrics, references."""

from typing import Any

import pytest
import torch
from torch import Tensor

from synpo_kernels import FusedPreferenceLoss, FusedSynPOLoss, PreferenceOutput, objectives, pair_loss_op, reference
from tests.closeness import assert_close, tolerance
from tests.kernels.oracle import Head, exact, largest_logit, naive

V, H = 203, 24
SETTINGS: dict[str, dict[str, Any]] = {
    "synpo": {"alpha": 5.0}, "dpo": {}, "dpop": {"dpop_lambda": 3.0}, "ipo": {"beta": 0.5}, "simpo": {}, "kto": {},
    "cpo": {}, "orpo": {"beta": 0.5},
}  # fmt: skip


def problem(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Three pairs with prompts, padding, a one-token answer and one that fills its row."""
    labels = torch.randint(0, V, (6, 9))
    for row, (start, end) in enumerate([(2, 6), (0, 9), (4, 5), (2, 9), (1, 3), (5, 8)]):
        labels[row, :start] = labels[row, end:] = -100
    return torch.randn(6, 9, H).to(dtype), (0.3 * torch.randn(V, H)).to(dtype), labels, torch.randn(V).to(dtype)


def references(labels: Tensor) -> Tensor:
    """Per position, with garbage where nothing counts."""
    refs = -4 - torch.rand(labels.shape, dtype=torch.float64)
    return refs.masked_fill(labels == -100, float("nan"))


@pytest.mark.parametrize("path", ["frozen", "stored", "scored again"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("objective", SETTINGS)
def test_gradients_are_those_of_the_log_probs(
    objective: str, dtype: torch.dtype, path: str, monkeypatch: pytest.MonkeyPatch, passes: str, poison: None
) -> None:
    """c_t from the objective on the closed forms' log-probs; the gradients from c_t through the closed forms."""
    hidden, weight, labels, bias = problem(dtype)
    refs = references(labels)
    head = Head(hidden.flatten(0, 1), weight, labels.flatten(), bias, logit_scale=0.8, softcap=20.0)
    valid = labels.flatten() != -100
    logps = exact(head, torch.zeros(54)).logps[valid].requires_grad_()
    cu_seqlens = torch.nn.functional.pad((labels != -100).sum(1).cumsum(0), (1, 0))
    losses = objectives.REGISTRY[objective].function(
        logps, cu_seqlens, ref_logps=refs.flatten()[valid], **SETTINGS[objective]
    )
    (coef,) = torch.autograd.grad(losses.mean(), logps)
    c = torch.zeros(54, dtype=torch.float64).masked_scatter(valid, coef)
    truth, plain = exact(head, c), naive(head, c)
    logit = H**0.5 * (1 + largest_logit(head))

    if path == "scored again":
        monkeypatch.setattr(pair_loss_op, "workspace_bytes", lambda *_: 8)
    leaves = [hidden.requires_grad_(), *([] if path == "frozen" else [weight.requires_grad_(), bias.requires_grad_()])]
    loss_fn = FusedPreferenceLoss(objective, logit_scale=0.8, softcap=20.0, **SETTINGS[objective])
    out = loss_fn(hidden, weight, labels, bias, ref_logps=refs)
    # An error of the log-probs moves c_t as well: by the curvature of the objective, a few units a nat at these values.
    acc = torch.finfo(out.loss.dtype).eps
    curvature = 60 * float(coef.abs().max() + 1)
    assert_close(out.loss.detach(), losses.mean().detach(), acc * logit * curvature, "loss")
    for name, gradient in zip(("hidden", "weight", "bias"), torch.autograd.grad(out.loss, leaves), strict=False):
        assert gradient.dtype == dtype
        want, by_plain = getattr(truth, name), getattr(plain, name)
        scale = (V**0.5 + logit * curvature) * float(c.abs().max()) * 4
        # The gradient waits in the inputs' dtype for the upstream scalar: its rounding comes twice.
        allowed = tolerance(want, by_plain, dtype, dtype, 1, scale) + torch.finfo(dtype).eps * want.abs()
        assert_close(gradient.view(want.shape), want, allowed, f"gradient of {name}")


@pytest.mark.parametrize("objective", SETTINGS)
def test_padded_is_packed(objective: str, passes: str) -> None:
    hidden, weight, labels, bias = problem()
    refs, valid = references(labels), labels != -100
    cu_seqlens = torch.nn.functional.pad(valid.sum(1).cumsum(0), (1, 0)).to(torch.int32)
    results = []
    for packed in (False, True):
        h, w, b = (t.clone().requires_grad_() for t in (hidden, weight, bias))
        loss_fn = FusedPreferenceLoss(objective, **SETTINGS[objective])
        if packed:
            out = loss_fn(h[valid], w, labels[valid], b, cu_seqlens, ref_logps=refs[valid])
        else:
            out = loss_fn(h, w, labels, b, ref_logps=refs)
        results.append((*(x.detach() for x in out), *torch.autograd.grad(out.loss, (h, w, b))))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-13, atol=1e-15)


@pytest.mark.parametrize("objective", SETTINGS)
def test_metrics(objective: str) -> None:
    hidden, weight, labels, _ = problem()
    refs = references(labels)
    out = FusedPreferenceLoss(objective, **SETTINGS[objective])(
        hidden.requires_grad_(), weight.requires_grad_(), labels, ref_logps=refs
    )
    valid = labels != -100
    logps = reference.linear_logps(hidden.detach(), weight.detach(), labels)
    means, sums = logps.sum(1) / valid.sum(1), logps.sum(1)
    beta = objectives.resolve(objective, SETTINGS[objective])["beta"]
    ref_sums = refs.nan_to_num(0.0).sum(1)
    want = {
        "synpo": means.exp(), "simpo": beta * means, "orpo": beta * means, "cpo": beta * (sums - ref_sums)
    }.get(objective, beta * (sums - ref_sums))  # fmt: skip
    language = (logps.exp() * valid).sum(1) / valid.sum(1)
    assert isinstance(out, PreferenceOutput)
    assert out.loss.requires_grad
    close = {"rtol": 1e-12, "atol": 1e-12}
    torch.testing.assert_close(torch.cat([out.chosen_logps, out.rejected_logps]), means, **close)
    torch.testing.assert_close(torch.cat([out.chosen_rewards, out.rejected_rewards]), want, **close)
    torch.testing.assert_close(out.language, language[:3], **close)
    for metric in out[1:]:
        assert metric.shape == (3,)
        assert not metric.requires_grad


def test_rewards_of_cpo_without_a_reference_are_beta_times_l() -> None:
    hidden, weight, labels, _ = problem()
    out = FusedPreferenceLoss("cpo", beta=0.4)(hidden, weight, labels)
    sums = reference.linear_logps(hidden, weight, labels).sum(1)
    torch.testing.assert_close(torch.cat([out.chosen_rewards, out.rejected_rewards]), 0.4 * sums)


def test_results_have_the_accumulators_dtype() -> None:
    for dtype, result in (
        (torch.float64, torch.float64),
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float32),
    ):
        hidden, weight, labels, bias = problem(dtype)
        for value in FusedSynPOLoss()(hidden, weight, labels, bias):
            assert value.dtype == result


@pytest.mark.parametrize("trainable", [False, True], ids=["frozen", "trainable"])
def test_every_shape_of_the_reference(trainable: bool) -> None:
    hidden, weight, labels, _ = problem()
    weight.requires_grad_(trainable)
    refs, valid = references(labels), labels != -100
    shapes = [refs, refs[valid], refs.nan_to_num(0.0).sum(1), refs.nan_to_num(0.0).sum(1).float()]
    for objective in ("dpo", lambda logps, cu, ref_logps: objectives.dpo(logps, cu, ref_logps=ref_logps)):
        losses = [FusedPreferenceLoss(objective)(hidden, weight, labels, ref_logps=shape).loss for shape in shapes]
        for loss in losses[1:]:
            torch.testing.assert_close(loss, losses[0], rtol=1e-6, atol=0)


def test_a_callable_gets_the_valid_tokens_and_its_own_hyperparameters() -> None:
    hidden, weight, labels, _ = problem()
    hidden.requires_grad_()
    weight.requires_grad_()
    seen = {}

    def margin(logps: Tensor, cu_seqlens: Tensor, *, ref_logps: Tensor | None = None, width: float) -> Tensor:
        seen.update(logps=logps.detach(), cu=cu_seqlens, ref=ref_logps)
        chosen, rejected = objectives.segment_sums(logps, cu_seqlens).chunk(2)
        return (width - chosen + rejected).relu()

    refs = references(labels)
    out = FusedPreferenceLoss(margin, width=100.0)(hidden, weight, labels, ref_logps=refs)
    valid = labels != -100
    logps = reference.linear_logps(hidden, weight, labels)
    torch.testing.assert_close(seen["logps"], logps[valid].detach())
    assert seen["cu"].tolist() == [0, *valid.sum(1).cumsum(0).tolist()]
    assert torch.equal(seen["ref"], refs[valid])
    want = (100 - logps.sum(1)[:3] + logps.sum(1)[3:]).relu().mean()
    torch.testing.assert_close(out.loss, want)
    for a, b in zip(*(torch.autograd.grad(x, (hidden, weight)) for x in (out.loss, want)), strict=True):
        torch.testing.assert_close(a, b)
    assert out.chosen_rewards.shape == (3,)


def test_backward_scales_with_the_upstream_gradient_and_repeats() -> None:
    hidden, weight, labels, bias = problem()
    leaves = [t.requires_grad_() for t in (hidden, weight, bias)]
    loss = FusedSynPOLoss()(hidden, weight, labels, bias).loss
    one = torch.autograd.grad(loss, leaves, retain_graph=True)
    minus_three = torch.autograd.grad(loss, leaves, torch.tensor(-3.0, dtype=torch.float64), retain_graph=True)
    again = torch.autograd.grad(loss, leaves)
    for a, b, c in zip(one, minus_three, again, strict=True):
        torch.testing.assert_close(b, -3 * a)
        assert torch.equal(a, c)


def test_a_row_that_is_not_finite_makes_the_loss_nan() -> None:
    for value in (float("nan"), float("inf")):
        hidden, weight, labels, _ = problem()
        hidden[1, 3, 0] = value
        out = FusedSynPOLoss()(hidden, weight, labels)
        assert out.loss.isnan()
        assert out.chosen_logps.isnan().tolist() == [False, True, False]
        assert not out.rejected_logps.isnan().any()


def test_what_an_ignored_position_holds_does_not_matter() -> None:
    hidden, weight, labels, _ = problem()
    clean = FusedSynPOLoss()(hidden, weight, labels)
    hidden[labels == -100] = float("nan")
    leaf = hidden.requires_grad_()
    dirty = FusedSynPOLoss()(leaf, weight, labels)
    assert torch.equal(clean.loss, dirty.loss.detach())
    dirty.loss.backward()
    assert leaf.grad.isfinite().all()
    assert (leaf.grad[labels == -100] == 0).all()


def test_settings_are_shown_and_kept() -> None:
    loss_fn = FusedSynPOLoss(alpha=7.0, form="logsigmoid", softcap=30.0)
    assert loss_fn.hyperparameters == {"alpha": 7.0, "beta": 0.2, "form": "logsigmoid"}
    for part in ("objective='synpo'", "alpha=7.0", "form='logsigmoid'", "softcap=30.0"):
        assert part in repr(loss_fn)
    assert not list(loss_fn.parameters())
    assert FusedPreferenceLoss(objectives.dpo).objective == "dpo"
