"""One training step of SynPOTrainer beside trl's DPO and SimPO: the same pairs, tokens and LoRA, a fresh process each.

    python -m bench.step_vs_trl --model DIR --pairs FILE.json

Every trainer gets the same texts: pairs whose two answers both fill --max-length are taken, and their answers are cut
so that prompt and answer together stay just under it. So no trainer truncates, none pads, and what a trainer gains on
short pairs is not in the figures. LoRA dropout is 0 throughout, because trl's default switches it off. trl's DPO
takes its reference from the adapter switched off. synpo-low-memory is the option low_host_memory.
"""

import argparse
import csv
import datetime
import json
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from .measure import commit, device_name
from .memory import Peak, peak_resident_mb

TRAINERS = ("trl-dpo", "trl-simpo", "synpo", "synpo-low-memory", "synpo-eager")
COLUMNS = [
    "date", "commit", "device", "torch", "transformers", "trl", "trainer", "pairs", "max_length", "sequence_tokens",
    "answer_tokens", "step_s", "peak_mb", "peak_extra_mb", "loss",
]  # fmt: skip
ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
CHECKPOINTING = ("activation_checkpointing", "gradient_checkpointing")
MARGIN = 6  # tokens left for what a chat template puts after an answer


def equal_pairs(path: Path, tokenizer: Any, max_length: int, count: int) -> list[dict[str, Any]]:
    """``count`` conversational pairs of a ShareGPT preference file, each sequence just under ``max_length`` tokens."""
    pairs = []
    for record in json.loads(path.read_text()):
        prompt = [{"role": ROLES[turn["from"]], "content": turn["value"]} for turn in record["conversations"]]
        prompt_ids = tokenizer.apply_chat_template(prompt, add_generation_prompt=True)["input_ids"]
        room = max_length - len(prompt_ids) - MARGIN
        answers = {
            side: tokenizer(record[side]["value"], add_special_tokens=False)["input_ids"]
            for side in ("chosen", "rejected")
        }
        if room < max_length // 4 or min(map(len, answers.values())) < room:
            continue
        pair: dict[str, Any] = {"prompt": prompt}
        for side, ids in answers.items():
            pair[side] = [{"role": "assistant", "content": tokenizer.decode(ids[:room])}]
        pairs.append(pair)
    if len(pairs) < count:
        raise SystemExit(
            f"{path}: both answers fill {max_length} tokens in {len(pairs)} pairs; {count} are needed. "
            "Lower --max-length."
        )
    return pairs[:count]


def trainer_for(
    name: str,
    model: Any,
    tokenizer: Any,
    pairs: list[dict[str, Any]],
    args: argparse.Namespace,
    output_dir: str,
    checkpointing: bool = False,
    **changes: Any,
) -> Any:
    """The trainer ``name`` on these pairs; changes: options of its configuration that differ from the common ones."""
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import TrainingArguments

    shared: dict[str, Any] = {
        "output_dir": output_dir,
        "per_device_train_batch_size": args.batch,
        "gradient_accumulation_steps": 1,
        "max_steps": args.steps + 1,
        "max_length": args.max_length,
        "learning_rate": 5e-6,
        "lr_scheduler_type": "constant",
        # Renamed after transformers 5.17.
        next(n for n in CHECKPOINTING if n in TrainingArguments.__dataclass_fields__): checkpointing,
        "bf16": False,
        "seed": 0,
        "report_to": "none",
        "save_strategy": "no",
        "logging_steps": 1,
        "disable_tqdm": True,
        "use_cpu": not torch.cuda.is_available(),
        "dataloader_pin_memory": torch.cuda.is_available(),
    } | changes
    lora = LoraConfig(
        r=128,
        lora_alpha=64,
        lora_dropout=0.0,
        task_type="CAUSAL_LM",
        target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    )
    rest = {
        "model": model,
        "train_dataset": Dataset.from_list(pairs),
        "processing_class": tokenizer,
        "peft_config": lora,
    }
    if name == "trl-dpo":
        from trl import DPOConfig, DPOTrainer

        return DPOTrainer(args=DPOConfig(**shared), **rest)
    if name == "trl-simpo":
        from trl.experimental.cpo import CPOConfig, CPOTrainer

        config = CPOConfig(
            loss_type="simpo", cpo_alpha=0.0, beta=2.0, simpo_gamma=0.5, remove_unused_columns=False, **shared
        )
        return CPOTrainer(args=config, **rest)
    from synpo import SynPOConfig, SynPOTrainer

    ours = {"fused": name != "synpo-eager", "low_host_memory": name == "synpo-low-memory"}
    return SynPOTrainer(args=SynPOConfig(objective="synpo", **ours, **shared), **rest)


def _count_tokens(batch: dict[str, Any]) -> tuple[int, int]:
    """Tokens in the sequences and in the answers of a collated batch, whichever trainer's it is."""
    if "passes" in batch:
        return tuple(map(sum, zip(*map(_count_tokens, batch["passes"]), strict=True)))
    masks = [v for k, v in batch.items() if k in ("attention_mask", "chosen_attention_mask", "rejected_attention_mask")]
    if "completion_mask" in batch:
        answers = int(batch["completion_mask"].sum())
    else:
        labels = [v for k, v in batch.items() if k in ("labels", "chosen_labels", "rejected_labels")]
        answers = sum(int((v != -100).sum()) for v in labels)
    return sum(int(m.sum()) for m in masks), answers


def measure_steps(args: argparse.Namespace) -> dict[str, Any]:
    """Train for a warm-up step and ``args.steps`` more; what they took and held."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
    pairs = equal_pairs(args.pairs, tokenizer, args.max_length, args.batch * (args.steps + 1))
    with tempfile.TemporaryDirectory() as folder:
        trainer = trainer_for(args.trainer, model, tokenizer, pairs, args, folder)
        tokens = _count_tokens(next(iter(trainer.get_train_dataloader())))
        return {"sequence_tokens": tokens[0], "answer_tokens": tokens[1]} | time_steps(trainer)


def time_steps(trainer: Any) -> dict[str, Any]:
    """What a trainer's steps took and held, the first of them left out."""
    from transformers import TrainerCallback

    class Clock(TrainerCallback):
        def __init__(self) -> None:
            self.ends: list[float] = []

        def on_step_end(self, *_: Any, **__: Any) -> None:
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            self.ends.append(time.perf_counter())

    clock = Clock()
    trainer.add_callback(clock)
    device = next(trainer.model.parameters()).device
    peak = Peak(device)
    trainer.train()
    extra = peak.extra_mb()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    total = peak_resident_mb() if device.type == "cpu" else peak.start + extra
    seconds = [b - a for a, b in zip(clock.ends[:-1], clock.ends[1:], strict=True)]
    return {
        "step_s": round(statistics.median(seconds), 4),
        "peak_mb": round(total),
        "peak_extra_mb": round(extra),
        "loss": round(float(losses[0]), 6),
    }


def in_fresh_process(trainer: str, args: argparse.Namespace) -> dict[str, Any]:
    child = [sys.executable, "-m", "bench.step_vs_trl", "--in-process", "--trainer", trainer]
    for name in ("model", "pairs", "batch", "max_length", "steps"):
        child += ["--" + name.replace("_", "-"), str(getattr(args, name))]
    done = subprocess.run(child, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{trainer} failed with exit status {done.returncode}:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def world(args: argparse.Namespace) -> dict[str, Any]:
    return {
        "date": datetime.date.today().isoformat(),
        "commit": commit(),
        "device": device_name(),
        "torch": torch.__version__,
        "transformers": version("transformers"),
        "trl": version("trl"),
        "pairs": args.batch,
        "max_length": args.max_length,
    }


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench.step_vs_trl", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument(
        "--model", type=Path, required=True, help="local directory of a causal language model and its tokenizer"
    )
    parser.add_argument("--pairs", type=Path, required=True, help="preference pairs as ShareGPT JSON")
    parser.add_argument("--trainer", nargs="+", choices=TRAINERS, default=list(TRAINERS))
    parser.add_argument("--batch", type=int, default=2, help="pairs in a step (2)")
    parser.add_argument("--max-length", type=int, default=512, help="tokens of prompt and answer (512)")
    parser.add_argument("--steps", type=int, default=3, help="timed steps, after one of warm-up (3)")
    parser.add_argument("--out", type=Path, help="CSV to append to; default bench/results/steps_<device>.csv")
    parser.add_argument("--in-process", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.in_process:
        (args.trainer,) = args.trainer
        print("\n" + json.dumps(measure_steps(args)))
        return
    out = args.out or Path(__file__).parent / "results" / f"steps_{device_name()}.csv"
    print("| trainer | s per step | peak MB | of it during training | tokens, answers |\n|---|---|---|---|---|")
    for trainer in tqdm(args.trainer, unit="trainer", file=sys.stderr):
        row = world(args) | {"trainer": trainer} | in_fresh_process(trainer, args)
        new = not out.exists()
        with out.open("a", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
            if new:
                writer.writeheader()
            writer.writerow(row)
        print(
            "| {trainer} | {step_s} | {peak_mb} | {peak_extra_mb} | {sequence_tokens}, {answer_tokens} |".format(**row)
        )


if __name__ == "__main__":
    main()
