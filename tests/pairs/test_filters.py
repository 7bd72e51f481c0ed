"""What each filter drops and reports, and the split."""

from collections import Counter

import pytest
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st

from synpo.pairs import PAIR_FEATURES, apply_filters, normalise_pair, split_pairs


def pairs(*records):
    """Records (prompt, chosen, rejected) or dicts, as a normalised dataset with the sources p:0, p:1, ..."""
    columns = ("prompt", "chosen", "rejected")
    rows = [r if isinstance(r, dict) else dict(zip(columns, r, strict=True)) for r in records]
    normalised = [normalise_pair(row, f"p:{i}") for i, row in enumerate(rows)]
    return Dataset.from_list(normalised, features=PAIR_FEATURES)


def scored(chosen, rejected, answer="a"):
    return {"prompt": "x", "chosen": answer, "rejected": "b", "score_chosen": chosen, "score_rejected": rejected}


def test_empty_same_and_duplicate_pairs_are_dropped_and_counted():
    dataset = pairs(
        ("x", "a", "b"),
        ("x", " ", "b"),
        ("x", "a", "\n"),
        ("", "a", "b"),
        ("x", "a  c", "a\nc "),
        (" x", "a", " b"),  # the first again, but for white space
        ("x", "b", "a"),
        ("x", "ab", "c"),
        ("x", "a", "bc"),  # joined texts alike, pairs not
    )
    kept, report = apply_filters(dataset)
    assert kept["source"][:] == ["p:0", "p:6", "p:7", "p:8"]
    assert report.dropped == {"empty": 3, "same answers": 1, "duplicate": 1}
    assert report.examples == {"empty": ["p:1", "p:2", "p:3"], "same answers": ["p:4"], "duplicate": ["p:5"]}
    assert (report.total, report.kept) == (9, 4)


def test_media_make_a_prompt_and_tell_prompts_apart():
    video = {"prompt": "", "chosen": "a", "rejected": "b"}
    dataset = pairs(
        video | {"videos": ["1.mp4"]},
        video | {"videos": ["2.mp4"]},
        video | {"videos": [b"1"]},
        video | {"videos": [b"2"]},
        video | {"videos": ["1.mp4"]},
        video | {"images": ["1.mp4"]},
    )
    kept, report = apply_filters(dataset)
    assert kept["source"][:] == ["p:0", "p:1", "p:2", "p:3", "p:5"]
    assert report.dropped == {"empty": 0, "same answers": 0, "duplicate": 1}


def test_score_gap_keeps_the_bound_and_counts_missing_scores_apart():
    dataset = pairs(scored(6, 2), scored(6, 2.5, "c"), scored(None, 0, "d"), scored(9, None, "e"), scored(0, 9, "f"))
    kept, report = apply_filters(dataset, min_score_gap=4)
    assert kept["source"][:] == ["p:0"]
    assert report.dropped == {"empty": 0, "same answers": 0, "score missing": 2, "score gap": 2, "duplicate": 0}


def test_length_is_prompt_plus_longer_answer_in_the_unit_given():
    dataset = pairs(("xx", "aaa", "b"), ("xx", "b", "aaaa"), ("one two", "three", "four five"))
    kept, report = apply_filters(dataset, max_length=5)
    assert kept["source"][:] == ["p:0"]
    assert report.dropped["length"] == 2
    kept, _ = apply_filters(dataset, max_length=4, length=lambda text: len(text.split()))
    assert len(kept) == 3
    kept, _ = apply_filters(dataset, max_length=3, length=lambda text: len(text.split()))
    assert kept["source"][:] == ["p:0", "p:1"]


def test_a_pair_counts_once_and_a_dropped_pair_is_no_first_copy():
    dataset = pairs(scored(1, 0), scored(9, 0), scored(9, 0), scored(None, None, " "))
    kept, report = apply_filters(dataset, min_score_gap=4)
    assert kept["source"][:] == ["p:1"]
    assert report.dropped == {"empty": 1, "same answers": 0, "score missing": 0, "score gap": 1, "duplicate": 1}


def test_the_report_prints_as_a_table():
    _, report = apply_filters(pairs(*[("x", "a", "b")] * 6))
    assert str(report).splitlines() == [
        "pairs read           6",
        "empty                0",
        "same answers         0",
        "duplicate           -5  p:1, p:2, p:3, ...",
        "kept                 1",
    ]


def test_everything_dropped_gives_an_empty_dataset_with_the_columns():
    kept, report = apply_filters(pairs(("x", "", "b")))
    assert (len(kept), kept.features, report.kept) == (0, PAIR_FEATURES, 0)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"min_score_gap": 4}, "min_score_gap=4 needs scores"),
        ({"min_score_gap": float("nan")}, "min_score_gap must be a finite number or None, got nan"),
        ({"max_length": 0}, "max_length must be positive or None, got 0"),
    ],
)
def test_filter_arguments_out_of_range(arguments, words):
    dataset = pairs(("x", "a", "b")) if arguments.get("min_score_gap") == 4 else pairs(scored(9, 0))
    with pytest.raises(ValueError, match=words):
        apply_filters(dataset, **arguments)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(0, 12), min_size=2, max_size=40), st.floats(0.05, 0.95), st.integers(0, 3))
def test_split_is_a_partition_without_a_shared_prompt(prompts, fraction, seed):
    if len(set(prompts)) < 2:
        prompts = [*prompts, 13, 14]
    dataset = pairs(*((f"prompt {' ' * (i % 2)}{p}", str(i), "b") for i, p in enumerate(prompts)))
    train, held_out = split_pairs(dataset, fraction, seed)
    rows = [int(source[2:]) for part in (train, held_out) for source in part["source"]]
    assert sorted(rows) == list(range(len(prompts)))
    assert rows == [*sorted(rows[: len(train)]), *sorted(rows[len(train) :])]
    assert {prompts[row] for row in rows[: len(train)]}.isdisjoint(prompts[row] for row in rows[len(train) :])
    assert len(train)
    smallest = min(Counter(prompts).values())
    assert 1 <= len(held_out) <= max(smallest, 1, round(fraction * len(prompts)))


def test_split_fraction_seed_and_order_of_rows():
    records = [(f"prompt {i}", "a", "b") for i in range(100)]
    dataset = pairs(*records)
    train, held_out = split_pairs(dataset)
    assert (len(train), len(held_out)) == (80, 20)
    held_prompts = {row["prompt"][0]["content"] for row in held_out}
    assert held_out[:] == split_pairs(dataset, 0.2, 0)[1][:]
    assert held_prompts != {row["prompt"][0]["content"] for row in split_pairs(dataset, 0.2, 1)[1]}
    reversed_split = split_pairs(pairs(*records[::-1]))[1]
    assert held_prompts == {row["prompt"][0]["content"] for row in reversed_split}


def test_split_that_cannot_be_made():
    dataset = pairs(("x", "a", "b"), (" x ", "c", "d"))
    with pytest.raises(ValueError, match="2 pairs with 1 different prompts"):
        split_pairs(dataset)
    for fraction in (0, 1, -0.1, float("nan")):
        with pytest.raises(ValueError, match="eval_fraction must lie between 0 and 1"):
            split_pairs(dataset, fraction)
