"""Models and tokenizers by name or path: hub names, folders, .gguf files, adapters of `synpo train`."""

import json
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING

from . import auroracap as auroracap  # registers itself with transformers

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
    name: str,
    dtype: torch.dtype | str | None = None,
    attn_implementation: str | None = None,
    load_in_4bit: bool = False,
) -> PreTrainedModel:
    """A language model or vision-language model by name or path, an adapter on the model that it was trained on.

    dtype None: float32 on a machine without an accelerator, else the checkpoint's own. attn_implementation: as in
    transformers' from_pretrained; None: its default. load_in_4bit: linear layers but the output's in bitsandbytes' NF4,
    to be trained under an adapter.

    Errors: ValueError for 4 bits without bitsandbytes, or of a .gguf file, which has a format of its own.
    """
    where, options = locate(name)
    quantised = _four_bits(name, options, dtype) if load_in_4bit else {}
    if (adapter := Path(where) / ADAPTER).exists():
        base = json.loads(adapter.read_text(encoding="utf-8"))["base_model_name_or_path"]
        model = load_model(base, dtype, attn_implementation, load_in_4bit)
        model.load_adapter(where)
        return model
    if dtype is None:
        dtype = "auto" if torch.accelerator.is_available() else torch.float32
    if "gguf_file" not in options:
        sees = type(AutoConfig.from_pretrained(where)) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
        loader = AutoModelForImageTextToText if sees else AutoModelForCausalLM
        return loader.from_pretrained(where, dtype=dtype, attn_implementation=attn_implementation, **quantised)
    model = AutoModelForCausalLM.from_pretrained(
        where, dtype=dtype, attn_implementation=attn_implementation, **options
    )
    # The weights were dequantised while loading; the marks of their former format would forbid training them.
    for mark in ("is_quantized", "quantization_method", "hf_quantizer"):
        model.__dict__.pop(mark, None)
    model.config.__dict__.pop("quantization_config", None)
    return model


def _four_bits(name: str, options: Mapping[str, str], dtype: torch.dtype | str | None) -> dict[str, Any]:
    if "gguf_file" in options:
        raise ValueError(f"load_in_4bit: model {name!r} is a .gguf file, widened when it is loaded; leave it out")
    if find_spec("bitsandbytes") is None:
        raise ValueError("load_in_4bit needs bitsandbytes: pip install 'synpo[qlora]'")
    half = torch.float32 if dtype in (None, "auto", "float32", torch.float32) else dtype
    if torch.accelerator.is_available() and half == torch.float32:
        half = torch.bfloat16
    half = getattr(torch, half) if isinstance(half, str) else half
    config = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=half
    )
    return {"quantization_config": config}


def empty_model(name: str, dtype: torch.dtype | str | None = None) -> PreTrainedModel:
    """A model of the shapes and dtype that ``load_model`` would give, from its configuration alone.

    Errors: ValueError for an adapter's folder.
    """
    where, options = locate(name)
    if (Path(where) / ADAPTER).exists():
        raise ValueError(f"model {name!r} is an adapter; give the model that it belongs to")
    config = AutoConfig.from_pretrained(where, **options)
    if dtype is None:
        dtype = "auto" if torch.accelerator.is_available() else torch.float32
    if isinstance(dtype, str):
        dtype = (config.dtype or torch.float32) if dtype == "auto" else getattr(torch, dtype)
    sees = type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
    return (AutoModelForImageTextToText if sees else AutoModelForCausalLM).from_config(config, dtype=dtype)


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """The tokenizer that belongs to a model's name or path."""
    where, options = locate(name)
    return AutoTokenizer.from_pretrained(where, **options)
