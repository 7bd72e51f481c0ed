"""Micro-batches as passes: what stands where, how many tokens go together, and datasets that say what they lost."""

import logging
from typing import Any

import pytest
import torch

from synpo.train.collate import LengthGrouped, PairCollator, PairDataset
from synpo.train.reference_table import pair_key
from synpo.train.tokenise import Pair, PairTokenizer
from tests.train import tiny


def pair(index: int, prompt: int, chosen: int, rejected: int) -> Pair:
    start = 100 * index
    ids = torch.arange(start, start + prompt + chosen + rejected)
    return Pair(index, *ids.split([prompt, chosen, rejected]))


def test_a_pass_holds_rows_and_aligned_labels() -> None:
    pairs = [pair(1, 3, 2, 4), pair(2, 2, 5, 1)]
    (batch,) = PairCollator(pad_token_id=9)(pairs)["passes"]
    rows = [
        torch.cat((p.prompt, answer)) for side in ("chosen", "rejected") for p in pairs for answer in [getattr(p, side)]
    ]
    assert batch["input_ids"].shape == (4, 7)
    for i, ids in enumerate(rows):
        assert batch["input_ids"][i].tolist() == ids.tolist() + [9] * (7 - len(ids))
        assert batch["attention_mask"][i].tolist() == [1] * len(ids) + [0] * (7 - len(ids))
    assert batch["cu_seqlens"].tolist() == [0, 2, 7, 11, 12]
    assert batch["cu_seqlens"].dtype == torch.int32
    # The state before a token predicts it: one place to the right of every position stands its label.
    assert batch["input_ids"].reshape(-1)[batch["positions"] + 1].tolist() == batch["labels"].tolist()
    assert batch["labels"].tolist() == [t for p in pairs for t in p.chosen.tolist()] + [
        t for p in pairs for t in p.rejected.tolist()
    ]
    assert batch["indices"] == [1, 2]
    assert batch["tokens"] == 5 + 7 + 7 + 3


@pytest.mark.parametrize(
    ("bound", "groups"),
    [
        (None, [[0, 1, 2, 3]]),
        (1, [[0], [1], [2], [3]]),  # a pair is never split, however long
        (24, [[0, 1], [2], [3]]),  # 2 rows of 2 pairs of at most 6 tokens
        (40, [[0, 1], [2, 3]]),
        (39, [[0, 1], [2], [3]]),
    ],
)
def test_a_pass_takes_as_many_pairs_as_fit(bound: int | None, groups: list[list[int]]) -> None:
    pairs = [pair(0, 2, 4, 1), pair(1, 2, 1, 2), pair(2, 4, 6, 6), pair(3, 1, 1, 1)]
    batch = PairCollator(0, bound)(pairs)
    assert [p["indices"] for p in batch["passes"]] == groups
    assert batch["pairs"] == 4


def test_keys_tell_pairs_and_boundaries_apart() -> None:
    ids = torch.arange(6)
    cuts = [(2, 4), (3, 4), (2, 5)]
    keys = {pair_key(Pair(0, ids[:a], ids[a:b], ids[b:])) for a, b in cuts}
    assert len(keys) == 3
    assert pair_key(Pair(7, ids[:2], ids[2:4], ids[4:].clone())) in keys


def test_reference_sums_come_in_the_order_of_the_rows() -> None:
    pairs = [pair(1, 3, 2, 4), pair(2, 2, 5, 1)]
    collator = PairCollator(0)
    collator.references = {pair_key(p): (10.0 + p.index, 20.0 + p.index) for p in pairs}
    (batch,) = collator(pairs)["passes"]
    assert batch["ref_logps"].tolist() == [11.0, 12.0, 21.0, 22.0]
    with pytest.raises(ValueError, match=r"rows \[3\] have no precomputed reference"):
        collator([pair(3, 1, 1, 1)])


def dataset(rows: list[dict[str, Any]], **options: Any) -> PairDataset:
    return PairDataset(rows, PairTokenizer(tiny.tokenizer(), 64, "drop"), "train", **options)


def test_score_gap_counts_what_it_drops(caplog: pytest.LogCaptureFixture) -> None:
    rows = tiny.pairs(4)
    scores = [(5.0, 1.0), (3.0, 1.0), (5.0, None), (4.5, 0.5)]
    for r, (chosen, rejected) in zip(rows, scores, strict=True):
        r |= {"score_chosen": chosen, "score_rejected": rejected}
    with caplog.at_level(logging.WARNING):
        found = dataset(rows, min_score_gap=4.0)
    assert [p.index for p in found.pairs] == [0, 3]
    assert found.counts == {"dropped, score gap below min_score_gap": 1, "dropped, a score is missing": 1}
    assert "train pairs: dropped, a score is missing: 1" in caplog.text


def test_nothing_left_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"train dataset: no pair is left to use .*a score is missing': 2"):
        dataset(tiny.pairs(2), min_score_gap=4.0)
    with pytest.raises(ValueError, match="train dataset: no pair is left to use"):
        dataset([])


def test_streams_are_refused() -> None:
    with pytest.raises(TypeError, match="train dataset is a generator; rows with a length are needed"):
        dataset(row for row in tiny.pairs(2))


def test_length_grouped_order_depends_on_seed_and_epoch_alone() -> None:
    lengths = list(range(40))
    sampler = LengthGrouped(lengths, 4, seed=1)
    first = list(sampler)
    torch.rand(1)
    assert list(sampler) == first
    sampler.set_epoch(1)
    assert sorted(sampler) == sorted(first) == list(range(40))
    assert list(sampler) != first
    assert list(LengthGrouped(lengths, 4, seed=2)) != first
