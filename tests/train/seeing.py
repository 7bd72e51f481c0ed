"""Tiny random video models, the pixels that their towers take, and pairs with films."""

import copy
from functools import cache
from pathlib import Path
from typing import Any

import torch
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
)

from synpo.auroracap import AuroraCapConfig, AuroraCapForConditionalGeneration
from synpo.train import SynPOTrainer, lora_recipe
from synpo.video import PixelSpec
from tests.caption import tiny as captions
from tests.train import tiny
from tests.video import films

FAMILIES = (
    "llava", "auroracap", "llava_onevision", "llava_next_video", "internvl", "smolvlm", "qwen2_5_vl", "qwen3_vl",
    "video_llama_3",
)  # fmt: skip
SIDE, PATCH = captions.SIZE, captions.PATCH
FRAMES = 4
_SQUARE = {"size": {"height": SIDE, "width": SIDE}}
_CROPPED = {"size": {"shortest_edge": SIDE}, "crop_size": {"height": SIDE, "width": SIDE}}
_AREA = {"patch_size": PATCH, "merge_size": 2, "size": {"shortest_edge": 16 * 16, "longest_edge": SIDE * SIDE}}
SETTINGS: dict[str, dict[str, Any]] = {
    "llava": _CROPPED,
    "auroracap": _CROPPED,
    "llava_onevision": _SQUARE,
    "llava_next_video": _CROPPED,
    "internvl": _SQUARE,
    "smolvlm": {"size": {"longest_edge": SIDE}, "max_image_size": {"longest_edge": SIDE}},
    "qwen2_5_vl": _AREA,
    "qwen3_vl": _AREA | {"size": {"shortest_edge": 16 * 16, "longest_edge": FRAMES * SIDE * SIDE}},
    "video_llama_3": _AREA | {"size": {"shortest_edge": 16 * 16, "longest_edge": FRAMES * SIDE * SIDE}},
}
_QWEN3 = ["<|vision_start|>", "<|vision_end|>", "<|video_pad|>"]


@cache
def tokenizer(family: str) -> PreTrainedTokenizerBase:
    made = copy.deepcopy(captions.tokenizer())
    if family == "qwen3_vl":
        made.add_special_tokens({"additional_special_tokens": _QWEN3}, replace_extra_special_tokens=False)
        made.chat_template = made.chat_template.replace(
            "<{{ part.type }}>", "<|vision_start|><|video_pad|><|vision_end|>"
        )
    return made


def _qwen3_vl() -> PreTrainedModel:
    config = Qwen3VLConfig(
        vision_config={
            "depth": 2, "hidden_size": 32, "intermediate_size": 48, "num_heads": 4, "patch_size": PATCH,
            "spatial_merge_size": 2, "temporal_patch_size": 2, "out_hidden_size": 32, "deepstack_visual_indexes": [0],
            "num_position_embeddings": 16,
        },
        text_config={
            "vocab_size": len(tokenizer("qwen3_vl")), "hidden_size": 32, "intermediate_size": 48,
            "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
            "initializer_range": 0.3, "pad_token_id": 2,
            "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0},
        },
        image_token_id=captions.IDS["<image>"],
        video_token_id=tokenizer("qwen3_vl").convert_tokens_to_ids("<|video_pad|>"),
        vision_start_token_id=tokenizer("qwen3_vl").convert_tokens_to_ids("<|vision_start|>"),
        tie_word_embeddings=False,
    )  # fmt: skip
    torch.manual_seed(1)
    made = Qwen3VLForConditionalGeneration(config)
    for name, weight in made.named_parameters():
        if "norm" not in name and weight.ndim > 1:
            torch.nn.init.normal_(weight, std=0.3)
    return made


@cache
def _auroracap() -> PreTrainedModel:
    llava = captions.model("llava")
    options = {"token_kept_ratio": 0.5, "model_type": "auroracap"}
    made = AuroraCapForConditionalGeneration(AuroraCapConfig.from_dict(llava.config.to_dict() | options))
    made.load_state_dict(llava.state_dict())
    return made


def model(family: str) -> PreTrainedModel:
    """A random model whose tower tells films apart."""
    if family == "auroracap":
        return copy.deepcopy(_auroracap())
    return _qwen3_vl() if family == "qwen3_vl" else copy.deepcopy(captions.model(family))


def spec(family: str) -> PixelSpec:
    return PixelSpec.of(family, SETTINGS[family])


@cache
def film(number: int) -> bytes:
    """Films of different lengths and shapes."""
    sizes = [(48, 64), (64, 48), (32, 32), (64, 64)]
    return films.film(frames=12 + 5 * number, size=sizes[number % 4])


def pairs(count: int, folder: Path | None = None) -> list[dict[str, Any]]:
    """Pairs with a film each, as bytes, or as files in a folder."""
    rows = tiny.pairs(count)
    for number, row in enumerate(rows):
        text = row["prompt"][0]["content"]
        row["prompt"] = [{"role": "user", "content": [{"type": "video"}, {"type": "text", "text": text}]}]
        if folder is None:
            row["videos"] = [{"bytes": film(number)}]
        else:
            path = folder / f"{number}.mp4"
            path.write_bytes(film(number))
            row["videos"] = [str(path)]
    return rows


def trainer(folder: Path, family: str = "llava_onevision", count: int = 4, **changes: Any) -> SynPOTrainer:
    """A trainer of a tiny video model; changes are keywords of SynPOTrainer or of SynPOConfig."""
    own = {
        name: changes.pop(name)
        for name in ("model", "train_dataset", "eval_dataset", "peft_config", "ref_model", "processing_class")
        if name in changes
    }
    options = {
        "model": own.pop("model", None) or model(family),
        "train_dataset": own.pop("train_dataset", None) or pairs(count),
        "processing_class": tokenizer(family),
        "peft_config": lora_recipe(r=4, alpha=8, dropout=0.0),
        "pixel_spec": spec(family),
    }
    arguments = {"max_length": 256, "num_frames": FRAMES, "optim": "sgd", "learning_rate": 0.3}
    return SynPOTrainer(args=tiny.arguments(folder, **arguments | changes), **options | own)
