"""The preference pair: one prompt, a chosen and a rejected answer, in one conversational form.

A normalised pair is a dict with exactly the columns of `PAIR_FEATURES`:

    prompt          list of messages {"role", "content"}; ends with a user or tool message
    chosen          one assistant message, in a list
    rejected        one assistant message, in a list
    images          list of {"path", "bytes"}: exactly one of the two is set
    videos          list of {"path", "bytes", "frames"}: exactly one of the three is set; frames are image paths
    score_chosen    float or None (missing is None, never 0)
    score_rejected  float or None
    source          where the pair came from, such as "pairs.jsonl:12"

`content` is a string when the message is text alone, and a list of parts {"type": "text", "text": ...},
{"type": "image"}, {"type": "video"} when it holds media. The i-th image part belongs to images[i], the same for videos.
"""

import math
import os
import re
from collections.abc import Mapping, Sequence
from typing import Any

from datasets import Features, Json, List, Value

# JSON for the whole list: content is a string or a list, which no plain Arrow type holds. Json on `content` alone would
# read an answer such as "42" back as a number.
_MESSAGES = Json()

PAIR_FEATURES = Features(
    {
        "prompt": _MESSAGES,
        "chosen": _MESSAGES,
        "rejected": _MESSAGES,
        "images": List({"path": Value("string"), "bytes": Value("binary")}),
        "videos": List({"path": Value("string"), "bytes": Value("binary"), "frames": List(Value("string"))}),
        "score_chosen": Value("float64"),
        "score_rejected": Value("float64"),
        "source": Value("string"),
    }
)

ROLES = ("system", "user", "assistant", "tool")
MEDIA_COLUMNS = {"image": "images", "video": "videos"}

# Content that training would lose without a word if these columns were ignored as other extra columns are.
_REFUSED_COLUMNS = {
    "tools": "tool definitions are not supported; remove the column or write them into the system message",
    "audios": "audio is not supported; remove these pairs",
    "objects": "grounding objects are not supported; write them into the text",
    "image": "rename it to 'images', a list per pair",
    "video": "rename it to 'videos', a list per pair",
}
_REFUSED_MESSAGE_KEYS = ("tool_calls", "function_call", "reasoning_content", "thinking")


class PairError(ValueError):
    """A pair that cannot be used: the message names the place (file and line, or row), the column and what to do."""

    def __init__(self, where: str, column: str | None, problem: str) -> None:
        self.where, self.column, self.problem = where, column, problem
        super().__init__(f"{where}: column '{column}': {problem}" if column else f"{where}: {problem}")


def prompt_type(record: Mapping[str, Any]) -> str:
    """ "plain" when the prompt is a string, "conversational" otherwise."""
    return "plain" if isinstance(record.get("prompt"), str) else "conversational"


def normalise_pair(record: Mapping[str, Any], where: str = "pair") -> dict[str, Any]:
    """Bring one record with `prompt`, `chosen`, `rejected`, and optional media and scores, to the normalised form.

    Plain strings become one user message and one assistant message. Media given inside a part, as
    {"type": "video", "video": path}, moves to the column `videos`. In a row with media and no media part, the tags
    "<image>" and "<video>" in the prompt become parts; without tags, media come before the first user message.
    Normalising a normalised pair changes nothing but `source`.

    Args:
        record: the columns of one pair; other columns are left out of the result.
        where: the place to name in errors and to keep as `source`.

    Raises:
        PairError: for a missing column, a wrong type, an unknown role or part, mixed prompt and answer types, answers
            that are not one assistant message, or media parts that do not match the media columns.
    """
    for column, remedy in _REFUSED_COLUMNS.items():
        if record.get(column) not in (None, "", [], {}):
            raise PairError(where, column, remedy)
    missing = [column for column in ("prompt", "chosen", "rejected") if record.get(column) is None]
    if missing:
        found = ", ".join(sorted(str(key) for key in record if record[key] is not None)) or "none"
        raise PairError(where, None, f"missing or null: {', '.join(missing)}; columns found: {found}")

    plain = prompt_type(record) == "plain"
    for column in ("chosen", "rejected"):
        if isinstance(record[column], str) != plain:
            kinds = ("a plain string", "a conversation") if plain else ("a conversation", "a plain string")
            raise PairError(
                where,
                column,
                f"it is {kinds[1]}, but the prompt is {kinds[0]}; give all three in one form (where the answers repeat "
                "the prompt's messages, read the file with format 'implicit': the shared messages become the prompt)",
            )

    media = {kind: _media_list(record.get(column), kind, where) for kind, column in MEDIA_COLUMNS.items()}
    inline: dict[str, list[dict[str, Any]]] = {kind: [] for kind in MEDIA_COLUMNS}
    prompt = _prompt(record["prompt"], inline, where)
    for kind, column in MEDIA_COLUMNS.items():
        if inline[kind] and media[kind]:
            raise PairError(where, column, f"given here and inside the prompt's {kind} parts; give them in one place")
        media[kind] = media[kind] or inline[kind]
        _place_media(prompt, kind, len(media[kind]), where)

    return {
        "prompt": [{"role": m["role"], "content": _collapse(m["content"])} for m in prompt],
        "chosen": [_answer(record["chosen"], "chosen", where)],
        "rejected": [_answer(record["rejected"], "rejected", where)],
        "images": media["image"],
        "videos": media["video"],
        "score_chosen": _score(record.get("score_chosen"), "score_chosen", where),
        "score_rejected": _score(record.get("score_rejected"), "score_rejected", where),
        "source": where,
    }


def message_text(messages: Sequence[Mapping[str, Any]]) -> str:
    """The text of the messages, one per line; media parts contribute nothing."""
    return "\n".join(
        m["content"] if isinstance(m["content"], str) else "".join(part.get("text") or "" for part in m["content"])
        for m in messages
    )


def _prompt(value: Any, inline: dict[str, list[dict[str, Any]]], where: str) -> list[dict[str, Any]]:
    """The prompt's messages with content as parts; media found inside parts are appended to `inline`."""
    if isinstance(value, str):
        return [{"role": "user", "content": _text_parts(_text(value, "prompt", where))}]
    messages = _messages(value, "prompt", where)
    if messages[-1]["role"] not in ("user", "tool"):
        raise PairError(where, "prompt", f"the last message is the {messages[-1]['role']}'s; it must be the user's")
    for index, message in enumerate(messages):
        if message["role"] == "system" and index:
            raise PairError(where, "prompt", f"message {index}: a system message must be the first")
        message["content"] = _parts(message["content"], inline, f"message {index}", where)
    return messages


def _answer(value: Any, column: str, where: str) -> dict[str, Any]:
    if isinstance(value, str):
        return {"role": "assistant", "content": _text(value, column, where)}
    messages = _messages(value, column, where)
    if len(messages) != 1 or messages[0]["role"] != "assistant":
        roles = ", ".join(m["role"] for m in messages)
        raise PairError(
            where,
            column,
            f"expected one assistant message, got: {roles}; move the messages that both answers share to 'prompt'",
        )
    inline: dict[str, list[dict[str, Any]]] = {kind: [] for kind in MEDIA_COLUMNS}
    content = _collapse(_parts(messages[0]["content"], inline, "message 0", where, column))
    if not isinstance(content, str):
        raise PairError(where, column, "an answer holds text only; move images and videos to the prompt")
    return {"role": "assistant", "content": content}


def _messages(value: Any, column: str, where: str) -> list[dict[str, Any]]:
    if not isinstance(value, list) or not value:
        problem = "an empty list" if isinstance(value, list) else f"a {type(value).__name__}"
        raise PairError(where, column, f"expected a string or a list of messages, got {problem}")
    messages = []
    for index, message in enumerate(value):
        if not isinstance(message, Mapping):
            raise PairError(where, column, f"message {index}: expected a dict, got a {type(message).__name__}")
        for key in _REFUSED_MESSAGE_KEYS:
            if message.get(key):
                raise PairError(where, column, f"message {index}: {key!r} is not supported; write it into 'content'")
        role, content = message.get("role"), message.get("content")
        if role not in ROLES:
            raise PairError(where, column, f"message {index}: role {role!r} is none of {', '.join(ROLES)}")
        if content is None:
            raise PairError(where, column, f"message {index}: no 'content'")
        messages.append({"role": role, "content": content})
    return messages


def _parts(
    content: Any, inline: dict[str, list[dict[str, Any]]], place: str, where: str, column: str = "prompt"
) -> list[dict[str, Any]]:
    """Content as a list of {"type": "text", "text"} and {"type": "image" | "video"}; sources move to `inline`."""
    if isinstance(content, str):
        return _text_parts(_text(content, column, where))
    if not isinstance(content, list):
        raise PairError(where, column, f"{place}: content must be a string or a list, got a {type(content).__name__}")
    parts: list[dict[str, Any]] = []
    for index, part in enumerate(content):
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind == "text":
            parts += _text_parts(_text(part.get("text"), column, where, f"{place}, part {index}: "))
        elif kind in ("image", "video"):
            sources = [part[key] for key in (kind, "path", "url", "bytes") if part.get(key) is not None]
            if sources:
                inline[kind].append(_medium(sources[0], kind, f"{place}, part {index}", where, column))
            parts.append({"type": kind})
        else:
            raise PairError(where, column, f"{place}, part {index}: type {kind!r} is none of text, image, video")
    return parts


def _text_parts(text: str) -> list[dict[str, Any]]:
    return [{"type": "text", "text": text}] if text else []


def _text(value: Any, column: str, where: str, place: str = "") -> str:
    if not isinstance(value, str):
        raise PairError(where, column, f"{place}expected text, got a {type(value).__name__}")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise PairError(
            where, column, f"{place}character {error.start} is half of a surrogate pair; repair the text's encoding"
        ) from None
    return value


def _collapse(parts: list[dict[str, Any]]) -> str | list[dict[str, Any]]:
    """Neighbouring text joined; a string when no media is left beside it."""
    joined: list[dict[str, Any]] = []
    for part in parts:
        if part["type"] == "text" and joined and joined[-1]["type"] == "text":
            joined[-1] = {"type": "text", "text": joined[-1]["text"] + part["text"]}
        else:
            joined.append(part)
    if any(part["type"] != "text" for part in joined):
        return joined
    return joined[0]["text"] if joined else ""


def _place_media(prompt: list[dict[str, Any]], kind: str, count: int, where: str) -> None:
    """Give the prompt, in place, exactly `count` parts of this kind: from its parts, from its tags, or at its front."""

    def parts_of_kind() -> int:
        return sum(part["type"] == kind for message in prompt for part in message["content"])

    if count and not parts_of_kind():
        tag = f"<{kind}>"
        for message in prompt:
            message["content"] = [
                piece for part in message["content"] for piece in _split_tags(part, tag, {"type": kind})
            ]
        if not parts_of_kind():
            first = next((m for m in prompt if m["role"] == "user"), prompt[-1])
            # Images stand before videos, and both before text.
            front = next((i for i, part in enumerate(first["content"]) if part["type"] != "image"), 0)
            first["content"][front:front] = [{"type": kind} for _ in range(count)]
    if parts_of_kind() != count:
        raise PairError(
            where,
            MEDIA_COLUMNS[kind],
            f"{count} given, but the prompt has {parts_of_kind()} {kind} parts or <{kind}> tags; make them equal",
        )


def _split_tags(part: dict[str, Any], tag: str, medium: dict[str, Any]) -> list[dict[str, Any]]:
    if part["type"] != "text":
        return [part]
    pieces: list[dict[str, Any]] = []
    for text in re.split(f"({re.escape(tag)})", part["text"]):
        pieces += [dict(medium)] if text == tag else _text_parts(text)
    return pieces


def _media_list(value: Any, kind: str, where: str) -> list[dict[str, Any]]:
    if value is None:
        return []
    column = MEDIA_COLUMNS[kind]
    items = value if isinstance(value, list) else [value]
    return [_medium(item, kind, f"item {index}", where, column) for index, item in enumerate(items)]


def _medium(value: Any, kind: str, place: str, where: str, column: str) -> dict[str, Any]:
    """One image or video: a path or URL, encoded bytes, a list of frame paths (video), or a dict with one of them."""
    fields: tuple[str, ...] = ("path", "bytes", "frames") if kind == "video" else ("path", "bytes")
    if isinstance(value, os.PathLike):
        value = os.fspath(value)
    if isinstance(value, str):
        value = {"path": value}
    elif isinstance(value, bytes):
        value = {"bytes": value}
    elif isinstance(value, list) and kind == "video":
        value = {"frames": [os.fspath(frame) if isinstance(frame, os.PathLike) else frame for frame in value]}
    if isinstance(value, Mapping):
        medium = {field: value.get(field) for field in fields}
        if medium["bytes"] is not None and medium["path"] is not None:
            medium["path"] = None  # the bytes are the file; datasets keeps its old name beside them
        given = {field: item for field, item in medium.items() if item not in (None, "", b"", [])}
        frames = given.get("frames", [])
        if len(given) == 1 and isinstance(frames, list) and all(isinstance(frame, str) for frame in frames):
            return {field: given.get(field) for field in fields}
    kinds = "a path, bytes" + (", a list of frame paths" if kind == "video" else "")
    raise PairError(
        where,
        column,
        f"{place}: a {kind} is {kinds}, or a dict with one of {', '.join(fields)}; got a {type(value).__name__} "
        "(a column of decoded images: cast it with datasets.Image(decode=False))",
    )


def _score(value: Any, column: str, where: str) -> float | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise PairError(where, column, f"expected a number or null, got {value!r}")
    try:
        score = float(value)
    except OverflowError:
        score = math.inf
    if not math.isfinite(score):
        raise PairError(where, column, f"{score} is not a score; write null where the score is missing")
    return score
