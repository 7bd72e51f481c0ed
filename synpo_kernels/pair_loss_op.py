"""The op behind the preference losses: pairs are scored, an objective evaluated on them, gradients formed, in one pass.

The loss depends on the model only through per-token log-probs l_t, so its gradients are those of l_t weighted by c_t
= dL / dl_t.

- Frozen head: g_t = dl_t / d hidden_t comes out of the scoring pass, and grad hidden_t = c_t g_t. Two matrix products.
- Trainable head: c_t is known once both answers of a pair are scored, so whole pairs are scored into a workspace of
  exp(z - z_y), from which both gradients are made. Three products. Pairs that do not fit, and objectives that couple
  the pairs of a call, are scored again: four.

The backward pass multiplies by the incoming scalar.
"""

import itertools
import json
from typing import Any

import torch
from torch import Tensor

from . import objectives
from .device import workspace_bytes
from .door import OPTIONS_SCHEMA, Door, Options, compact, own_precision, refuse_second_order, scatter
from .pair_objective import BoundObjective
from .scoring import (
    Gradients,
    Head,
    open_head,
    recomputed_gradients,
    score,
    stored_gradients,
    tile_dtype,
    vocabulary_size,
    widest_slice,
)
from .vocab_passes import accumulator


def references(ref_logps: Tensor | None, door: Door, labels: Tensor) -> Tensor | None:
    """Reference log-probs as (2B,) sums or (n,) per valid token, from either of these or from the labels' shape."""
    if ref_logps is None:
        return None
    values = ref_logps.reshape(-1).to(accumulator(door.hidden.dtype))
    if ref_logps.shape == (len(door.bounds) - 1,):
        return values
    if ref_logps.shape == labels.shape and door.kept is not None:
        values = values[door.kept]
    if values.numel() != len(door.targets):
        raise ValueError(
            f"ref_logps has shape {tuple(ref_logps.shape)}; expected ({len(door.bounds) - 1},) sums per sequence, "
            f"({len(door.targets)},) per valid token, or the labels' {tuple(labels.shape)}"
        )
    return values


def refuse_empty_answers(bounds: list[int], ignore_index: int) -> None:
    pairs = len(bounds) // 2
    for i, (start, end) in enumerate(itertools.pairwise(bounds)):
        if start == end:
            side = "chosen" if i < pairs else "rejected"
            raise ValueError(
                f"labels: the {side} answer of pair {i % pairs} (row {i}) has no valid token: all are {ignore_index}"
            )


def _chunks(bounds: list[int], row_bytes: int, workspace: int) -> list[tuple[list[int], bool]]:
    """Consecutive pairs whose tokens fit the workspace together, and whether they do: a pair alone may not."""
    pairs = len(bounds) // 2
    chunks: list[tuple[list[int], bool]] = []
    used = 0
    for pair in range(pairs):
        tokens = bounds[pair + 1] - bounds[pair] + bounds[pairs + pair + 1] - bounds[pairs + pair]
        size = tokens * row_bytes
        fits = size <= workspace
        if chunks and fits and chunks[-1][1] and used + size <= workspace:
            chunks[-1][0].append(pair)
            used += size
        else:
            chunks.append(([pair], fits))
            used = size
    return chunks


def _trainable(
    door: Door, head: Head, loss: BoundObjective, coupled: bool, refs: Tensor | None, out: Gradients
) -> Tensor:
    """Log-probs (n,) of all pairs, chunk by chunk of whole pairs; gradients into ``out``."""
    bounds, cu, device = door.bounds, door.cu_seqlens, door.hidden.device
    pairs = len(bounds) // 2
    logps = torch.empty(len(door.targets), dtype=accumulator(door.hidden.dtype), device=device)
    row_bytes = widest_slice(head) * tile_dtype(door.hidden).itemsize
    workspace = workspace_bytes(head.workspace_mb, device, True)
    chunks = [(list(range(pairs)), False)] if coupled else _chunks(bounds, row_bytes, workspace)
    for members, fits in chunks:
        first, last = members[0], members[-1] + 1
        spans = [(bounds[first], bounds[last]), (bounds[pairs + first], bounds[pairs + last])]
        # On the device, from what is there: a copy from the host would wait for the chunks before.
        chosen, rejected = (cu[first : last + 1], cu[pairs + first : pairs + last + 1])
        cu_seqlens = torch.cat([chosen - chosen[0], (rejected - rejected[0])[1:] + (chosen[-1] - chosen[0])])
        ref = None if refs is None else torch.cat([refs[first:last], refs[pairs + first : pairs + last]])

        def coefficients(chunk_logps: Tensor, cu_seqlens: Tensor = cu_seqlens, ref: Tensor | None = ref) -> Tensor:
            return loss.evaluate(chunk_logps, cu_seqlens, ref).coef

        hidden, targets = (torch.cat([x[a:b] for a, b in spans]) for x in (door.hidden, door.targets))
        part = out._replace(hidden=None if out.hidden is None else out.hidden.new_empty(hidden.shape))
        run = stored_gradients if fits else recomputed_gradients
        chunk_logps = run(hidden, targets, head, coefficients, part)
        start = 0
        for a, b in spans:
            logps[a:b] = chunk_logps[start : start + b - a]
            if out.hidden is not None and part.hidden is not None:
                out.hidden[a:b] = part.hidden[start : start + b - a]
            start += b - a
    return logps


def _gradient_dtype(dtype: torch.dtype) -> torch.dtype:
    """fp16 gradients wait in float32 for the loss scaler's factor: at their true size they would underflow."""
    return torch.float32 if dtype == torch.float16 else dtype


@own_precision
def _pair_loss(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None,
    cu_seqlens: Tensor,
    ref_logps: Tensor | None,
    objective: str,
    hyperparameters: str,
    *rest: Any,
) -> tuple[Tensor, ...]:
    options = Options(*rest)
    needs, trainable = options.needs, options.trainable
    head = open_head(weight, bias, options)
    door = compact(hidden, labels, cu_seqlens, options, vocabulary_size(head), "labels")
    refuse_empty_answers(door.bounds, options.ignore_index)
    cu = door.cu_seqlens
    refs = references(ref_logps, door, labels)
    if refs is not None and len(refs) != len(cu) - 1:
        refs = objectives.segment_sums(refs, cu)
    loss = BoundObjective(objective, json.loads(hyperparameters), len(door.bounds) // 2)

    acc = accumulator(hidden.dtype)
    out = Gradients(
        hidden.new_empty(door.hidden.shape, dtype=acc) if trainable and needs[0] else None,
        weight.new_zeros(weight.shape, dtype=acc) if needs[1] else None,
        weight.new_zeros(len(weight), dtype=acc) if needs[2] else None,
    )
    if trainable:
        logps = _trainable(door, head, loss, objectives.REGISTRY[objective].coupled, refs, out)
        metrics, _ = loss.evaluate(logps, cu, refs, want_coef=False)
    else:
        scores, gradient = score(door.hidden, door.targets, head, needs[0])
        metrics, coef = loss.evaluate(scores.logps, cu, refs, want_coef=needs[0])
        if needs[0]:
            out = out._replace(hidden=gradient.mul_(coef[:, None]))

    grad_hidden = hidden.new_empty((0, hidden.shape[1]), dtype=_gradient_dtype(hidden.dtype))
    if out.hidden is not None:
        grad_hidden = scatter(out.hidden.to(grad_hidden.dtype), door.kept, len(hidden))
    grad_weight, grad_bias = (
        weight.new_empty(0, dtype=_gradient_dtype(weight.dtype)) if g is None else g.to(_gradient_dtype(weight.dtype))
        for g in (out.weight, out.bias)
    )
    return *metrics, grad_hidden, grad_weight, grad_bias


def _pair_loss_fake(
    hidden: Tensor, weight: Tensor, labels: Tensor, bias: Tensor | None, cu_seqlens: Tensor, *rest: Any
) -> tuple[Tensor, ...]:
    needs = rest[-1]
    acc, pairs = accumulator(hidden.dtype), (cu_seqlens.shape[0] - 1) // 2
    return (
        hidden.new_empty((), dtype=acc),
        *(hidden.new_empty(pairs, dtype=acc) for _ in range(5)),
        hidden.new_empty((hidden.shape[0] if needs[0] else 0, hidden.shape[1]), dtype=_gradient_dtype(hidden.dtype)),
        weight.new_empty(weight.shape if needs[1] else 0, dtype=_gradient_dtype(weight.dtype)),
        weight.new_empty(weight.shape[0] if needs[2] else 0, dtype=_gradient_dtype(weight.dtype)),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.needs, ctx.dtypes = inputs[-1], (inputs[0].dtype, inputs[1].dtype, inputs[1].dtype)
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)  # or zeros of the head's size stand in for the gradient of grad_weight
    ctx.save_for_backward(*output[6:])


def _autograd(ctx: Any, grad_loss: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    refuse_second_order("a fused preference loss")
    if grad_loss is None:
        return (None,) * 15
    hidden, weight, bias = (
        (g * grad_loss.to(g.dtype)).to(dtype) if need else None
        for g, need, dtype in zip(ctx.saved_tensors, ctx.needs, ctx.dtypes, strict=True)
    )
    return hidden, weight, None, bias, *(None,) * 11


_LIBRARY = torch.library.Library("synpo", "FRAGMENT")
_LIBRARY.define(
    "pair_loss(Tensor hidden, Tensor weight, Tensor labels, Tensor? bias, Tensor cu_seqlens, Tensor? ref_logps,"
    f" str objective, str hyperparameters, {OPTIONS_SCHEMA}) -> (Tensor loss, Tensor chosen_logps,"
    " Tensor rejected_logps, Tensor chosen_rewards, Tensor rejected_rewards, Tensor language,"
    " Tensor grad_hidden, Tensor grad_weight, Tensor grad_bias)"
)
_LIBRARY.impl("pair_loss", _pair_loss, "CompositeExplicitAutograd")
torch.library.register_fake("synpo::pair_loss", _pair_loss_fake, lib=_LIBRARY)
torch.library.register_autograd("synpo::pair_loss", _autograd, setup_context=_setup_context, lib=_LIBRARY)
