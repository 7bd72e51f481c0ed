"""Preference losses on whole pairs, from hidden states and lm_head: FusedSynPOLoss and FusedPreferenceLoss.

The loss depends on the model only through per-token log-probs l_t, so its gradients are those of l_t weighted by c_t
= dL / dl_t. One op scores the tokens, evaluates the objective on their log-probs, and forms the gradients in the same
forward pass:

- Frozen head: g_t = dl_t / d hidden_t comes out of the scoring pass, and grad hidden_t = c_t g_t. Two matrix products.
- Trainable head: c_t is known once both answers of a pair are scored, so whole pairs are scored into a workspace of
  exp(z - z_y), from which both gradients are made. Three products. Pairs that do not fit, and objectives that couple
  the pairs of a call, are scored again: four.

The backward pass multiplies by the incoming scalar. With a head that is frozen the working memory is bounded by
workspace_mb and 4 n H bytes for n valid tokens; a trainable one adds the float32 gradient of the head, 4 V H bytes.
"""

import itertools
import json
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from . import objectives
from .device import workspace_bytes
from .door import (
    OPTIONS_SCHEMA,
    Door,
    Options,
    autocast,
    check_devices,
    check_inputs,
    compact,
    open_options,
    own_precision,
    refuse_second_order,
    scatter,
)
from .linear_logps import linear_logps
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


class PreferenceOutput(NamedTuple):
    """float32 (float64 for float64 inputs); B pairs; all but loss are detached."""

    loss: Tensor  # scalar: mean over the pairs
    chosen_logps: Tensor  # (B,) mean log-prob per token, nats
    rejected_logps: Tensor  # (B,)
    chosen_rewards: (
        Tensor  # (B,) exp(mean) for synpo; beta (l - ref), beta mean l or beta l elsewhere: objectives.Objective.reward
    )
    rejected_rewards: Tensor  # (B,)
    language: Tensor  # (B,) mean token probability of the chosen


class _Evaluation(NamedTuple):
    """An objective's value on log-probs (n,) of B pairs."""

    metrics: tuple[Tensor, ...]  # what PreferenceOutput holds, in its order
    coef: Tensor  # (n,) c_t = d loss / d logps_t; (0,) where nobody asked


class _Loss(NamedTuple):
    """An objective bound to its hyperparameters and to the number of pairs its mean is over."""

    objective: str
    settings: dict[str, Any]
    pairs: int

    def evaluate(
        self, logps: Tensor, cu_seqlens: Tensor, ref_logps: Tensor | None, want_coef: bool = True
    ) -> _Evaluation:
        """Loss = sum of these pairs' losses / pairs, the metrics, and the tokens' coefficients."""
        if self.objective == "synpo":
            *metrics, coef = torch.ops.synpo.synpo_loss(
                logps, cu_seqlens, **self.settings, pairs=self.pairs, want_coef=want_coef
            )
            return _Evaluation(tuple(metrics), coef)
        return self.by_autograd(logps, cu_seqlens, ref_logps, want_coef)

    def by_autograd(self, logps: Tensor, cu_seqlens: Tensor, ref_logps: Tensor | None, want_coef: bool) -> _Evaluation:
        """``evaluate`` through objectives.py and autograd."""
        function = partial(objectives.REGISTRY[self.objective].function, ref_logps=ref_logps, **self.settings)
        if want_coef:
            # Inside an op's kernel autograd is switched off one level below grad mode; the guard lifts that for these
            # few small tensors, so that each objective is written once, without a hand-made derivative beside it.
            autograd = torch._C.DispatchKey.AutogradFunctionality
            with torch.enable_grad(), torch._C._SetExcludeDispatchKeyGuard(autograd, False):
                leaf = logps.detach().requires_grad_()
                loss = function(leaf, cu_seqlens).sum() / self.pairs
                (coef,) = torch.autograd.grad(loss, leaf)
        else:
            loss, coef = function(logps, cu_seqlens).sum() / self.pairs, logps.new_empty(0)
        summaries = _summaries(logps, cu_seqlens, ref_logps, self.objective, self.settings)
        return _Evaluation((loss.detach(), *summaries), coef)


def _synpo_loss(
    logps: Tensor, cu_seqlens: Tensor, alpha: float, beta: float, form: str, pairs: int, want_coef: bool
) -> tuple[Tensor, ...]:
    loss = _Loss("synpo", {"alpha": alpha, "beta": beta, "form": form}, pairs)
    metrics, coef = loss.by_autograd(logps, cu_seqlens, None, want_coef)
    return *metrics, coef


def _references(ref_logps: Tensor | None, door: Door, labels: Tensor) -> Tensor | None:
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


def _trainable(door: Door, head: Head, loss: _Loss, coupled: bool, refs: Tensor | None, out: Gradients) -> Tensor:
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


def _summaries(
    logps: Tensor, cu_seqlens: Tensor, refs: Tensor | None, objective: str, hyperparameters: dict[str, Any]
) -> list[Tensor]:
    """The five per-pair metrics of PreferenceOutput."""
    sums = objectives.segment_sums(logps, cu_seqlens)
    lengths = cu_seqlens.diff().to(logps.dtype)
    means = sums / lengths
    rewards = objectives.REGISTRY[objective].rewards(sums, means, refs, hyperparameters)
    language = objectives.segment_sums(logps.exp(), cu_seqlens) / lengths
    # Copies: the outputs of an op must not share memory.
    return [x.clone() for x in (*means.chunk(2), *rewards.chunk(2), language.chunk(2)[0])]


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
    _refuse_empty_answers(door.bounds, options.ignore_index)
    cu = door.cu_seqlens
    refs = _references(ref_logps, door, labels)
    if refs is not None and len(refs) != len(cu) - 1:
        refs = objectives.segment_sums(refs, cu)
    loss = _Loss(objective, json.loads(hyperparameters), len(door.bounds) // 2)

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


def _refuse_empty_answers(bounds: list[int], ignore_index: int) -> None:
    pairs = len(bounds) // 2
    for i, (start, end) in enumerate(itertools.pairwise(bounds)):
        if start == end:
            side = "chosen" if i < pairs else "rejected"
            raise ValueError(
                f"labels: the {side} answer of pair {i % pairs} (row {i}) has no valid token: all are {ignore_index}"
            )


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
# The inner op of the objective that has a kernel of its own (loss_triton.py, on CUDA); the default is objectives.py.
_LIBRARY.define(
    "synpo_loss(Tensor logps, Tensor cu_seqlens, float alpha, float beta, str form, int pairs, bool want_coef)"
    " -> (Tensor loss, Tensor chosen_logps, Tensor rejected_logps, Tensor chosen_rewards, Tensor rejected_rewards,"
    " Tensor language, Tensor coef)"
)
_LIBRARY.impl("synpo_loss", _synpo_loss, "CompositeExplicitAutograd")
_LIBRARY.impl("pair_loss", _pair_loss, "CompositeExplicitAutograd")
torch.library.register_fake("synpo::pair_loss", _pair_loss_fake, lib=_LIBRARY)
torch.library.register_autograd("synpo::pair_loss", _autograd, setup_context=_setup_context, lib=_LIBRARY)


class FusedPreferenceLoss(nn.Module):
    """Any preference objective on pairs, straight from hidden states and lm_head, without full-vocabulary logits.

    objective: a name or function of ``synpo_kernels.objectives``, or any callable of that shape (differentiable in
    torch, per-pair losses that do not depend on other pairs; evaluated by autograd outside the op, so a trainable
    head costs four products rather than three). ignore_index, logit_scale, softcap, tp_group, workspace_mb, check: as
    in ``linear_logps``. hyperparameters: the objective's own. Errors: ValueError for an unknown objective or
    hyperparameter, or one out of range.
    """

    def __init__(
        self,
        objective: str | Callable[..., Tensor],
        ignore_index: int = -100,
        *,
        logit_scale: float = 1.0,
        softcap: float | None = None,
        tp_group: dist.ProcessGroup | None = None,
        workspace_mb: int | None = None,
        check: bool = False,
        **hyperparameters: Any,
    ) -> None:
        super().__init__()
        names = {entry.function: name for name, entry in objectives.REGISTRY.items()}
        self.objective = objective if isinstance(objective, str) else names.get(objective, objective)
        if isinstance(self.objective, str):
            hyperparameters = objectives.resolve(self.objective, hyperparameters)
        elif not callable(self.objective):
            raise TypeError(
                f"objective is {objective!r}; a name, one of {', '.join(objectives.REGISTRY)}, or a function"
            )
        self.hyperparameters = hyperparameters
        self._settings = json.dumps(hyperparameters) if isinstance(self.objective, str) else ""
        self.options: dict[str, Any] = {
            "ignore_index": ignore_index,
            "logit_scale": logit_scale,
            "softcap": softcap,
            "tp_group": tp_group,
            "workspace_mb": workspace_mb,
            "check": check,
        }

    def extra_repr(self) -> str:
        settings = self.hyperparameters | {key: value for key, value in self.options.items() if value is not None}
        return ", ".join([f"objective={self.objective!r}", *(f"{key}={value!r}" for key, value in settings.items())])

    def forward(
        self,
        hidden: Tensor,
        weight: Tensor,
        labels: Tensor,
        bias: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        ref_logps: Tensor | None = None,
    ) -> PreferenceOutput:
        """Loss and metrics of B pairs.

        Padded: hidden (2B, T, H), labels (2B, T) int64, rows 0..B-1 the chosen answers, rows B..2B-1 their rejected
        ones. Packed: hidden (N, H), labels (N,), cu_seqlens (2B+1,) int32 boundaries of the sequences in the same
        order. weight (V, H), bias (V,). Labels are already aligned: labels[t] is the token that hidden[t] predicts;
        ignore_index marks prompt and padding. ref_logps: the reference model's log-probs of the answers, (2B,) sums
        per sequence, or per valid token, or in the labels' shape. Errors: TypeError for dtypes; ValueError for
        shapes, devices, an odd number of sequences, an answer without a valid token (named) or a missing reference;
        IndexError for a label outside [0, V) (position and value named).
        """
        hidden, weight, bias = autocast(hidden, weight, bias)
        check_inputs(hidden, weight, labels, bias, self.options["softcap"], self.options["workspace_mb"], "labels")
        cu_seqlens = _boundaries(labels, cu_seqlens)
        check_devices(hidden, {"cu_seqlens": cu_seqlens, "ref_logps": ref_logps})
        if not isinstance(self.objective, str):
            return self._by_callable(self.objective, hidden, weight, labels, bias, cu_seqlens, ref_logps)
        if objectives.REGISTRY[self.objective].reference and ref_logps is None:
            raise ValueError(f"{self.objective} needs ref_logps: the reference's log-probs, per sequence or per token")
        loss, *metrics, _, _, _ = torch.ops.synpo.pair_loss(
            hidden.reshape(-1, hidden.shape[-1]), weight, labels, bias, cu_seqlens, ref_logps, self.objective,
            self._settings, *open_options(hidden, weight, bias, **self.options),
        )  # fmt: skip
        return PreferenceOutput(loss, *(m.detach() for m in metrics))

    def _by_callable(
        self,
        objective: Callable[..., Tensor],
        hidden: Tensor,
        weight: Tensor,
        labels: Tensor,
        bias: Tensor | None,
        cu_seqlens: Tensor,
        ref_logps: Tensor | None,
    ) -> PreferenceOutput:
        options = open_options(hidden, weight, bias, **self.options)
        flat = hidden.reshape(-1, hidden.shape[-1])
        door = compact(flat, labels, cu_seqlens, options, vocabulary_size(open_head(weight, bias, options)), "labels")
        _refuse_empty_answers(door.bounds, options.ignore_index)
        bounds = door.cu_seqlens
        refs = _references(ref_logps, door, labels)
        logps = linear_logps(door.hidden, weight, door.targets, bias=bias, **self.options)
        losses = objective(logps, bounds, ref_logps=refs, **self.hyperparameters)
        if losses.shape != (len(bounds) // 2,):
            raise ValueError(
                f"objective: its losses have shape {tuple(losses.shape)}; needed is one per pair, ({len(bounds) // 2},)"
            )
        return PreferenceOutput(losses.mean(), *_summaries(logps.detach(), bounds, None, "synpo", {}))


def _boundaries(labels: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """(2B+1,) boundaries of the flattened sequences, padded or packed."""
    if cu_seqlens is None:
        if labels.ndim != 2:
            raise ValueError(
                f"labels have shape {tuple(labels.shape)}; padded input is (2B, T), packed input needs cu_seqlens"
            )
        rows, length = labels.shape
        cu_seqlens = torch.arange(0, (rows + 1) * length, max(length, 1), device=labels.device)[: rows + 1]
        if length == 0:
            raise ValueError(f"labels have shape {tuple(labels.shape)}: the answers have no tokens")
    elif labels.ndim != 1 or cu_seqlens.ndim != 1:
        raise ValueError(
            f"packed input is labels (N,), cu_seqlens (2B+1,); got {tuple(labels.shape)} and {tuple(cu_seqlens.shape)}"
        )
    elif cu_seqlens.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"cu_seqlens have dtype {cu_seqlens.dtype}; int32 is needed")
    sequences = cu_seqlens.shape[0] - 1
    if sequences < 2 or sequences % 2:
        raise ValueError(
            f"got {sequences} sequences; an even number is needed: the B chosen answers, then their B rejected ones"
        )
    return cu_seqlens


class FusedSynPOLoss(FusedPreferenceLoss):
    """SynPO (arXiv 2506.00835): mean over pairs of rank(alpha (r+ - r-)) - beta q+, without full-vocabulary logits.

    r = exp(mean log-prob) of an answer, q = mean token probability of the chosen one; rank(u) = -sigmoid(u) for form
    "sigmoid" (what the release trains with), -logsigmoid(u) for form "logsigmoid". The other arguments are those of
    ``linear_logps``. Errors: ValueError for alpha <= 0, beta < 0 or an unknown form.
    """

    def __init__(
        self,
        alpha: float = 30.0,
        beta: float = 0.2,
        form: str = "sigmoid",
        ignore_index: int = -100,
        *,
        logit_scale: float = 1.0,
        softcap: float | None = None,
        tp_group: dist.ProcessGroup | None = None,
        workspace_mb: int | None = None,
        check: bool = False,
    ) -> None:
        super().__init__(
            "synpo",
            ignore_index,
            logit_scale=logit_scale,
            softcap=softcap,
            tp_group=tp_group,
            workspace_mb=workspace_mb,
            check=check,
            alpha=alpha,
            beta=beta,
            form=form,
        )
