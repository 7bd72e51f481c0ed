"""The formats that preference files come in, and how a record of each becomes the columns of a pair."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from .schema import MEDIA_COLUMNS, PAIR_FEATURES, PairError

VIDEO_PROMPT = "Describe this video in detail: the setting, the people and objects in it, and what happens, in order."

Record = dict[str, Any]

_SHAREGPT_ROLES = {"system": "system", "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant"}


@dataclass(frozen=True)
class PairFormat:
    """A file format: the keys a record must have, and how it becomes the columns of a pair.

    Attributes:
        required: keys that must be there and not null.
        convert: (record, place, instruction or None) -> the columns that `normalise_pair` takes; None for a record that
            is as it should be and holds no pair.
        one_of: keys of which at least one must be there.
        file_columns: column of a pair -> its name in the file, for errors.
    """

    name: str
    required: tuple[str, ...]
    convert: Callable[[Record, str, str | None], Record | None]
    one_of: tuple[str, ...] = ()
    file_columns: Mapping[str, str] = field(default_factory=dict)

    def missing(self, record: Record) -> list[str]:
        absent = [key for key in self.required if record.get(key) is None]
        if self.one_of and all(record.get(key) is None for key in self.one_of):
            absent.append(" or ".join(self.one_of))
        return absent

    def check(self, record: Record, where: str) -> None:
        if absent := self.missing(record):
            found = ", ".join(str(key) for key in record if record[key] is not None) or "none"
            problem = f"missing or null for format {self.name!r}: {', '.join(absent)}; columns found: {found}"
            raise PairError(where, None, problem)

    def __str__(self) -> str:
        return f"{self.name} ({', '.join([*self.required, *([' or '.join(self.one_of)] if self.one_of else [])])})"


def _columns(record: Record, where: str, prompt: str | None) -> Record:
    return dict(record)


def _implicit(record: Record, where: str, prompt: str | None) -> Record:
    """Two whole conversations that share everything before their last messages."""
    for column in ("chosen", "rejected"):
        if not isinstance(record[column], list) or len(record[column]) < 2:
            raise PairError(
                where,
                column,
                "without a column 'prompt', the answers must be conversations that begin with the prompt's messages",
            )
    return {**record, **_shared_prompt(record["chosen"], record["rejected"], "rejected", where)}


def _sharegpt(record: Record, where: str, prompt: str | None) -> Record:
    converted: Record = {**record}
    for source, target in (("conversations", "prompt"), ("chosen", "chosen"), ("rejected", "rejected")):
        turns = record[source] if source == "conversations" else [record[source]]
        if not isinstance(turns, list):
            raise PairError(where, source, f"expected a list of turns, got a {type(turns).__name__}")
        converted[target] = [_turn(turn, index, source, where) for index, turn in enumerate(turns)]
    return converted


def _turn(turn: Any, index: int, column: str, where: str) -> Record:
    if not isinstance(turn, Mapping) or turn.get("from") is None or turn.get("value") is None:
        raise PairError(where, column, f"turn {index}: expected a dict with 'from' and 'value', got {_brief(turn)}")
    if str(turn["from"]) not in _SHAREGPT_ROLES:
        known = ", ".join(_SHAREGPT_ROLES)
        raise PairError(where, column, f"turn {index}: 'from' is {_brief(turn['from'])}, which is none of {known}")
    return {"role": _SHAREGPT_ROLES[turn["from"]], "content": turn["value"]}


def _ms_swift(record: Record, where: str, prompt: str | None) -> Record:
    messages = record["messages"]
    if not isinstance(messages, list) or len(messages) < 2:
        raise PairError(where, "messages", "expected messages that end with the chosen answer")
    for kind in MEDIA_COLUMNS.values():
        if record.get(f"rejected_{kind}") not in (None, [], record.get(kind)):
            raise PairError(where, f"rejected_{kind}", f"differs from '{kind}'; both answers must share one prompt")
    if (rejected := record.get("rejected_messages")) is not None:
        if not isinstance(rejected, list) or len(rejected) < 2:
            raise PairError(where, "rejected_messages", "expected messages that end with the rejected answer")
        return {**record, **_shared_prompt(messages, rejected, "rejected_messages", where)}
    answer = record["rejected_response"]
    if not isinstance(answer, str):
        raise PairError(where, "rejected_response", f"expected one answer as text, got {_brief(answer)}")
    rejected_message = [{"role": "assistant", "content": answer}]
    return {**record, "prompt": messages[:-1], "chosen": messages[-1:], "rejected": rejected_message}


def _synpo_release(record: Record, where: str, prompt: str | None) -> Record:
    question = prompt if prompt is not None else record.get("question") or VIDEO_PROMPT
    for column, value in (("video_name", record["video_name"]), ("question", question)):
        if not isinstance(value, str):
            raise PairError(where, column, f"expected text, got {_brief(value)}")
    return {
        "prompt": [{"role": "user", "content": [{"type": "video"}, {"type": "text", "text": question}]}],
        "chosen": [{"role": "assistant", "content": record["pos_pre"]}],
        "rejected": [{"role": "assistant", "content": record["neg_pre"]}],
        "videos": [record["video_name"]],
        "score_chosen": record.get("pos_score"),
        "score_rejected": record.get("neg_score"),
    }


def _ultrafeedback_binarized(record: Record, where: str, prompt: str | None) -> Record:
    """HuggingFaceH4/ultrafeedback_binarized: whole conversations, which repeat what stands in a column `prompt`."""
    return _implicit({name: value for name, value in record.items() if name != "messages"}, where, prompt)


_ASPECTS = ("helpfulness", "honesty", "instruction_following", "truthfulness")


def _ultrafeedback(record: Record, where: str, prompt: str | None) -> Record | None:
    """openbmb/UltraFeedback: several completions with ratings in four aspects; the best and the worst by their mean.

    A completion with a rating missing ("N/A") is neither. The file's overall_score is not used: it is known to call
    some of the worst completions the best.
    """
    completions = record["completions"]
    if not isinstance(completions, list):
        raise PairError(where, "completions", f"expected a list of completions, got {_brief(completions)}")
    rated = []
    for index, completion in enumerate(completions):
        try:
            ratings = [completion["annotations"][aspect]["Rating"] for aspect in _ASPECTS]
            response = completion["response"]
        except (KeyError, TypeError):
            raise PairError(
                where, "completions", f"completion {index}: a response and the Rating of each aspect are needed"
            ) from None
        if all(isinstance(rating, str) and rating.isdecimal() for rating in ratings):
            rated.append((sum(map(int, ratings)) / len(ratings), response))
    if not rated:
        return None
    best, worst = max(rated, key=lambda pair: pair[0]), min(rated, key=lambda pair: pair[0])
    if best[0] == worst[0]:
        return None
    return {
        "prompt": record["instruction"],
        "chosen": best[1],
        "rejected": worst[1],
        "score_chosen": best[0],
        "score_rejected": worst[0],
    }


def _shared_prompt(chosen: list[Any], rejected: list[Any], column: str, where: str) -> Record:
    if chosen[:-1] != rejected[:-1]:
        pairs = zip(chosen[:-1], rejected[:-1], strict=False)
        at = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(chosen), len(rejected)) - 1)
        raise PairError(
            where, column, f"message {at} differs from the chosen conversation's; only the last of each may differ"
        )
    return {"prompt": chosen[:-1], "chosen": chosen[-1:], "rejected": rejected[-1:]}


def with_system(columns: Record, system: Any, where: str) -> Record:
    """Put a `system` column, where there is one, in front of the prompt's messages."""
    if not system:
        return columns
    if not isinstance(system, str):
        raise PairError(where, "system", f"expected text, got {_brief(system)}")
    prompt = columns["prompt"]
    if not isinstance(prompt, list):
        raise PairError(where, "system", "a plain prompt has no system message; give prompt and answers as messages")
    if prompt and isinstance(prompt[0], Mapping) and prompt[0].get("role") == "system":
        raise PairError(where, "system", "the conversation has a system message already; keep one of the two")
    return {**columns, "prompt": [{"role": "system", "content": system}, *prompt]}


def _brief(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


# In the order of detection: the most particular first; "implicit" needs the fewest keys, so it is asked last.
FORMATS = {
    format.name: format
    for format in (
        PairFormat(
            "sharegpt",
            ("conversations", "chosen", "rejected"),
            _sharegpt,
            file_columns={"prompt": "conversations"},
        ),
        PairFormat(
            "ms-swift",
            ("messages",),
            _ms_swift,
            one_of=("rejected_response", "rejected_messages"),
            file_columns={"prompt": "messages", "chosen": "messages[-1]", "rejected": "rejected_messages[-1]"},
        ),
        PairFormat(
            "synpo-release",
            ("video_name", "pos_pre", "neg_pre"),
            _synpo_release,
            file_columns={
                "chosen": "pos_pre",
                "rejected": "neg_pre",
                "videos": "video_name",
                "score_chosen": "pos_score",
                "score_rejected": "neg_score",
            },
        ),
        PairFormat("ultrafeedback", ("instruction", "completions"), _ultrafeedback),
        PairFormat(
            "ultrafeedback-binarized",
            ("prompt", "prompt_id", "chosen", "rejected", "score_chosen", "score_rejected"),
            _ultrafeedback_binarized,
            file_columns={"prompt": "chosen", "chosen": "chosen[-1]", "rejected": "rejected[-1]"},
        ),
        PairFormat("columns", ("prompt", "chosen", "rejected"), _columns),
        PairFormat(
            "implicit",
            ("chosen", "rejected"),
            _implicit,
            file_columns={"prompt": "chosen", "chosen": "chosen[-1]", "rejected": "rejected[-1]"},
        ),
    )
}

KNOWN_COLUMNS = frozenset(PAIR_FEATURES) | {
    "system", "conversations", "messages", "rejected_response", "rejected_messages", "rejected_images",
    "rejected_videos", "video_name", "pos_pre", "neg_pre", "pos_score", "neg_score", "question", "provenance",
    "prompt_id", "instruction", "completions",
}  # fmt: skip


def detect(record: Record, where: str) -> PairFormat:
    """The format whose keys the record has; PairError listing the known ones where none fits."""
    for format in FORMATS.values():
        if not format.missing(record):
            return format
    found = ", ".join(str(key) for key in record if record[key] is not None) or "none"
    known = "; ".join(map(str, FORMATS.values()))

    def nearness(format: PairFormat) -> tuple[int, int]:
        return sum(record.get(key) is not None for key in format.required), -len(format.missing(record))

    nearest = max(FORMATS.values(), key=nearness)
    near = ""
    if len(nearest.missing(record)) < len(nearest.required):
        near = f" Nearest is {nearest.name!r}; missing: {', '.join(nearest.missing(record))}."
    raise PairError(where, None, f"no known pair format has these columns: {found}.{near} Known formats: {known}")
