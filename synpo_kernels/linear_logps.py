"""Per-token log-probs of given tokens, straight from hidden states and lm_head, without (N, V) logits.

With z the logits and y the target of a token, the target's own logit is the softmax reference:

    s = sum_{v != y} exp(z_v - z_y)        log p = -log(1 + s)        p = 1 / (1 + s)

and the gradient of log p in the hidden state, which does not depend on the loss, comes out of the same pass over the
vocabulary:

    g = d log p / d hidden = (s d_y W[y] - sum_{v != y} exp(z_v - z_y) d_v W[v]) / (1 + s),     d_v = dz_v / d(h . W[v])

so with a frozen head the forward pass makes g, and the backward pass is one multiply by the incoming gradient: two
matrix products in all. No difference of nearly equal numbers is taken, so a confident token (p near 1) keeps its
relative accuracy. Where a logit passes z_y by more than vocab_passes.GUARD, the row's reference is raised ("shift");
then with t = exp(z_y - shift) the denominator 1 + s becomes t + s and log p = (z_y - shift) - log(t + s).
docs/linear_logps.md derives all of it.

With a trainable head the backward pass computes the probabilities again: four products in all. pair_loss.py does
whole pairs in three.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .door import (
    OPTIONS_SCHEMA,
    Options,
    autocast,
    check_inputs,
    compact,
    open_options,
    own_precision,
    refuse_second_order,
    scatter,
)
from .scoring import Scores, open_head, score, score_gradients, target_logits, vocabulary_size
from .vocab_passes import accumulator


@own_precision
def _forward(hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None, *rest: Any) -> tuple[Tensor, Tensor]:
    options = Options(*rest)
    head = open_head(weight, bias, options)
    ends = len(targets) * torch.arange(2, device=targets.device)
    door = compact(hidden, targets, ends, options, vocabulary_size(head))
    want_gradient = options.needs[0] and not options.trainable
    scores, gradient = score(door.hidden, door.targets, head, want_gradient)
    if want_gradient:
        gradient = scatter(gradient, door.kept, len(targets))
    return scatter(scores.logps, door.kept, len(targets)), gradient


def _forward_fake(
    hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None, *rest: Any
) -> tuple[Tensor, Tensor]:
    options, acc = Options(*rest), accumulator(hidden.dtype)
    rows = hidden.shape[0] if options.needs[0] and not options.trainable else 0
    return targets.new_empty(targets.shape, dtype=acc), hidden.new_empty((rows, hidden.shape[1]), dtype=acc)


@own_precision
def _backward(
    grad: Tensor, logps: Tensor, hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None, *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    options = Options(*rest)
    needs = options.needs
    head = open_head(weight, bias, options)
    ends = len(targets) * torch.arange(2, device=targets.device)
    door = compact(hidden, targets, ends, options._replace(check=False), vocabulary_size(head))
    logps, coef = (x if door.kept is None else x[door.kept] for x in (logps, grad))
    columns, owned = head.local(door.targets)
    one = torch.ones_like(logps)
    z_y = target_logits(door.hidden, columns, owned, head)
    scores = Scores(columns, owned, z_y, sums=-torch.expm1(logps), norm=one, logps=logps, local_scale=one)
    grad_weight = logps.new_zeros(weight.shape if needs[1] else 0)
    grad_bias = logps.new_zeros(len(weight) if needs[2] else 0)
    wanted = grad_weight if needs[1] else None, grad_bias if needs[2] else None
    g = score_gradients(door.hidden, scores, coef, head, *wanted, needs[0])
    if needs[0]:
        g = scatter(g.mul_(coef[:, None]), door.kept, len(targets))
    return g.to(hidden.dtype), grad_weight.to(weight.dtype), grad_bias.to(weight.dtype)


def _backward_fake(
    grad: Tensor, logps: Tensor, hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None, *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    needs = Options(*rest).needs
    return (
        hidden.new_empty((hidden.shape[0] if needs[0] else 0, hidden.shape[1])),
        weight.new_empty(weight.shape if needs[1] else 0),
        weight.new_empty(weight.shape[0] if needs[2] else 0),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    hidden, weight, targets, bias, *rest = inputs
    ctx.options, ctx.dtype = Options(*rest), hidden.dtype
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)  # or zeros of hidden's size stand in for the gradient of the unit gradient
    ctx.save_for_backward(*((output[0], hidden, weight, targets, bias) if ctx.options.trainable else output[1:]))


def _autograd(ctx: Any, grad: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
    refuse_second_order("linear_logps")
    nothing = (None,) * len(ctx.options)
    if grad is None:
        return None, None, None, None, *nothing
    if not ctx.options.trainable:
        (unit,) = ctx.saved_tensors
        # Rounded as it is written: on a GPU no float32 copy of it is made.
        rounded = torch.empty_like(unit, dtype=ctx.dtype)
        torch.mul(grad[:, None], unit, out=rounded)
        return rounded, None, None, None, *nothing
    grads = torch.ops.synpo.linear_logps_backward(grad, *ctx.saved_tensors, *ctx.options)
    grad_hidden, grad_weight, grad_bias = (
        g if need else None for g, need in zip(grads, ctx.options.needs, strict=True)
    )
    return grad_hidden, grad_weight, None, grad_bias, *nothing


_LIBRARY = torch.library.Library("synpo", "FRAGMENT")
_LIBRARY.define(
    f"linear_logps(Tensor hidden, Tensor weight, Tensor targets, Tensor? bias, {OPTIONS_SCHEMA})"
    " -> (Tensor logps, Tensor unit_gradient)"
)
_LIBRARY.define(
    "linear_logps_backward(Tensor grad, Tensor logps, Tensor hidden, Tensor weight, Tensor targets, Tensor? bias,"
    f" {OPTIONS_SCHEMA}) -> (Tensor grad_hidden, Tensor grad_weight, Tensor grad_bias)"
)
_LIBRARY.impl("linear_logps", _forward, "CompositeExplicitAutograd")
_LIBRARY.impl("linear_logps_backward", _backward, "CompositeExplicitAutograd")
torch.library.register_fake("synpo::linear_logps", _forward_fake, lib=_LIBRARY)
torch.library.register_fake("synpo::linear_logps_backward", _backward_fake, lib=_LIBRARY)
torch.library.register_autograd("synpo::linear_logps", _autograd, setup_context=_setup_context, lib=_LIBRARY)


def linear_logps(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    ignore_index: int = -100,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    tp_group: dist.ProcessGroup | None = None,
    workspace_mb: int | None = None,
    check: bool = False,
) -> Tensor:
    """Log-probs (nats) of given tokens: softmax of z = logit_scale * (hidden @ weight.T + bias), softcapped when asked.

    Equivalent to, without ever holding the (N, V) logits::

        logits = logit_scale * (hidden @ weight.T + bias)
        logits = softcap * torch.tanh(logits / softcap)
        logits.log_softmax(-1).gather(-1, targets[..., None])[..., 0]

    Shapes: hidden (..., H), weight (V, H), targets (...) int64, bias (V,). Already aligned: targets[t] is the token
    that hidden[t] predicts. hidden, weight and bias share one dtype: float64, float32, bfloat16 or float16 (or
    autocast is on). Returns: float32 (float64 for float64 inputs) in the shape of targets, 0.0 at positions that hold
    ignore_index. Differentiable once in hidden, weight and bias.

    tp_group: weight and bias are this rank's slice of the vocabulary, in rank order; targets are ids in the whole
    vocabulary; hidden is the same on every rank, and its gradient comes back summed over the ranks. workspace_mb
    bounds working memory (default 64 on a CPU and 640 on a GPU with a frozen head, 256 and 1300 with a trainable one).
    check=True also refuses values of hidden that are not finite, at the cost of a read of hidden. Errors: TypeError
    for dtypes, ValueError for shapes, devices, softcap <= 0 and workspace_mb < 1, IndexError for a target outside
    [0, V) (its position in the flattened targets and its value named), RuntimeError for a second derivative.
    """
    hidden, weight, bias = autocast(hidden, weight, bias)
    check_inputs(hidden, weight, targets, bias, softcap, workspace_mb)
    options = open_options(
        hidden,
        weight,
        bias,
        ignore_index=ignore_index,
        logit_scale=logit_scale,
        softcap=softcap,
        tp_group=tp_group,
        workspace_mb=workspace_mb,
        check=check,
    )
    flat = hidden.reshape(-1, hidden.shape[-1])
    logps: Tensor = torch.ops.synpo.linear_logps(flat, weight, targets.reshape(-1), bias, *options)[0]
    return logps.view(targets.shape)
