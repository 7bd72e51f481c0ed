"""Tokenised pairs as a dataset, and micro-batches of them as passes through the model.

The answer tokens of a sequence of n tokens with a prompt of p stand at p..n-1 and are predicted by the hidden states at
p-1..n-2, so every pass carries the flat positions of those hidden states and the tokens they predict, already aligned.
"""

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Dataset, Sampler
from tqdm import tqdm
from transformers.trainer_pt_utils import get_length_grouped_indices

from .media import Media, MediaError, has_media
from .pieces import Layout, Piece
from .reference_table import Sums, pair_key
from .tokenise import COLUMNS, Pair, PairTokenizer

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Pending:
    """A pair with media: tokenised when it is asked for, since its media decide on its placeholders."""

    index: int
    row: Mapping[str, Any]

    def length(self) -> int:
        """Characters of its texts: an order among pairs that have media, whose tokens are not counted yet."""
        return len(str(self.row["prompt"])) + max(len(str(self.row[side])) for side in ("chosen", "rejected"))


class PairDataset(Dataset):
    """All pairs of a dataset: texts tokenised once, in memory; videos and images read whenever a pair is asked for.

    broken_media "stop": a video or image that cannot be read is an error; "skip": the next readable pair takes the
    place of its own, and counts how many were passed over.
    """

    def __init__(
        self,
        rows: Sequence[Mapping[str, Any]],
        tokenizer: PairTokenizer,
        name: str,
        min_score_gap: float | None = None,
        broken_media: str = "stop",
    ) -> None:
        """Errors: TypeError for a stream, ValueError for a bad row (named) and where no pair is left."""
        _require_columns(rows, name)
        tokenizer.counts.clear()
        self.name, self.tokenizer, self.broken_media = name, tokenizer, broken_media
        self.pairs: list[Pair | Pending] = []
        for index, row in enumerate(
            tqdm(rows, desc=f"tokenising {name} pairs", unit=" pairs", delay=2, disable=None, leave=False)
        ):
            if min_score_gap is not None and (reason := _score_gap_fails(row, min_score_gap)):
                tokenizer.counts[reason] += 1
            elif tokenizer.media is not None and has_media(row):
                self._pend(row, index)
            elif (pair := tokenizer(row, index)) is not None:
                self.pairs.append(pair)
        self.counts = dict(tokenizer.counts)
        for what, count in self.counts.items():
            logger.warning("%s pairs: %s: %d", name, what, count)
        if not self.pairs:
            raise ValueError(f"{name} dataset: no pair is left to use ({self.counts or 'it was empty'})")

    def __len__(self) -> int:
        return len(self.pairs)

    def _pend(self, row: Mapping[str, Any], index: int) -> None:
        try:
            self.tokenizer.check(row, index)
        except MediaError as error:
            if self.broken_media == "stop":
                raise
            logger.warning("%s pairs: %s", self.name, error)
            self.tokenizer.counts["dropped, media missing or not supported"] += 1
        else:
            self.pairs.append(Pending(index, dict(row)))

    def __getitem__(self, index: int) -> Pair:
        if index >= len(self.pairs):  # see processes.Evened
            return replace(self[index - len(self.pairs)], repeat=True, skipped=0, cut=False)
        for skipped in range(len(self.pairs)):
            pair = self.pairs[(index + skipped) % len(self.pairs)]
            if isinstance(pair, Pair):
                return replace(pair, skipped=skipped) if skipped else pair
            try:
                found = self.tokenizer(pair.row, pair.index)
            except MediaError as error:
                if self.broken_media == "stop":
                    raise
                logger.warning("%s pairs: %s; the next pair takes its place", self.name, error)
                continue
            if found is not None:
                return replace(found, skipped=skipped)
            logger.warning(
                "%s pairs: row %d is longer than max_length; the next takes its place", self.name, pair.index
            )
        raise MediaError(f"{self.name} pairs: none can be read; the warnings above name them")

    def lengths(self) -> list[int]:
        """Tokens of each pair's longer sequence; for pairs with media, a number of the same order."""
        return [pair.length() for pair in self.pairs]


def _require_columns(rows: Any, name: str) -> None:
    if not hasattr(rows, "__len__") or not hasattr(rows, "__getitem__"):
        raise TypeError(
            f"{name} dataset is a {type(rows).__name__}; rows with a length are needed (a list or datasets.Dataset), "
            "not a stream"
        )
    columns = getattr(rows, "column_names", None)
    missing = [column for column in COLUMNS if columns is not None and column not in columns]
    if missing:
        raise ValueError(f"{name} dataset has no column {missing[0]!r}; its columns are {', '.join(columns)}")


class LengthGrouped(Sampler[int]):
    """Pairs of like length near each other, in an order that depends on the seed and the epoch alone (so runs
    resume).
    """

    def __init__(self, lengths: Sequence[int], batch_size: int, seed: int) -> None:
        self.lengths, self.batch_size, self.seed, self.epoch = list(lengths), batch_size, seed, 0

    def set_epoch(self, epoch: int) -> None:
        """Called by the data loader before every epoch."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        return iter(get_length_grouped_indices(self.lengths, self.batch_size, generator=generator))


def _score_gap_fails(row: Mapping[str, Any], least: float) -> str:
    """Why a row does not have the score gap asked for; empty where it has."""
    if row.get("score_chosen") is None or row.get("score_rejected") is None:
        return "dropped, a score is missing"
    return "dropped, score gap below min_score_gap" if row["score_chosen"] - row["score_rejected"] < least else ""


class Form(NamedTuple):
    """How pairs become rows; the default is a row for every sequence, padded."""

    shared: bool = False  # rows [prompt | chosen | rejected]
    packed: bool = False  # everything in one row, without padding


PLAIN = Form()


class PairCollator:
    """A list of Pairs -> {"passes": [...], "pairs": B}: consecutive pairs, as many to a pass as tokens_per_pass allows.

    Repeats are left out; where there is nothing else, one of them makes an idle pass. For a pass see ``assemble``.
    ``references``, where set, maps pair_key to the reference's summed log-probs and adds ref_logps (2b,) float32.
    """

    def __init__(self, pad_token_id: int, tokens_per_pass: int | None = None, form: Form = PLAIN) -> None:
        self.pad_token_id = pad_token_id
        self.tokens_per_pass = tokens_per_pass
        self.form = form
        self.references: Mapping[str, Sums] | None = None

    def __call__(self, pairs: Sequence[Pair]) -> dict[str, Any]:
        own = [pair for pair in pairs if not pair.repeat]
        if not own:
            return {"passes": [self._collate(pairs[:1]) | {"idle": True}], "pairs": 0}
        passes: list[list[Pair]] = []
        for pair in own:
            fits = passes and (self.tokens_per_pass is None or self._size([*passes[-1], pair]) <= self.tokens_per_pass)
            if fits:
                passes[-1].append(pair)
            else:
                passes.append([pair])
        return {"passes": [self._collate(group) for group in passes], "pairs": len(own)}

    def _size(self, pairs: Sequence[Pair]) -> int:
        """Tokens of a pass of these pairs, padding included."""
        lengths = [n for pair in pairs for n in _strip_lengths(pair, self.form.shared)]
        return sum(lengths) if self.form.packed else len(lengths) * max(lengths)

    def _collate(self, pairs: Sequence[Pair]) -> dict[str, Any]:
        batch = assemble(pairs, self.pad_token_id, self.form)
        if self.references is not None:
            try:
                chosen, rejected = zip(*(self.references[pair_key(pair)] for pair in pairs), strict=True)
            except KeyError:
                raise ValueError(
                    f"rows {batch['indices']} have no precomputed reference log-probs; give their dataset to the "
                    "trainer's constructor"
                ) from None
            batch["ref_logps"] = torch.tensor([*chosen, *rejected])
        return batch


class _Strip(NamedTuple):
    """Tokens that stay together in a row: a sequence, or a prompt with both its answers."""

    ids: Tensor
    places: Tensor  # (n,) or (3, n): position of each token in its own sequence
    media: Media | None
    pieces: tuple[Piece, ...]
    predictors: tuple[Tensor, ...]  # for each answer, where the hidden states that predict its tokens stand


def _positions(pair: Pair, *answers: Tensor) -> Tensor:
    """Of a prompt's tokens, and of each answer's, which go on from the prompt's largest."""
    prompt = torch.arange(len(pair.prompt)) if pair.places is None else pair.places
    first = int(prompt.max()) + 1
    return torch.cat(
        [prompt, *(torch.arange(first, first + len(a)).expand(*prompt.shape[:-1], len(a)) for a in answers)], -1
    )


def _sequence(pair: Pair, answer: Tensor) -> _Strip:
    p, n = len(pair.prompt), len(pair.prompt) + len(answer)
    return _Strip(
        torch.cat((pair.prompt, answer)),
        _positions(pair, answer),
        pair.media,
        (Piece(0, n),),
        (torch.arange(p - 1, n - 1),),
    )


def _pair(pair: Pair) -> _Strip:
    """The last token of the prompt predicts the first of both answers."""
    p, c, r = len(pair.prompt), len(pair.chosen), len(pair.rejected)
    own = torch.arange(p + c + r)
    return _Strip(
        torch.cat((pair.prompt, pair.chosen, pair.rejected)),
        _positions(pair, pair.chosen, pair.rejected),
        pair.media,
        (Piece(0, p + c), Piece(p + c, p + c + r, 0, p)),
        (own[p - 1 : p + c - 1], torch.cat((own[p - 1 : p], own[p + c : -1]))),
    )


def _strip_lengths(pair: Pair, shared: bool) -> tuple[int, ...]:
    p, c, r = len(pair.prompt), len(pair.chosen), len(pair.rejected)
    return (p + c + r,) if shared else (p + c, p + r)


def assemble(pairs: Sequence[Pair], pad_token_id: int, form: Form) -> dict[str, Any]:
    """A pass of b pairs: what goes through the model, and where the answers stand.

    input_ids, attention_mask (R, T) int64: a row per sequence, chosen ones first and then their rejected, padded on
    the right; or a row per pair (form.shared), or one row for all (form.packed). positions (N,) int64: flat indices
    into (R*T) of the hidden states that predict answer tokens, chosen answers first; labels (N,) int64, those tokens;
    cu_seqlens (2b+1,) int32, boundaries of the answers in both. pairs, indices: the pairs, and their rows in the
    dataset. tokens: those of the 2b sequences. media: what rows show, in order. skipped: pairs that these stand for
    because their media could not be read. cut: pairs that lost tokens to max_length. Forms other than PLAIN add layout
    (see prefix) and position_ids (R, T); (3, R, T) for models that count positions along time, height and width, in
    any form.
    """
    answers = [(p, p.chosen) for p in pairs] + [(p, p.rejected) for p in pairs]
    strips = [_pair(p) for p in pairs] if form.shared else [_sequence(*answer) for answer in answers]
    lengths = [len(strip.ids) for strip in strips]
    width = sum(lengths) if form.packed else max(lengths)
    rows = 1 if form.packed else len(strips)
    starts = [sum(lengths[:i]) for i in range(len(strips))] if form.packed else [i * width for i in range(len(strips))]

    input_ids = torch.full((rows * width,), pad_token_id)
    attention_mask = torch.zeros_like(input_ids)
    axes = max(strip.places.ndim for strip in strips)  # 2 where some pair has positions along several axes
    places = torch.zeros((3,) * (axes - 1) + input_ids.shape, dtype=torch.int64)
    pieces: list[tuple[Piece, ...]] = [()] * rows
    for strip, start in zip(strips, starts, strict=True):
        stop = start + len(strip.ids)
        input_ids[start:stop] = strip.ids
        attention_mask[start:stop] = 1
        places[..., start:stop] = strip.places
        row, column = divmod(start, width)
        pieces[row] += tuple(piece.shifted(column) for piece in strip.pieces)
    sides = range(2 if form.shared else 1)
    placed = list(zip(strips, starts, strict=True))
    batch: dict[str, Any] = {
        "input_ids": input_ids.view(rows, width),
        "attention_mask": attention_mask.view(rows, width),
        "positions": torch.cat([strip.predictors[side] + start for side in sides for strip, start in placed]),
        "labels": torch.cat([answer for _, answer in answers]),
        "cu_seqlens": torch.tensor([0, *(len(answer) for _, answer in answers)]).cumsum(0).to(torch.int32),
        "pairs": list(pairs),
        "indices": [pair.index for pair in pairs],
        "tokens": sum(len(pair.prompt) + len(answer) for pair, answer in answers),
        "media": [strip.media for strip in strips if strip.media is not None],
        "skipped": sum(pair.skipped for pair in pairs),
        "cut": sum(pair.cut for pair in pairs),
        "idle": False,  # whether it is computed for nothing (see processes)
    }
    if form != PLAIN:
        batch["layout"] = Layout(tuple(pieces))
    if form != PLAIN or axes > 1:
        batch["position_ids"] = places.unflatten(-1, (rows, width))
    return batch
