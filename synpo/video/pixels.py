"""From frames to what a vision tower takes, for the video models of transformers, without their video processors.

Those need torchvision, and by default take every frame they get. This is the same arithmetic on numpy and Pillow, held
bit for bit to transformers' image processors of the Pillow kind by test. A model's own settings, the
(video_)preprocessor_config.json beside its weights, decide; what they leave open is the family's default.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from .sizes import RULES

CLIP = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
HALF = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
BICUBIC, LANCZOS = int(Image.Resampling.BICUBIC), int(Image.Resampling.LANCZOS)
LAYOUTS = ("images", "video", "patches")

_SHORTEST = {"shortest_edge": 224}
_CROP = {"height": 224, "width": 224}
_SQUARE = {"height": 384, "width": 384}
_PATCHES = {"layout": "patches", "key": "pixel_values_videos", "patch_size": 14, "merge_size": 2}
_QWEN2 = {"rule": "frame_area", "size": {"shortest_edge": 128 * 28**2, "longest_edge": 768 * 28**2}, "moments": CLIP}
_VIDEO = {"layout": "video", "key": "pixel_values_videos"}
_IMAGES = {"layout": "images", "key": "pixel_values"}

# What each family's model takes, and its video processor's defaults (llava: its image processor's).
FAMILIES: dict[str, dict[str, Any]] = {
    "llava": _IMAGES | {"size": _SHORTEST, "crop_size": _CROP},
    "auroracap": _IMAGES | {"size": {"shortest_edge": 378}, "crop_size": {"height": 378, "width": 378}},
    "internvl": _IMAGES | {"size": _SQUARE},
    "llava_onevision": _VIDEO | {"size": _SQUARE},
    "llava_next_video": _VIDEO | {"size": _SHORTEST, "crop_size": _CROP},
    "video_llava": _VIDEO | {"size": _SHORTEST, "crop_size": _CROP},
    "smolvlm": {
        "layout": "video", "key": "pixel_values", "rule": "squared", "size": {"longest_edge": 4 * 364},
        "max_image_size": {"longest_edge": 364}, "resample": LANCZOS, "moments": HALF,
    },
    "qwen2_vl": _PATCHES | _QWEN2 | {"temporal_patch_size": 2},
    "qwen2_5_vl": _PATCHES | _QWEN2 | {"temporal_patch_size": 2},
    "qwen3_vl": _PATCHES | {
        "rule": "video_area", "size": {"shortest_edge": 128 * 32**2, "longest_edge": 768 * 32**2}, "patch_size": 16,
        "temporal_patch_size": 2, "moments": HALF,
    },
    "video_llama_3": _PATCHES | _QWEN2 | {"rule": "shared_area", "temporal_patch_size": 1, "moments": HALF},
}  # fmt: skip

# Settings that would change the pixels: bounds of another kind, and a frame made square by a border.
UNSUPPORTED = {"cap_pixels_per_frame": ("qwen2_vl", "qwen2_5_vl", "qwen3_vl"), "do_pad": ("llava",)}


@dataclass(frozen=True)
class PixelSpec:
    """How a model's vision tower wants the frames of one video.

    key: the name of the model's input. layout: "images" (F, 3, H, W); "video" (1, F, 3, H, W); "patches" (N, 3 * T * P
    * P) with video_grid_thw (1, 3) beside it, N their product.
    rule, bounds: how the size is found. "keep"; "exact" (height, width); "shortest" edge (edge, 0); "squared": longest
    edge, then a square (edge, side); areas (least, most) in pixels: "frame_area" of each frame, "shared_area" of each
    with `most` divided among the frames, "video_area" of all frames together; height and width are then multiples of
    patch * merge.
    crop: (height, width) around the centre, black where the frame is smaller, or None. resample: Pillow's filter.
    scale, mean, std: value = (scale * pixel - mean) / std. patch, merge, temporal: pixels, patches and frames.
    """

    family: str
    key: str
    layout: str
    rule: str
    bounds: tuple[int, int]
    crop: tuple[int, int] | None
    resample: int
    scale: float
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    patch: int = 1
    merge: int = 1
    temporal: int = 1

    @classmethod
    def of(cls, family: str, settings: Mapping[str, Any] | None = None) -> "PixelSpec":
        """The spec of a model of this family (config.model_type) with these settings: the content of its
        (video_)preprocessor_config.json, or to_dict() of its image processor.

        Raises:
            ValueError: a family that is not known, settings that this code does not have.
        """
        if family not in FAMILIES:
            raise ValueError(f"no pixels are known for a {family!r} model; known: {', '.join(sorted(FAMILIES))}")
        mean, std = FAMILIES[family].get("moments", CLIP)
        default = {"image_mean": mean, "image_std": std, "resample": BICUBIC, "rescale_factor": 1 / 255}
        own = {k: v for k, v in (settings or {}).items() if v is not None}  # None: transformers' word for "not set"
        given = default | FAMILIES[family] | own
        for name, families in UNSUPPORTED.items():
            if family in families and given.get(name):
                raise ValueError(f"{family}: {name}={given[name]} is not supported; switch it off in the settings")
        rule, bounds = _size_rule(given)
        # a tower of another kind, SigLIP in a LLaVA, has a size of its own and no crop
        cropped = given.get("do_center_crop", "crop_size" in (own if "size" in own else given))
        normalised = given.get("do_normalize", True)
        return cls(
            family=family,
            key=given["key"],
            layout=given["layout"],
            rule=rule,
            bounds=bounds,
            crop=_height_width(given["crop_size"]) if cropped else None,
            resample=int(given["resample"]),
            scale=float(given["rescale_factor"]) if given.get("do_rescale", True) else 1.0,
            mean=_three(given["image_mean"]) if normalised else (0.0, 0.0, 0.0),
            std=_three(given["image_std"]) if normalised else (1.0, 1.0, 1.0),
            patch=given.get("patch_size", 1),
            merge=given.get("merge_size", 1),
            temporal=given.get("temporal_patch_size", 1),
        )

    @classmethod
    def read(cls, folder: Path) -> "PixelSpec":
        """The spec of a model that lies in a folder. Its video settings come before its image settings.

        Raises:
            FileNotFoundError: no config.json there. ValueError: see of().
        """
        folder = Path(folder)
        family = json.loads((folder / "config.json").read_text())["model_type"]
        processor = folder / "processor_config.json"
        nested = json.loads(processor.read_text()) if processor.exists() else {}
        found = [nested.get("video_processor"), folder / "video_preprocessor_config.json"]
        found += [nested.get("image_processor"), folder / "preprocessor_config.json"]
        for settings in found:
            if isinstance(settings, Path) and settings.exists():
                settings = json.loads(settings.read_text())
            if isinstance(settings, dict):
                return cls.of(family, settings)
        return cls.of(family)

    def sizes(self, height: int, width: int, count: int) -> list[tuple[int, int]]:
        """The (height, width) that frames of a video with `count` chosen frames are resized to, one after the other."""
        return RULES[self.rule](self, height, width, count)

    def resize(self, image: np.ndarray, count: int) -> np.ndarray:
        """One frame (H, W, 3) uint8 of a view with `count` frames, resized; what decode's `each` takes."""
        for height, width in self.sizes(*image.shape[:2], count):
            if (height, width) != image.shape[:2]:
                image = np.asarray(Image.fromarray(image).resize((width, height), self.resample))
        return image


def pixels(frames: np.ndarray, spec: PixelSpec, *, resized: bool = False) -> dict[str, torch.Tensor]:
    """The model's inputs for one video, without the text: spec.key as float32, and for patches the grid (and for
    VideoLLaMA 3 the merge size) that go with it.

    frames: (F, H, W, 3) uint8, RGB. resized: they come from decode(..., each=spec.resize).
    TypeError, ValueError for frames of another dtype or shape.
    """
    if frames.dtype != np.uint8:
        raise TypeError(f"frames must be uint8, not {frames.dtype}")
    if frames.ndim != 4 or frames.shape[3] != 3 or not frames.size:
        raise ValueError(f"frames must have the shape (F, H, W, 3), none of them 0, not {frames.shape}")
    if not resized:
        frames = np.stack([spec.resize(frame, len(frames)) for frame in frames])
    if spec.crop is not None:
        frames = _cropped(frames, *spec.crop)
    values = _normalised(frames, spec)
    if spec.layout == "images":
        return {spec.key: values}
    if spec.layout == "video":
        return {spec.key: values[None]}
    flat, grid = _patches(values, spec)
    inputs = {spec.key: flat, "video_grid_thw": torch.tensor([grid])}
    if spec.family == "video_llama_3":
        inputs["video_merge_sizes"] = torch.tensor([spec.merge])
    return inputs


def _normalised(frames: np.ndarray, spec: PixelSpec) -> torch.Tensor:
    """(F, 3, H, W) float32. A pixel has 256 values, so each channel is one look-up."""
    scaled = (np.arange(256, dtype=np.float64) * spec.scale).astype(np.float32)
    values = np.empty((len(frames), 3, *frames.shape[1:3]), np.float32)
    for channel, (mean, std) in enumerate(zip(spec.mean, spec.std, strict=True)):
        values[:, channel] = ((scaled - np.float32(mean)) / np.float32(std))[frames[..., channel]]
    return torch.from_numpy(values)


def _cropped(frames: np.ndarray, height: int, width: int) -> np.ndarray:
    top, left = (frames.shape[1] - height) // 2, (frames.shape[2] - width) // 2
    if top < 0 or left < 0:
        margins = [(max(-at, 0), max(at + size - have, 0)) for at, size, have in
                   ((top, height, frames.shape[1]), (left, width, frames.shape[2]))]  # fmt: skip
        frames = np.pad(frames, [(0, 0), *margins, (0, 0)])
        top, left = max(top, 0), max(left, 0)
    return frames[:, top : top + height, left : left + width]


def _patches(values: torch.Tensor, spec: PixelSpec) -> tuple[torch.Tensor, tuple[int, int, int]]:
    """Frames as rows of patches, those that the model merges side by side; the last frame fills up the last patch."""
    missing = -len(values) % spec.temporal
    values = torch.cat([values, values[-1:].expand(missing, -1, -1, -1)])
    count, _, height, width = values.shape
    if height % (spec.patch * spec.merge) or width % (spec.patch * spec.merge):
        raise ValueError(
            f"frames of {width}x{height} are not made of patches of {spec.patch} pixels in groups of {spec.merge}x"
            f"{spec.merge}; resize them with spec.resize"
        )
    grid = (count // spec.temporal, height // spec.patch, width // spec.patch)
    split = values.reshape(
        grid[0], spec.temporal, 3, grid[1] // spec.merge, spec.merge, spec.patch, grid[2] // spec.merge, spec.merge,
        spec.patch,
    )  # fmt: skip
    return split.permute(0, 3, 6, 4, 7, 2, 1, 5, 8).reshape(math.prod(grid), -1), grid


def _size_rule(given: Mapping[str, Any]) -> tuple[str, tuple[int, int]]:
    rule, size = given.get("rule"), given["size"]
    size = dict(size) if isinstance(size, Mapping) else {"shortest_edge": size}
    if not given.get("do_resize", True):
        return "keep", (0, 0)
    if rule == "squared":
        size = given.get("video_sampling", {}).get("video_size", size)
        return rule, (size["longest_edge"], given["max_image_size"]["longest_edge"])
    if rule is not None:  # areas; min_pixels and max_pixels are their names in older files
        least, most = (
            given.get("min_pixels", size.get("shortest_edge")),
            given.get("max_pixels", size.get("longest_edge")),
        )
        return rule, (least, most)
    size = {name: value for name, value in size.items() if value is not None}
    if set(size) == {"height", "width"}:
        return "exact", (size["height"], size["width"])
    if set(size) == {"shortest_edge"}:
        return "shortest", (size["shortest_edge"], 0)
    raise ValueError(f"size={size} is not supported; it must be height and width, or shortest_edge")


def _height_width(size: Any) -> tuple[int, int]:
    return (size["height"], size["width"]) if isinstance(size, Mapping) else (size, size)


def _three(values: Any) -> tuple[float, float, float]:
    first, second, third = values if isinstance(values, list | tuple) else [values] * 3
    return float(first), float(second), float(third)
