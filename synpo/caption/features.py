"""What a vision tower makes of a video, and where it goes in the prompt, for each family of models.

A video is encoded once, unit by unit: a unit is one frame, or the pair of frames that Qwen's towers merge. None of the
towers here looks across units, so the features of some of the frames are some of the features of all frames: contrast
views and retrospective passes cost no second encoding. tests/caption holds each family to that.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

_SMALL = (
    "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve",
    "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen",
)  # fmt: skip
_TENS = ("", "", "twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety")


@dataclass(frozen=True)
class Features:
    """A video as the language model gets it."""

    units: Tensor  # (U, N, H): N vectors for each frame or pair of frames
    tail: Tensor  # (E, H): vectors after the last unit; E is 0 in most families
    grid: tuple[int, int]  # rows and columns that a unit's N vectors stand for
    times: tuple[float, ...]  # (U,) seconds at which each unit begins
    duration: float  # seconds

    def choose(self, units: Sequence[int]) -> "Features":
        """Some of the units, at their own times."""
        index = torch.as_tensor(units, device=self.units.device)
        return replace(self, units=self.units[index], times=tuple(self.times[int(unit)] for unit in index))

    def shows(self, units: Tensor) -> "Features":
        """Other content (U, N, H) at the same times."""
        return replace(self, units=units)

    @property
    def vectors(self) -> Tensor:
        """(U N + E, H) in the order of the prompt's placeholders."""
        return torch.cat([self.units.flatten(0, 1), self.tail])

    @property
    def seconds_per_unit(self) -> float:
        """Mean step between units."""
        return (self.times[-1] - self.times[0]) / (len(self.times) - 1) if len(self.times) > 1 else self.duration


@dataclass(frozen=True)
class Words:
    """The strings that stand for images in a tokenizer's prompts."""

    place: str  # one vector of features
    tokenizer: PreTrainedTokenizerBase

    def named(self, attribute: str, usual: str) -> str:
        """A special token by the tokenizer's own name for it."""
        return getattr(self.tokenizer, attribute, None) or usual


@dataclass(frozen=True)
class Family:
    """How one kind of model takes a video."""

    # None: its results are more than Features hold, and it is trained here but not captioned with.
    encode: Callable[[PreTrainedModel, dict[str, Tensor], int], tuple[Tensor, Tensor | None, tuple[int, int]]] | None
    expand: Callable[[Features, Words], list[str]]  # the texts that replace the markers in the chat template's result
    token: str = "video_token_id"  # name in the config of the id that each vector replaces
    marker: str | None = None  # what the chat template writes for the video; None: that token
    part: str = "video"  # the chat template gets one part of this type, or an "image" part for each unit


def encode(model: PreTrainedModel, pixels: dict[str, Tensor], times: Sequence[float], duration: float) -> Features:
    """Features of one video. pixels: what the model's vision tower takes (synpo.video makes them); times: (F,) seconds
    of the frames.
    """
    placed = {
        name: value.to(model.device, model.dtype if value.is_floating_point() else None)
        for name, value in pixels.items()
    }
    with torch.no_grad():
        units, tail, grid = family_of(model).encode(model, placed, len(times))
    step = -(-len(times) // len(units))
    tail = units.new_empty(0, units.shape[-1]) if tail is None else tail
    return Features(units, tail, grid, tuple(float(times[i * step]) for i in range(len(units))), float(duration))


def family_of(model: PreTrainedModel) -> Family:
    """Errors: ValueError for a model without a vision tower, or with one that is not known here."""
    kind = model.config.model_type
    if kind not in FAMILIES:
        raise ValueError(
            f"a {kind} model takes no frames here; models that do: {', '.join(sorted(FAMILIES))}. Give it text alone"
        )
    return FAMILIES[kind]


def _square(count: int) -> tuple[int, int]:
    side = round(count**0.5)
    return (side, side) if side * side == count else (1, count)


def _images(model: PreTrainedModel, pixels: dict[str, Tensor], frames: int) -> tuple[Tensor, None, tuple[int, int]]:
    """Towers that take every frame as an image of its own."""
    found: Any = model.get_image_features(**pixels, return_dict=True).pooler_output
    flat = found.flatten(0, -2) if isinstance(found, Tensor) else torch.cat(list(found))
    units = flat.unflatten(0, (frames, -1))
    return units, None, _square(units.shape[1])


def _frames(
    model: PreTrainedModel, pixels: dict[str, Tensor], frames: int, tail: int = 0
) -> tuple[Tensor, Tensor, tuple[int, int]]:
    """LLaVA's towers for videos; OneVision's ends the whole in one vector for a new line."""
    (flat,) = model.get_video_features(**pixels, return_dict=True).pooler_output
    units, end = flat.split([len(flat) - tail, tail])
    units = units.unflatten(0, (frames, -1))
    return units, end, _square(units.shape[1])


def _grids(model: PreTrainedModel, pixels: dict[str, Tensor], frames: int) -> tuple[Tensor, None, tuple[int, int]]:
    """Towers that take patches, with the number of patches along time, height and width beside them."""
    (flat,) = model.get_video_features(**pixels, return_dict=True).pooler_output
    units, height, width = pixels["video_grid_thw"][0].tolist()
    merge = round((units * height * width / len(flat)) ** 0.5)
    return flat.unflatten(0, (units, -1)), None, (height // merge, width // merge)


def _one_run(features: Features, words: Words) -> list[str]:
    return [words.place * len(features.vectors)]


def _image_each(features: Features, words: Words) -> list[str]:
    return [words.place * features.units.shape[1]] * len(features.units)


def _internvl(features: Features, words: Words) -> list[str]:
    start, end = words.named("start_image_token", "<img>"), words.named("end_image_token", "</img>")
    frame = start + words.place * features.units.shape[1] + end
    return ["\n".join(f"Frame{number}: {frame}" for number in range(1, len(features.units) + 1))]


def _smolvlm(features: Features, words: Words) -> list[str]:
    around = words.named("fake_image_token", "<fake_token_around_image>")
    frame = around + words.named("global_image_token", "<global-img>") + words.place * features.units.shape[1] + around
    length = timedelta(seconds=int(features.duration))
    text = (
        f"You are provided the following series of {_spelled(len(features.units))} frames from a {length} [H:MM:SS] "
        "video.\n"
    )
    for time in features.times:
        text += f"\nFrame from {int(time // 60):02d}:{int(time % 60):02d}:{frame}"
    return [text + "\n\n"]


def _video_llama(features: Features, words: Words) -> list[str]:
    frame = words.place * features.units.shape[1]
    return [",".join(f"Time {time:.1f}s:{frame}" for time in features.times)]


def _spelled(number: int) -> str:
    """English words below a hundred, as SmolVLM was trained with; figures from there on."""
    if number < len(_SMALL):
        return _SMALL[number]
    if number < 100:
        return _TENS[number // 10] + (f"-{_SMALL[number % 10]}" if number % 10 else "")
    return str(number)


FAMILIES = {
    "llava": Family(_images, _image_each, token="image_token_id", part="image"),
    "auroracap": Family(_images, _image_each, token="image_token_id", part="image"),
    "llava_onevision": Family(partial(_frames, tail=1), _one_run),
    "llava_next_video": Family(_frames, _one_run),
    "internvl": Family(_images, _internvl, token="image_token_id", marker="<video>"),
    "qwen2_vl": Family(_grids, _one_run),
    "qwen2_5_vl": Family(_grids, _one_run),
    "smolvlm": Family(_images, _smolvlm, token="image_token_id", marker="<video>"),
    "video_llama_3": Family(_grids, _video_llama),
}
