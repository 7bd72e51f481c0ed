"""The judge that knows the truth, in process and behind a server, through synpo.judge's own doors."""

import asyncio
import json
import urllib.error
import urllib.request
from pathlib import Path
from random import Random
from typing import Any

import pytest

from synpo.judge import CONSISTENCY, FACTUALITY, AnswerCache, ChatClient, ModelJudge, OracleJudge, judge_candidates
from synpo.miniature.films import make_films
from synpo.miniature.grammar import tell
from synpo.miniature.oracle import accuracy, consistency, factuality, fluency, rate
from synpo.miniature.server import reply, serving
from synpo.miniature.world import FACTS, Scene, hallucinate

SCENE = Scene("square", "red", "black", "right", "top", "blue", "vanish", "middle")
RNG = Random(0)
TRUE = tell(SCENE.facts, RNG)


def wrong(count: int) -> str:
    """A caption with so many facts wrong."""
    facts = dict(SCENE.facts)
    for name in list(FACTS)[:count]:
        facts[name] = next(value for value in FACTS[name] if value != facts[name])
    return tell(facts, RNG)


def test_factuality_falls_with_each_wrong_fact() -> None:
    assert [factuality(wrong(count), SCENE.facts) for count in range(9)] == [5, 4, 3, 2, 1, 0, 0, 0, 0]
    assert [accuracy(wrong(count), SCENE.facts) for count in (0, 2, 8)] == [1, 0.75, 0]


def test_what_is_left_out_is_no_error_but_no_gain() -> None:
    motion = next(part for part in TRUE.split(". ") if "background" in part).rstrip(".") + "."
    assert factuality(motion, SCENE.facts) == 2  # four of eight facts
    assert factuality("", SCENE.facts) == 0
    assert accuracy(motion, SCENE.facts) == 0.5


def test_fluency_is_about_language_alone() -> None:
    assert fluency(TRUE) == fluency(wrong(8)) == 5
    sentences = TRUE.split(". ")
    assert fluency(". ".join(sentences[:2]) + ".") == 3
    assert fluency(TRUE + " " + TRUE) == 2  # half of the sentences say nothing new
    assert fluency(TRUE.replace("stripe", "strip")) == 3
    assert fluency("Nothing of the kind.") == fluency("") == 0


def test_consistency_is_with_most_of_them() -> None:
    true = [TRUE] * 6
    assert consistency([*true, wrong(1), wrong(2), wrong(3), wrong(5), wrong(8)]) == [*[3] * 6, 2, 2, 1, 0, 0]
    # the same invention in most of them is what they agree on
    assert consistency([wrong(2), wrong(2), TRUE]) == [3, 3, 2]
    assert consistency([TRUE, ""]) == [3, 0]


def test_another_criterion_is_refused() -> None:
    with pytest.raises(ValueError, match="criterion 'detail' is not known"):
        rate("detail", [TRUE], SCENE.facts)


def candidates(scene: Scene) -> list[str]:
    """With a majority for each fact: between values told as often their order decides, and votes change it."""
    rng = Random(4)
    texts = [tell(hallucinate(scene, rate, rng).facts, rng) for rate in (0, 0, 0.2, 0.5, 0.8)]
    return [*texts, texts[0][:-30]]


def test_the_function_is_found_by_its_name_and_knows_films(tmp_path: Path) -> None:
    scenes = make_films(tmp_path, 2, seed=3)
    judge = OracleJudge.named("synpo.miniature.oracle:judge")
    for name, scene in scenes.items():
        texts = candidates(scene)
        film = str(tmp_path / f"{name}.mp4")
        given = asyncio.run(judge_candidates(judge, "Describe.", texts, ["nothing to go by"], film)).scores
        assert [s.factuality for s in given] == [factuality(text, scene.facts) for text in texts]
        assert [s.fluency for s in given] == [fluency(text) for text in texts]
        assert [s.consistency for s in given] == consistency(texts)
        assert given[0].factuality == 5


@pytest.mark.parametrize(("layout", "votes"), [("captions-first", 1), ("references-first", 3)])
def test_the_server_judges_as_the_function_does(layout: str, votes: int) -> None:
    texts = candidates(SCENE)
    references = [tell(SCENE.facts, RNG), tell(SCENE.facts, RNG), wrong(1)]

    async def ask(url: str) -> Any:
        client = ChatClient("oracle", AnswerCache(None), url=url)
        judge = ModelJudge(client, layout=layout, votes=votes)
        try:
            return await judge_candidates(judge, "Describe.", texts, references)
        finally:
            await judge.close()

    with serving() as url:
        assert url.startswith("http://127.0.0.1:")
        given = asyncio.run(ask(url)).scores
    assert [s.factuality for s in given] == [factuality(text, SCENE.facts) for text in texts]
    assert [s.fluency for s in given] == [fluency(text) for text in texts]
    assert [s.consistency for s in given] == consistency(texts)


@pytest.mark.parametrize("messages", [[], [{"role": "user", "content": "Hello?"}], [{"role": "user", "content": 3}]])
def test_other_questions_have_no_answer(messages: Any) -> None:
    with pytest.raises(ValueError, match=r"no question of synpo\.judge"):
        reply(messages)


def test_references_that_tell_too_little_are_refused() -> None:
    with pytest.raises(ValueError, match=r"the references tell nothing about \['background'"):
        reply([{"role": "user", "content": FACTUALITY.rubric + "\n\n<<< caption c1\nx\n>>> caption c1\n"}])
    assert json.loads(reply([{"role": "user", "content": CONSISTENCY.rubric}]))["scores"] == []


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"null", b'{"messages": 1}', b'{"messages": [1]}'])
def test_bad_requests_are_answered_with_400(body: bytes) -> None:
    with serving() as url:
        request = urllib.request.Request(f"{url}/chat/completions", data=body)
        with pytest.raises(urllib.error.HTTPError) as caught:
            urllib.request.urlopen(request, timeout=10)
        assert caught.value.code == 400
        assert "error" in json.loads(caught.value.read())
        caught.value.close()
