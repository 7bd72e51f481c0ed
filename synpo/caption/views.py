"""Contrast views: what the full view's logits are contrasted with.

A view is any callable (video view, its features, encoder) -> Features, or None for no video at all. The encoder turns
frames (F, H, W, 3) uint8 and their times into Features; views made of the full view's own features need no encoding.
"""

from collections.abc import Callable, Sequence

import numpy as np
import torch

from ..video import View, contrast_subset
from .features import Features

Encoder = Callable[[np.ndarray, Sequence[float]], Features]
ContrastView = Callable[[View, Features, Encoder], Features | None]

SHUFFLE_SEED = 0


def third(view: View, features: Features, encode: Encoder) -> Features:
    """A third of the units, evenly spaced, at least one: the paper's contrast view."""
    return features.choose(contrast_subset(len(features.units)))


def blank(view: View, features: Features, encode: Encoder) -> Features:
    """Black frames, as many as the full view has."""
    frames = -(-len(view) // len(features.units))
    black = encode(np.zeros((frames, *view.images[0].shape), np.uint8), view.times[:1].repeat(frames))
    return features.shows(black.units.expand_as(features.units))


def shuffled(view: View, features: Features, encode: Encoder) -> Features:
    """The full view's units in another order, the same for every video of that length."""
    order = torch.randperm(len(features.units), generator=torch.Generator().manual_seed(SHUFFLE_SEED))
    return features.shows(features.units[order.to(features.units.device)])


def no_video(view: View, features: Features, encode: Encoder) -> None:
    """The instruction alone: what the model would say without looking."""
    return


VIEWS: dict[str, ContrastView] = {"third": third, "blank": blank, "shuffled": shuffled, "no_video": no_video}


def contrast_view(name: str) -> ContrastView | None:
    """A view by its name; "off" is None. Errors: ValueError for any other name."""
    if name == "off":
        return None
    if name not in VIEWS:
        raise ValueError(f"contrast is {name!r}; allowed: off, {', '.join(VIEWS)}")
    return VIEWS[name]
