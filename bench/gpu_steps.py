"""Training steps in the shapes of 8B models on one GPU: random weights in bf16, LoRA of rank 128, pairs of one length.

    ours      FusedSynPOLoss on the answers' hidden states
    naive     SynPO on full logits, as transformers gives them
    liger     SynPO on liger-kernel's preference base
    trl-dpo   DPO as trl's trainer computes it: its chunked log-probs on the answers' tokens, and a forward pass of the
              reference, the model with its adapter switched off

    synpo-trainer         SynPOTrainer as it is by default: prompts shared by their two answers, no padding
    synpo-trainer-plain   the same with a row for every answer
    trl-dpo-trainer       trl's DPOTrainer

A row is a process: the model is built, a step warms up, the rest are timed. The head's share is its loss and gradient
on the same hidden states, timed alone; trainers' rows leave it out. Tokens per second count a prompt once for each of
its answers, shared or not.
"""

import argparse
import statistics
import tempfile
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor, nn

import synpo_kernels

from .implementations import _liger_synpo, naive_logps, pair_loss
from .measure import Stopwatch, where
from .memory import Peak
from .step_vs_trl import MARGIN, time_steps, trainer_for

LOSSES = ("ours", "naive", "liger", "trl-dpo")
# Row -> step_vs_trl's trainer, and what differs from its options.
TRAINERS: dict[str, tuple[str, dict[str, Any]]] = {
    "synpo-trainer": ("synpo", {}),
    "synpo-trainer-plain": ("synpo", {"prefix_sharing": False, "padding_free": False}),
    "trl-dpo-trainer": ("trl-dpo", {}),
}
MODELS = ("llama3-8b", "llava-onevision-7b", "tiny")
COLUMNS = [
    "date", "commit", "device", "torch", "transformers", "model", "loss", "pairs", "prompt", "answer", "checkpointing",
    "step_ms", "tokens_per_s", "peak_mb", "head_ms", "head_share", "note",
]  # fmt: skip
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
DPO_BETA = 0.1
WORDS = 90  # of the trainers' texts: fewer than the smallest vocabulary
LIMIT = 240.0  # seconds of a row


def plan(device: str) -> list[dict[str, Any]]:
    """The rows, in order of what they tell."""
    shapes = [("llama3-8b", 2, 512, 512), ("llava-onevision-7b", 1, 2048, 512), ("llama3-8b", 4, 1024, 1024)]
    if device == "cpu":
        shapes = [("tiny", 2, 5, 4)]
    return [
        {"model": model, "loss": loss, "pairs": pairs, "prompt": prompt, "answer": answer, "checkpointing": True}
        for model, pairs, prompt, answer in shapes
        for loss in (*LOSSES, *TRAINERS)
    ]


def _llama(**changes: Any) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = {
        "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
        "num_key_value_heads": 8, "vocab_size": 128256, "max_position_embeddings": 8192,
    }  # fmt: skip
    return LlamaForCausalLM(LlamaConfig(**shape | {"use_cache": False} | changes))


def _qwen2() -> nn.Module:
    """LLaVA-OneVision-7B's language model, which its frames' tokens go through with the text's."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    return Qwen2ForCausalLM(
        Qwen2Config(
            hidden_size=3584,
            intermediate_size=18944,
            num_hidden_layers=28,
            num_attention_heads=28,
            num_key_value_heads=4,
            vocab_size=152064,
            max_position_embeddings=32768,
            use_cache=False,
        )
    )


def build(model: str, device: torch.device) -> nn.Module:
    """A model of this shape with random weights, in bfloat16 on a GPU."""
    torch.manual_seed(0)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with device:
            if model == "tiny":
                base = _llama(
                    hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
                    num_key_value_heads=2, vocab_size=97,
                )  # fmt: skip
            else:
                base = {"llama3-8b": _llama, "llava-onevision-7b": _qwen2}[model]()
    finally:
        torch.set_default_dtype(before)
    return base


def with_adapter(base: nn.Module, rank: int, checkpointing: bool) -> nn.Module:
    """The model with a LoRA on all projections, ready to train."""
    from peft import LoraConfig, get_peft_model

    if checkpointing:
        # Renamed after transformers 5.17.
        enable = getattr(base, "activation_checkpointing_enable", None) or base.gradient_checkpointing_enable
        enable()
        base.enable_input_require_grads()
    lora = LoraConfig(r=rank, lora_alpha=64, lora_dropout=0.0, target_modules=TARGETS, task_type="CAUSAL_LM")
    # In the model's dtype: float32 products of the adapter would take as long as the model's own.
    return get_peft_model(base, lora, autocast_adapter_dtype=False).train()


class _Batch:
    """Pairs of one length as token ids: chosen sequences first, then the rejected ones of the same prompts."""

    def __init__(self, pairs: int, prompt: int, answer: int, vocabulary: int, device: torch.device) -> None:
        prompts = torch.randint(vocabulary, (pairs, prompt), device=device)
        answers = torch.randint(vocabulary, (2 * pairs, answer), device=device)
        self.ids = torch.cat([prompts.repeat(2, 1), answers], 1)
        self.labels = answers
        self.first = prompt - 1  # hidden[:, first : -1] predict the answers
        self.cu_seqlens = torch.arange(2 * pairs + 1, dtype=torch.int32, device=device) * answer


def head_loss(loss: str, hidden: Tensor, head: nn.Linear, batch: _Batch, reference: Tensor | None) -> Tensor:
    """The loss on the answers' hidden states (2B, T, H)."""
    if loss == "ours":
        return synpo_kernels.FusedSynPOLoss()(hidden, head.weight, batch.labels).loss
    if loss == "liger":
        return _liger_synpo().apply(hidden, head.weight, batch.labels)[0]
    flat = hidden.flatten(0, 1)
    if loss == "naive":
        logps = naive_logps(flat, head.weight, batch.labels.flatten(), None)
        return pair_loss("synpo_loss", logps, batch.labels, batch.cu_seqlens)[0]
    assert reference is not None
    margins = (_trl_logps(flat, head, batch).view(len(hidden), -1).sum(1) - reference).chunk(2)
    return -nn.functional.logsigmoid(DPO_BETA * (margins[0] - margins[1])).mean()


def _trl_logps(flat: Tensor, head: nn.Linear, batch: _Batch) -> Tensor:
    from .gpu_peers import trl_logps

    return trl_logps(flat, head.weight, batch.labels.flatten(), None)


def _step(model: nn.Module, loss: str, batch: _Batch) -> Tensor:
    causal = model.get_base_model()
    head = causal.get_output_embeddings()
    if loss == "naive":  # what a trainer that asks the model for logits holds: every position's
        logits = causal(input_ids=batch.ids).logits[:, batch.first : -1].float()
        logps = logits.log_softmax(-1).gather(-1, batch.labels[..., None]).flatten()
        return pair_loss("synpo_loss", logps, batch.labels, batch.cu_seqlens)[0]
    reference = None
    if loss == "trl-dpo":
        with torch.no_grad(), model.disable_adapter():
            hidden = causal.model(input_ids=batch.ids).last_hidden_state[:, batch.first : -1]
            reference = _trl_logps(hidden.flatten(0, 1), head, batch).view(len(hidden), -1).sum(1)
    hidden = causal.model(input_ids=batch.ids).last_hidden_state[:, batch.first : -1]
    return head_loss(loss, hidden, head, batch, reference)


def measure_steps(
    model: str, loss: str, pairs: int, prompt: int, answer: int, checkpointing: bool, device: str, steps: int = 5
) -> dict[str, Any]:
    """What a step took and held; runs in the worker. ImportError where the loss's package is missing."""
    where = torch.device(device)
    if loss in TRAINERS:
        return _train(build(model, where), loss, pairs, prompt, answer, checkpointing, steps)
    made = with_adapter(build(model, where), 4 if model == "tiny" else 128, checkpointing)
    parameters = [p for p in made.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-5, fused=where.type == "cuda")
    causal = made.get_base_model()
    head: nn.Linear = causal.get_output_embeddings()
    batch = _Batch(pairs, prompt, answer, head.weight.shape[0], where)

    def step() -> None:
        _step(made, loss, batch).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    stopwatch = Stopwatch(where)
    step()  # compiles, and makes the optimizer's state
    peak = Peak(where)
    times = [stopwatch(step) for _ in range(steps)]
    held = peak.start + peak.extra_mb()
    head_ms = _alone(loss, head, batch, stopwatch, steps)
    step_ms = statistics.median(times)
    return {
        "step_ms": step_ms,
        "tokens_per_s": batch.ids.numel() / step_ms * 1e3,
        "peak_mb": held,
        "head_ms": head_ms,
        "head_share": head_ms / step_ms,
        "note": f"{sum(p.numel() for p in parameters):,} trained parameters",
    }


def _alone(loss: str, head: nn.Linear, batch: _Batch, stopwatch: Stopwatch, steps: int) -> float:
    """Milliseconds of the loss and its gradient in hidden states like the model's."""
    shape = (*batch.labels.shape, head.weight.shape[1])
    hidden = torch.randn(shape, dtype=head.weight.dtype, device=head.weight.device).requires_grad_()
    reference = torch.zeros(len(hidden), device=hidden.device)

    def run() -> None:
        head_loss(loss, hidden, head, batch, reference).backward()
        hidden.grad = None

    run()
    return statistics.median(stopwatch(run) for _ in range(steps))


def _train(
    base: nn.Module, loss: str, pairs: int, prompt: int, answer: int, checkpointing: bool, steps: int
) -> dict[str, Any]:
    """The same of a trainer, on texts of one token a word."""
    name, changes = TRAINERS[loss]
    changes = changes | {"bf16": base.dtype == torch.bfloat16}
    count = pairs * (steps + 1)
    words = torch.randint(WORDS, (count, prompt + 2 * answer)).tolist()

    def text(row: list[int]) -> str:
        return " ".join(f"w{word}" for word in row)

    rows = [
        {"prompt": text(r[:prompt]) + " ", "chosen": text(r[prompt:-answer]), "rejected": text(r[-answer:])}
        for r in words
    ]
    options = argparse.Namespace(batch=pairs, steps=steps, max_length=prompt + answer + MARGIN)
    with tempfile.TemporaryDirectory() as folder:
        trainer = trainer_for(name, base, _tokenizer(), rows, options, folder, checkpointing=checkpointing, **changes)
        taken = time_steps(trainer)
    tokens = 2 * pairs * (prompt + answer)
    return {
        "step_ms": 1e3 * taken["step_s"],
        "tokens_per_s": tokens / taken["step_s"],
        "peak_mb": taken["peak_mb"],
        "note": f"loss of the first step {taken['loss']:.4f}",
    }


def _tokenizer() -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    specials = ["<unk>", "<s>", "</s>"]
    vocabulary = {word: i for i, word in enumerate(specials + [f"w{i}" for i in range(WORDS)])}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="</s>"
    )


def world(device: str) -> dict[str, Any]:
    """What a row says of where it was measured."""
    return where(device) | {"transformers": version("transformers")}


def line(row: dict[str, Any]) -> str:
    """A row in words."""
    shape = f"{row['model']}, {row['pairs']} pairs of {row['prompt']} + {row['answer']} tokens, {row['loss']}"
    if not row.get("step_ms"):
        return f"{shape}: {row['note']}"
    head = f", head {row['head_share']:.1%}" if row.get("head_share") else ""
    return f"{shape}: {row['step_ms']:.0f} ms a step, {row['tokens_per_s']:.0f} tokens/s, {row['peak_mb']:.0f} MB{head}"


def table(rows: list[dict[str, str]]) -> str:
    """Markdown of the rows' latest."""
    latest = {(r["model"], r["pairs"], r["prompt"], r["answer"], r["loss"]): r for r in rows}
    out = ["| model | pairs, prompt + answer | loss | ms a step | tokens/s | peak MB | head's share | note |"]
    out.append("|---|---|---|---|---|---|---|---|")
    for row in latest.values():
        digits = (("step_ms", 1), ("tokens_per_s", 0), ("peak_mb", 0), ("head_share", 3))
        cells = [f"{float(row[name]):.{n}f}" if row[name] else "" for name, n in digits]
        shape = f"{row['pairs']}, {row['prompt']} + {row['answer']}"
        out.append("| " + " | ".join((row["model"], shape, row["loss"], *cells, row["note"])) + " |")
    return "\n".join(out)
