"""One pass: a few pairs through the model, straight to log-probs and loss."""

import inspect
from typing import Any

import torch
from torch import Tensor, nn

from synpo_kernels import FusedPreferenceLoss, PreferenceOutput, linear_logps, objectives

from .config import SynPOConfig
from .model import base_model, find_head, head_replaced

_CHECKED_TOKENS = 8


class PairScorer:
    """Runs passes (see collate.PairCollator) through a model, which may be wrapped, and scores their answers."""

    def __init__(self, args: SynPOConfig, model: nn.Module) -> None:
        """Errors: ValueError where lm_head cannot be handed to the fused loss."""
        self.objective = objectives.REGISTRY[args.objective]
        self.hyperparameters = args.hyperparameters
        self.workspace_mb = args.workspace_mb
        self.keeps_logits = "logits_to_keep" in inspect.signature(base_model(model).forward).parameters
        self.head = find_head(model) if args.fused else None
        self._fused: FusedPreferenceLoss | None = None
        self._precision = torch.float32  # that lm_head ran in, the last time its log-probs were taken
        if self.head is not None:
            self._fused = FusedPreferenceLoss(args.objective, **self._head_options(), **args.hyperparameters)

    def _head_options(self) -> dict[str, Any]:
        return {"logit_scale": self.head.logit_scale, "softcap": self.head.softcap, "workspace_mb": self.workspace_mb}

    def loss(self, model: nn.Module, batch: dict[str, Any], ref_sums: Tensor | None = None) -> PreferenceOutput:
        """Loss (mean over the pass's pairs, with gradient) and metrics; ref_sums (2b,): the reference's summed
        log-probs.
        """
        if self._fused is None:
            return self._eager(self._logits_logps(model, batch), batch["cu_seqlens"], ref_sums)
        found: list[PreferenceOutput] = []
        module, fused = self.head.module, self._fused

        def compute(hidden: Tensor) -> Tensor:
            picked = _rows(hidden, batch["positions"])
            found.append(fused(picked, module.weight, batch["labels"], module.bias, batch["cu_seqlens"], ref_sums))
            return found[-1].loss

        with head_replaced(self.head, compute):
            returned = _forward(model, batch["input_ids"]).logits
        return found[-1]._replace(loss=returned)

    @torch.no_grad()
    def sums(self, model: nn.Module, batch: dict[str, Any]) -> Tensor:
        """Summed log-probs of the pass's sequences, (2b,), without gradient."""
        if self.head is None:
            logps = self._logits_logps(model, batch)
        else:
            logps = self._head_logps(model, batch, batch["positions"], batch["labels"])
        return objectives.segment_sums(logps, batch["cu_seqlens"])

    @torch.no_grad()
    def verify(self, model: nn.Module, batch: dict[str, Any]) -> None:
        """Compare the fused log-probs of a few tokens with those of the model's own logits.

        Errors: ValueError where they differ by more than rounding: the model does something to its logits that is not
        known here.
        """
        if self.head is None:
            return
        training = model.training
        model.eval()
        try:
            first = int(batch["positions"][0])  # row 0, so the flat position is the position in the row
            count = min(_CHECKED_TOKENS, int(batch["cu_seqlens"][1]))
            row = {"input_ids": batch["input_ids"][:1, : first + count]}
            labels = batch["labels"][:count]
            options = {"logits_to_keep": count} if self.keeps_logits else {}
            logits = _forward(model, row["input_ids"], **options).logits[0, -count:].float()
            expected = _gather(logits, labels)
            positions = torch.arange(first, first + count, device=labels.device)
            got = self._head_logps(model, row, positions, labels).float()
        finally:
            model.train(training)
        tolerance = 1e-3 + 2 * torch.finfo(self._precision).eps * float(logits.abs().max())
        error = float((got - expected).abs().max())
        if not error <= tolerance and bool(expected.isfinite().all()):
            raise ValueError(
                f"{type(base_model(model)).__name__}: log-probs from lm_head differ from those of the model's own "
                f"logits by {error:.3g} (allowed {tolerance:.3g}): the model changes its logits after lm_head in a way "
                "that is not known here; set fused=False"
            )

    def _head_logps(self, model: nn.Module, batch: dict[str, Any], positions: Tensor, labels: Tensor) -> Tensor:
        module = self.head.module

        def compute(hidden: Tensor) -> Tensor:
            kind = hidden.device.type
            self._precision = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden.dtype
            return linear_logps(
                _rows(hidden, positions), module.weight, labels, bias=module.bias, **self._head_options()
            )

        with head_replaced(self.head, compute):
            return _forward(model, batch["input_ids"]).logits

    def _logits_logps(self, model: nn.Module, batch: dict[str, Any]) -> Tensor:
        logits = _forward(model, batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        return _gather(_rows(logits, batch["positions"]), batch["labels"])

    def _eager(self, logps: Tensor, cu_seqlens: Tensor, ref_sums: Tensor | None) -> PreferenceOutput:
        losses = self.objective.function(logps, cu_seqlens, ref_logps=ref_sums, **self.hyperparameters)
        fixed = logps.detach()
        lengths = cu_seqlens.diff()
        sums = objectives.segment_sums(fixed, cu_seqlens)
        rewards = self.objective.rewards(sums, sums / lengths, ref_sums, self.hyperparameters)
        language = (objectives.segment_sums(fixed.exp(), cu_seqlens) / lengths).chunk(2)[0]
        return PreferenceOutput(losses.mean(), *(sums / lengths).chunk(2), *rewards.chunk(2), language)


def _forward(model: nn.Module, input_ids: Tensor, **options: Any) -> Any:
    # Rows are padded on the right and attention is causal: no token looks at padding, no mask is needed; without one
    # attention skips the upper triangle and holds no (rows, T, T) mask. The eager path passes the mask all the same.
    return model(input_ids=input_ids, use_cache=False, **options)


def _rows(values: Tensor, positions: Tensor) -> Tensor:
    return values.reshape(-1, values.shape[-1]).index_select(0, positions)


def _gather(logits: Tensor, labels: Tensor) -> Tensor:
    if logits.dtype != torch.float64:
        logits = logits.float()
    return logits.log_softmax(-1).gather(-1, labels[:, None]).squeeze(-1)
