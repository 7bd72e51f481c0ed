"""The vision tower inside a training step: run once for each video, however many rows show it."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedTokenizerBase

from ..video import PixelSpec
from .config import SynPOConfig
from .media import TRAINABLE, Media, MediaReader
from .model import base_model, language_part
from .vision_cache import Encoded, VisionCache, tower_digest

logger = logging.getLogger(__name__)


def open_media(
    args: SynPOConfig, model: nn.Module, tokenizer: PreTrainedTokenizerBase, spec: PixelSpec | None
) -> MediaReader | None:
    """What reads the pairs' videos for a model; None for a model of text, or of a family that is not known here.

    Errors: ValueError for a cache without a tower, or beside a tower that trains; pixel settings not supported.
    """
    config = base_model(model).config
    if config.model_type not in TRAINABLE:
        if args.vision_cache is not None:
            raise ValueError(
                f"vision_cache is set, but a {config.model_type} model has no tower known here; leave it out"
            )
        if hasattr(config, "vision_config"):
            logger.warning(
                "a %s model is trained on text alone here; families with video: %s",
                config.model_type,
                ", ".join(TRAINABLE),
            )
        return None
    cache = None
    if args.vision_cache is not None:
        trained = next((name for name, p in vision_parameters(model) if p.requires_grad), None)
        if trained is not None:
            raise ValueError(
                f"vision_cache is set, but the vision tower or projector trains ({trained}), so its features change; "
                "freeze it, or leave vision_cache out"
            )
        cache = VisionCache(args.vision_cache, tower_digest(vision_parameters(model)), args.vision_cache_gb)
    return MediaReader(model, tokenizer, args.frame_policy, spec, cache)


def open_vision(model: nn.Module, media: MediaReader | None, *, cached: bool = True) -> "Vision | None":
    """The tower of a model whose media this reader reads; cached: with the reader's cache."""
    return None if media is None else Vision(model, media.spec.key, media.cache if cached else None)


def vision_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Everything before the language model: tower, projector, and what stands between frames."""
    for name, parameter in base_model(model).named_parameters():
        if not language_part(name):
            yield name, parameter


class Vision:
    """A model's tower: what its forward call is given for the media of a pass."""

    def __init__(self, model: nn.Module, key: str, cache: VisionCache | None = None) -> None:
        """key: name of the pixels among the forward call's arguments."""
        self.modality = "video" if key.endswith("videos") else "image"
        self.trains = any(parameter.requires_grad for _, parameter in vision_parameters(model))
        self.cache = cache
        self._recent: dict[bytes, Encoded] = {}

    def options(self, model: nn.Module, media: list[Media]) -> dict[str, Any]:
        """Arguments of the forward call for a pass whose rows show these media, in order.

        A frozen tower runs here, once for each of them, without gradient; one that trains runs inside the forward call.
        Errors: ValueError where that call cannot take videos of different sizes together.
        """
        if not media:
            return {}
        base = base_model(model)
        if self.trains or _sharded(base):
            return self._together(base, media)
        known, self._recent = self._recent, {}
        new = any(item.key not in known and item.encoded is None for item in media)
        with torch.no_grad(), _evaluating(base) if new else nullcontext():
            for item in media:
                if item.key not in self._recent:
                    self._recent[item.key] = known.get(item.key) or self._encoded(base, item)
        return {"mm_encoder_outputs": {self.modality: _joined([self._recent[item.key] for item in media])}}

    def _encoded(self, base: Any, item: Media) -> Encoded:
        if item.encoded is not None:
            pooled, levels = item.encoded
            moved = [x.to(base.device) for x in pooled] if isinstance(pooled, list) else pooled.to(base.device)
            return Encoded(moved, levels and [[x.to(base.device) for x in level] for level in levels])
        encode = base.get_video_features if self.modality == "video" else base.get_image_features
        output = encode(**_placed(base, item.inputs), return_dict=True)
        pooled = output.pooler_output
        levels = getattr(output, "deepstack_features", None)
        # A tensor of several frames may be a view of something larger, a tuple a list in disguise.
        found = Encoded(
            pooled.clone() if isinstance(pooled, Tensor) else [x.clone() for x in pooled],
            None if levels is None else [_tensors(level) for level in levels],
        )
        if self.cache is not None:
            self.cache.put(item.key, found, item.skeleton)
        return found

    def _together(self, base: Any, media: list[Media]) -> dict[str, Any]:
        placed = [_placed(base, item.inputs) for item in media]
        shapes = {name: {tuple(inputs[name].shape[1:]) for inputs in placed} for name in placed[0]}
        if any(len(found) > 1 for found in shapes.values()):
            raise ValueError(
                "videos of different lengths or sizes in one pass, and the vision tower runs inside the forward call "
                "(it trains, or is sharded); set num_frames, or tokens_per_pass so that a pass holds one pair"
            )
        return {name: torch.cat([inputs[name] for inputs in placed]) for name in placed[0]}


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Without dropout: a frozen tower says the same of a video every time."""
    training = model.training
    if training:
        model.eval()
    try:
        yield
    finally:
        if training:
            model.train()


def _sharded(base: Any) -> bool:
    """Whether weights are whole inside a wrapper's forward call alone (FSDP, ZeRO-3), so that the tower cannot run by
    itself.
    """
    parameter = next(p for _, p in vision_parameters(base))
    return isinstance(parameter, DTensor) or hasattr(parameter, "ds_id")


def _placed(base: Any, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    return {
        name: value.to(base.device, base.dtype if value.is_floating_point() else None) for name, value in inputs.items()
    }


def _tensors(level: Any) -> list[Tensor]:
    return [level.clone()] if isinstance(level, Tensor) else [x.clone() for x in level]


def _joined(found: list[Encoded]) -> SimpleNamespace:
    """The results of several videos as the model would have returned them together. Tensors (videos or frames, vectors,
    H) become one of a single row, which models flatten or fill in from all the same: videos may differ in length.
    """
    if isinstance(found[0].pooled, Tensor):
        pooled = torch.cat([item.pooled.flatten(0, 1) for item in found])[None]
    else:
        pooled = [x for item in found for x in item.pooled]
    levels = found[0].levels and [[x for item in found for x in item.levels[i]] for i in range(len(found[0].levels))]
    return SimpleNamespace(pooler_output=pooled, deepstack_features=levels)
