"""Rows as token ids: prompt, chosen answer, rejected answer, and the media that stand in the prompt."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ..pairs import normalise_pair
from .media import Media, MediaError, MediaReader, has_media

COLUMNS = ("prompt", "chosen", "rejected")


@dataclass(frozen=True)
class Pair:
    """One tokenised pair; ids are 1-D int64 tensors. The prompt is the same for both answers; answers end in their
    end token.
    """

    index: int  # row of the dataset the pair came from
    prompt: Tensor
    chosen: Tensor
    rejected: Tensor
    media: Media | None = None
    places: Tensor | None = None  # (3, P) positions of the prompt's tokens, where they are not 0..P-1
    skipped: int = 0  # pairs before this one in the dataset whose media could not be read
    cut: bool = False  # whether truncation took tokens of it
    repeat: bool = False  # stands once more at an epoch's end, to fill the last batches of several processes

    def length(self) -> int:
        """Tokens of the longer sequence."""
        return len(self.prompt) + max(len(self.chosen), len(self.rejected))


class PairTokenizer:
    """Turns rows with the columns prompt, chosen and rejected into Pairs, and counts what it changed.

    Strings are concatenated: prompt (with the tokenizer's start token) + answer + end token. Conversations go through
    the chat template. The answer is tokenised by itself, so no merge reaches across the boundary and the prompt's
    tokens are those that generation would see. Where max_length is passed, truncation "cut" shortens the prompt from
    the left (a start token stays) down to a quarter of max_length and then the longer answers before their end token;
    "drop" drops the pair; "error" raises ValueError. Placeholders of media are never cut.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        max_length: int,
        truncation: str,
        media: MediaReader | None = None,
        blind: str = "the model",
    ) -> None:
        """media: reads videos and images; without it pairs that have some are refused, ``blind`` saying who cannot see.

        Errors: ValueError for a tokenizer without an end token.
        """
        if tokenizer.eos_token_id is None:
            raise ValueError("processing_class has no eos_token; set one, answers have to end in it")
        self.tokenizer = tokenizer
        self.max_length = max_length
        self.truncation = truncation
        self.media = media
        self.blind = blind
        self._specials = frozenset(tokenizer.all_special_ids)
        self.counts: Counter[str] = Counter()

    def __call__(self, row: Mapping[str, Any], index: int) -> Pair | None:
        """The pair of a row, or None where truncation="drop" drops it. Errors: ValueError naming the row and the
        column.
        """
        where = self._checked(row, index)
        if has_media(row):
            return self._with_media(normalise_pair(row, where), index, where)
        prompt_text, answers = self._texts(row, where)
        prompt = self._ids(prompt_text, special=isinstance(row["prompt"], str))
        return self._pair(index, prompt, answers, where)

    def check(self, row: Mapping[str, Any], index: int) -> None:
        """Refuse a row with media as far as that is possible without reading them. Errors: MediaError, ValueError."""
        where = self._checked(row, index)
        record = normalise_pair(row, where)
        _answer_messages(record, where)
        self.media.check(record, where)

    def _checked(self, row: Mapping[str, Any], index: int) -> str:
        where = f"{row.get('source') or f'row {index}'}"
        missing = [column for column in COLUMNS if row.get(column) is None]
        if missing:
            raise ValueError(f"{where}: column {missing[0]!r} is missing; needed are prompt, chosen and rejected")
        if self.media is None and has_media(row):
            raise ValueError(f"{where}: has images or videos, but {self.blind} takes text alone; remove them")
        return where

    def _with_media(self, record: Mapping[str, Any], index: int, where: str) -> Pair | None:
        media = self.media.read(record, where)
        messages = self.media.messages(record["prompt"], media)
        head, tails = self._rendered(messages, _answer_messages(record, where), where)
        prompt = self._ids(self.media.expand(head, media, where), special=False)
        kept = self.media.span(prompt, media, where)
        pair = self._pair(index, prompt, tails, where, kept)
        if pair is None:
            return None
        if any(self.media.place in answer for answer in (pair.chosen, pair.rejected)):
            raise MediaError(f"{where}: an answer holds {self.media.words.place!r}, the place of a vision vector")
        return replace(pair, media=media, places=self.media.places(pair.prompt, media))

    def _pair(
        self, index: int, prompt: list[int], answers: Sequence[str], where: str, kept: tuple[int, int] = (0, 0)
    ) -> Pair | None:
        if not prompt:
            raise ValueError(f"{where}: column 'prompt' has no tokens; the first answer token needs one before it")
        chosen, rejected = (
            self._answer(text, where, column) for text, column in zip(answers, ("chosen", "rejected"), strict=True)
        )
        fitted = self._fit(prompt, chosen, rejected, where, kept)
        if fitted is None:
            return None
        cut = sum(map(len, fitted)) < len(prompt) + len(chosen) + len(rejected)
        return Pair(index, *(torch.tensor(ids) for ids in fitted), cut=cut)

    def _texts(self, row: Mapping[str, Any], where: str) -> tuple[str, list[str]]:
        prompt = row["prompt"]
        if isinstance(prompt, str):
            for column in ("chosen", "rejected"):
                if not isinstance(row[column], str):
                    raise ValueError(
                        f"{where}: prompt is a string but {column} is a {type(row[column]).__name__}; "
                        "give three strings, or three conversations"
                    )
                _refuse_blank(row[column], where, column)
            _refuse_alike(row["chosen"], row["rejected"], where)
            return prompt, [row["chosen"], row["rejected"]]
        prompt = [_text_message(message, where, "prompt") for message in prompt]
        return self._rendered(prompt, _answer_messages(row, where), where)

    def _rendered(
        self, prompt: list[dict[str, Any]], answers: list[dict[str, str]], where: str
    ) -> tuple[str, list[str]]:
        """A conversation's text up to the answer, and what each answer adds to it."""
        if self.tokenizer.chat_template is None:
            if len(prompt) > 1:
                raise ValueError(
                    f"{where}: the prompt has {len(prompt)} messages but the tokenizer no chat template; set one"
                )
            self.counts["joined without a chat template"] += 1
            return (self.tokenizer.bos_token or "") + prompt[0]["content"], [answer["content"] for answer in answers]
        head = self.tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
        tails = []
        for answer, column in zip(answers, ("chosen", "rejected"), strict=True):
            whole = self.tokenizer.apply_chat_template([*prompt, answer], tokenize=False)
            if not whole.startswith(head):
                raise ValueError(
                    f"{where}: the chat template renders the prompt differently once the {column} answer follows, "
                    "so it cannot be split; use a template whose generation prompt begins the assistant's turn"
                )
            tails.append(whole[len(head) :])
        return head, tails

    def _ids(self, text: str, special: bool) -> list[int]:
        ids = self.tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"]
        return ids[:-1] if special and ids and ids[-1] == self.tokenizer.eos_token_id else ids

    def _answer(self, text: str, where: str, column: str) -> list[int]:
        """Ids up to and with the end of the turn: the template's own end token where it renders one, eos otherwise."""
        ids = self._ids(text, special=False)
        if not ids:
            raise ValueError(f"{where}: column {column!r} has no tokens; remove the pair")
        last = max((at for at, token in enumerate(ids) if token in self._specials), default=-1)
        if last >= 0 and not self.tokenizer.decode(ids[last + 1 :]).strip():
            return ids[: last + 1]
        return [*ids, self.tokenizer.eos_token_id]

    def _fit(
        self, prompt: list[int], chosen: list[int], rejected: list[int], where: str, kept: tuple[int, int]
    ) -> tuple[list[int], list[int], list[int]] | None:
        """The three within max_length; prompt[kept[0]:kept[1]] stays whole."""
        longest = max(len(chosen), len(rejected))
        if len(prompt) + longest <= self.max_length:
            return prompt, chosen, rejected
        if self.truncation == "error":
            raise ValueError(
                f"{where}: {len(prompt) + longest} tokens, max_length is {self.max_length}; "
                "raise it, or set truncation to cut or drop"
            )
        if self.truncation == "drop":
            self.counts["dropped, longer than max_length"] += 1
            return None
        left = max(self.max_length - longest, min(len(prompt), self.max_length // 4))
        if left < len(prompt):
            prompt = self._cut(prompt, len(prompt) - left, kept)
        room = self.max_length - len(prompt)
        if room < 2:
            raise MediaError(
                f"{where}: its media take {kept[1] - kept[0]} of max_length={self.max_length} tokens and leave no room "
                "for an answer; raise max_length, or lower num_frames or fps"
            )
        cut = []
        for answer in (chosen, rejected):
            if len(answer) > room:
                self.counts["answers cut"] += 1
                answer = [*answer[: room - 1], answer[-1]]
            cut.append(answer)
        return prompt, *cut

    def _cut(self, prompt: list[int], count: int, kept: tuple[int, int]) -> list[int]:
        """A prompt without its first ``count`` tokens, but for the start token and those of kept."""
        start = int(prompt[0] == self.tokenizer.bos_token_id)
        free = [i for i in range(start, len(prompt)) if not kept[0] <= i < kept[1]]
        gone = set(free[:count])
        self.counts["prompts cut"] += 1
        return [token for i, token in enumerate(prompt) if i not in gone]


def _text_message(message: Mapping[str, Any], where: str, column: str) -> dict[str, str]:
    content = message["content"]
    if not isinstance(content, str):
        kinds = {part.get("type") for part in content} - {"text"}
        if kinds:
            raise ValueError(
                f"{where}: column {column!r} has a part of type {min(map(str, kinds))!r}; this trainer takes text only"
            )
        content = "".join(part["text"] for part in content)
    return {"role": message["role"], "content": content}


def _answer_messages(row: Mapping[str, Any], where: str) -> list[dict[str, str]]:
    answers = [_answer_message(row[column], where, column) for column in ("chosen", "rejected")]
    _refuse_alike(*(answer["content"] for answer in answers), where)
    return answers


def _answer_message(answer: Any, where: str, column: str) -> dict[str, str]:
    if isinstance(answer, str):
        raise ValueError(f"{where}: prompt is a conversation but {column} is a string; give three conversations")
    if len(answer) != 1:
        raise ValueError(f"{where}: column {column!r} has {len(answer)} messages; an answer is one assistant message")
    message = _text_message(answer[0], where, column)
    _refuse_blank(message["content"], where, column)
    return message


def _refuse_blank(text: str, where: str, column: str) -> None:
    if not text.strip():
        raise ValueError(f"{where}: column {column!r} is an empty answer; remove the pair")


def _refuse_alike(chosen: str, rejected: str, where: str) -> None:
    if chosen.split() == rejected.split():
        raise ValueError(
            f"{where}: columns 'chosen' and 'rejected' are alike but for white space and teach no preference; remove "
            "the pair, as synpo.pairs.apply_filters does"
        )
