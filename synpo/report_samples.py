"""What a report shows of a run beside its curves: settings, evaluations, and videos with their captions."""

import base64
import difflib
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import yaml
from markupsafe import Markup, escape
from PIL import Image

from .evaluate.files import read_hypotheses, read_references
from .run_files import read_json_lines
from .video import FramePolicy, VideoError, decode

CONFIG_FILE = "config.yaml"
EVALUATIONS = "evaluation"  # folder of a run for what `synpo evaluate --out` writes
SAMPLES = 6  # videos shown, spread evenly over the captions' file
STRIP_FRAMES, STRIP_HEIGHT = 8, 80  # of each sample; height in pixels


class Evaluation(NamedTuple):
    """What `synpo evaluate` wrote about captions of a run: of one set, or of two with their changes."""

    captions: list[Path]
    references: Path
    videos: int
    metrics: Mapping[str, Mapping[str, Any]]


class RunFiles(NamedTuple):
    """What a run's folder holds beside its curves. evaluations: by the names of their files, without the ending."""

    label: str
    settings: Mapping[str, Any]
    evaluations: Mapping[str, Evaluation]


class Told(NamedTuple):
    """A caption of a sample and who wrote it; in the text, words that the first one has not are marked."""

    who: str
    text: Markup


class Sample(NamedTuple):
    """A video as a strip of frames (a data URI, or why there is none), and its captions by evaluation."""

    video: str
    strip: str
    problem: str
    reference: str
    captions: Mapping[str, list[Told]]


def read_files(path: Path, label: str) -> RunFiles:
    """Settings and evaluations of a run's folder; of a bare metrics.jsonl there are none.

    Errors: ValueError naming a file of the folder evaluation/ that is not what `synpo evaluate --out` writes.
    """
    if not path.is_dir():
        return RunFiles(label, {}, {})
    config = path / CONFIG_FILE
    settings = yaml.safe_load(config.read_text(encoding="utf-8")) if config.exists() else {}
    found = {file.stem: _evaluation(file) for file in sorted((path / EVALUATIONS).glob("*.json"))}
    return RunFiles(label, settings, found)


def _evaluation(file: Path) -> Evaluation:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        captions = [Path(name) for name in content["captions"]]
        metrics = {name: row for name, row in content["metrics"].items() if len(row["values"]) == len(captions)}
        return Evaluation(captions, Path(content["references"]), int(content["videos"]), metrics)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{file} is not what `synpo evaluate --out` writes ({error!r}); move it away") from None


def samples(runs: Sequence[RunFiles], count: int = SAMPLES) -> list[Sample]:
    """Videos with what was told about them before and by each run, from the files that the evaluations name.

    Captions of files that are gone are left out; without any file there is no sample.
    """
    told: dict[str, list[tuple[str, dict[str, str]]]] = {}  # evaluation: (who, captions by video)
    paths: dict[str, str] = {}  # video: its file
    references: dict[str, list[str]] = {}
    for run in runs:
        for name, evaluation in run.evaluations.items():
            if evaluation.references.exists():
                references |= read_references(evaluation.references)
            for number, file in enumerate(evaluation.captions):
                before = number == 0 and len(evaluation.captions) == 2
                if not file.exists() or (before and name in told):
                    continue
                told.setdefault(name, []).append(("before" if before else run.label, read_hypotheses(file).captions))
                paths |= _paths(file)
    known = list(dict.fromkeys(video for sets in told.values() for _, captions in sets for video in captions))
    picked = known[:: max(1, len(known) // count)][:count]
    return [_sample(video, paths.get(video), references.get(video, [""])[0], told) for video in picked]


def _paths(file: Path) -> dict[str, str]:
    """The files of videos by name, as `synpo caption` notes them; none in files of other layouts."""
    if file.suffix != ".jsonl":
        return {}
    named = [record["video"] for record in read_json_lines(file) if isinstance(record.get("video"), str)]
    return {Path(name).stem: name for name in named}


def _sample(
    video: str, path: str | None, reference: str, told: Mapping[str, list[tuple[str, dict[str, str]]]]
) -> Sample:
    captions = {}
    for name, sets in told.items():
        texts = [(who, texts[video]) for who, texts in sets if video in texts]
        captions[name] = [Told(who, marked(texts[0][1], text)) for who, text in texts]
    try:
        strip, problem = _strip(path) if path else "", "" if path else "its file is not known"
    except (VideoError, OSError) as error:
        strip, problem = "", str(error)
    return Sample(video, strip, problem, reference, captions)


def marked(before: str, after: str) -> Markup:
    """`after` as HTML, with the words marked that `before` has not in their places."""
    old, new = before.split(), after.split()
    out = []
    for kind, _, _, start, end in difflib.SequenceMatcher(None, old, new, autojunk=False).get_opcodes():
        words = escape(" ".join(new[start:end]))
        if words:
            out.append(words if kind == "equal" else Markup("<mark>{}</mark>").format(words))
    return Markup(" ").join(out)


def _strip(path: str) -> str:
    """Frames of a video side by side as a data URI."""
    view = decode(path, FramePolicy(num_frames=STRIP_FRAMES)).whole
    frames = []
    for image in view.images:
        height, width = image.shape[:2]
        size = (max(1, round(width * STRIP_HEIGHT / height)), STRIP_HEIGHT)
        scaling = Image.Resampling.NEAREST if height < STRIP_HEIGHT else Image.Resampling.BICUBIC
        frames.append(np.asarray(Image.fromarray(image).resize(size, scaling)))
    gap = np.full((STRIP_HEIGHT, 3, 3), 128, dtype=np.uint8)
    whole = np.concatenate([part for frame in frames for part in (gap, frame)][1:], axis=1)
    stream = io.BytesIO()
    Image.fromarray(whole).save(stream, "JPEG", quality=85)
    return data_uri(stream.getvalue(), "image/jpeg")


def data_uri(content: bytes, kind: str) -> str:
    """Bytes as an address that holds them."""
    return f"data:{kind};base64,{base64.b64encode(content).decode('ascii')}"
