"""caption_metrics against pycocoevalcap's values, recorded by tests.evaluate.record, and against closed forms."""

import json
import math
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from synpo.evaluate import caption_metrics
from synpo.evaluate.captions import measure
from synpo.evaluate.meteor import Found, Meteor, find
from synpo.evaluate.overlap import bleu, bleu_counts, cider, rouge_l
from synpo.evaluate.ptb import tokenize
from tests.evaluate.made_captions import make_set

RECORDED = json.loads((Path(__file__).parent / "recorded" / "metrics.json").read_text(encoding="utf-8"))
OWN = [text.split() for text in RECORDED["hypotheses"]]
REFERENCES = [[text.split() for text in texts] for texts in RECORDED["references"]]
TOLERANCE = 1e-9  # of the scale of a metric; the recorded values are exact to rounding


def test_recorded_set_has_what_matters() -> None:
    assert len(OWN) == 1000
    assert sum(not text for text in OWN) >= 5  # empty captions, or of marks alone
    assert sum(len(text) == 1 for text in OWN) >= 5
    assert sum(any(not mark.isascii() for mark in " ".join(text)) for text in OWN) >= 100
    assert sum(any(not mark.isalnum() for mark in "".join(text)) for text in OWN) >= 300
    assert any(not any(set(text) & set(other) for other in texts) for text, texts in zip(OWN, REFERENCES, strict=True))


def test_bleu_is_pycocoevalcaps() -> None:
    got = bleu(bleu_counts(OWN, REFERENCES).sum(0))
    expected = [RECORDED[f"BLEU-{n}"]["value"] for n in range(1, 5)]
    assert got.tolist() == pytest.approx(expected, abs=TOLERANCE)
    assert min(expected) > 0.1


@pytest.mark.parametrize(("name", "metric"), [("ROUGE-L", rouge_l), ("CIDEr", cider)])
def test_means_over_captions_are_pycocoevalcaps(name: str, metric: Any) -> None:
    got = metric(OWN, REFERENCES)
    assert got.tolist() == pytest.approx(RECORDED[name]["each"], abs=TOLERANCE)
    assert got.mean() == pytest.approx(RECORDED[name]["value"], abs=TOLERANCE)
    assert got.std() > 0.1


@pytest.mark.slow
@pytest.mark.skipif(find().missing is not None, reason=f"METEOR cannot run: {find().missing}")
def test_meteor_is_pycocoevalcaps() -> None:
    with Meteor() as program:
        whole, each = program.scores(OWN, REFERENCES)
    assert whole == pytest.approx(RECORDED["METEOR"]["value"], abs=TOLERANCE)
    assert each == pytest.approx(RECORDED["METEOR"]["each"], abs=TOLERANCE)


@pytest.mark.parametrize("answers", [0, 1])
def test_a_program_that_stops_is_said_to_have(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, answers: int) -> None:
    java = tmp_path / "java"
    java.write_text(f"#!/bin/sh\nfor i in $(seq {answers}); do read line; echo 1; done\nexit 3\n")
    java.chmod(0o755)
    monkeypatch.setattr("synpo.evaluate.meteor.find", lambda: Found(tmp_path / "meteor.jar", str(java), None))
    with Meteor() as program:
        if not answers:
            program._program.wait()  # what is written goes nowhere then
        with pytest.raises(RuntimeError, match="METEOR stopped with exit code 3; try its command: "):
            program.scores([["a"]] * 2, [[["a"]]] * 2)


def test_from_text_the_few_other_tokens_move_nothing_that_papers_print() -> None:
    hypotheses, references = make_set(len(OWN), seed=2)  # what was recorded; docs/evaluate.md states these numbers
    other = [tokenize(text) != tokens for text, tokens in zip(hypotheses.values(), OWN, strict=True)]
    texts = [tokenize(text) for some in references.values() for text in some]
    others = [text != tokens for text, tokens in zip(texts, chain(*REFERENCES), strict=True)]
    assert (sum(other), sum(others), len(others)) == (2, 5, 2943)
    for name, value in caption_metrics(hypotheses, references, meteor=False).items():
        assert value == pytest.approx(RECORDED[name]["value"], rel=3e-4), name


HYPOTHESES = {"a": "A dog runs over the grass.", "b": "Two people cook.", "c": ""}
TEXTS = {
    "a": ["A dog runs over the grass.", "The dog is running!"],
    "b": ["A man sings."],
    "c": ["A cat sleeps on a chair."],
}


def test_names_order_and_extremes() -> None:
    metrics = caption_metrics(HYPOTHESES, TEXTS, meteor=False)
    assert list(metrics) == ["BLEU-1", "BLEU-2", "BLEU-3", "BLEU-4", "ROUGE-L", "CIDEr"]
    found = measure(HYPOTHESES, TEXTS, meteor=False)
    assert found["ROUGE-L"].each.tolist() == [1, 0, 0]
    # the same words as one of two references: half of each cosine is 1
    assert 5 <= found["CIDEr"].each[0] <= 10
    assert found["CIDEr"].each[1:].tolist() == [0, 0]
    # 6 of the 9 words match; 9 words against references of 6 + 3 + 6
    assert metrics["BLEU-1"] == pytest.approx(6 / 9 * math.exp(1 - 15 / 9), rel=1e-6)


def test_a_set_of_exact_captions_scores_full_marks() -> None:
    metrics = caption_metrics({v: texts[0] for v, texts in TEXTS.items()}, {v: t[:1] for v, t in TEXTS.items()})
    assert [metrics[f"BLEU-{n}"] for n in (1, 2, 3)] == pytest.approx([1, 1, 1], abs=1e-6)
    assert metrics["ROUGE-L"] == 1
    # "A man sings" has no 4-gram, so one of its four cosines is 0
    assert metrics["CIDEr"] == pytest.approx(10 * (1 + 0.75 + 1) / 3)


def test_order_of_videos_does_not_count() -> None:
    backwards = dict(reversed(HYPOTHESES.items()))
    assert caption_metrics(backwards, TEXTS, meteor=False) == caption_metrics(HYPOTHESES, TEXTS, meteor=False)


def test_parts_of_the_whole_set_give_its_value() -> None:
    for name, metric in measure(HYPOTHESES, TEXTS, meteor=False).items():
        whole = metric.of_sums(metric.parts.sum(0), np.asarray(len(metric.parts)))
        assert float(whole) == pytest.approx(metric.value, abs=1e-12), name


@pytest.mark.parametrize(
    ("hypotheses", "references", "error", "message"),
    [
        ({}, {}, ValueError, "hypotheses is empty"),
        (
            {"a": "x", "b": "y"},
            {"a": ["x"]},
            ValueError,
            "references has nothing for 1 of the videos, the first is 'b'",
        ),
        ({"a": "x"}, {"a": ["x"], "b": ["y"]}, ValueError, "hypotheses has nothing for 1 .* 'b'"),
        ({"a": "x"}, {"a": []}, ValueError, r"references\['a'\] is empty"),
        ({"a": "x"}, {"a": "x"}, TypeError, r"references\['a'\] is a str; a list"),
        ({"a": "x"}, {"a": ["x", 3]}, TypeError, r"references\['a'\]\[1\] is a int; a string"),
        ({"a": None}, {"a": ["x"]}, TypeError, r"hypotheses\['a'\] is a NoneType"),
    ],
)
def test_bad_input_is_named(hypotheses: Any, references: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        caption_metrics(hypotheses, references)


def test_meteor_is_insisted_on_or_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.which", lambda name: None)
    assert "METEOR" not in caption_metrics(HYPOTHESES, TEXTS)
    with pytest.raises(RuntimeError, match="METEOR needs more than there is"):
        caption_metrics(HYPOTHESES, TEXTS, meteor=True)
