"""The first stage: from a video to clip captions and candidates, each seen once more by the model that wrote it.

Every text has its own seed, made from the run's seed, the video's name and the text's place. So a video's texts do not
depend on which videos came before, and a run that was interrupted goes on with the same texts.
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from threading import Semaphore
from typing import Any, NamedTuple, Protocol

import numpy as np
from PIL import Image

from ..caption import CERTAIN, UnusableFrames
from ..judge import NoAnswer
from ..run_files import write_atomically
from ..video import FramePolicy, Video, VideoError, View, clip_bounds, decode
from .formats import VIDEO_PROMPT
from .video_lists import VideoItem

VERSION = 1  # of this stage: prompts, order, seeds, layout of the records
Record = dict[str, Any]
Failure = VideoError | UnusableFrames | OSError | NoAnswer  # of one video; the others go on


class Written(NamedTuple):
    """A caption after the model has seen the video again, and what it wrote at first; None where the model failed."""

    draft: str | None
    caption: str | None


class Captioner(Protocol):
    """What this stage needs of a model that writes captions.

    Attributes:
        settings: everything that its texts depend on; JSON types only.
        parallel: calls that may run at the same time, from as many threads.
        shrink: applied to each decoded frame, (H, W, 3) uint8 to the same kind, with the number of frames in its view,
            so that frames held in memory are no larger than the model takes them; None keeps them as they are.
    """

    settings: Mapping[str, Any]
    parallel: int
    shrink: Callable[[np.ndarray, int], np.ndarray] | None

    def __call__(
        self, views: Sequence[View], instruction: str, seeds: Sequence[Sequence[int]] | None
    ) -> list[list[Written]]:
        """For each view one greedy caption (seeds None), or one sampled caption for each of its seeds, of which every
        view has as many.
        """
        ...

    def close(self) -> None:
        """Finish what is under way; no call comes after it."""
        ...


@dataclass(frozen=True)
class CaptionPlan:
    """What is written about each video.

    Attributes:
        instruction: what the candidates answer; the prompt of the pairs.
        candidates: sampled captions of the whole video.
        frames: frames of the whole and of each clip.
        seed: of the run.
        together: videos that go through the captioner in one call. How many decides the last bits of a model's numbers,
            so it belongs to the settings, and a group that was stopped is made again as a whole.
    """

    instruction: str = VIDEO_PROMPT
    candidates: int = 8
    frames: FramePolicy = FramePolicy(fps=0.5)  # noqa: RUF009 - frozen
    seed: int = 0
    together: int = 1

    def __post_init__(self) -> None:
        if self.together < 1:
            raise ValueError(f"videos_together is {self.together}; it has to be at least 1")
        if self.candidates < 2:
            raise ValueError(f"candidates is {self.candidates}; a pair needs at least 2")
        if not self.instruction.strip():
            raise ValueError("instruction is empty; say what the captions are to tell")

    def settings(self) -> dict[str, Any]:
        """Everything that the texts depend on, as JSON types."""
        return {"version": VERSION, "clip_instruction": CERTAIN, **asdict(self)}


@dataclass(frozen=True)
class Shrink:
    """Scales a frame (H, W, 3) uint8 down until its longer side has at most max_side pixels. ValueError below 1."""

    max_side: int

    def __post_init__(self) -> None:
        if self.max_side < 1:
            raise ValueError(f"max_side is {self.max_side}; it has to be at least 1")

    def __call__(self, frame: np.ndarray, count: int) -> np.ndarray:
        height, width, _ = frame.shape
        scale = self.max_side / max(height, width)
        if scale >= 1:
            return frame
        size = (max(1, round(width * scale)), max(1, round(height * scale)))
        return np.asarray(Image.fromarray(frame).resize(size, Image.Resampling.BICUBIC))


class CaptionStore:
    """Records of the videos that are done, a file each, so that a run goes on where it stopped.

    folder/settings.json says what all of them were made with. Errors: ValueError where that is something else.
    """

    def __init__(self, folder: Path, settings: Mapping[str, Any]) -> None:
        self.folder = folder
        file = folder / "settings.json"
        text = json.dumps(settings, indent=1, sort_keys=True)
        if not file.exists():
            write_atomically(file, text)
            return
        former = json.loads(file.read_text(encoding="utf-8"))
        now = json.loads(text)
        for name in sorted({*former, *now}):
            if former.get(name) != now.get(name):
                raise ValueError(
                    f"{folder} holds captions made with other settings ({name}: {former.get(name)!r} then, "
                    f"{now.get(name)!r} now); choose another folder to write to, or delete it"
                )

    def file(self, name: str) -> Path:
        """Where the record of a video is."""
        digest = hashlib.sha256(name.encode()).hexdigest()[:32]
        return self.folder / digest[:2] / f"{digest}.json"

    def get(self, item: VideoItem) -> Record | None:
        """The record of a video; None where there is none, or the video's size has changed since."""
        file = self.file(item.name)
        try:
            record: Record = json.loads(file.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        except ValueError as error:
            raise ValueError(
                f"{file} is no record of captions ({error}); delete it to caption {item.name} again"
            ) from None
        return record if record["bytes"] == item.path.stat().st_size else None

    def put(self, record: Record) -> None:
        """Keep a record, whole or not at all."""
        write_atomically(self.file(record["name"]), json.dumps(record, ensure_ascii=False))


def captioned(
    items: Sequence[VideoItem], captioner: Captioner, plan: CaptionPlan, store: CaptionStore
) -> Iterator[tuple[VideoItem, Record | Failure]]:
    """Each video's record, in order, from the store or made now; or why there is none, which a later run tries again.

    One group of videos more than the captioner takes at once is decoded ahead. A captioner that takes one call at a
    time is called in the thread that iterates: torch keeps a team of threads for every thread that calls it, and as
    soon as the teams have more threads than there are cores, models take twice their time.
    """
    alone = captioner.parallel == 1
    turn = Semaphore(captioner.parallel)
    Made = Callable[[], list[Record | Failure]]
    waiting: list[tuple[Sequence[VideoItem], Made]] = []

    def start(group: Sequence[VideoItem]) -> Made:
        if not alone:
            return pool.submit(caption_group, group, captioner, plan, store, turn).result
        ahead = pool.submit(_prepared, group, captioner, plan, store)
        return lambda: _written(group, ahead.result(), captioner, plan, store, turn)

    with ThreadPoolExecutor(captioner.parallel + 1, thread_name_prefix="synpo-captions") as pool:
        try:
            for first in range(0, len(items), plan.together):
                group = items[first : first + plan.together]
                waiting.append((group, start(group)))
                if len(waiting) > (1 if alone else captioner.parallel + 1):
                    group, made = waiting.pop(0)
                    yield from zip(group, made(), strict=True)
            while waiting:
                group, made = waiting.pop(0)
                yield from zip(group, made(), strict=True)
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def caption_group(
    items: Sequence[VideoItem],
    captioner: Captioner,
    plan: CaptionPlan,
    store: CaptionStore,
    turn: AbstractContextManager[Any] = nullcontext(),  # noqa: B008 - has no state
) -> list[Record | Failure]:
    """The records of videos that are captioned together, all from the store, or all made and kept now; or why there is
    none of one. Where the group's call fails, its videos are tried one by one. `turn` is held while the captioner
    works.
    """
    return _written(items, _prepared(items, captioner, plan, store), captioner, plan, store, turn)


def _prepared(
    items: Sequence[VideoItem], captioner: Captioner, plan: CaptionPlan, store: CaptionStore
) -> list[Record | Video | Failure]:
    """A group's records from the store; or, where one is missing, its videos, all of them."""
    found: list[Any] = [_attempt(store.get, item) for item in items]
    missing = [at for at, record in enumerate(found) if record is None]
    decoded = {at: _attempt(_decode, items[at], captioner, plan) for at in missing}
    if any(isinstance(video, Video) for video in decoded.values()):
        kept = [at for at, record in enumerate(found) if isinstance(record, dict)]
        decoded |= {at: _attempt(_decode, items[at], captioner, plan) for at in kept}
    return [decoded.get(at, record) for at, record in enumerate(found)]


def _written(
    items: Sequence[VideoItem],
    found: list[Any],
    captioner: Captioner,
    plan: CaptionPlan,
    store: CaptionStore,
    turn: AbstractContextManager[Any],
) -> list[Record | Failure]:
    """A group as _prepared returned it, with records in the places of its videos."""
    places = [at for at, video in enumerate(found) if isinstance(video, Video)]

    def write(group: Sequence[int]) -> list[Record] | Failure:
        videos = [(items[at], found[at]) for at in group]
        return _attempt(_caption, videos, captioner, plan, store.folder.parent, turn)

    groups = [places] if places else []
    while groups:
        group = groups.pop()
        made = write(group)
        if isinstance(made, list):
            for at, record in zip(group, made, strict=True):
                found[at] = _attempt(store.put, record) or record
        elif len(group) == 1:
            found[group[0]] = made
        else:
            groups += [[at] for at in group]
    return found


def _attempt(act: Callable[..., Any], *given: Any) -> Any:
    """What a call returns, or the failure of one video that it raises."""
    try:
        return act(*given)
    except (VideoError, UnusableFrames, OSError, NoAnswer) as error:
        return error


def _decode(item: VideoItem, captioner: Captioner, plan: CaptionPlan) -> Video:
    return decode(item.path, plan.frames, clips=clip_bounds, section=item.section, each=captioner.shrink)


def _caption(
    videos: Sequence[tuple[VideoItem, Video]],
    captioner: Captioner,
    plan: CaptionPlan,
    out: Path,
    turn: AbstractContextManager[Any],
) -> list[Record]:
    """Everything about decoded videos, written in one go.

    Each: name, path, section, bytes, sha256, duration (s), times (s) of the frames, damaged (packets),
    clips [{start, end, draft, caption}], candidates [{seed, draft, caption}], and for a section of a file `images`:
    its frames under `out`, since pairs refer to whole files only.

    Errors: UnusableFrames; what the captioner raises.
    """
    contents = [_content(item.path) for item, _ in videos]
    seeds = [[seed_of(plan.seed, item.name, index) for index in range(plan.candidates)] for item, _ in videos]
    with turn:
        told = iter(captioner([clip for _, video in videos for clip in video.clips], CERTAIN, None))
        written = captioner([video.whole for _, video in videos], plan.instruction, seeds)
    return [
        {
            "name": item.name,
            "path": str(item.path.resolve()),
            "section": item.section and list(item.section),
            "bytes": size,
            "sha256": digest,
            "duration": round(video.duration, 6),
            "times": [round(float(time), 6) for time in video.times],
            "damaged": video.damaged,
            "clips": [
                {"start": round(view.start, 6), "end": round(view.end, 6), **next(told)[0]._asdict()}
                for view in video.clips
            ],
            "candidates": [{"seed": seed, **text._asdict()} for seed, text in zip(drawn, texts, strict=True)],
            "images": None if item.section is None else _save_frames(video, item.name, out),
        }
        for (item, video), (digest, size), drawn, texts in zip(videos, contents, seeds, written, strict=True)
    ]


def seed_of(seed: int, *place: str | int) -> int:
    """A seed below 2^62 for one text of a run."""
    text = "\n".join(map(str, (seed, *place)))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 2


def _content(path: Path) -> tuple[str, int]:
    with path.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
        return digest, stream.tell()


def _save_frames(video: Video, name: str, out: Path) -> list[str]:
    """The frames of the whole view as JPEG files; their paths."""
    folder = out / "frames" / hashlib.sha256(name.encode()).hexdigest()[:32]
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for number, image in enumerate(video.whole.images):
        path = folder / f"{number:03d}.jpg"
        partial = path.with_suffix(".partial")
        Image.fromarray(image).save(partial, "JPEG", quality=95)
        os.replace(partial, path)
        paths.append(str(path.resolve()))
    return paths
