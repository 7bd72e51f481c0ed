"""The rules by which models' processors find the size that a frame is resized to.

A rule takes the spec (its bounds, patch, merge and temporal), a frame's height and width, and how many frames the view
has; it gives the (height, width) to resize to, one after the other.
"""

import math
from collections.abc import Callable
from typing import Protocol

LARGEST_EDGE = 4096  # to which SmolVLM's first resize is limited
MOST_OBLONG = 200  # the ratio of the sides that Qwen's rule accepts

Size = tuple[int, int]


class Spec(Protocol):
    """What the rules read of a PixelSpec."""

    bounds: Size
    patch: int
    merge: int
    temporal: int


def kept(spec: Spec, height: int, width: int, count: int) -> list[Size]:
    """No resizing."""
    return []


def exact(spec: Spec, height: int, width: int, count: int) -> list[Size]:
    """bounds = (height, width), whatever the shape."""
    return [spec.bounds]


def shortest(spec: Spec, height: int, width: int, count: int) -> list[Size]:
    """The shorter side becomes bounds[0], the shape is kept."""
    edge = spec.bounds[0]
    long = int(edge * max(height, width) / min(height, width))
    return [(long, edge) if width <= height else (edge, long)]


def squared(spec: Spec, height: int, width: int, count: int) -> list[Size]:
    """The longer side becomes bounds[0], the other the nearest even number; then a square of side bounds[1]."""
    edge, side = min(spec.bounds[0], LARGEST_EDGE), spec.bounds[1]
    ratio = width / height
    short = int(edge / ratio) if width >= height else int(edge * ratio)
    short = max(short + short % 2, 1)
    return [(short, edge) if width >= height else (edge, short), (side, side)]


def frame_area(spec: Spec, height: int, width: int, count: int) -> list[Size]:
    """Multiples of patch * merge; the pixels of each frame are within bounds."""
    return [within_area(height, width, spec.patch * spec.merge, *spec.bounds)]


def shared_area(spec: Spec, height: int, width: int, count: int) -> list[Size]:
    """The same, with the upper bound shared by the frames."""
    least, most = spec.bounds
    return [within_area(height, width, spec.patch * spec.merge, least, most // count)]


def video_area(spec: Spec, height: int, width: int, count: int) -> list[Size]:
    """Multiples of patch * merge; the pixels of all frames together are within bounds."""
    factor = spec.patch * spec.merge
    count = max(count, spec.temporal)  # a single frame fills a patch of time
    if min(height, width) < factor:
        scale = max(factor / height, factor / width)
        height, width = int(height * scale), int(width * scale)
    slots = round(count / spec.temporal) * spec.temporal
    return [within_area(height, width, factor, *spec.bounds, frames=count, slots=slots)]


def within_area(height: int, width: int, factor: int, least: int, most: int, frames: int = 1, slots: int = 1) -> Size:
    """The multiples of `factor` nearest to height and width. Where `slots` such frames are more pixels than `most` or
    fewer than `least`, both sides are scaled so that `frames` frames keep to it, and rounded towards it.
    """
    if max(height, width) > MOST_OBLONG * min(height, width):
        raise ValueError(f"frames of {width}x{height} are too oblong: {MOST_OBLONG} to 1 is the limit")
    near = [round(side / factor) * factor for side in (height, width)]
    area, pixels = slots * near[0] * near[1], frames * height * width
    if area > most:
        shrink = math.sqrt(pixels / most)
        near = [max(factor, math.floor(side / shrink / factor) * factor) for side in (height, width)]
    elif area < least:
        grow = math.sqrt(least / pixels)
        near = [math.ceil(side * grow / factor) * factor for side in (height, width)]
    return near[0], near[1]


RULES: dict[str, Callable[[Spec, int, int, int], list[Size]]] = {
    "keep": kept,
    "exact": exact,
    "shortest": shortest,
    "squared": squared,
    "frame_area": frame_area,
    "shared_area": shared_area,
    "video_area": video_area,
}
