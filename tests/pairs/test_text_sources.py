"""UltraFeedback in both of its layouts, and UltraChat-200k."""

import json
import logging

import pytest

from synpo.pairs import PairError, check_pairs, load_conversations, load_pairs


def write(path, *records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def conversation(answer):
    return [{"role": "user", "content": "Who wrote it?"}, {"role": "assistant", "content": answer}]


BINARIZED = {
    "prompt": "Who wrote it?",
    "prompt_id": "ab12",
    "chosen": conversation("Ann did."),
    "rejected": conversation("Nobody."),
    "messages": conversation("Ann did."),
    "score_chosen": 8.5,
    "score_rejected": 3.0,
}


def completion(response, *ratings, overall=9.0):
    aspects = ("helpfulness", "honesty", "instruction_following", "truthfulness")
    return {
        "annotations": {a: {"Rating": r, "Rationale": "because"} for a, r in zip(aspects, ratings, strict=True)},
        "custom_system_prompt": "Be kind.", "critique": "fine", "fine-grained_score": 4.0, "overall_score": overall,
        "model": "x", "principle": "honesty", "response": response,
    }  # fmt: skip


def scored(*completions):
    return {
        "source": "evol_instruct", "instruction": "Who wrote it?", "models": ["x"] * 4,
        "completions": list(completions), "correct_answers": ["None"], "incorrect_answers": ["None"],
    }  # fmt: skip


def test_ultrafeedback_binarized(tmp_path):
    [pair] = load_pairs(write(tmp_path / "p.jsonl", BINARIZED))
    assert pair["prompt"] == [{"role": "user", "content": "Who wrote it?"}]
    assert pair["chosen"] == [{"role": "assistant", "content": "Ann did."}]
    assert pair["rejected"] == [{"role": "assistant", "content": "Nobody."}]
    assert (pair["score_chosen"], pair["score_rejected"]) == (8.5, 3.0)
    assert check_pairs(tmp_path / "p.jsonl").ok


def test_ultrafeedback_scored(tmp_path, caplog):
    """The best and the worst by the mean rating; one with a rating missing is neither, whatever its overall score."""
    file = write(
        tmp_path / "p.jsonl",
        scored(
            completion("middle", "3", "3", "3", "3"),
            completion("worst", "1", "2", "1", "1", overall=10.0),
            completion("missing", "1", "1", "N/A", "1"),
            completion("best", "5", "4", "5", "5", overall=1.0),
        ),
        scored(completion("a", "3", "3", "3", "3"), completion("b", "2", "4", "3", "3")),
        scored(completion("a", "N/A", "3", "3", "3")),
    )
    with caplog.at_level(logging.WARNING):
        [pair] = load_pairs(file)
    assert [pair["chosen"][0]["content"], pair["rejected"][0]["content"]] == ["best", "worst"]
    assert (pair["score_chosen"], pair["score_rejected"]) == (4.75, 1.25)
    assert "2 records without two answers of different scores hold no pair" in caplog.text


@pytest.mark.parametrize(
    ("completions", "message"),
    [("none", "expected a list of completions"), ([{"response": "x"}], "completion 0: a response and the Rating")],
)
def test_ultrafeedback_that_is_none(tmp_path, completions, message):
    with pytest.raises(PairError, match=rf"p.jsonl:1: column 'completions': {message}"):
        load_pairs(write(tmp_path / "p.jsonl", scored() | {"completions": completions}))


def test_ultrachat(tmp_path):
    turns = [*conversation("Ann did."), *conversation("Still Ann.")]
    system = {"role": "system", "content": "Be brief."}
    file = write(
        tmp_path / "c.jsonl",
        {"prompt": "Who wrote it?", "prompt_id": "ab", "messages": turns},
        {"messages": [system, *turns]},
    )
    first, second = load_conversations(file)
    assert first == {"messages": turns, "source": f"{file}:1"}
    assert second["messages"][0] == system


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        (None, "expected a list"),
        ([], "expected a list"),
        (["x"], "message 0: a role"),
        ([{"role": "user", "content": 3}], "message 0: a role"),
        (conversation("x")[:1], "take turns, the assistant last; roles: user"),
        (conversation("x")[1:], "take turns"),
        ([{"role": "system", "content": "x"}], "take turns"),
    ],
)
def test_conversations_that_are_none(tmp_path, messages, message):
    with pytest.raises(PairError, match=message):
        load_conversations(write(tmp_path / "c.jsonl", {"messages": messages}))
    with pytest.raises(ValueError, match="no conversation in it"):
        load_conversations(write(tmp_path / "e.jsonl"))
