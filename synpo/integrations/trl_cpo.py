"""trl's CPOTrainer (CPO, SimPO, hinge, IPO, AlphaPO) on synpo's kernels: trl's losses and gradients without logits,
and loss_type="synpo" beside them.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from trl.experimental.cpo import CPOConfig, CPOTrainer

from .pair_loss import AnswerScorer, PairLoss
from .trl_synpo import SynPOOptions, pair_metrics, refuse_options

AVERAGED = ("ipo", "simpo")  # loss types whose log-probs trl takes as means over an answer's tokens


@dataclass
class FusedCPOConfig(SynPOOptions, CPOConfig):
    """trl's CPOConfig, and the options of loss_type="synpo"."""


class FusedCPOTrainer(CPOTrainer):
    """trl's CPOTrainer with the same arguments, losses and gradients, and no (2B, T, V) logits.

    loss_type may also be "synpo" (args: FusedCPOConfig with cpo_alpha=0, since SynPO has a language term of its own).
    Of trl's metrics "logits/..." are NaN where the model caps its logits; with "synpo" trl's are those of
    ``trl_synpo.pair_metrics``. Errors: TypeError and ValueError for options that SynPO has no use for, before any
    training.
    """

    def __init__(
        self, model: str | nn.Module | None = None, args: CPOConfig | None = None, *others: Any, **options: Any
    ) -> None:
        if args is None:
            raise TypeError("args is missing; a CPOConfig is needed")
        synpo = args.loss_type == "synpo"
        if synpo:
            if not isinstance(args, FusedCPOConfig):
                raise TypeError(f'args is a {type(args).__name__}; loss_type="synpo" needs a FusedCPOConfig')
            unused = {"cpo_alpha": 0.0, "alpha": 0.0, "label_smoothing": 0.0}
            refuse_options(args, unused, "synpo has a language term and a ranking term of its own")
            if options.get("compute_metrics") is not None:
                raise ValueError("compute_metrics is given, but synpo makes no logits for it; leave it out")
        super().__init__(model, args, *others, **options)
        if not synpo:
            self._scorer = AnswerScorer(self.model)
            return
        if self.aux_loss_enabled:
            refuse_options(self, {"aux_loss_coef": 0.0}, "synpo comes without the loss of an MoE's router")
        self._scorer = PairLoss(self.model, "synpo", **args.synpo_hyperparameters())

    def concatenated_forward(self, model: nn.Module, batch: Mapping[str, Any]) -> tuple[Tensor, ...]:
        """trl's tuple: log-probs (B,) of chosen and rejected, mean logits of both as scalars, the chosen's NLL, and
        the router's loss where there is one.
        """
        labels, inputs = self._joined(batch)
        if self.aux_loss_enabled:
            inputs["output_router_logits"] = True
        chosen = len(batch["chosen_labels"])
        scorer, means = self._scorer, []

        def compute(hidden: Tensor) -> Tensor:
            if scorer.head.softcap is None:
                means.extend(scorer.mean_logits(part.flatten(0, 1).mean(0)) for part in hidden.split(chosen))
            else:
                means.extend([hidden.new_full((), torch.nan)] * 2)
            return scorer.compute_logps(hidden, labels)

        output = scorer.run(model, compute, **inputs)
        logps, counts = output.logits, (labels[:, 1:] != -100).sum(1)
        sums = logps.sum(1)
        answers = sums / counts if self.loss_type in AVERAGED else sums
        nll = -sums[:chosen].sum() / counts[:chosen].sum() if self.cpo_alpha else torch.zeros_like(sums[0])
        found = (answers[:chosen], answers[chosen:], *means, nll)
        return (*found, output.aux_loss) if self.aux_loss_enabled else found

    def get_batch_loss_metrics(
        self, model: nn.Module, batch: Mapping[str, Any], train_eval: str = "train"
    ) -> tuple[Tensor, dict[str, float]]:
        """The loss and trl's metrics."""
        if self.loss_type != "synpo":
            return super().get_batch_loss_metrics(model, batch, train_eval)
        labels, inputs = self._joined(batch)
        output = self._scorer(model, labels, **inputs)
        prefix = "eval_" if train_eval == "eval" else ""
        metrics = pair_metrics(output, self.accelerator.gather_for_metrics)
        return output.loss, {prefix + name: value for name, value in metrics.items()}

    def _joined(self, batch: Mapping[str, Any]) -> tuple[Tensor, dict[str, Any]]:
        """Labels (2B, T) and the model's inputs, chosen answers first."""
        joined = self.concatenated_inputs(
            batch, is_encoder_decoder=False, padding_value=self.pad_token_id, device=self.accelerator.device
        )
        inputs = {name: joined[f"concatenated_{name}"] for name in ("input_ids", "attention_mask")}
        return joined["concatenated_labels"], inputs
