"""Preference losses on whole pairs, from hidden states and lm_head: FusedSynPOLoss and FusedPreferenceLoss.

An objective known by name runs inside one op (pair_loss_op.py), which forms the gradients in the forward pass; any
other callable is evaluated on linear_logps and differentiated by autograd. With a head that is frozen the working
memory is bounded by workspace_mb and 4 n H bytes for n valid tokens; a trainable one adds the float32 gradient of the
head, 4 V H bytes.
"""

import json
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from . import objectives
from .door import autocast, check_devices, check_inputs, compact, open_options
from .linear_logps import linear_logps
from .pair_loss_op import references, refuse_empty_answers
from .pair_objective import per_pair_metrics
from .scoring import open_head, vocabulary_size


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
        refuse_empty_answers(door.bounds, options.ignore_index)
        bounds = door.cu_seqlens
        refs = references(ref_logps, door, labels)
        logps = linear_logps(door.hidden, weight, door.targets, bias=bias, **self.options)
        losses = objective(logps, bounds, ref_logps=refs, **self.hyperparameters)
        if losses.shape != (len(bounds) // 2,):
            raise ValueError(
                f"objective: its losses have shape {tuple(losses.shape)}; needed is one per pair, ({len(bounds) // 2},)"
            )
        return PreferenceOutput(losses.mean(), *per_pair_metrics(logps.detach(), bounds, None, "synpo", {}))


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
