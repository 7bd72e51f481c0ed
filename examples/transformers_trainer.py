"""SynPO in transformers' own Trainer: python examples/transformers_trainer.py --model DIR_OR_NAME

synpo.SynPOTrainer does much more (prefix sharing, videos, exact resuming); this is for a Trainer that you already have.
"""

from functools import partial
from typing import Any

import torch
from inputs import options, read_pairs
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

from synpo.integrations import PairLoss, pair_batch


class PairTrainer(Trainer):
    """A Trainer whose batches are pairs (see pair_batch) and whose loss is SynPO's."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        # The loss is a mean over pairs: Trainer is to divide it by the number of micro-batches, not by tokens.
        self.model_accepts_loss_kwargs = False
        self.pair_loss = PairLoss(self.model, "synpo", alpha=30.0, beta=0.2)

    def compute_loss(
        self, model: Any, inputs: dict[str, torch.Tensor], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        output = self.pair_loss(model, **inputs)
        metrics = {"rewards": torch.stack([output.chosen_rewards, output.rejected_rewards], 1)}
        return (output.loss, metrics) if return_outputs else output.loss


def main(argv: list[str] | None = None) -> list[float]:
    args = options(__doc__, argv)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    trainer = PairTrainer(
        AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32),
        TrainingArguments(
            output_dir=args.output_dir, max_steps=args.steps, per_device_train_batch_size=2, learning_rate=1e-5,
            gradient_accumulation_steps=2, remove_unused_columns=False, logging_steps=1, save_strategy="no",
            report_to="none", dataloader_pin_memory=torch.cuda.is_available(),
        ),
        train_dataset=read_pairs(args.pairs),
        data_collator=partial(pair_batch, tokenizer, max_length=512),
    )  # fmt: skip
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


if __name__ == "__main__":
    main()
