"""A Captioner from a model's name or folder: weights, tokenizer, and what its vision tower takes."""

from functools import partial
from pathlib import Path

import torch
from transformers.utils import cached_file

from ..pretrained import load_model, load_tokenizer, locate
from ..video import PixelSpec, pixels
from .captioner import Captioner
from .features import FAMILIES

SETTINGS = (
    "config.json", "video_preprocessor_config.json", "processor_config.json", "preprocessor_config.json"
)  # fmt: skip


def load_captioner(
    name: str, dtype: torch.dtype | str | None = None, *, device: str | None = None, batch_size: int | None = None
) -> Captioner:
    """A captioner by hub name, folder, .gguf file, or adapter of `synpo train`. device None: an accelerator if one is
    there.

    Errors: FileNotFoundError for a path without a model; ValueError for pixel settings that are not supported.
    """
    model = load_model(name, dtype)
    if device is None:
        device = str(torch.accelerator.current_accelerator() or "cpu") if torch.accelerator.is_available() else "cpu"
    spec = None
    if model.config.model_type in FAMILIES:
        spec = PixelSpec.read(settings_folder(model.config.name_or_path))
    return Captioner(
        model.to(device),
        load_tokenizer(name),
        None if spec is None else partial(pixels, spec=spec),
        batch_size=batch_size,
    )


def settings_folder(name: str) -> Path:
    """The folder with a model's settings; those of a hub name are fetched into the cache."""
    where = locate(name).where
    if Path(where).is_dir():
        return Path(where)
    found = [cached_file(where, file, _raise_exceptions_for_missing_entries=False) for file in SETTINGS]
    return Path(found[0]).parent
