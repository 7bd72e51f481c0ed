"""trl's trainers and their swaps on one tiny model and the same pairs."""

import copy
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset

from tests.train import tiny


def tokenizer() -> Any:
    made = tiny.tokenizer()
    made.pad_token = "<unk>"
    return made


def trainer(kind: Any, config: Any, folder: Path, model: Any = None, count: int = 4, **changes: Any) -> Any:
    """A trl trainer, or its swap, on ``count`` pairs: one step of all of them; changes are options of the config or,
    by these names, of the trainer.
    """
    own = {n: changes.pop(n) for n in ("ref_model", "peft_config", "eval_dataset", "compute_metrics") if n in changes}
    shared = {
        "output_dir": str(folder),
        "per_device_train_batch_size": count,
        "gradient_accumulation_steps": 1,
        "max_steps": 1,
        "max_length": 64,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "constant",
        "activation_checkpointing": False,
        "bf16": False,
        "report_to": "none",
        "save_strategy": "no",
        "logging_steps": 1,
        "disable_tqdm": True,
        "use_cpu": True,
        "dataloader_pin_memory": False,
        "remove_unused_columns": False,
        "max_grad_norm": 0.0,
    }
    if "eval_dataset" in own:
        own["eval_dataset"] = Dataset.from_list(own["eval_dataset"])
    return kind(
        model=copy.deepcopy(tiny.model() if model is None else model),
        args=config(**shared | changes),
        train_dataset=Dataset.from_list(tiny.pairs(count)),
        processing_class=tokenizer(),
        **own,
    )


def step(made: Any) -> tuple[float, dict[str, torch.Tensor], dict[str, float]]:
    """Loss, gradients by parameter name, and the logged metrics of a trainer's one training step."""
    gradients: dict[str, torch.Tensor] = {}
    for name, parameter in made.model.named_parameters():
        if parameter.requires_grad:
            gradients[name] = torch.zeros_like(parameter)
            parameter.register_hook(lambda grad, name=name: gradients[name].add_(grad))
    made.train()
    logged = next(entry for entry in made.state.log_history if "loss" in entry)
    return logged["loss"], gradients, logged
