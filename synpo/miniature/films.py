"""Films of the small world as files: real mp4, and beside them the truth about each."""

import json
from collections.abc import Mapping
from fractions import Fraction
from functools import cache
from pathlib import Path
from random import Random

import av
import numpy as np
from tqdm import tqdm

from ..run_files import write_atomically
from .grammar import tell
from .world import BEATS, FACTS, FPS, FRAMES_PER_BEAT, Scene, make_scene, render

TRUTH_FILE = "truth.json"  # {name of a film, without its ending: {fact: value}}


def all_frames(scene: Scene) -> np.ndarray:
    """Every frame of a film: (24, SIZE, SIZE, 3) uint8."""
    count = BEATS * FRAMES_PER_BEAT
    return render([scene], [frame / FRAMES_PER_BEAT for frame in range(count)])[0]


def write_film(path: Path, scene: Scene) -> None:
    """One mp4 of 3 s: H.264, near lossless, one thread so that the same scene gives the same bytes."""
    frames = all_frames(scene)
    options = {"crf": "4", "preset": "veryfast", "threads": "1"}
    with av.open(str(path), "w") as file:
        stream = file.add_stream("libx264", rate=Fraction(FPS), options=options)
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuv420p"
        for frame in frames:
            file.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        file.mux(stream.encode())


def make_films(folder: Path, count: int, seed: int, *, prefix: str = "film") -> dict[str, Scene]:
    """`count` films with their truth in a folder, and their scenes by name; the same seed gives the same films.

    A folder that has the truth of the same films is taken as it is.
    """
    rng = Random(seed)
    scenes = {f"{prefix}{number:05d}": make_scene(rng) for number in range(count)}
    truth = {name: scene.facts for name, scene in scenes.items()}
    file = folder / TRUTH_FILE
    if file.exists() and json.loads(file.read_text(encoding="utf-8")) == truth:
        return scenes
    folder.mkdir(parents=True, exist_ok=True)
    file.unlink(missing_ok=True)
    for name, scene in tqdm(scenes.items(), unit="film", desc="films", disable=None):
        write_film(folder / f"{name}.mp4", scene)
    write_atomically(file, json.dumps(truth, indent=0) + "\n")  # last: it says that the films are complete
    return scenes


def references(scenes: Mapping[str, Scene], seed: int, count: int = 5) -> dict[str, list[str]]:
    """`count` true captions of each film, phrased by chance: what metrics compare with."""
    rng = Random(seed)
    return {name: [tell(scene.facts, rng) for _ in range(count)] for name, scene in scenes.items()}


@cache
def _truths(file: Path) -> dict[str, dict[str, str]]:
    truths = json.loads(file.read_text(encoding="utf-8"))
    for name, facts in truths.items():
        if list(facts) != list(FACTS):
            raise ValueError(f"{file}: film {name!r} has the facts {list(facts)}; {list(FACTS)} are needed")
    return truths


def truth_of(film: str) -> dict[str, str]:
    """The facts of a film by its path (a media fragment after it does not count).

    Errors: FileNotFoundError, KeyError where nothing is known about it.
    """
    path = Path(film.partition("#")[0])
    return _truths(path.parent.resolve() / TRUTH_FILE)[path.stem]
