"""What LLaMA-Factory 0.9.5 and ms-swift 4.6 ask of their preference trainers and give to them, as far as the recipes
touch it: their methods' names, arguments and results, with losses from whole logits.
"""

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, logsigmoid

IGNORED = -100


class Accelerator:
    """One process."""

    device = torch.device("cpu")

    def unwrap_model(self, model: Any) -> Any:
        return model

    def gather_for_metrics(self, values: Tensor) -> Tensor:
        return values


def per_token(logits: Tensor, labels: Tensor) -> Tensor:
    """logits (R, T, V) and labels beside them, (R, T) -> log-probs, 0 where ignored."""
    kept = labels != IGNORED
    return logits.log_softmax(-1).gather(2, labels.clamp(min=0)[..., None])[..., 0] * kept


class LlamaFactory:
    """CustomDPOTrainer: batches of input_ids, attention_mask and labels (2B, T), the chosen first."""

    def __init__(self, model: Any, ref_model: Any, loss_type: str, **changes: Any) -> None:
        self.accelerator, self.model, self.ref_model = Accelerator(), model, ref_model
        self.beta, self.simpo_gamma, self.loss_type, self.ld_alpha = 0.5, 0.3, loss_type, None
        self.finetuning_args = SimpleNamespace(use_ref_model=loss_type not in ("orpo", "simpo"))
        vars(self).update(changes)

    def concatenated_forward(
        self, model: Any, batch: dict[str, Tensor], is_ref_model: bool = False
    ) -> dict[str, Tensor]:
        batch = dict(batch)
        labels = batch.pop("labels")
        logits = model(**batch, return_dict=True, use_cache=False).logits.to(torch.float32)
        sums = per_token(logits[:, :-1], labels[:, 1:]).sum(1)
        lengths = (labels[:, 1:] != IGNORED).sum(1)
        logps = sums / lengths if self.loss_type in ("ipo", "orpo", "simpo") else sums
        return {
            "chosen_logps": logps.chunk(2)[0], "rejected_logps": logps.chunk(2)[1],
            "chosen_logits": logits.chunk(2)[0], "rejected_logits": logits.chunk(2)[1],
            "chosen_logps_avg": (sums / lengths).chunk(2)[0],
        }  # fmt: skip

    def get_batch_loss_metrics(
        self, model: Any, batch: dict[str, Tensor], train_eval: str = "train"
    ) -> tuple[Tensor, dict[str, float]]:
        policy = self.concatenated_forward(model, batch)
        gap = policy["chosen_logps"] - policy["rejected_logps"]
        if self.finetuning_args.use_ref_model:
            with torch.no_grad():
                refs = self.concatenated_forward(self.ref_model, batch, is_ref_model=True)
            losses = -logsigmoid(self.beta * (gap - refs["chosen_logps"] + refs["rejected_logps"]))
        else:
            losses = -logsigmoid(self.beta * gap - self.simpo_gamma)
        losses = losses - 0.1 * policy["chosen_logps_avg"]  # pref_ftx
        names = ("chosen_logps", "rejected_logps", "chosen_logits", "rejected_logits")
        return losses.mean(), {name: policy[name].mean().item() for name in names}


class SwiftDPO:
    """DPOTrainer: labels rolled beside the logits, log-probs through get_per_token_logps."""

    def __init__(self, model: Any, ref_model: Any, **changes: Any) -> None:
        self.accelerator, self.model, self.ref_model, self.beta = Accelerator(), model, ref_model, 0.5
        self.template = SimpleNamespace(sequence_parallel_size=1)
        vars(self).update(changes)

    def get_use_logits_to_keep(self, default_value: bool = True) -> bool:
        return default_value

    def get_per_token_logps(
        self, logits: Tensor, labels: Tensor, label_pad_token_id: int = IGNORED, reduction: str = "mean"
    ) -> tuple[Tensor, Tensor, Tensor]:
        kept = labels != label_pad_token_id
        return per_token(logits, labels), logits.mean(-1) * kept, kept

    def concatenated_forward(self, model: Any, batch: dict[str, Any], is_ref_model: bool = False) -> dict[str, Tensor]:
        batch = dict(batch)
        if self.get_use_logits_to_keep(True):
            kept = batch["labels"].shape[1] - int((batch["labels"] != IGNORED).int().argmax(1).min()) + 1
            batch["labels"], batch["logits_to_keep"] = batch["labels"][:, -kept:], kept
        labels = batch.pop("labels")
        logits = model(**batch, use_cache=False).logits
        labels = torch.roll(labels, shifts=-1, dims=1)
        logps, means, kept = self.get_per_token_logps(logits, labels, label_pad_token_id=IGNORED)
        pairs = len(labels) // 2
        return {
            "chosen_logps": logps.sum(1)[:pairs], "rejected_logps": logps.sum(1)[pairs:],
            "nll_loss": -logps[:pairs][kept[:pairs]].mean(),
            "mean_chosen_logits": means[:pairs][kept[:pairs]].mean(),
            "mean_rejected_logits": means[pairs:][kept[pairs:]].mean(),
        }  # fmt: skip

    def get_batch_loss_metrics(
        self, model: Any, batch: dict[str, Any], train_eval: str = "train"
    ) -> tuple[Tensor, dict[str, float]]:
        policy = self.concatenated_forward(model, batch)
        with torch.no_grad():
            refs = self.concatenated_forward(self.ref_model, batch, is_ref_model=True)
        gap = policy["chosen_logps"] - policy["rejected_logps"] - refs["chosen_logps"] + refs["rejected_logps"]
        loss = (-logsigmoid(self.beta * gap)).mean() + 0.1 * policy["nll_loss"]
        return loss, {name: value.mean().item() for name, value in policy.items()}


class SwiftCPO:
    """CPOTrainer: a tuple from concatenated_forward, log-probs through the static get_batch_logps."""

    def __init__(self, model: Any, cpo_alpha: float = 0.0, **changes: Any) -> None:
        self.accelerator, self.model = Accelerator(), model
        self.beta, self.simpo_gamma, self.cpo_alpha, self.loss_type = 2.0, 0.5, cpo_alpha, "simpo"
        self.template = SimpleNamespace(sequence_parallel_size=1)
        vars(self).update(changes)

    @staticmethod
    def get_batch_logps(
        logits: Tensor, labels: Tensor, average_log_prob: bool = False, is_encoder_decoder: bool = False
    ) -> Tensor:
        sums = per_token(logits[:, :-1], labels[:, 1:]).sum(1)
        return sums / (labels[:, 1:] != IGNORED).sum(1) if average_log_prob else sums

    def concatenated_forward(self, model: Any, batch: dict[str, Any]) -> tuple[Tensor, ...]:
        batch = dict(batch)
        labels = batch.pop("labels")
        logits = model(**batch, use_cache=False).logits
        pairs, nll = len(labels) // 2, torch.zeros(())
        if self.cpo_alpha:
            nll = cross_entropy(logits[:pairs, :-1].flatten(0, 1), labels[:pairs, 1:].flatten())
        logps = self.get_batch_logps(logits, labels, average_log_prob=True)
        return logps[:pairs], logps[pairs:], logits[:pairs], logits[pairs:], nll

    def get_batch_loss_metrics(
        self, model: Any, batch: dict[str, Any], train_eval: str = "train"
    ) -> tuple[Tensor, dict[str, float]]:
        chosen, rejected, *logits, nll = self.concatenated_forward(model, batch)
        losses = -logsigmoid(self.beta * (chosen - rejected) - self.simpo_gamma)
        metrics = {"chosen": chosen, "rejected": rejected, "logits/chosen": logits[0], "logits/rejected": logits[1]}
        return losses.mean() + self.cpo_alpha * nll, {name: value.mean().item() for name, value in metrics.items()}
