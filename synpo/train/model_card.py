"""README.md beside a trained adapter or model: from what, by what method, on what pairs, with what result."""

import dataclasses
import importlib.metadata
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from peft import PeftModel

from .. import __version__
from ..run_files import write_atomically
from .model import base_model
from .trainer import SynPOTrainer

CARD_FILE = "README.md"
PAPERS = {
    "synpo": ("SynPO", "2506.00835"),
    "dpo": ("DPO", "2305.18290"),
    "dpop": ("DPOP", "2402.13228"),
    "ipo": ("IPO", "2310.12036"),
    "simpo": ("SimPO", "2405.14734"),
    "kto": ("KTO", "2402.01306"),
    "cpo": ("CPO", "2401.08417"),
    "orpo": ("ORPO", "2403.07691"),
}
VERSIONS = ("torch", "transformers", "peft", "accelerate", "datasets")
# What a reader needs to repeat a run or to judge it; the files beside the card hold every option.
SETTINGS = (
    "learning_rate", "lr_scheduler_type", "warmup_steps", "num_train_epochs", "max_steps", "max_length", "truncation",
    "min_score_gap", "prefix_sharing", "bf16", "fp16", "seed",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Origin:
    """What a trainer does not know of its run."""

    model: str  # as it was given: a hub name or a path
    data: str
    held_out: str = ""  # the table of held-out values before and after, empty without an evaluation


def write_model_card(trainer: SynPOTrainer, origin: Origin) -> Path:
    """Write the card into the trainer's output_dir, over the empty one that peft leaves there; returns its path."""
    path = Path(trainer.args.output_dir, CARD_FILE)
    write_atomically(path, model_card(trainer, origin))
    return path


def model_card(trainer: SynPOTrainer, origin: Origin) -> str:
    """The card as Markdown with the front matter that model hubs read."""
    args, adapted = trainer.args, isinstance(trainer.model, PeftModel)
    name, paper = PAPERS[args.objective]
    title = Path(args.output_dir).resolve().name
    what = "a LoRA adapter of" if adapted else "trained from"
    parts = [
        f"---\n{yaml.safe_dump(_front_matter(trainer, origin, adapted), sort_keys=False)}---\n\n# {title}\n",
        f"This is {what} `{origin.model}`, trained on preference pairs with {name} "
        f"([arXiv {paper}](https://arxiv.org/abs/{paper})) by synpo.\n",
        "## Method\n",
        _table({"objective": args.objective, **args.hyperparameters, **_adapter(trainer, adapted)}),
        "## Data\n",
        _table(_data(trainer, origin)),
        "## Settings\n",
        _table(_settings(trainer)),
        "`config.yaml` holds the options that were given, `training_args.json` all of them, `metrics.jsonl` every "
        "log line.\n",
        "## Result\n",
        _result(trainer, origin),
        "## Use\n",
        f'```python\nfrom synpo.train import load_model, load_tokenizer\n\nfolder = "{title}"  # this one\n'
        "model, tokenizer = load_model(folder), load_tokenizer(folder)\n```\n",
        "## Versions\n",
        _table(_versions()),
    ]
    return "\n".join(parts)


def _front_matter(trainer: SynPOTrainer, origin: Origin, adapted: bool) -> dict[str, Any]:
    """What model hubs read. A path of this machine is no model of theirs, so base_model is a hub name or absent."""
    known = not Path(origin.model).expanduser().exists()
    sees = hasattr(base_model(trainer.model).config, "vision_config")
    return {
        **({"base_model": origin.model} if known else {}),
        "library_name": "peft" if adapted else "transformers",
        "pipeline_tag": "video-text-to-text" if sees else "text-generation",
        "tags": ["preference-optimization", trainer.args.objective, *(["lora"] if adapted else [])],
    }


def _adapter(trainer: SynPOTrainer, adapted: bool) -> dict[str, Any]:
    trained = sum(p.numel() for p in trainer.model.parameters() if p.requires_grad)
    found: dict[str, Any] = {"trained parameters": f"{trained:,}"}
    if not adapted:
        return found
    config = trainer.model.active_peft_config
    names = {"r": "rank", "lora_alpha": "alpha", "lora_dropout": "dropout"}
    found |= {f"adapter's {label}": getattr(config, key) for key, label in names.items() if hasattr(config, key)}
    targets = config.target_modules
    return found | {"adapted layers": targets if isinstance(targets, str) else ", ".join(sorted(targets or ()))}


def _data(trainer: SynPOTrainer, origin: Origin) -> dict[str, Any]:
    found: dict[str, Any] = {
        "pairs from": f"`{Path(origin.data).name}`",
        "pairs trained on": len(trainer.train_dataset),
    }
    if trainer.eval_dataset is not None:
        found["pairs held out"] = len(trainer.eval_dataset)
    found |= {f"pairs {what}": count for what, count in trainer.train_dataset.counts.items()}
    skipped = [line["skipped_media"] for line in trainer.state.log_history if "skipped_media" in line]
    if skipped and skipped[-1]:
        found["pairs passed over for their media, over all epochs"] = skipped[-1]
    return found


def _settings(trainer: SynPOTrainer) -> dict[str, Any]:
    args = trainer.args
    step = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
    chosen = {name: getattr(args, name) for name in SETTINGS}
    return {
        **{name: getattr(value, "value", value) for name, value in chosen.items() if value not in (None, -1)},
        "pairs per optimizer step": step,
        "processes": args.world_size,
        "device": args.device.type,
    }


def _result(trainer: SynPOTrainer, origin: Origin) -> str:
    state = trainer.state
    found: dict[str, Any] = {"optimizer steps": state.global_step, "epochs": round(state.epoch or 0, 2)}
    if trainer.nonfinite_steps:
        found["steps skipped, loss or gradient not finite"] = trainer.nonfinite_steps
    last = next((entry for entry in reversed(state.log_history) if "loss" in entry), {})
    names = ("loss", "rewards/accuracies", "rewards/margins", "saturation")
    found |= {f"last logged {name}": f"{last[name]:.4g}" for name in names if name in last}
    if not origin.held_out:
        return _table(found) + "\nNo pairs were held out.\n"
    return _table(found) + f"\n```\n{origin.held_out}\n```\n"


def _versions() -> dict[str, str]:
    found = {"synpo": __version__, "python": platform.python_version()}
    return found | {name: importlib.metadata.version(name) for name in VERSIONS}


def _table(rows: Mapping[str, Any]) -> str:
    lines = [f"| {name} | {value} |" for name, value in rows.items()]
    return "\n".join(["| | |", "|---|---|", *lines, ""])
