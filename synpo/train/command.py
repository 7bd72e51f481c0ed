"""`synpo train`: from a file of pairs to an adapter, with an evaluation before and after."""

import argparse
import logging
import shlex
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from datasets import Dataset

from ..evaluate import Change, paired_bootstrap
from ..options import add_options, field_names, given_options, option
from ..pairs import apply_filters, load_pairs, split_pairs
from ..pretrained import DTYPES, load_model, load_tokenizer
from ..run_files import read_json_lines, write_atomically
from . import checkpoints
from .config import SynPOConfig, own_fields
from .evaluation import PAIRS_FOLDER
from .model import LORA_TARGETS, lora_recipe
from .model_card import Origin, write_model_card
from .plan import longest_pairs, plan
from .trainer import SynPOTrainer

logger = logging.getLogger(__name__)

CONFIG_FILE = "config.yaml"


@dataclass
class RunConfig:
    """What `synpo train` needs beside SynPOConfig."""

    model: str = option("", "Model to train: a hub name, a folder, or a .gguf file. Required.")
    data: str = option("", "File or folder of preference pairs (JSONL, JSON, parquet). Required.")
    eval_data: str = option("", "Held-out pairs for the evaluation before and after. Default: split off the data.")
    eval_fraction: float = option(0.1, "Share of the pairs held out where eval_data is not given; 0: no evaluation.")
    max_train_pairs: int | None = option(None, "Train on the first so many pairs only.")
    max_eval_pairs: int | None = option(None, "Evaluate the first so many held-out pairs only.")
    format: str = option("auto", "Format of the pairs; see docs/data.md.")
    dtype: str | None = option(
        None, "Model weights: float32, bfloat16, float16, auto. Default: float32 on a CPU, else auto."
    )
    attn_implementation: str | None = option(
        None, "Attention of transformers: sdpa, eager, flash_attention_2, ... Rows of several sequences have their own."
    )
    plan: bool = option(False, "Do not train: print the peak memory of a training step by parts, and load no weights.")
    full: bool = option(False, "Train all weights rather than a LoRA adapter.")
    load_in_4bit: bool = option(False, "QLoRA: the frozen weights under the adapter in 4 bits (bitsandbytes' NF4).")
    dora: bool = option(False, "An adapter with trained column lengths: DoRA.")
    lora_r: int = option(128, "Rank of the adapter.")
    lora_alpha: float = option(64, "Scale of the adapter: its output is multiplied with lora_alpha / lora_r.")
    lora_dropout: float = option(0.05, "Dropout before the adapter.")
    lora_targets: list[str] = option(list(LORA_TARGETS), "Names of the layers that get an adapter.")

    def __post_init__(self) -> None:
        for name in ("model", "data"):
            if not getattr(self, name):
                raise ValueError(f"{name} is missing; give --{name} or set it in the config file")
        if not 0 <= self.eval_fraction < 1:
            raise ValueError(f"eval_fraction is {self.eval_fraction}; allowed: 0 (no evaluation) up to, not with, 1")
        if self.dtype is not None and self.dtype not in DTYPES:
            raise ValueError(f"dtype is {self.dtype!r}; allowed: {', '.join(DTYPES)}")
        if self.full and (self.dora or self.load_in_4bit):
            raise ValueError("full=True trains all weights; leave dora and load_in_4bit out")
        if self.plan and self.load_in_4bit:
            raise ValueError("plan=True counts weights in their dtype; leave load_in_4bit out")
        for name in ("max_train_pairs", "max_eval_pairs", "lora_r"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} is {value}; it has to be at least 1")


OPTIONS = (RunConfig, SynPOConfig)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """--config, and a flag for every option."""
    parser.usage = "synpo train [--config FILE.yaml] [--name value ...]"
    own = {*field_names(RunConfig), *own_fields()}
    titles = ("options of TrainingArguments", "options of synpo")
    add_options(parser, *OPTIONS, group_of=lambda name: titles[name in own])


def main(args: argparse.Namespace) -> int:
    """Train, print the held-out metrics before and after, and leave adapter, metrics and options in output_dir."""
    given = given_options(args, *OPTIONS)
    own = field_names(RunConfig)
    run = RunConfig(**{name: value for name, value in given.items() if name in own})
    config = SynPOConfig(**{name: value for name, value in given.items() if name not in own})
    peft_config = None
    if not run.full:
        peft_config = lora_recipe(run.lora_r, run.lora_alpha, run.lora_dropout, run.lora_targets, run.dora)
    if run.plan:
        pairs = longest_pairs(load_data(run)[0], load_tokenizer(run.model), config)
        print(plan(config, run.model, run.dtype, peft_config, pairs).table())
        return 0
    folder = Path(config.output_dir)
    with config.main_process_first(local=False, desc="output_dir"):
        resume = _prepare_folder(folder, given, config.resume_from_checkpoint, writes=config.process_index == 0)
    train_pairs, eval_pairs = load_data(run)

    trainer = SynPOTrainer(
        load_model(run.model, run.dtype, run.attn_implementation, run.load_in_4bit),
        config,
        train_pairs,
        eval_pairs,
        processing_class=load_tokenizer(run.model),
        peft_config=peft_config,
    )
    if trainer.is_deepspeed_enabled and eval_pairs is not None:
        logger.warning("no evaluation before training: DeepSpeed's engine is not there yet")
    before = None if eval_pairs is None or trainer.is_deepspeed_enabled else _evaluate(trainer, 0)
    trainer.train(resume_from_checkpoint=resume)
    trainer.save_model()
    held_out = ""
    if before is not None:
        held_out = comparison(before, _evaluate(trainer, trainer.state.global_step))
    if trainer.is_world_process_zero():
        if held_out:
            print(held_out)
        write_model_card(trainer, Origin(run.model, run.data, held_out))
    logger.info("written to %s", config.output_dir)
    return 0


def load_data(run: RunConfig) -> tuple[Dataset, Dataset | None]:
    """Train and held-out pairs, filtered; what was dropped is logged."""
    pairs, report = apply_filters(load_pairs(run.data, run.format))
    logger.info("%s\n%s", run.data, report)
    held_out = None
    if run.eval_data:
        held_out, report = apply_filters(load_pairs(run.eval_data, run.format))
        logger.info("%s\n%s", run.eval_data, report)
    elif run.eval_fraction:
        pairs, held_out = split_pairs(pairs, run.eval_fraction)
    if run.max_train_pairs is not None:
        pairs = pairs.select(range(min(run.max_train_pairs, len(pairs))))
    if held_out is not None and run.max_eval_pairs is not None:
        held_out = held_out.select(range(min(run.max_eval_pairs, len(held_out))))
    logger.info("%d pairs to train on, %d held out", len(pairs), len(held_out or ()))
    return pairs, held_out


def _prepare_folder(folder: Path, given: dict[str, Any], resume: str | None, writes: bool) -> str | bool:
    """Write the options into output_dir (one of several processes does), and say what to resume: a run of the same
    options goes on where it stopped.
    """
    path = folder / CONFIG_FILE
    given = {name: value for name, value in given.items() if name != "resume_from_checkpoint"}
    newest = checkpoints.newest_checkpoint(folder)
    if resume is None and newest is not None and path.exists():
        former = yaml.safe_load(path.read_text(encoding="utf-8"))
        changed = sorted(name for name in {*former, *given} if former.get(name) != given.get(name))
        if changed:
            name = changed[0]
            raise ValueError(
                f"output_dir {str(folder)!r} holds a run with other options ({name}: {former.get(name)} then, "
                f"{given.get(name)} now); choose another output_dir, or go on with that run all the same: "
                f"--resume_from_checkpoint {shlex.quote(str(newest))}"
            )
        logger.info("going on from %s", newest)
    elif resume is None and writes:
        (folder / checkpoints.METRICS_FILE).unlink(missing_ok=True)  # of a run that ended before its first checkpoint
        shutil.rmtree(folder / PAIRS_FOLDER, ignore_errors=True)
    if writes:
        write_atomically(path, yaml.safe_dump(given, sort_keys=True))
    return resume or newest is not None


def _evaluate(trainer: SynPOTrainer, step: int) -> dict[str, list[float]]:
    """The held-out pairs' values at a step, from the file that an evaluation there has left, or from one made now."""
    path = trainer.pairs_file("eval", step)
    if not path.exists():
        trainer.evaluate()
        trainer.accelerator.wait_for_everyone()
    records = read_json_lines(path)
    return {column: [record[column] for record in records] for column in records[0]}


def comparison(before: dict[str, list[float]], after: dict[str, list[float]]) -> str:
    """Means before and after, and their change with its 95 % interval over pairs, as a table."""
    title = f"held-out pairs: {len(before['index'])}"
    lines = [f"{title:<22}{'before':>10}{'after':>10}{'change':>10}   95 % interval"]
    for name in [name for name in before if name != "index"]:
        change: Change = paired_bootstrap(before[name], after[name])
        means = (sum(values[name]) / len(values[name]) for values in (before, after))
        cells = "".join(f"{value:>10.4f}" for value in (*means, change.mean))
        lines.append(f"{name:<22}{cells}   [{change.low:+.4f}, {change.high:+.4f}]")
    return "\n".join(lines)
