"""Judged scores: means over valid answers, failures counted, from functions and from a server's recorded answers."""

import asyncio
import json
import re
from collections.abc import Coroutine
from pathlib import Path
from typing import Any, TypeVar

import pytest

from synpo.cli import main
from synpo.evaluate.files import Quiz
from synpo.evaluate.judged import answers_of, compared, detail_score, quiz_score, summarise
from synpo.judge import AnswerCache, ChatClient, ModelJudge, OracleJudge, Question
from tests.judge.loopback import FENCED, Reply, completion, serving

T = TypeVar("T")
HYPOTHESES = {"a": "one two three", "b": "one", "c": "one two"}
REFERENCES = {"a": ["one two three four"], "b": ["one"], "c": ["five"]}


def run(work: Coroutine[Any, Any, T]) -> T:
    return asyncio.run(work)


def words(question: Question) -> list[int | None]:
    """A judge that counts words, up to its scale."""
    return [min(len(text.split()), question.criterion.high) for text in question.captions]


def test_detail_is_the_mean_of_what_the_judge_gives() -> None:
    seen = []

    def oracle(question: Question) -> list[int | None]:
        seen.append((question.video, question.references, question.criterion.name))
        return words(question)

    score = run(detail_score(OracleJudge(oracle), HYPOTHESES, REFERENCES))
    assert (score.mean, score.valid, score.failed) == (2.0, 3, 0)
    assert score.each == {("a", 0): 3, ("b", 0): 1, ("c", 0): 2}
    assert seen == [(video, tuple(REFERENCES[video]), "detail") for video in HYPOTHESES]


def test_a_failing_judge_moves_no_mean() -> None:
    def failing(question: Question) -> list[int | None]:
        return [None] if question.video == "a" else words(question)

    score = run(detail_score(OracleJudge(failing), HYPOTHESES, REFERENCES))
    assert (score.mean, score.valid, score.failed) == (1.5, 2, 1)  # a zero for "a" would make it 1
    assert str(score) == "1.500 (2 valid, 1 failed)"
    nothing = run(detail_score(OracleJudge(lambda question: [None]), HYPOTHESES, REFERENCES))
    assert (nothing.mean, nothing.failed) == (None, 3)
    assert str(nothing) == "no valid score (0 valid, 3 failed)"


QUIZZES = [
    Quiz("a", "How many?", "three", "number"),
    Quiz("b", "How many?", "one", "number"),
    Quiz("a", "Which first?", "one", "order"),
    Quiz("c", "Which first?", "one", "order"),
]


async def last_word(caption: str, question: str) -> str | None:
    """Answers with a word of the caption; knows nothing of "one two"."""
    if caption == "one two":
        return None
    return caption.split()[-1 if question == "How many?" else 0]


def same(question: Question) -> list[int | None]:
    return [question.criterion.high if text == question.references[0] else 0 for text in question.captions]


def test_quiz_is_scored_by_aspect_and_in_all() -> None:
    scores = run(quiz_score(OracleJudge(same), last_word, HYPOTHESES, QUIZZES))
    assert list(scores) == ["number", "order", "all"]
    assert scores["number"].accuracy.mean == 1
    order = scores["order"]
    assert (order.accuracy.mean, order.accuracy.valid, order.accuracy.failed) == (1, 1, 1)
    assert (scores["all"].closeness.mean, scores["all"].closeness.failed) == (5, 1)
    assert scores["all"].accuracy.each == {("a", 0): 1, ("b", 1): 1, ("a", 2): 1, ("c", 3): None}


def test_a_wrong_answer_is_wrong_and_an_unjudged_one_is_missing() -> None:
    def half(question: Question) -> list[int | None]:
        return same(question) if question.criterion.name == "correct" else [None]

    scores = run(quiz_score(OracleJudge(half), last_word, {"a": "nine"}, QUIZZES[:1]))
    assert scores["number"].accuracy.mean == 0
    assert (scores["number"].closeness.mean, scores["number"].closeness.failed) == (None, 1)


def test_a_comparison_is_of_what_both_have_a_score_for() -> None:
    before = summarise({("a", 0): 1.0, ("b", 0): 5.0, ("c", 0): None})
    after = summarise({("a", 0): 2.0, ("b", 0): None, ("c", 0): 5.0})
    assert compared(before, after) == (1, (1.0, 1.0, 1.0))
    assert compared(before, summarise(dict.fromkeys(before.each))) == (0, None)


def test_videos_are_drawn_not_questions() -> None:
    # 40 questions about each of 6 videos, all answers about one video alike: there are 6 observations, not 240
    changes = (0.0, 0.0, 0.0, 1.0, 1.0, 1.0)
    items = [(f"v{video}", number) for video in range(6) for number in range(40)]
    before = summarise(dict.fromkeys(items, 0.0))
    after = summarise({item: changes[int(item[0][1:])] for item in items})
    count, change = compared(before, after)
    assert count == 240
    assert change.mean == 0.5
    # of 6 draws, binomial with p 1/2: 0 or 6 come in 1.6 % each, 1 or 5 in 9.4 %
    assert (change.low, change.high) == pytest.approx((1 / 6, 5 / 6))


def test_a_video_with_more_questions_weighs_more() -> None:
    items = [("a", 0), ("b", 1), ("b", 2), ("b", 3)]
    before = summarise(dict.fromkeys(items, 0.0))
    after = summarise({item: float(item[0] == "b") for item in items})
    assert compared(before, after)[1].mean == after.mean == 0.75


def test_what_is_missing_is_named() -> None:
    judge = OracleJudge(words)
    with pytest.raises(ValueError, match="references has nothing for 1 of the videos, the first is 'c'"):
        run(detail_score(judge, HYPOTHESES, {**REFERENCES, "c": []}))
    with pytest.raises(ValueError, match="no caption for 1 questions; the first is about 'z'"):
        run(quiz_score(judge, last_word, HYPOTHESES, [Quiz("z", "?", "!")]))
    with pytest.raises(ValueError, match="the score of 'a' is nan"):
        summarise({("a", 0): float("nan")})


def reply(request: dict[str, Any], headers: dict[str, str]) -> Reply:
    """A server: answers questions with the caption's first word, refuses those about "one", and judges by `same`."""
    prompt = request["messages"][-1]["content"]
    if found := re.search(r"-----\n(.*)\n-----", prompt):
        if found[1] == "one":
            return completion(None, refusal="I cannot help with that")
        return completion(found[1].split()[0])
    fenced = FENCED.findall(prompt)
    right = next(text for kind, _, text in fenced if kind == "reference")
    high = 1 if "1: right." in prompt else 5
    scores = [{"id": name, "score": high * (text == right)} for kind, name, text in fenced if kind == "caption"]
    return completion(json.dumps({"reason": "", "scores": scores}))


def test_a_server_and_its_recorded_answers_give_the_same_scores(tmp_path: Path) -> None:
    quizzes = [Quiz("a", "Which first?", "one"), Quiz("b", "Which first?", "one"), Quiz("c", "Which first?", "two")]
    recorded = tmp_path / "answers.jsonl"

    async def score(cache: AnswerCache, **how: Any) -> Any:
        client = ChatClient("loopback", cache, **how)
        judge = ModelJudge(client)
        try:
            quiz = await quiz_score(judge, answers_of(client), HYPOTHESES, quizzes)
            detail = await detail_score(judge, HYPOTHESES, REFERENCES)
            if not how.get("offline"):
                cache.export(recorded)
            return quiz, detail
        finally:
            await judge.close()

    with serving(reply) as server:
        live = run(score(AnswerCache(tmp_path / "judge.sqlite"), url=server.url))
    assert live[0]["all"].accuracy.each == {("a", 0): 1, ("b", 1): None, ("c", 2): 0}
    assert live[0]["all"].closeness.mean == 2.5
    assert live[1].each == {("a", 0): 0, ("b", 0): 5, ("c", 0): 0}
    assert run(score(AnswerCache.recorded(recorded), offline=True)) == live

    # one recorded answer spoilt: its score is missing, the others' mean stands
    lines = recorded.read_text().splitlines()
    spoilt = [
        line.replace("scores", "points") if '\\"score\\": 5' in line and "detail" in line else line for line in lines
    ]
    recorded.write_text("\n".join(spoilt) + "\n")
    detail = run(score(AnswerCache.recorded(recorded), offline=True))[1]
    assert (detail.mean, detail.each) == (0, {("a", 0): 0, ("b", 0): None, ("c", 0): 0})


def test_the_command_judges_two_files_keeps_the_answers_and_compares_what_both_have(tmp_path: Path) -> None:
    files = {
        "before": HYPOTHESES,
        "after": {"a": "one two three four", "b": "one", "c": "five"},
        "references": REFERENCES,
        "quiz": {v: [{"question": "Which first?", "answer": REFERENCES[v][0].split()[0]}] for v in HYPOTHESES},
    }
    for name, content in files.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    before, after, references, quiz = (str(tmp_path / f"{name}.json") for name in files)
    out = tmp_path / "out.json"
    words = [
        "evaluate", before, after, "--references", references, "--quiz", quiz, "--detail", "--meteor", "off",
        "--judge", "loopback", "--judge_cache", str(tmp_path / "judge.sqlite"), "--out", str(out),
    ]  # fmt: skip
    with serving(reply) as server:
        assert main([*words, "--judge_url", server.url]) == 0
        first, asked = json.loads(out.read_text()), server.count
        assert main([*words, "--judge_url", server.url]) == 0
        # all but the refusal, which is asked for again, lies in the cache
        assert server.count - asked <= 1
    assert json.loads(out.read_text()) == first
    detail = first["metrics"]["detail (VDD)"]
    assert (detail["values"], detail["valid"], detail["failed"]) == ([5 / 3, 5.0], [3, 3], [0, 0])
    assert (detail["compared"], detail["change"]["mean"]) == (3, pytest.approx(10 / 3))
    accuracy = first["metrics"]["VDC accuracy, all"]
    # the answer about "b" is refused in both: a missing score, not a wrong answer
    assert (accuracy["values"], accuracy["failed"], accuracy["compared"]) == ([0.5, 1.0], [1, 1], 2)
    assert accuracy["change"]["mean"] == 0.5


def test_every_video_has_questions_or_is_left_out_and_counted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, content in (("captions", HYPOTHESES), ("references", REFERENCES)):
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    (tmp_path / "quiz.json").write_text(json.dumps({"a": [{"question": "Which first?", "answer": "one"}]}))
    captions, references, quiz = (str(tmp_path / f"{name}.json") for name in ("captions", "references", "quiz"))
    words = [
        "evaluate", captions, "--references", references, "--quiz", quiz, "--meteor", "off", "--judge", "loopback",
        "--judge_cache", str(tmp_path / "judge.sqlite"), "--out", str(tmp_path / "out.json"),
    ]  # fmt: skip
    with serving(reply) as server:
        assert main([*words, "--judge_url", server.url]) == 2
        assert "2 videos are without questions, the first is 'b'" in capsys.readouterr().err
        assert server.count == 0  # nothing was paid for before
        assert main([*words, "--judge_url", server.url, "--partial"]) == 0
    result = json.loads((tmp_path / "out.json").read_text())
    assert (result["videos"], result["left_out"]) == (1, {"questions": 2})
