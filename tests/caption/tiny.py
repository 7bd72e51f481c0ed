"""Tiny random models of every family, their tokenizer, and inputs for their vision towers, made on the spot."""

import json
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import (
    CLIPVisionConfig,
    InternVLConfig,
    InternVLForConditionalGeneration,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextVideoConfig,
    LlavaNextVideoForConditionalGeneration,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    SiglipVisionConfig,
    SmolVLMConfig,
    SmolVLMForConditionalGeneration,
    VideoLlama3Config,
    VideoLlama3ForConditionalGeneration,
)

from synpo.video import View

SPECIALS = [
    "<unk>", "<s>", "</s>", "<image>", "<video>", "<img>", "</img>", "<ctx>", "<|user|>", "<|assistant|>", "<|end|>",
    "<fake_token_around_image>", "<global-img>",
]  # fmt: skip
WORDS = [f"w{i}" for i in range(84)]
IDS = {word: i for i, word in enumerate(SPECIALS + WORDS)}
SIZE, PATCH = 32, 8  # pixels of a frame's side, and of a patch's
TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|> {% if m.content is string %}{{ m.content }}{% else %}"
    "{% for part in m.content %}{% if part.type == 'text' %} {{ part.text }}{% else %}<{{ part.type }}>{% endif %}"
    "{% endfor %}{% endif %} <|end|>{% endfor %}{% if add_generation_prompt %}<|assistant|> {% endif %}"
)
VIDEO_FAMILIES = (
    "llava", "llava_onevision", "llava_next_video", "internvl", "qwen2_vl", "qwen2_5_vl", "smolvlm", "video_llama_3"
)  # fmt: skip


@cache
def tokenizer() -> PreTrainedTokenizerFast:
    """One token a word."""
    inner = Tokenizer(models.WordLevel(IDS, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made = PreTrainedTokenizerFast(
        tokenizer_object=inner,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        additional_special_tokens=SPECIALS[3:],
    )
    made.chat_template = TEMPLATE
    return made


@cache
def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte, so that stop strings and characters begin and end inside and between tokens."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = Tokenizer(models.BPE({letter: i for i, letter in enumerate(letters)}, []))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="</s>", clean_up_tokenization_spaces=False)


def _text(kind: type = LlamaConfig, **changes: Any) -> Any:
    options = {
        "vocab_size": len(IDS),
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "initializer_range": 0.3,  # so that logits differ, and greedy texts are not one token again and again
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 2,
        "tie_word_embeddings": False,
    }
    return kind(**options | changes)


def _tower(kind: type, **changes: Any) -> Any:
    options = {
        "image_size": SIZE,
        "patch_size": PATCH,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    }
    return kind(**options | changes)


def _llava() -> PreTrainedModel:
    config = LlavaConfig(
        vision_config=_tower(CLIPVisionConfig, projection_dim=32),
        text_config=_text(),
        image_token_id=IDS["<image>"],
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
        tie_word_embeddings=False,
    )
    return LlavaForConditionalGeneration(config)


def _llava_onevision() -> PreTrainedModel:
    config = LlavaOnevisionConfig(
        vision_config=_tower(SiglipVisionConfig, vision_use_head=False),
        text_config=_text().to_dict() | {"model_type": "llama"},
        image_token_id=IDS["<image>"],
        video_token_id=IDS["<video>"],
        vision_feature_layer=-1,
        tie_word_embeddings=False,
    )
    return LlavaOnevisionForConditionalGeneration(config)


def _llava_next_video() -> PreTrainedModel:
    config = LlavaNextVideoConfig(
        vision_config=_tower(CLIPVisionConfig, projection_dim=32),
        text_config=_text(),
        image_token_id=IDS["<image>"],
        video_token_id=IDS["<video>"],
        vision_feature_layer=-1,
        tie_word_embeddings=False,
    )
    return LlavaNextVideoForConditionalGeneration(config)


def _internvl() -> PreTrainedModel:
    config = InternVLConfig(
        vision_config=_tower(dict, image_size=[SIZE, SIZE], patch_size=[PATCH, PATCH]),
        text_config=_text().to_dict() | {"model_type": "llama"},
        image_token_id=IDS["<ctx>"],
        downsample_ratio=0.5,
        tie_word_embeddings=False,
    )
    return InternVLForConditionalGeneration(config)


def _qwen2_5_vl() -> PreTrainedModel:
    config = Qwen2_5_VLConfig(
        vision_config={
            "depth": 2, "hidden_size": 32, "intermediate_size": 48, "num_heads": 4, "patch_size": PATCH,
            "spatial_merge_size": 2, "temporal_patch_size": 2, "window_size": 2 * 2 * PATCH, "out_hidden_size": 32,
            "fullatt_block_indexes": [1],
        },
        text_config=_text(dict)
        | {"rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}},
        image_token_id=IDS["<image>"],
        video_token_id=IDS["<video>"],
        tie_word_embeddings=False,
    )  # fmt: skip
    return Qwen2_5_VLForConditionalGeneration(config)


def _qwen2_vl() -> PreTrainedModel:
    config = Qwen2VLConfig(
        vision_config={
            "depth": 2, "embed_dim": 32, "hidden_size": 32, "mlp_ratio": 2, "num_heads": 4, "patch_size": PATCH,
            "spatial_merge_size": 2, "temporal_patch_size": 2,
        },
        text_config=_text(dict)
        | {"rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}},
        image_token_id=IDS["<image>"],
        video_token_id=IDS["<video>"],
        tie_word_embeddings=False,
    )  # fmt: skip
    return Qwen2VLForConditionalGeneration(config)


def _smolvlm() -> PreTrainedModel:
    config = SmolVLMConfig(
        vision_config=_tower(dict),
        text_config=_text(),
        image_token_id=IDS["<image>"],
        scale_factor=2,
        tie_word_embeddings=False,
    )
    return SmolVLMForConditionalGeneration(config)


def _video_llama_3() -> PreTrainedModel:
    config = VideoLlama3Config(
        vision_config=_tower(dict) | {"model_type": "video_llama_3_vision"},
        text_config=_text(dict) | {"model_type": "qwen2"},
        image_token_id=IDS["<image>"],
        video_token_id=IDS["<video>"],
        tie_word_embeddings=False,
    )
    return VideoLlama3ForConditionalGeneration(config)


def _llama() -> PreTrainedModel:
    return LlamaForCausalLM(_text())


@cache
def model(family: str) -> PreTrainedModel:
    """A random model; its end token is out of reach unless a test sets one."""
    torch.manual_seed(1)
    made = globals()[f"_{family}"]().eval()
    made.generation_config.eos_token_id = None
    for name, weight in made.named_parameters():  # towers start out nearly blind to what they see
        if "norm" not in name and weight.ndim > 1:
            torch.nn.init.normal_(weight, std=0.3)
    return made


def pixels(family: str, frames: np.ndarray) -> dict[str, Tensor]:
    """Frames (F, 32, 32, 3) uint8 as each tower takes them."""
    images = torch.from_numpy(frames).permute(0, 3, 1, 2).float() / 127.5 - 1
    if family in ("llava", "internvl"):
        return {"pixel_values": images}
    if family == "smolvlm":
        return {"pixel_values": images[None]}
    if family in ("llava_onevision", "llava_next_video"):
        return {"pixel_values_videos": images[None]}
    temporal, merge = (2, 2) if family.startswith("qwen") else (1, 2)
    if len(images) % temporal:
        images = torch.cat([images, images[-1:]])
    time, side = len(images) // temporal, SIZE // PATCH
    patches = images.reshape(time, temporal, 3, side // merge, merge, PATCH, side // merge, merge, PATCH)
    patches = patches.permute(0, 3, 6, 4, 7, 2, 1, 5, 8).reshape(time * side * side, -1)
    made = {"pixel_values_videos": patches, "video_grid_thw": torch.tensor([[time, side, side]])}
    return made | ({"video_merge_sizes": torch.tensor([merge])} if family == "video_llama_3" else {})


def view(frames: int = 6, seed: int = 0, seconds: float = 3.0) -> View:
    """Frames of noise, half a second apart by default."""
    images = np.random.default_rng(seed).integers(0, 256, (frames, SIZE, SIZE, 3), dtype=np.uint8)
    return View(0.0, seconds, np.arange(frames) * seconds / frames, tuple(images))


def save_llava(folder: Path) -> None:
    """A tiny LLaVA as a folder that commands take: model, tokenizer, and the settings of its pixels."""
    model("llava").save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    settings = {"size": {"shortest_edge": SIZE}, "crop_size": {"height": SIZE, "width": SIZE}}
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))
