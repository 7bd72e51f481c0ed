"""trl's SimPO on synpo's kernels: python examples/trl_simpo.py --model DIR_OR_NAME

loss_type="synpo" in the place of "simpo" trains with SynPO; everything else is trl's.
"""

import torch
from datasets import Dataset
from inputs import options, read_pairs
from transformers import AutoTokenizer

from synpo.integrations.trl_cpo import FusedCPOConfig, FusedCPOTrainer  # trl.experimental.cpo: CPOConfig, CPOTrainer
from synpo.train import load_model, lora_recipe


def main(argv: list[str] | None = None) -> list[float]:
    args = options(__doc__, argv)
    trainer = FusedCPOTrainer(
        load_model(args.model),
        args=FusedCPOConfig(
            output_dir=args.output_dir, max_steps=args.steps, loss_type="simpo", beta=2.0, simpo_gamma=0.5,
            cpo_alpha=0.0, learning_rate=1e-4, per_device_train_batch_size=2, bf16=torch.cuda.is_available(),
            remove_unused_columns=False, logging_steps=1, save_strategy="no", report_to="none",
            dataloader_pin_memory=torch.cuda.is_available(),
        ),
        train_dataset=Dataset.from_list(read_pairs(args.pairs)),
        processing_class=AutoTokenizer.from_pretrained(args.model),
        peft_config=lora_recipe(r=16),
    )  # fmt: skip
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


if __name__ == "__main__":
    main()
