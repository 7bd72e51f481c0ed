"""trl's DPOTrainer on synpo's kernels: python examples/trl_dpo.py --model DIR_OR_NAME

loss_type="synpo" in the place of "sigmoid" trains with SynPO; everything else is trl's.
"""

import torch
from datasets import Dataset
from inputs import options, read_pairs
from transformers import AutoTokenizer

from synpo.integrations.trl_dpo import FusedDPOConfig, FusedDPOTrainer  # trl: DPOConfig, DPOTrainer
from synpo.train import load_model, lora_recipe


def main(argv: list[str] | None = None) -> list[float]:
    args = options(__doc__, argv)
    trainer = FusedDPOTrainer(
        load_model(args.model),
        args=FusedDPOConfig(
            output_dir=args.output_dir, max_steps=args.steps, loss_type="sigmoid", beta=0.1, learning_rate=1e-4,
            per_device_train_batch_size=2, bf16=torch.cuda.is_available(), logging_steps=1, save_strategy="no",
            report_to="none", dataloader_pin_memory=torch.cuda.is_available(),
        ),
        train_dataset=Dataset.from_list(read_pairs(args.pairs)),
        processing_class=AutoTokenizer.from_pretrained(args.model),
        peft_config=lora_recipe(r=16),
    )  # fmt: skip
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


if __name__ == "__main__":
    main()
