"""Files of captions and of references: what `synpo caption` writes, and what data sets come as."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from ..run_files import read_json_lines

VIDEO_KEYS = ("video", "video_id", "video_name", "videoID", "id")
CAPTION_KEYS = ("caption", "text", "pred", "prediction", "answer")
# Of names that are files: synpo.caption.files.SUFFIXES, whose import would load models' libraries; a test compares them
ENDINGS = (
    ".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".mpg", ".mpeg", ".ts", ".m2ts", ".mts", ".flv", ".wmv", ".ogv",
    ".3gp", ".gif",
)  # fmt: skip


class Quiz(NamedTuple):
    """One question about a video, with its right answer. aspect: such as "camera" or "background"."""

    video: str
    question: str
    answer: str
    aspect: str = "all"


class Hypotheses(NamedTuple):
    """Captions by video, and why a video of the file has none."""

    captions: dict[str, str]
    failures: dict[str, str]


def read_hypotheses(path: Path) -> Hypotheses:
    """Captions from JSON lines, or from one JSON object {video: caption}.

    A line names its video under one of VIDEO_KEYS and holds its caption under one of CAPTION_KEYS, or, as `synpo
    caption` writes it, under `captions`: a string, {"text", "failure"}, or a list of such of which the first counts.
    A video is known by its file name without folder and ending.
    Errors: ValueError naming file and line, and for a video with two captions; FileNotFoundError.
    """
    content = _json(path)
    if isinstance(content, dict) and _one_key(content, VIDEO_KEYS) is None:
        content = [{"video": video, "caption": caption} for video, caption in content.items()]
    found = Hypotheses({}, {})
    for number, record in enumerate([content] if isinstance(content, dict) else content, start=1):
        where = f"{path}:{number}"
        video = _video(record, where)
        if video in found.captions or video in found.failures:
            raise ValueError(f"{where}: a second caption of {video!r}; each video has one")
        key = _one_key(record, (*CAPTION_KEYS, "captions"))
        caption = record[key] if key else None
        if isinstance(caption, list):
            caption = next(iter(caption), None)
        if isinstance(caption, dict):
            failure, caption = caption.get("failure"), caption.get("text")
            if failure:
                found.failures[video] = str(failure)
                continue
        if not isinstance(caption, str):
            raise ValueError(f"{where}: no caption; a string under one of {', '.join(CAPTION_KEYS)} is needed")
        found.captions[video] = caption
    if not found.captions:
        raise ValueError(f"{path}: no caption in it")
    return found


def read_references(path: Path, split: str = "") -> dict[str, list[str]]:
    """References by video. The layout is recognised: {video: [texts]}, VATEX ([{"videoID", "enCap"}]), MSR-VTT
    ({"sentences": [{"video_id", "caption"}]}), COCO ({"annotations": [{"image_id", "caption"}]}), JSON lines of
    `video` and `references` or `caption`. split: of MSR-VTT's `videos` those alone whose split it is.

    Errors: ValueError naming what is wrong where, and for a split that the file has not; FileNotFoundError.
    """
    content = _json(path)
    chosen = _of_split(content, split, path) if split else None
    if isinstance(content, dict) and isinstance(rows := content.get("sentences", content.get("annotations")), list):
        content = rows
    if isinstance(content, dict):
        content = [{"video": video, "references": texts} for video, texts in content.items()]
    found: dict[str, list[str]] = {}
    for number, record in enumerate(content, start=1):
        where = f"{path}:{number}"
        video = _video(record, where)
        texts = record.get("enCap", record.get("references", record.get("captions", record.get("caption"))))
        texts = [texts] if isinstance(texts, str) else texts
        if not isinstance(texts, list) or not texts or not all(isinstance(text, str) for text in texts):
            raise ValueError(f"{where}: references of {video!r} must be strings, at least one; got {texts!r:.80}")
        if chosen is None or video in chosen:
            found.setdefault(video, []).extend(texts)
    if not found:
        raise ValueError(f"{path}: no reference in it{f' of split {split!r}' if split else ''}")
    return found


def _of_split(content: Any, split: str, path: Path) -> set[str]:
    """The videos of a split, from MSR-VTT's list {"videos": [{"video_id", "split"}]}."""
    listed = content.get("videos") if isinstance(content, dict) else None
    splits: dict[str, set[str]] = {}
    for number, record in enumerate(listed if isinstance(listed, list) else [], start=1):
        splits.setdefault(str(record.get("split")), set()).add(_video(record, f"{path}: videos:{number}"))
    if split not in splits:
        raise ValueError(f"{path}: split is {split!r}; its videos have {', '.join(sorted(splits)) or 'none'}")
    return splits[split]


def read_quizzes(path: Path) -> list[Quiz]:
    """Questions from JSON lines of `video`, `question`, `answer` and, optionally, `aspect`, or from one JSON object
    {video: [{"question", "answer", "aspect"}]}.

    Errors: ValueError naming file and entry; FileNotFoundError.
    """
    content = _json(path)
    if isinstance(content, dict):
        for video, entries in content.items():
            if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
                raise ValueError(f"{path}: questions about {video!r} must be a list of objects; got {entries!r:.80}")
        content = [{**entry, "video": video} for video, entries in content.items() for entry in entries]
    quizzes = []
    for number, record in enumerate(content, start=1):
        where = f"{path}:{number}"
        video = _video(record, where)
        for name in ("question", "answer"):
            if not isinstance(record.get(name), str) or not record[name].strip():
                raise ValueError(f"{where}: {name} is {record.get(name)!r:.60}; text is needed")
        quizzes.append(Quiz(video, record["question"], record["answer"], str(record.get("aspect", "all"))))
    if not quizzes:
        raise ValueError(f"{path}: no question in it")
    return quizzes


def _json(path: Path) -> Any:
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file")
    if path.suffix in (".jsonl", ".ndjson"):
        return read_json_lines(path)
    try:
        content = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_object)
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON: {error}; JSON lines need the ending .jsonl") from None
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    if not isinstance(content, dict | list):
        raise ValueError(f"{path} holds a {type(content).__name__}; an object or a list is needed")
    return content


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of a file; json alone would keep the last of two values of one key, and say nothing."""
    made: dict[str, Any] = {}
    for key, value in pairs:
        if key in made:
            raise ValueError(f"{key!r} stands twice in one object")
        made[key] = value
    return made


def _one_key(record: Mapping[str, Any], names: tuple[str, ...]) -> str | None:
    return next((name for name in names if name in record), None)


def _video(record: Any, where: str) -> str:
    if not isinstance(record, dict):
        raise ValueError(f"{where}: a {type(record).__name__}; an object is needed")
    name = _one_key(record, (*VIDEO_KEYS, "image_id"))
    if name is None:
        raise ValueError(f"{where}: no video; a name under one of {', '.join(VIDEO_KEYS)} is needed")
    value = record[name]
    if isinstance(value, bool) or not isinstance(value, str | int) or value == "":
        raise ValueError(f"{where}: {name} is {value!r:.60}; a name or a whole number is needed")
    return video_name(str(value))


def video_name(name: str) -> str:
    """What a video is known by: the name of a file without folder and ending, any other name as it is."""
    path = Path(name)
    return path.stem if path.suffix.lower() in ENDINGS else name
