"""A small world to make films of: one shape moves over a plain background, a stripe runs along an edge, and once,
briefly, something happens. Eight facts tell a film, and a renderer draws it.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from random import Random

import numpy as np

SIZE = 32  # width and height of a frame, pixels
BEATS = 8  # moments of a film; the captioner's full view is one frame of each
FRAMES_PER_BEAT = 3
FPS = 8  # 24 frames, 3 s
# The beat of the event. A third of the view, beats 0, 3 and 7, holds none of these.
EVENT_BEAT = {"start": 1, "middle": 4, "end": 6}

_COLOURS = {
    "red": (220, 40, 40),
    "green": (40, 180, 60),
    "blue": (50, 90, 240),
    "yellow": (240, 220, 40),
    "purple": (150, 50, 190),
    "pink": (255, 140, 190),
}
_BACKGROUNDS = {
    "black": (10, 10, 10),
    "white": (245, 245, 245),
    "grey": (128, 128, 128),
    "brown": (110, 70, 30),
    "navy": (15, 20, 90),
}
_DIRECTIONS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}  # x, y; y grows downwards
_FLASH = (90, 255, 255)
_STRIPE_WIDTH = 4

FACTS: dict[str, tuple[str, ...]] = {  # every fact of a film, and the values that it can have
    "shape": ("circle", "square", "triangle", "cross", "ring"),
    "colour": tuple(_COLOURS),
    "background": tuple(_BACKGROUNDS),
    "direction": tuple(_DIRECTIONS),
    "edge": ("left", "right", "top", "bottom"),
    "stripe": tuple(_COLOURS),
    "event": ("vanish", "grow", "dark", "flash"),
    "time": tuple(EVENT_BEAT),
}


@dataclass(frozen=True)
class Scene:
    """The truth about one film: its eight facts, and what captions do not tell."""

    shape: str
    colour: str
    background: str
    direction: str
    edge: str
    stripe: str
    event: str
    time: str
    radius: float = 9.0  # of the shape, pixels
    travel: float = 13.0  # from the first frame to the last, pixels
    offset: float = 0.0  # of the path from the middle of the frame, pixels

    @property
    def facts(self) -> dict[str, str]:
        """The eight facts by name."""
        return {name: getattr(self, name) for name in FACTS}

    def place(self, beat: float) -> tuple[float, float]:
        """Centre of the shape, x and y in pixels from the upper left corner, at a moment in beats."""
        dx, dy = _DIRECTIONS[self.direction]
        along = self.travel * (beat / (BEATS - 1) - 0.5)
        return SIZE / 2 + dx * along + abs(dy) * self.offset, SIZE / 2 + dy * along + abs(dx) * self.offset


def make_scene(rng: Random) -> Scene:
    """A scene whose facts are independent and uniform; the stripe never has the colour of the shape."""
    facts = {name: rng.choice(values) for name, values in FACTS.items()}
    facts["stripe"] = rng.choice([colour for colour in _COLOURS if colour != facts["colour"]])
    looks = {"radius": rng.uniform(8.5, 10.0), "travel": rng.uniform(12.0, 15.0), "offset": rng.uniform(-3.0, 3.0)}
    return Scene(**facts, **looks)


def hallucinate(scene: Scene, rate: float, rng: Random) -> Scene:
    """`scene` with each fact replaced, with probability `rate`, by another value: what a careless witness tells."""
    wrong = {
        name: rng.choice([value for value in FACTS[name] if value != truth])
        for name, truth in scene.facts.items()
        if rng.random() < rate
    }
    return replace(scene, **wrong)


def _distance(shape: str, x: np.ndarray, y: np.ndarray, radius: np.ndarray) -> np.ndarray:
    """Signed distance in pixels to the outline of a shape around (0, 0), about exact near it; negative inside."""
    if shape == "circle":
        return np.hypot(x, y) - radius
    if shape == "square":
        return np.maximum(abs(x), abs(y)) - 0.9 * radius
    if shape == "triangle":  # point up
        return np.maximum(0.894 * abs(x) - 0.447 * y - 0.5 * radius, y - 0.85 * radius)
    if shape == "cross":
        wide, narrow = radius, 0.36 * radius
        return np.minimum(np.maximum(abs(x) - wide, abs(y) - narrow), np.maximum(abs(y) - wide, abs(x) - narrow))
    return abs(np.hypot(x, y) - 0.75 * radius) - 0.27 * radius  # ring


def render(scenes: Sequence[Scene], beats: Sequence[float]) -> np.ndarray:
    """Frames of films at moments counted in beats (0 <= beat < BEATS): (scenes, moments, SIZE, SIZE, 3) uint8.

    Edges are smoothed over one pixel. The same scene and moment give the same frame in any batch.
    """
    moments = np.asarray(beats, dtype=np.float32)
    count = len(scenes)

    def column(values: Sequence[float]) -> np.ndarray:  # one value a scene, to broadcast over (scene, moment, y, x)
        return np.asarray(values, dtype=np.float32).reshape(count, 1, 1, 1)

    def palette(colours: Sequence[tuple[int, int, int]]) -> np.ndarray:
        return np.asarray(colours, dtype=np.float32).reshape(count, 1, 1, 1, 3)

    progress = (moments / (BEATS - 1) - 0.5).reshape(1, -1, 1, 1)  # about -0.5 .. 0.5
    way = np.asarray([_DIRECTIONS[scene.direction] for scene in scenes], dtype=np.float32)
    travel, offset = column([scene.travel for scene in scenes]), column([scene.offset for scene in scenes])
    dx, dy = column(way[:, 0]), column(way[:, 1])
    grid = np.arange(SIZE, dtype=np.float32) - (SIZE - 1) / 2
    x = grid.reshape(1, 1, 1, SIZE) - (dx * travel * progress + abs(dy) * offset)
    y = grid.reshape(1, 1, SIZE, 1) - (dy * travel * progress + abs(dx) * offset)

    at_event = np.asarray([EVENT_BEAT[s.time] for s in scenes]).reshape(count, 1) == np.floor(moments).reshape(1, -1)
    kinds = np.asarray([scene.event for scene in scenes]).reshape(count, 1)

    def happens(kind: str) -> np.ndarray:
        return (at_event & (kinds == kind))[:, :, None, None]

    frames = np.broadcast_to(palette([_BACKGROUNDS[s.background] for s in scenes]), (*at_event.shape, SIZE, SIZE, 3))
    stripes = np.zeros((count, 1, SIZE, SIZE, 1), dtype=bool)
    for index, scene in enumerate(scenes):
        part = slice(None, _STRIPE_WIDTH) if scene.edge in ("left", "top") else slice(-_STRIPE_WIDTH, None)
        stripes[(index, 0, slice(None), part) if scene.edge in ("left", "right") else (index, 0, part)] = True
    frames = np.where(stripes, palette([_COLOURS[scene.stripe] for scene in scenes]), frames)

    radius = column([scene.radius for scene in scenes]) * np.where(happens("grow"), np.float32(1.5), np.float32(1))
    distance = np.empty((*at_event.shape, SIZE, SIZE), dtype=np.float32)
    for shape in {scene.shape for scene in scenes}:
        rows = [index for index, scene in enumerate(scenes) if scene.shape == shape]
        distance[rows] = _distance(shape, x[rows], y[rows], radius[rows])
    cover = np.where(happens("vanish"), np.float32(0), np.clip(0.5 - distance, 0, 1))[..., None]
    frames = frames + cover * (palette([_COLOURS[scene.colour] for scene in scenes]) - frames)

    frames = np.where(happens("dark")[..., None], 0.3 * frames, frames)
    flash = np.asarray(_FLASH, dtype=np.float32)
    frames = np.where(happens("flash")[..., None], frames + 0.7 * (flash - frames), frames)
    return (frames + 0.5).astype(np.uint8)
