"""LLaMA-Factory's preference training on synpo's kernels: python examples/llama_factory.py train.yaml

In the place of `llamafactory-cli train train.yaml`, with `stage: dpo`. Every pref_loss stays LLaMA-Factory's own; its
log-probs come from the kernel, so no (2B, T, V) logits are made. `--synpo` trains with SynPO: pref_loss: simpo in the
YAML file, which needs no reference model, and SynPO's loss in its place.

It needs synpo_kernels alone, since LLaMA-Factory (0.9.5) pins an older transformers than synpo's own trainer: torch
2.11 or newer, then `pip install --no-deps synpo`. Copy this file wherever it is wanted.
"""

import sys
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


def swap(base: type, synpo: FusedSynPOLoss | None = None) -> type:
    """A subclass of LLaMA-Factory's CustomDPOTrainer on the kernels; synpo: the loss in the place of its own."""

    class KernelDPOTrainer(base):
        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **options)
            config = self.accelerator.unwrap_model(self.model).config
            config = config.get_text_config() if hasattr(config, "get_text_config") else config
            for name in AFTER_HEAD:
                if getattr(config, name, None) not in (None, 1.0):
                    raise ValueError(f"the model has {name}={getattr(config, name)}: not supported by this swap")
            if self.ld_alpha is not None:
                raise ValueError(f"ld_alpha is {self.ld_alpha}: not supported by this swap, leave it out")
            if synpo is not None and self.finetuning_args.use_ref_model:
                raise ValueError("SynPO has no reference model: set pref_loss: simpo, its loss is replaced")

        def concatenated_forward(
            self, model: nn.Module, batch: dict[str, Tensor], is_ref_model: bool = False
        ) -> dict[str, Tensor]:
            labels, inputs = batch["labels"], {k: v for k, v in batch.items() if k != "labels"}

            def compute(hidden: Tensor, head: nn.Linear) -> Tensor:
                logps = linear_logps(hidden, head.weight, next_tokens(labels), bias=head.bias)
                with torch.no_grad():  # for the metric: the mean of the logits over the vocabulary
                    means = hidden.float() @ head.weight.float().mean(0)
                    means = means if head.bias is None else means + head.bias.float().mean()
                return torch.stack([logps, means], -1)

            with lm_head_returns(self.accelerator.unwrap_model(model), compute):
                scored = model(**inputs, return_dict=True, use_cache=False).logits
            sums, lengths = scored[..., 0].sum(1), (labels[:, 1:] != IGNORED).sum(1)
            logps = sums / lengths if self.loss_type in ("ipo", "orpo", "simpo") else sums
            (chosen, rejected), means = logps.chunk(2), scored[..., 1].detach().chunk(2)
            return {
                "chosen_logps": chosen,
                "rejected_logps": rejected,
                "chosen_logits": means[0],
                "rejected_logits": means[1],
                "chosen_logps_avg": (sums / lengths).chunk(2)[0],
            }

        def get_batch_loss_metrics(
            self, model: nn.Module, batch: dict[str, Tensor], train_eval: str = "train"
        ) -> tuple[Tensor, dict[str, float]]:
            if synpo is None:
                # LLaMA-Factory takes the labels out of the batch on the way; the reference needs them as well.
                return super().get_batch_loss_metrics(model, dict(batch), train_eval)
            labels, inputs = batch["labels"], {k: v for k, v in batch.items() if k != "labels"}
            found = []

            def compute(hidden: Tensor, head: nn.Linear) -> Tensor:
                found.append(synpo(hidden, head.weight, next_tokens(labels), head.bias))
                return found[-1].loss

            with lm_head_returns(self.accelerator.unwrap_model(model), compute):
                loss = model(**inputs, return_dict=True, use_cache=False).logits
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
            return loss, {prefix + name: value.mean().item() for name, value in metrics.items()}

    return KernelDPOTrainer


def main() -> None:
    from llamafactory.train import tuner
    from llamafactory.train.dpo import trainer, workflow

    synpo = FusedSynPOLoss(alpha=30.0, beta=0.2) if "--synpo" in sys.argv else None
    sys.argv = [argument for argument in sys.argv if argument != "--synpo"]
    # The workflow takes the class from its module when it runs; a version that has it by name finds it there too.
    trainer.CustomDPOTrainer = workflow.CustomDPOTrainer = swap(trainer.CustomDPOTrainer, synpo)
    tuner.run_exp()


if __name__ == "__main__":
    main()
