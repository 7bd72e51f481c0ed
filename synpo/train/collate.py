"""Tokenised pairs as a dataset, and micro-batches of them as passes through the model.

The answer tokens of a sequence of n tokens with a prompt of p stand at p..n-1 and are predicted by the hidden states at
p-1..n-2, so every pass carries the flat positions of those hidden states and the tokens they predict, already aligned.
"""

import hashlib
import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset, Sampler
from tqdm import tqdm
from transformers.trainer_pt_utils import get_length_grouped_indices

from .tokenise import COLUMNS, Pair, PairTokenizer

logger = logging.getLogger(__name__)


class PairDataset(Dataset):
    """All pairs of a dataset, tokenised once, in memory."""

    def __init__(
        self,
        rows: Sequence[Mapping[str, Any]],
        tokenizer: PairTokenizer,
        name: str,
        min_score_gap: float | None = None,
    ) -> None:
        """Errors: TypeError for a stream, ValueError for a bad row (named) and where no pair is left."""
        _require_columns(rows, name)
        tokenizer.counts.clear()
        self.pairs: list[Pair] = []
        for index, row in enumerate(
            tqdm(rows, desc=f"tokenising {name} pairs", unit=" pairs", delay=2, disable=None, leave=False)
        ):
            if min_score_gap is not None and (reason := _score_gap_fails(row, min_score_gap)):
                tokenizer.counts[reason] += 1
            elif (pair := tokenizer(row, index)) is not None:
                self.pairs.append(pair)
        self.counts = dict(tokenizer.counts)
        for what, count in self.counts.items():
            logger.warning("%s pairs: %s: %d", name, what, count)
        if not self.pairs:
            raise ValueError(f"{name} dataset: no pair is left to use ({self.counts or 'it was empty'})")

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> Pair:
        return self.pairs[index]

    def lengths(self) -> list[int]:
        """Tokens of each pair's longer sequence."""
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


class PairCollator:
    """A list of Pairs -> {"passes": [...], "pairs": B}: consecutive pairs, as many to a pass as tokens_per_pass allows.

    A pass of b pairs is a dict: input_ids, attention_mask (2b, T) int64, right-padded, chosen rows first and then
    their rejected; positions (N,) int64, flat indices into (2b*T) of the hidden states that predict answer tokens;
    labels (N,) int64, those tokens; cu_seqlens (2b+1,) int32, boundaries of the sequences in both; indices, tokens:
    the pairs' rows in the dataset, and the number of tokens without padding. ``references``, where set, maps
    sequence_key to the reference's summed log-prob and adds ref_logps (2b,) float32.
    """

    def __init__(self, pad_token_id: int, tokens_per_pass: int | None = None) -> None:
        self.pad_token_id = pad_token_id
        self.tokens_per_pass = tokens_per_pass
        self.references: Mapping[bytes, float] | None = None

    def __call__(self, pairs: Sequence[Pair]) -> dict[str, Any]:
        passes: list[list[Pair]] = []
        longest = 0
        for pair in pairs:
            longest = max(longest, pair.length())
            if passes and (self.tokens_per_pass is None or 2 * (len(passes[-1]) + 1) * longest <= self.tokens_per_pass):
                passes[-1].append(pair)
            else:
                passes.append([pair])
                longest = pair.length()
        return {"passes": [self._collate(group) for group in passes], "pairs": len(pairs)}

    def _collate(self, pairs: Sequence[Pair]) -> dict[str, Any]:
        rows = [(p.prompt, p.chosen) for p in pairs] + [(p.prompt, p.rejected) for p in pairs]
        width = max(len(prompt) + len(answer) for prompt, answer in rows)
        input_ids = torch.full((len(rows), width), self.pad_token_id)
        attention_mask = torch.zeros_like(input_ids)
        positions = []
        for i, (prompt, answer) in enumerate(rows):
            n = len(prompt) + len(answer)
            input_ids[i, :n] = torch.cat((prompt, answer))
            attention_mask[i, :n] = 1
            positions.append(torch.arange(i * width + len(prompt) - 1, i * width + n - 1))
        bounds = torch.tensor([0, *(len(answer) for _, answer in rows)]).cumsum(0)
        batch: dict[str, Any] = {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "positions": torch.cat(positions),
            "labels": torch.cat([answer for _, answer in rows]),
            "cu_seqlens": bounds.to(torch.int32),
            "indices": [pair.index for pair in pairs],
            "tokens": int(attention_mask.sum()),
        }
        if self.references is not None:
            try:
                batch["ref_logps"] = torch.tensor([self.references[sequence_key(*row)] for row in rows])
            except KeyError:
                raise ValueError(
                    f"rows {batch['indices']} have no precomputed reference log-probs; give their dataset to the "
                    "trainer's constructor"
                ) from None
        return batch


def sequence_key(prompt: Tensor, answer: Tensor) -> bytes:
    """What identifies a sequence to a reference model: a hash of its token ids and of where the answer starts."""
    digest = hashlib.sha256(len(prompt).to_bytes(8, "little"))
    digest.update(torch.cat((prompt, answer)).numpy().tobytes())
    return digest.digest()
