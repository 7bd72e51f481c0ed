"""A tiny random Llama, its tokenizer, and pairs, made on the spot."""

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedTokenizerFast,
)

from synpo.train import SynPOConfig, SynPOTrainer, lora_recipe

WORDS = [f"w{i}" for i in range(90)]
TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|> {{ m.content }} <|end|>{{ ' ' }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|> {% endif %}"
)


def tokenizer(template: str | None = TEMPLATE) -> PreTrainedTokenizerFast:
    """One token per word; <s> and </s> beside the template's <|end|>, as instruction-tuned models have."""
    specials = ["<unk>", "<s>", "</s>", "<|user|>", "<|assistant|>", "<|system|>", "<|end|>"]
    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(specials + WORDS)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made = PreTrainedTokenizerFast(
        tokenizer_object=inner,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        additional_special_tokens=specials[3:],
    )
    made.chat_template = template
    return made


SIZES: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.2,  # log-probs far from uniform, so that losses and gradients are not all alike
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": None,
}


def config(**changes: Any) -> LlamaConfig:
    return LlamaConfig(**SIZES | {"max_position_embeddings": 128, "tie_word_embeddings": True} | changes)


def model(seed: int = 0, **changes: Any) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    return LlamaForCausalLM(config(**changes))


def windowed(window: int) -> MistralForCausalLM:
    """A model whose tokens see so many before them."""
    torch.manual_seed(0)
    return MistralForCausalLM(MistralConfig(**SIZES, head_dim=8, sliding_window=window))


def pairs(count: int, seed: int = 0) -> list[dict[str, Any]]:
    """Conversational pairs of different lengths."""
    generator = torch.Generator().manual_seed(seed)

    def text(low: int, high: int) -> str:
        length = int(torch.randint(low, high, (), generator=generator))
        return " ".join(WORDS[i] for i in torch.randint(90, (length,), generator=generator).tolist())

    return [
        {
            "prompt": [{"role": "user", "content": text(2, 9)}],
            "chosen": [{"role": "assistant", "content": text(1, 12)}],
            "rejected": [{"role": "assistant", "content": text(1, 12)}],
        }
        for _ in range(count)
    ]


def arguments(folder: Path, **changes: Any) -> SynPOConfig:
    options = {
        "output_dir": str(folder),
        "max_length": 64,
        "learning_rate": 1e-2,
        "warmup_steps": 0,
        "gradient_accumulation_steps": 1,
        "num_train_epochs": 1,
        "save_strategy": "no",
        "disable_tqdm": True,
        "use_cpu": True,
    }
    return SynPOConfig(**options | changes)


def trainer(folder: Path, count: int = 8, *, lora: bool = True, dropout: float = 0.0, **changes: Any) -> SynPOTrainer:
    """A trainer of a tiny model on ``count`` pairs; changes are keywords of SynPOTrainer or of SynPOConfig."""
    own = {
        name: changes.pop(name)
        for name in (
            "model",
            "train_dataset",
            "eval_dataset",
            "peft_config",
            "ref_model",
            "processing_class",
            "compute_metrics",
        )
        if name in changes
    }
    options = {
        "model": own.pop("model", None) or model(),
        "train_dataset": pairs(count),
        "processing_class": tokenizer(),
        "peft_config": lora_recipe(r=4, alpha=8, dropout=dropout) if lora else None,
    }
    return SynPOTrainer(args=arguments(folder, **changes), **options | own)
