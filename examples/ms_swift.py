"""ms-swift's preference training on synpo's kernels: swift rlhf --external_plugins examples/ms_swift.py --rlhf_type dpo

Also --rlhf_type cpo and simpo (with --cpo_alpha 0). Every loss type stays ms-swift's own; its log-probs come from the
kernel, so no (2B, T, V) logits are made. With the variable SYNPO=1 set, --rlhf_type simpo trains with SynPO instead.

It needs synpo_kernels alone, since ms-swift (4.6) pins an older peft than synpo's own trainer: torch 2.11 or newer,
then `pip install --no-deps synpo`. Copy this file wherever it is wanted.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from synpo_kernels import FusedSynPOLoss, linear_logps

IGNORED = -100
# What a model does to its logits after lm_head, by its configuration: unknown to this file, so refused.
AFTER_HEAD = ("final_logit_softcapping", "logit_scale", "logits_scaling", "output_multiplier", "lm_head_multiplier")


@contextmanager
def lm_head_returns(model: nn.Module, compute: Any) -> Iterator[None]:
    """Inside, the model's logits are compute(hidden (R, T, H), lm_head); it is called through its wrapper as ever."""
    head = model.get_output_embeddings()
    head.forward = lambda hidden: compute(hidden, head)
    try:
        yield
    finally:
        del head.forward


def next_tokens(labels: Tensor) -> Tensor:
    """Labels beside the positions that predict them."""
    return nn.functional.pad(labels[:, 1:], (0, 1), value=IGNORED)


def logps_and_means(hidden: Tensor, head: nn.Linear, labels: Tensor) -> Tensor:
    """(R, T, 2) in the place of logits (R, T, V): the next tokens' log-probs, and the logits' means over V."""
    hidden = hidden[:, -labels.shape[1] :]
    logps = linear_logps(hidden, head.weight, next_tokens(labels), bias=head.bias)
    with torch.no_grad():
        means = hidden.float() @ head.weight.float().mean(0)
        means = means if head.bias is None else means + head.bias.float().mean()
    return torch.stack([logps, means], -1)


def refuse(trainer: Any) -> None:
    """ValueError for what the swap cannot do."""
    config = trainer.accelerator.unwrap_model(trainer.model).config
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    for name in AFTER_HEAD:
        if getattr(config, name, None) not in (None, 1.0):
            raise ValueError(f"the model has {name}={getattr(config, name)}: not supported by this swap")
    if trainer.template.sequence_parallel_size > 1:
        raise ValueError("sequence parallelism is not supported by this swap; set --sequence_parallel_size 1")


def swap_dpo(base: type) -> type:
    """A subclass of ms-swift's DPOTrainer on the kernels."""

    class KernelDPOTrainer(base):
        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **options)
            refuse(self)

        def get_use_logits_to_keep(self, default_value: bool = True) -> bool:
            return False  # the kernel drops what has no label by itself

        def concatenated_forward(self, model: nn.Module, batch: dict[str, Any], is_ref_model: bool = False) -> Any:
            labels = batch["labels"]
            scored = lm_head_returns(
                self.accelerator.unwrap_model(model), lambda hidden, head: logps_and_means(hidden, head, labels)
            )
            with scored:
                return super().concatenated_forward(model, batch, is_ref_model=is_ref_model)

        def get_per_token_logps(
            self, logits: Tensor, labels: Tensor, label_pad_token_id: int = IGNORED, reduction: str = "mean"
        ) -> tuple[Tensor, Tensor, Tensor]:
            kept = labels != label_pad_token_id
            return logits[..., 0] * kept, logits[..., 1].detach() * kept, kept

    return KernelDPOTrainer


def swap_cpo(base: type, synpo: FusedSynPOLoss | None = None) -> type:
    """A subclass of ms-swift's CPOTrainer (CPO and SimPO) on the kernels; synpo: the loss in the place of its own."""

    class KernelCPOTrainer(base):
        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **options)
            refuse(self)
            if self.cpo_alpha:
                raise ValueError(f"cpo_alpha is {self.cpo_alpha}, whose NLL takes logits; set --cpo_alpha 0")

        def concatenated_forward(self, model: nn.Module, batch: dict[str, Any]) -> tuple[Tensor, ...]:
            labels = batch["labels"]
            scored = lm_head_returns(
                self.accelerator.unwrap_model(model), lambda hidden, head: logps_and_means(hidden, head, labels)
            )
            with scored:
                chosen, rejected, *logits, nll = super().concatenated_forward(model, batch)[:5]
            return chosen, rejected, *(part[..., 1].detach() for part in logits), nll

        @staticmethod
        def get_batch_logps(
            logits: Tensor, labels: Tensor, average_log_prob: bool = False, is_encoder_decoder: bool = False
        ) -> Tensor:
            sums = logits[..., 0].sum(1)
            return sums / (labels[:, 1:] != IGNORED).sum(1) if average_log_prob else sums

        def get_batch_loss_metrics(self, model: nn.Module, batch: dict[str, Any], train_eval: str = "train") -> Any:
            if synpo is None:
                return super().get_batch_loss_metrics(model, batch, train_eval)
            labels, inputs = batch["labels"], {k: v for k, v in batch.items() if k != "labels"}
            found = []

            def compute(hidden: Tensor, head: nn.Linear) -> Tensor:
                found.append(synpo(hidden[:, -labels.shape[1] :], head.weight, next_tokens(labels), head.bias))
                return found[-1].loss

            with lm_head_returns(self.accelerator.unwrap_model(model), compute):
                loss = model(**inputs, use_cache=False).logits
            output, prefix = found[-1], "eval_" if train_eval == "eval" else ""
            metrics = {
                "rewards/chosen": output.chosen_rewards,
                "rewards/rejected": output.rejected_rewards,
                "rewards/accuracies": (output.chosen_rewards > output.rejected_rewards).float(),
                "rewards/margins": output.chosen_rewards - output.rejected_rewards,
                "logps/chosen": output.chosen_logps,
                "logps/rejected": output.rejected_logps,
                "probs/language": output.language,
            }
            gather = self.accelerator.gather_for_metrics
            return loss, {prefix + name: gather(value).mean().item() for name, value in metrics.items()}

    return KernelCPOTrainer


def register() -> None:
    """Put the subclasses where ms-swift looks its trainers up; called when swift imports this file as a plugin."""
    from swift.rlhf_trainers import CPOTrainer, DPOTrainer
    from swift.trainers import TrainerFactory

    synpo = FusedSynPOLoss(alpha=30.0, beta=0.2) if os.environ.get("SYNPO") == "1" else None
    globals().update(DPOTrainer=swap_dpo(DPOTrainer), CPOTrainer=swap_cpo(CPOTrainer, synpo))
    TrainerFactory.TRAINER_MAPPING |= {"dpo": f"{__name__}.DPOTrainer", "cpo": f"{__name__}.CPOTrainer"}


if __name__ == "ms_swift":  # the name that swift imports it under
    register()
