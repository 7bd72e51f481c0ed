"""Models and tokenizers by name or path: hub names, folders, .gguf files, adapters of `synpo train`."""

import json
from pathlib import Path
from typing import NamedTuple

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING

ADAPTER = "adapter_config.json"
DTYPES = ("auto", "float32", "bfloat16", "float16")


class Location(NamedTuple):
    """from_pretrained's arguments."""

    where: str
    options: dict[str, str]


def locate(name: str) -> Location:
    """Where a hub name, a folder of a model or an adapter, a .gguf file, or a folder whose only model is one .gguf file
    is to be loaded from.

    Errors: FileNotFoundError for a path that does not exist or holds no model.
    """
    path = Path(name).expanduser()
    if path.suffix == ".gguf":
        if not path.is_file():
            raise FileNotFoundError(f"model {name!r}: no such file")
        return Location(str(path.parent), {"gguf_file": path.name})
    if not path.is_dir():
        if path.is_absolute() or name.startswith((".", "~")):
            raise FileNotFoundError(f"model {name!r}: no such folder")
        return Location(name, {})
    if (path / "config.json").exists() or (path / ADAPTER).exists():
        return Location(str(path), {})
    found = sorted(path.glob("*.gguf"))
    if len(found) != 1:
        raise FileNotFoundError(
            f"model {name!r}: the folder needs a config.json or exactly one .gguf file; it has {len(found)} .gguf files"
        )
    return Location(str(path), {"gguf_file": found[0].name})


def load_model(
    name: str, dtype: torch.dtype | str | None = None, attn_implementation: str | None = None
) -> PreTrainedModel:
    """A language model or vision-language model by name or path, an adapter on the model that it was trained on.

    dtype None: float32 on a machine without an accelerator, else the checkpoint's own. attn_implementation: as in
    transformers' from_pretrained; None: its default.
    """
    where, options = locate(name)
    if (adapter := Path(where) / ADAPTER).exists():
        base = json.loads(adapter.read_text(encoding="utf-8"))["base_model_name_or_path"]
        model = load_model(base, dtype, attn_implementation)
        model.load_adapter(where)
        return model
    if dtype is None:
        dtype = "auto" if torch.accelerator.is_available() else torch.float32
    if "gguf_file" not in options:
        sees = type(AutoConfig.from_pretrained(where)) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
        loader = AutoModelForImageTextToText if sees else AutoModelForCausalLM
        return loader.from_pretrained(where, dtype=dtype, attn_implementation=attn_implementation)
    model = AutoModelForCausalLM.from_pretrained(
        where, dtype=dtype, attn_implementation=attn_implementation, **options
    )
    # The weights were dequantised while loading; the marks of their former format would forbid training them.
    for mark in ("is_quantized", "quantization_method", "hf_quantizer"):
        model.__dict__.pop(mark, None)
    model.config.__dict__.pop("quantization_config", None)
    return model


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """The tokenizer that belongs to a model's name or path."""
    where, options = locate(name)
    return AutoTokenizer.from_pretrained(where, **options)
