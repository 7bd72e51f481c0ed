"""The file of captions that `synpo caption` writes: a line of JSON for each video."""

import hashlib
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from ..run_files import drop_torn_line, read_json_lines
from ..video import Video
from .captioner import Caption

Record = dict[str, Any]


def record_of(file: str, video: Video, captions: Sequence[Caption], settings: Mapping[str, Any]) -> Record:
    """A video's line, as JSON types."""
    return {
        "video": file,
        "duration": round(video.duration, 3),
        "times": [round(float(time), 3) for time in video.times],
        "captions": [_caption(caption) for caption in captions],
        "settings": dict(settings),
        "versions": {name: version(name) for name in ("synpo", "torch", "transformers")},
    }


def _caption(caption: Caption) -> Record:
    """logp, model_logp: means over its tokens in nats, None where it has none."""
    generated = caption.generated
    tokens = len(generated.tokens)
    drafts = []
    while (draft := (caption if not drafts else drafts[-1]).draft) is not None:
        drafts.append(draft)
    return {
        "text": caption.text,
        "seed": caption.seed,
        "tokens": tokens,
        "finish": generated.finish,
        "failure": caption.failure,
        "logp": float(generated.logps.mean()) if tokens else None,
        "model_logp": float(generated.model_logps.mean()) if tokens else None,
        "drafts": [draft.text for draft in reversed(drafts)],
    }


def seeds_of(seed: int, file: str, count: int) -> list[int]:
    """Seeds of a file's captions: of the run's seed and the file's name alone, so that they do not depend on where in
    a list of files it stands, or in which folder.
    """
    digest = hashlib.sha256(f"{seed}/{Path(file).name}".encode()).digest()
    first = int.from_bytes(digest[:8], "big") >> 2
    return list(range(first, first + count))


def read_records(out: Path, settings: Mapping[str, Any]) -> dict[str, Record]:
    """The lines that a file holds, by video; a last line that was cut off is dropped.

    Errors: ValueError where they were made with other settings, or are something else.
    """
    if not out.exists():
        return {}
    drop_torn_line(out)
    records = read_json_lines(out)
    for number, record in enumerate(records, start=1):
        former = record.get("settings")
        if not isinstance(former, dict) or "video" not in record:
            raise ValueError(f"{out}:{number} is not a line of `synpo caption`; choose another --out")
        for name in settings:
            if former.get(name) != settings[name]:
                raise ValueError(
                    f"{out} holds captions made with other settings ({name}: {former.get(name)!r} then, "
                    f"{settings[name]!r} now); choose another --out"
                )
    return {record["video"]: record for record in records}


def failure(record: Record) -> str | None:
    """What is wrong with the captions of a line, if anything."""
    reasons = [caption["failure"] for caption in record["captions"] if caption["failure"]]
    return f"{len(reasons)} of {len(record['captions'])} captions failed: {reasons[0]}" if reasons else None
