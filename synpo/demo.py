"""`synpo demo`: a small real model learns to prefer faithful captions, in minutes on a CPU.

SmolLM2-135M-Instruct is trained with LoRA and SynPO on the pairs of synpo.scenes (the same as examples/pairs.jsonl), by
the very functions behind `synpo train` and `synpo report`.
"""

import argparse
import time
from pathlib import Path

import torch
from peft import PeftModel

from .assets import smollm2
from .pairs import load_pairs, split_pairs
from .report import draw_curves, read_run
from .run_files import read_json_lines
from .scenes import write_pairs
from .train import command, load_model, load_tokenizer, paired_bootstrap

HELD_OUT_SHARE = 0.2
RECIPE = {
    "objective": "synpo",
    "learning_rate": 5e-4,
    "warmup_steps": 2,
    "per_device_train_batch_size": 3,
    "gradient_accumulation_steps": 2,
    "per_device_eval_batch_size": 3,
    "num_train_epochs": 1,
    "max_length": 256,
    "eval_fraction": HELD_OUT_SHARE,
    "lora_r": 16,
    "lora_alpha": 32.0,
    "lora_dropout": 0.0,
    "save_strategy": "no",
}


def run(model: Path, data: Path, out: Path, steps: int, seed: int, max_eval_pairs: int) -> int:
    """Train the model in folder `model` on the pairs in file `data`; 0 when the held-out margin rose, else 1.

    `out` receives the adapter, the metrics and curves.png. The margin rose when the 95 % paired bootstrap interval of
    its change, over the held-out pairs, lies above 0.
    """
    started = time.perf_counter()
    options = {
        "model": str(model),
        "data": str(data),
        "output_dir": str(out),
        "max_steps": steps,
        "max_eval_pairs": max_eval_pairs,
        "seed": seed,
        **RECIPE,
    }
    command.main(argparse.Namespace(config=None, **options))
    draw_curves([read_run(out, out.name)], out / "curves.png")
    _show_captions(model, out, data)

    before, after = _margins(out, 0), _margins(out, steps)
    preferred = [sum(margin > 0 for margin in margins) for margins in (before, after)]
    change = paired_bootstrap(before, after)
    rose = change.low > 0
    print(
        f"\nThe faithful caption wins in {preferred[0]} of {len(before)} held-out pairs before, {preferred[1]} after."
        f"\nThe margin {'rose' if rose else 'did NOT rise'}: {change.mean:+.4f}, 95 % interval "
        f"[{change.low:+.4f}, {change.high:+.4f}]."
    )
    print(f"curves {out / 'curves.png'} | metrics {out / 'metrics.jsonl'} | {time.perf_counter() - started:.0f} s")
    print(f"again, with other options: synpo train --config {out / 'config.yaml'} --output_dir DIR")
    return 0 if rose else 1


def _margins(out: Path, step: int) -> list[float]:
    """Margins of the held-out pairs, as an evaluation at a step left them."""
    return [record["rewards/margins"] for record in read_json_lines(out / "eval_pairs" / f"eval-{step}.jsonl")]


def _show_captions(model: Path, out: Path, data: Path) -> None:
    """One held-out scene as the model tells it without and with the adapter, greedily."""
    _, held_out = split_pairs(load_pairs(data), HELD_OUT_SHARE)
    pair = held_out[0]
    tokenizer = load_tokenizer(str(model))
    tuned = PeftModel.from_pretrained(load_model(str(model)), out).eval()
    inputs = tokenizer.apply_chat_template(
        pair["prompt"], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )

    @torch.no_grad()
    def tell() -> str:
        tokens = tuned.generate(**inputs, max_new_tokens=96, do_sample=False)
        return tokenizer.decode(tokens[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()

    with tuned.disable_adapter():
        before = tell()
    told = {"before": before, "after": tell(), "chosen": pair["chosen"][0]["content"]}
    print("\n\n".join([f"\n{pair['prompt'][0]['content']}", *(f"{name}: {text}" for name, text in told.items())]))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """--steps, --seed, --out."""
    parser.add_argument("--steps", type=int, default=12, help="optimizer steps of 6 pairs (default 12)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("runs/demo"), metavar="DIR", help="default: runs/demo")


def main(args: argparse.Namespace) -> int:
    """Get the model, train it, show what changed."""
    if args.steps < 1:
        raise ValueError(f"--steps is {args.steps}; it has to be at least 1")
    model = smollm2()
    data = args.out / "pairs.jsonl"
    write_pairs(data)
    return run(model, data, args.out, args.steps, args.seed, max_eval_pairs=30)
