"""Pairs per second of whole training steps: objectives and references, with plain rows and with everything shared.

    python -m bench.training                                    all rows, about five minutes on two cores
    python -m bench.training --row release synpo synpo-shared   some of them

A random Llama (30 M parameters, vocabulary 8,192), LoRA of rank 16 on all projections, pairs of one length with a
prompt eight times as long as an answer. Rows:

    synpo, simpo, dpo-model, dpo-adapter, dpo-precomputed   SynPOTrainer with prefix_sharing=False
    the same with -shared      SynPOTrainer as it comes: the prompt computed once, pairs packed
    release                    SynPO as its public release trains it: the model called once for each answer, float32
                               logits of every token, a log-softmax for the ranking term, a softmax for the other
    dpo-usual                  DPO as usually written: logits of every token, a second model as the reference, online

dpo-model: a second model is the reference; dpo-adapter: the model with its adapter off; dpo-precomputed: reference
log-probs from before training, whose time is not in the row. Every row is a fresh process that sees the same pairs.
"""

import argparse
import csv
import datetime
import itertools
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from .measure import commit, device_name
from .memory import MB, Peak

OURS = ("synpo", "simpo", "dpo-model", "dpo-adapter", "dpo-precomputed")
ROWS = ("release", "dpo-usual", *(name + form for name in OURS for form in ("", "-shared")))
COLUMNS = [
    "date", "commit", "device", "torch", "transformers", "row", "parameters", "prompt", "answer", "pairs_per_step",
    "steps", "pairs_per_s", "step_s", "loader_ms", "peak_extra_mb", "models_mb", "loss",
]  # fmt: skip
VOCABULARY = 8192
ALPHA, BETA, DPO_BETA = 30.0, 0.2, 0.1
LEARNING_RATE = 1e-4


def make_model(seed: int = 0) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=512, intermediate_size=1408, num_hidden_layers=8, num_attention_heads=8,
        num_key_value_heads=4, max_position_embeddings=8192, tie_word_embeddings=True, pad_token_id=None,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def make_tokenizer() -> Any:
    """A word, a token; the pairs' texts are words."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {"<unk>": 0, "<s>": 1, "</s>": 2, **{f"w{i}": i for i in range(3, VOCABULARY)}}
    inner = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


def make_pairs(count: int, prompt: int, answer: int) -> list[dict[str, str]]:
    """Random texts of exactly so many tokens, an answer's end token included."""
    generator = torch.Generator().manual_seed(0)

    def text(length: int) -> str:
        return " ".join(f"w{i}" for i in torch.randint(3, VOCABULARY, (length,), generator=generator).tolist())

    return [{"prompt": text(prompt), "chosen": text(answer - 1), "rejected": text(answer - 1)} for _ in range(count)]


def recipe() -> Any:
    from synpo.train import lora_recipe

    return lora_recipe(r=16, alpha=16, dropout=0.0)


def ours(row: str, args: argparse.Namespace, folder: str) -> dict[str, Any]:
    """SynPOTrainer's steps."""
    from transformers import TrainerCallback

    from synpo import SynPOConfig, SynPOTrainer

    name, shared = row.removesuffix("-shared"), row.endswith("-shared")
    objective, _, reference = name.partition("-")
    config = SynPOConfig(
        output_dir=folder, objective=objective, precompute_ref_logps=reference == "precomputed",
        prefix_sharing=None if shared else False, max_steps=args.steps + 1, learning_rate=LEARNING_RATE,
        per_device_train_batch_size=args.pairs, gradient_accumulation_steps=1, lr_scheduler_type="constant",
        warmup_steps=0, save_strategy="no", disable_tqdm=True, use_cpu=not torch.cuda.is_available(), max_length=8192,
        train_sampling_strategy="sequential",
    )  # fmt: skip
    ends: list[float] = []
    waits: list[float] = []

    class Clock(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            ends.append(time.perf_counter())

    class Timed(SynPOTrainer):
        def get_batch_samples(self, *arguments: Any) -> Any:
            start = time.perf_counter()
            found = super().get_batch_samples(*arguments)
            waits.append(time.perf_counter() - start)
            return found

    trainer = Timed(
        make_model(), config, make_pairs(args.pairs * (args.steps + 1), args.prompt, args.answer),
        processing_class=make_tokenizer(), peft_config=recipe(),
        ref_model=make_model() if reference == "model" else None, callbacks=[Clock()],
    )  # fmt: skip
    trainer._precompute_references()
    peak = Peak(trainer.args.device)
    trainer.train()
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    assert trainer.scorer.fallbacks == 0
    models = [trainer.model, *([] if reference != "model" else [trainer.references.ref_model])]
    return summary(ends, waits, peak, losses, args) | weights_of(*models)


def restated(row: str, args: argparse.Namespace) -> dict[str, Any]:
    """Steps of the loops that others write: one pair per forward and backward pass."""
    from peft import get_peft_model

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = get_peft_model(make_model(), recipe()).to(device).train()
    reference = make_model().to(device).eval() if row == "dpo-usual" else None
    loss_of: Callable[[Tensor, int], Tensor] = (
        _release_loss(model) if reference is None else _dpo_loss(model, reference)
    )
    weights = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=LEARNING_RATE)
    tokenizer = make_tokenizer()
    ends, losses = [], []
    rows = make_pairs(args.pairs * (args.steps + 1), args.prompt, args.answer)
    peak = Peak(device)
    for step in range(args.steps + 1):
        total = 0.0
        for text in rows[step * args.pairs : (step + 1) * args.pairs]:
            texts = [f"{text['prompt']} {text[side]} </s>" for side in ("chosen", "rejected")]
            ids = torch.tensor(tokenizer(texts)["input_ids"], device=device)
            loss = loss_of(ids, args.prompt) / args.pairs
            loss.backward()
            total += float(loss)
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(total)
        ends.append(time.perf_counter())
    models = [model, *([] if reference is None else [reference])]
    return summary(ends, [0.0], peak, losses, args) | weights_of(*models)


def _release_loss(model: nn.Module) -> Callable[[Tensor, int], Tensor]:
    def loss(ids: Tensor, prompt: int) -> Tensor:
        rewards, language = [], None
        for row in ids:
            logits = model(input_ids=row[None], use_cache=False).logits[0, :-1].float()
            labels = row[1:, None]
            answer = torch.arange(len(labels), device=row.device) >= prompt - 1
            logps = logits.log_softmax(-1).gather(-1, labels)[:, 0]
            rewards.append(((logps * answer).sum() / answer.sum()).exp())
            if language is None:
                probabilities = logits.softmax(-1).gather(-1, labels)[:, 0]
                language = (probabilities * answer).sum() / answer.sum()
        return -torch.sigmoid(ALPHA * (rewards[0] - rewards[1])) - BETA * language

    return loss


def _dpo_loss(model: nn.Module, reference: nn.Module) -> Callable[[Tensor, int], Tensor]:
    def sums(of: nn.Module, ids: Tensor, prompt: int) -> Tensor:
        logits = of(input_ids=ids, use_cache=False).logits[:, :-1].float()
        logps = logits.log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]
        return logps[:, prompt - 1 :].sum(1)

    def loss(ids: Tensor, prompt: int) -> Tensor:
        with torch.no_grad():
            fixed = sums(reference, ids, prompt)
        chosen, rejected = sums(model, ids, prompt) - fixed
        return -torch.nn.functional.logsigmoid(DPO_BETA * (chosen - rejected))

    return loss


def summary(
    ends: list[float], waits: list[float], peak: Peak, losses: list[float], args: argparse.Namespace
) -> dict[str, Any]:
    """What the steps after the first took; the first warms up."""
    seconds = statistics.median([b - a for a, b in itertools.pairwise(ends)])
    return {
        "pairs_per_s": round(args.pairs / seconds, 3),
        "step_s": round(seconds, 3),
        "loader_ms": round(1e3 * statistics.median(waits), 2),
        "peak_extra_mb": round(peak.extra_mb()),
        "loss": round(losses[0], 5),
    }


def weights_of(*models: nn.Module) -> dict[str, int]:
    """Memory of the models that a row holds, which its peak comes on top of."""
    return {"models_mb": round(sum(p.numel() * p.element_size() for m in models for p in m.parameters()) / MB)}


def in_fresh_process(row: str, args: argparse.Namespace) -> dict[str, Any]:
    child = [sys.executable, "-m", "bench.training", "--in-process", "--row", row]
    for name in ("prompt", "answer", "pairs", "steps"):
        child += ["--" + name, str(getattr(args, name))]
    done = subprocess.run(child, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{row} failed with exit status {done.returncode}:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench.training", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--row", nargs="+", choices=ROWS, default=list(ROWS))
    parser.add_argument("--prompt", type=int, default=512, help="tokens of a prompt (512)")
    parser.add_argument("--answer", type=int, default=64, help="tokens of an answer (64)")
    parser.add_argument("--pairs", type=int, default=2, help="pairs in a step (2)")
    parser.add_argument("--steps", type=int, default=5, help="timed steps, after one of warm-up (5)")
    parser.add_argument("--out", type=Path, help="CSV to append to; default bench/results/training_<device>.csv")
    parser.add_argument("--in-process", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.in_process:
        (row,) = args.row
        with tempfile.TemporaryDirectory() as folder:
            found = restated(row, args) if row in ("release", "dpo-usual") else ours(row, args, folder)
        print("\n" + json.dumps(found))
        return
    device = device_name("cuda" if torch.cuda.is_available() else "cpu")
    out = args.out or Path(__file__).parent / "results" / f"training_{device}.csv"
    world = {
        "date": datetime.date.today().isoformat(),
        "commit": commit(),
        "device": device,
        "torch": torch.__version__,
        "transformers": version("transformers"),
        "parameters": sum(p.numel() for p in make_model().parameters()),
        "prompt": args.prompt,
        "answer": args.answer,
        "pairs_per_step": args.pairs,
        "steps": args.steps,
    }
    print("| row | pairs per s | s per step | loader wait, ms | models, MB | peak MB over them | first loss |")
    print("|---|---|---|---|---|---|---|")
    for row in tqdm(args.row, unit="row", file=sys.stderr):
        result = world | {"row": row} | in_fresh_process(row, args)
        out.parent.mkdir(parents=True, exist_ok=True)
        new = not out.exists()
        with out.open("a", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
            if new:
                writer.writeheader()
            writer.writerow(result)
        shown = ("row", "pairs_per_s", "step_s", "loader_ms", "models_mb", "peak_extra_mb", "loss")
        print("| " + " | ".join(str(result[name]) for name in shown) + " |")


if __name__ == "__main__":
    main()
