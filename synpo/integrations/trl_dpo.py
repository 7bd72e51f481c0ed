"""trl's DPOTrainer on synpo's kernels: trl's losses and gradients, and loss_type="synpo" beside them.

trl gives the model a second way to be called, ``model(..., labels=..., fused_lm_head=True)``, which returns log-probs
from tiles of logits. That call is answered here from linear_logps instead, for the policy and the reference alike, so
whatever trl builds on it (its losses, divergences, reference caches) stays trl's own code.
"""

from dataclasses import dataclass
from functools import wraps
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel
from trl import DPOConfig, DPOTrainer

from ..train.model import base_model
from .pair_loss import AnswerScorer, PairLoss
from .trl_synpo import SynPOOptions, pair_metrics, refuse_options

try:
    from trl.trainer.utils import FusedCausalLMOutput
except ImportError as error:
    raise ImportError("synpo.integrations.trl_dpo needs trl 1.16 or newer: pip install 'trl>=1.16'") from error

# Metrics that take the whole distribution at every token, which the kernels never have.
LEFT_OUT = ("entropy", "mean_token_accuracy")
MEAN_LOGITS = ("logits/chosen", "logits/rejected")


@dataclass
class FusedDPOConfig(SynPOOptions, DPOConfig):
    """trl's DPOConfig, and the options of loss_type="synpo"."""


class _NoReference(nn.Module):
    """Stands where trl would otherwise load a second model, which SynPO never asks."""

    def __init__(self) -> None:
        super().__init__()
        self.config = PretrainedConfig()


class FusedDPOTrainer(DPOTrainer):
    """trl.DPOTrainer with the same arguments, losses and gradients, and less memory.

    loss_type may also be "synpo" (args: FusedDPOConfig), by itself: it has no reference, so none is loaded or run. Of
    trl's metrics "entropy" and "mean_token_accuracy" are left out, and "logits/..." where the model caps its logits;
    "synpo" logs those of ``trl_synpo.pair_metrics``. Errors: ValueError for use_weighting, which takes the whole
    distribution, and for options that SynPO has no use for, before any training.
    """

    def __init__(
        self,
        model: str | nn.Module,
        ref_model: PreTrainedModel | None = None,
        args: DPOConfig | None = None,
        *others: Any,
        **options: Any,
    ) -> None:
        if args is not None:
            refuse_options(args, {"use_weighting": False}, "WPO's weights take the whole distribution at every token")
        self._synpo = args is not None and "synpo" in args.loss_type
        self._scorer: AnswerScorer | None = None
        if self._synpo:
            _check_synpo(args, ref_model)
            ref_model = _NoReference()
        super().__init__(model, ref_model, args, *others, **options)
        if self._synpo:
            self.ref_model = None
            if self.aux_loss_enabled:
                refuse_options(self, {"router_aux_loss_coef": 0.0}, "synpo comes without the loss of an MoE's router")
            self._pair_loss = PairLoss(self.model, "synpo", **args.synpo_hyperparameters())
        else:
            self._swap()

    def _swap(self) -> None:
        if self._scorer is not None:
            return
        self._scorer = answer_from_kernels(self.model)
        if self.ref_model is not None:
            answer_from_kernels(self.accelerator.unwrap_model(self.ref_model))

    def _precompute_ref_logps(self, *args: Any, **options: Any) -> Any:
        self._swap()  # trl calls this before its construction is over
        return super()._precompute_ref_logps(*args, **options)

    def _compute_loss(self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool) -> Any:
        mode = "train" if self.model.training else "eval"
        metrics = self._metrics[mode]
        if not self._synpo:
            result = super()._compute_loss(model, inputs, return_outputs)
            for name in LEFT_OUT if self._scorer.head.softcap is None else LEFT_OUT + MEAN_LOGITS:
                metrics.pop(name, None)
            return result
        inputs = dict(inputs)
        labels = inputs["input_ids"].masked_fill(inputs.pop("completion_mask") == 0, -100)
        output = self._pair_loss(model, labels, **inputs)
        for name, value in pair_metrics(output, self.accelerator.gather_for_metrics).items():
            metrics[name].append(value)
        if mode == "train":
            tokens = self.accelerator.gather_for_metrics(inputs["attention_mask"].sum()).sum().item()
            self._total_train_tokens += tokens // self._tp_size
        metrics["num_tokens"] = [self._total_train_tokens]
        if not return_outputs:
            return output.loss
        with torch.no_grad():  # for compute_metrics, as trl does
            return output.loss, model(**inputs, use_cache=False)


def _check_synpo(args: DPOConfig, ref_model: PreTrainedModel | None) -> None:
    """Errors: TypeError for a plain DPOConfig, ValueError for what SynPO has no use for."""
    if not isinstance(args, FusedDPOConfig):
        raise TypeError(f'args is a {type(args).__name__}; loss_type="synpo" needs a FusedDPOConfig')
    if list(args.loss_type) != ["synpo"]:
        raise ValueError(f"loss_type is {args.loss_type}; synpo has a language term of its own and stands alone")
    if ref_model is not None:
        raise ValueError("ref_model is given but synpo has no reference; leave it out")
    unused = {"precompute_ref_log_probs": False, "sync_ref_model": False, "ld_alpha": None}
    refuse_options(args, unused, "synpo has no reference and weighs all tokens alike")
    if args.deepspeed_plugin is not None or args.fsdp:
        # trl would shard the reference that is not there.
        raise ValueError('loss_type="synpo" in DPOTrainer under DeepSpeed or FSDP: take FusedCPOTrainer, same pairs')


def answer_from_kernels(model: nn.Module) -> AnswerScorer:
    """Let a model that trl has given a fused LM head answer ``fused_lm_head=True`` from synpo's kernels."""
    base = base_model(model)
    scorer, former = AnswerScorer(base), base.forward

    @wraps(type(base).forward)  # generate and Trainer look at its signature
    def forward(
        self: PreTrainedModel, *args: Any, fused_lm_head: bool = False, labels: Tensor | None = None, **inputs: Any
    ) -> Any:
        if not fused_lm_head:
            return former(*args, **inputs, **({} if labels is None else {"labels": labels}))
        return _answer(scorer, former, labels, **inputs)

    base.forward = MethodType(forward, base)
    return scorer


def _answer(scorer: AnswerScorer, model: Any, labels: Tensor, **inputs: Any) -> FusedCausalLMOutput:
    means: list[Tensor] = []

    def compute(hidden: Tensor) -> Tensor:
        hidden = hidden[:, -labels.shape[1] :]
        capped = scorer.head.softcap is not None
        means.append(hidden.new_full(labels.shape, torch.nan) if capped else scorer.mean_logits(hidden))
        return scorer.compute_logps(hidden, labels)

    output = scorer.run(model, compute, **inputs)
    logps, kept = output.logits, labels[:, 1:] != -100
    return FusedCausalLMOutput(
        loss=-logps.sum() / kept.sum().clamp(min=1),
        log_probs=logps,
        entropy=torch.zeros_like(logps),  # trl takes its mean; the metric is taken out again
        mean_logits=means[-1][:, :-1],
        is_top1=torch.zeros_like(kept),  # likewise
        label_mask=kept,
        aux_loss=getattr(output, "aux_loss", None),
    )
