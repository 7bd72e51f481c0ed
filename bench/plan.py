"""What `synpo train --plan` says against what a step takes: python -m bench.plan

A random Llama of 134 M parameters in the shapes of SmolLM2-135M, LoRA of rank 16 and then all weights, on a CPU. A
fresh process trains three optimizer steps of two micro-batches; its resident memory's highest point over what it held
before the model was there stands beside the plan's sum. Last, a plan that nothing here can check: Llama-3-8B in bf16,
LoRA of rank 128, checkpoints, a GPU's workspace.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from .memory import MB, Peak

SHAPES = {
    "vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
    "num_attention_heads": 9, "num_key_value_heads": 3, "tie_word_embeddings": True, "max_position_embeddings": 8192,
}  # fmt: skip
EIGHT_BILLION = "llama3-8b"
EIGHT_BILLION_SHAPES = {
    "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 8, "tie_word_embeddings": False, "max_position_embeddings": 8192,
}  # fmt: skip
CASES = {
    "lora": {},
    "lora, checkpointing": {"activation_checkpointing": True},
    "lora, plain rows": {"prefix_sharing": False},
    "all weights": {"full": True},
    EIGHT_BILLION: {"activation_checkpointing": True, "bf16": True, "workspace_mb": 640, "r": 128},
}


def _world(case: str, folder: str, args: argparse.Namespace) -> tuple[Any, ...]:
    """(SynPOConfig, adapter, rows, tokenizer) of a case."""
    from synpo import SynPOConfig
    from synpo.train import lora_recipe

    from .training import make_pairs, make_tokenizer

    changes = dict(CASES[case])
    full, r = changes.pop("full", False), changes.pop("r", 16)
    config = SynPOConfig(
        output_dir=folder, max_steps=3, gradient_accumulation_steps=2, per_device_train_batch_size=2, max_length=8192,
        tokens_per_pass=8192, save_strategy="no", disable_tqdm=True, use_cpu=True, **changes,
    )  # fmt: skip
    adapter = None if full else lora_recipe(r=r, alpha=r, dropout=0.05)
    return config, adapter, make_pairs(4, args.prompt, args.answer), make_tokenizer()


def planned(case: str, args: argparse.Namespace) -> dict[str, float]:
    from transformers import LlamaConfig

    from synpo.train.plan import longest_pairs, plan

    with tempfile.TemporaryDirectory() as folder:
        large = case == EIGHT_BILLION
        LlamaConfig(**(EIGHT_BILLION_SHAPES if large else SHAPES)).save_pretrained(folder)
        config, adapter, rows, tokenizer = _world(case, folder, args)
        found = plan(config, folder, "bfloat16" if large else None, adapter, longest_pairs(rows, tokenizer, config))
    return {name: size / MB for name, size in found.parts.items()}


def measured(case: str, args: argparse.Namespace) -> float:
    from transformers import LlamaConfig, LlamaForCausalLM

    from synpo import SynPOTrainer

    with tempfile.TemporaryDirectory() as folder:
        config, adapter, rows, tokenizer = _world(case, folder, args)
        torch.ones(64, 64) @ torch.ones(64, 64)  # the libraries' own buffers come before
        peak = Peak(torch.device("cpu"))
        model = LlamaForCausalLM(LlamaConfig(**SHAPES))
        SynPOTrainer(model, config, rows, processing_class=tokenizer, peft_config=adapter).train()
        return peak.extra_mb()


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.plan", description=__doc__)
    parser.add_argument("--case", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--prompt", type=int, default=512, help="tokens of a prompt (512)")
    parser.add_argument("--answer", type=int, default=128, help="tokens of an answer (128)")
    parser.add_argument("--child", choices=("planned", "measured"), help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.child:
        found = planned(args.case[0], args) if args.child == "planned" else measured(args.case[0], args)
        print("\n" + json.dumps(found))
        return
    print("| case | planned MB | measured MB | ratio | weights, trained, optimizer, gradients, activations, head |")
    print("|---|---|---|---|---|")
    for case in args.case:
        parts = _fresh("planned", case, args)
        total, real, ratio = sum(parts.values()), "", ""
        if case != EIGHT_BILLION:
            found = _fresh("measured", case, args)
            real, ratio = f"{found:.0f}", f"{total / found:.3f}"
        sizes = ", ".join(f"{size:.0f}" for size in parts.values())
        print(f"| {case} | {total:.0f} | {real} | {ratio} | {sizes} |", flush=True)


def _fresh(kind: str, case: str, args: argparse.Namespace) -> Any:
    words = ["--child", kind, "--case", case, "--prompt", str(args.prompt), "--answer", str(args.answer)]
    done = subprocess.run(
        [sys.executable, "-m", "bench.plan", *words], capture_output=True, text=True, env=os.environ, cwd=Path.cwd()
    )
    if done.returncode:
        raise SystemExit(f"{case} failed with exit status {done.returncode}:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


if __name__ == "__main__":
    main()
