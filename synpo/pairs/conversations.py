"""Conversations without a preference, as a supervised stage before preference training uses them (UltraChat-200k)."""

from pathlib import Path
from typing import Any

from datasets import Dataset, Features, Value
from datasets import List as ListOf

from .files import pair_files, read_records
from .importers import Paths
from .schema import PairError

CONVERSATION_FEATURES = Features(
    {"messages": ListOf({"role": Value("string"), "content": Value("string")}), "source": Value("string")}
)


def load_conversations(path: Paths) -> Dataset:
    """Read files whose records hold `messages`: a system message or none, then user and assistant in turns.

    UltraChat-200k is published so (prompt, prompt_id, messages); other columns are left out.

    Raises:
        PairError: (a ValueError) the first bad record: file and line or row, and what is wrong.
        FileNotFoundError, ValueError: as `load_pairs`; files without a record.
    """
    rows = []
    for file in pair_files(path):
        for where, record in read_records(Path(file)):
            if isinstance(record, PairError):
                raise record
            rows.append({"messages": _turns(record.get("messages"), where), "source": where})
    if not rows:
        raise ValueError(f"{path}: no conversation in it")
    return Dataset.from_list(rows, features=CONVERSATION_FEATURES)


def _turns(messages: Any, where: str) -> list[dict[str, str]]:
    if not isinstance(messages, list) or not messages:
        raise PairError(where, "messages", "expected a list of messages")
    turns = []
    for index, message in enumerate(messages):
        role, content = (message.get("role"), message.get("content")) if isinstance(message, dict) else (None, None)
        if not isinstance(role, str) or not isinstance(content, str):
            raise PairError(where, "messages", f"message {index}: a role and a content as text are needed")
        turns.append({"role": role, "content": content})
    spoken = turns[1:] if turns[0]["role"] == "system" else turns
    expected = [("user", "assistant")[index % 2] for index in range(len(spoken))]
    if not spoken or [turn["role"] for turn in spoken] != expected or spoken[-1]["role"] != "assistant":
        roles = ", ".join(turn["role"] for turn in turns)
        raise PairError(where, "messages", f"user and assistant have to take turns, the assistant last; roles: {roles}")
    return turns
