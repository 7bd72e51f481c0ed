"""The example pairs: reproducible, matched in length, faithful where they should be and wrong where they should be."""

import runpy
from pathlib import Path
from random import Random
from statistics import fmean

import pytest

from synpo import scenes
from synpo.pairs import apply_filters, load_pairs

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture(scope="module")
def pairs() -> list[dict]:
    return scenes.make_pairs()


def test_the_script_writes_the_committed_file_byte_for_byte(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", ["make_pairs.py", "--out", str(tmp_path / "pairs.jsonl")])
    runpy.run_path(str(EXAMPLES / "make_pairs.py"), run_name="__main__")
    made, committed = (tmp_path / "pairs.jsonl").read_bytes(), (EXAMPLES / "pairs.jsonl").read_bytes()
    assert made == committed
    assert len(committed) < 400_000


def test_another_seed_gives_other_pairs(pairs):
    assert not {pair["prompt"][0]["content"] for pair in scenes.make_pairs(20, seed=1)} & {
        pair["prompt"][0]["content"] for pair in pairs
    }


def test_all_pairs_are_read_and_pass_the_filters():
    pairs = load_pairs(EXAMPLES / "pairs.jsonl")
    kept, _ = apply_filters(pairs, min_score_gap=4)
    assert len(kept) == len(pairs) == 200


def test_pairs_are_distinct(pairs):
    for column in ("prompt", "chosen", "rejected"):
        assert len({pair[column][0]["content"] for pair in pairs}) == len(pairs)


@pytest.mark.parametrize("length", [len, lambda text: len(text.split())], ids=["characters", "words"])
def test_length_does_not_tell_the_answers_apart(pairs, length):
    chosen = [length(pair["chosen"][0]["content"]) for pair in pairs]
    rejected = [length(pair["rejected"][0]["content"]) for pair in pairs]
    assert abs(fmean(chosen) / fmean(rejected) - 1) < 0.03
    longer = fmean((c > r) + 0.5 * (c == r) for c, r in zip(chosen, rejected, strict=True))
    assert abs(longer - 0.5) < 4 * (0.25 / len(pairs)) ** 0.5  # four standard errors of a fair coin


def scene() -> scenes.Scene:
    return scenes.Scene(
        place="in a park",
        light="at noon",
        camera="zooms in",
        things=(scenes.Thing(1, "red", "dog", "left"), scenes.Thing(3, "blue", "kite", "back")),
        events=(
            scenes.Event("dog", "run", "near"),
            scenes.Event("kite", "spin", None),
            scenes.Event("dog", "turn", None),
        ),
    )


def test_log_of_a_scene():
    assert scenes.log(scene()).splitlines() == [
        "Scene log",
        "place: in a park at noon",
        "camera: zooms in",
        "objects: 1 red dog, left; 3 blue kites, back",
        "1. dog: run near",
        "2. kites: spin",
        "3. dog: turn",
        scenes.INSTRUCTION,
    ]


@pytest.mark.parametrize("seed", range(20))
def test_a_caption_tells_the_whole_scene_in_order(seed):
    text = scenes.caption(scene(), Random(seed))
    assert "in a park at noon" in text
    assert "one red dog" in text
    assert "three blue kites" in text
    assert any(f"the camera {phrase}" in text.lower() for phrase in ("zooms in", "moves closer"))
    places = [
        min(text.find(phrase) for phrase in phrases if phrase in text)
        for phrases in (
            ("dog runs", "dog dashes"),
            ("kites spin", "kites turn in circles"),
            ("dog turns around", "dog turns back"),
        )
    ]
    assert places == sorted(places)


def test_captions_vary():
    assert len({scenes.caption(scene(), Random(seed)) for seed in range(50)}) > 40


def differences(true: scenes.Scene, told: scenes.Scene) -> set[str]:
    """Kinds of errors, found by comparing the scenes without a look at how the errors were made."""
    found = {name for name in ("light", "camera") if getattr(true, name) != getattr(told, name)}
    known = {thing.noun: thing for thing in true.things}
    for thing in told.things:
        if thing.noun not in known:
            found.add("invented")
        else:
            found |= {f for f in ("count", "colour", "position") if getattr(thing, f) != getattr(known[thing.noun], f)}
    order = [(event.noun, event.action) for event in true.events]
    kept = [(event.noun, event.action) for event in told.events if event.noun in known]
    if [event for event in order if event in kept] != kept:
        found.add("order")
    if any(event.noun in known and event not in true.events for event in told.events):
        found.add("direction")
    return found


def test_each_error_that_is_reported_is_in_the_scene():
    seen: dict[str, int] = {}
    rng = Random(0)
    for _ in range(400):
        true = scenes.make_scene(rng)
        if len({(event.noun, event.action) for event in true.events}) < len(true.events):
            continue  # the same action twice: order and direction cannot be told apart by comparison
        told, names = scenes.hallucinate(true, rng)
        assert differences(true, told) == set(names)
        assert 2 <= len(names) <= scenes.MAX_ERRORS
        for name in names:
            seen[name] = seen.get(name, 0) + 1
    assert seen.keys() == scenes.ERRORS.keys()


def test_scores_follow_the_judges_scale():
    assert [scenes.score(errors) for errors in range(4)] == [13.5, 10.3, 7.1, 5.0]
