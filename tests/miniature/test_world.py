"""Scenes, their frames and films: facts can be seen, and the same seed gives the same."""

from collections import Counter
from pathlib import Path
from random import Random

import numpy as np
import pytest

from synpo.miniature.films import TRUTH_FILE, all_frames, make_films, references, truth_of
from synpo.miniature.grammar import read
from synpo.miniature.world import BEATS, EVENT_BEAT, FACTS, SIZE, Scene, hallucinate, make_scene, render
from synpo.video import FramePolicy, contrast_subset, decode

SCENE = Scene("square", "red", "black", "right", "top", "blue", "vanish", "middle")


def variants(fact: str) -> list[Scene]:
    return [Scene(**{**SCENE.facts, fact: value}) for value in FACTS[fact]]


@pytest.mark.parametrize("fact", FACTS)
def test_every_fact_can_be_seen(fact: str) -> None:
    films = render(variants(fact), range(BEATS)).astype(int)
    for index, film in enumerate(films):
        for other in films[:index]:
            # of the frames that differ, one differs in at least 20 pixels by more than compression changes
            assert (abs(film - other).max(-1) > 60).sum((1, 2)).max() >= 20


def test_a_third_of_the_frames_does_not_show_the_event() -> None:
    kept = contrast_subset(BEATS)
    assert len(kept) == 3
    for time in FACTS["time"]:
        assert EVENT_BEAT[time] not in kept
        films = render([Scene(**{**SCENE.facts, "time": time, "event": event}) for event in FACTS["event"]], kept)
        assert all(np.array_equal(film, films[0]) for film in films)
    whole = render(variants("event"), range(BEATS))
    assert not any(np.array_equal(film, whole[0]) for film in whole[1:])


def test_directions_are_what_they_say() -> None:
    for scene, (axis, sign) in zip(variants("direction"), [(1, -1), (1, 1), (0, -1), (0, 1)], strict=True):
        film = render([scene], [0, BEATS - 1])[0].astype(int)
        red = (film[..., 0] > 150) & (film[..., 2] < 100)
        centres = [np.argwhere(frame).mean(0)[axis] for frame in red]
        assert sign * (centres[1] - centres[0]) > 0.8 * scene.travel


def test_a_frame_is_the_same_in_any_batch() -> None:
    rng = Random(3)
    scenes = [make_scene(rng) for _ in range(9)]
    batch = render(scenes, [0.0, 1.5, 6.9])
    for index, scene in enumerate(scenes):
        assert np.array_equal(render([scene], [6.9, 0.0])[0], batch[index][[2, 0]])


def test_scenes_are_uniform_and_stripes_stand_out() -> None:
    rng = Random(0)
    scenes = [make_scene(rng) for _ in range(3000)]
    for name, values in FACTS.items():
        counts = Counter(scene.facts[name] for scene in scenes)
        assert counts.keys() == set(values)
        assert min(counts.values()) > 0.8 * 3000 / len(values)
    assert all(scene.colour != scene.stripe for scene in scenes)


def test_hallucination_has_its_rate() -> None:
    rng = Random(1)
    wrong = 0
    for _ in range(1000):
        scene = make_scene(rng)
        told = hallucinate(scene, 0.3, rng)
        wrong += sum(told.facts[name] != scene.facts[name] for name in FACTS)
        assert (told.radius, told.travel, told.offset) == (scene.radius, scene.travel, scene.offset)
    assert wrong / 8000 == pytest.approx(0.3, abs=0.02)
    assert hallucinate(SCENE, 0.0, rng) == SCENE


def test_films_are_real_and_show_the_scene(tmp_path: Path) -> None:
    scenes = make_films(tmp_path, 3, seed=5)
    for name, scene in scenes.items():
        film = decode(str(tmp_path / f"{name}.mp4"), FramePolicy(fps=0.5)).whole
        assert film.frames.shape == (BEATS, SIZE, SIZE, 3)
        # the view that commands take by default has a frame of each beat
        shown = [int(time * 8 / 3 + 1e-6) for time in film.times]
        assert shown == list(range(BEATS))
        drawn = all_frames(scene)[[round(time * 8) for time in film.times]]
        # what is lost is colour at edges, which H.264 keeps at half the resolution
        assert abs(film.frames.astype(int) - drawn.astype(int)).mean() < 6
        assert abs(film.frames.astype(int) - drawn.astype(int)[::-1]).mean() > 10
        assert truth_of(str(tmp_path / f"{name}.mp4#t=0,3")) == scene.facts


def test_the_same_seed_gives_the_same_files(tmp_path: Path) -> None:
    first = make_films(tmp_path / "a", 2, seed=7)
    second = make_films(tmp_path / "b", 2, seed=7)
    assert first == second
    for name in first:
        film = (tmp_path / "a" / f"{name}.mp4").read_bytes()
        assert film == (tmp_path / "b" / f"{name}.mp4").read_bytes()
    assert make_films(tmp_path / "c", 2, seed=8) != first


def test_films_that_are_there_are_kept_and_others_replaced(tmp_path: Path) -> None:
    make_films(tmp_path, 2, seed=7)
    film = tmp_path / "film00001.mp4"
    film.write_bytes(b"kept")
    make_films(tmp_path, 2, seed=7)
    assert film.read_bytes() == b"kept"
    make_films(tmp_path, 2, seed=8)
    assert film.read_bytes() != b"kept"


def test_unknown_films_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        truth_of(str(tmp_path / "film.mp4"))
    (tmp_path / TRUTH_FILE).write_text('{"film": {"shape": "ring"}}')
    with pytest.raises(ValueError, match=r"film 'film' has the facts \['shape'\]"):
        truth_of(str(tmp_path / "film.mp4"))


def test_references_tell_the_truth_in_several_ways() -> None:
    rng = Random(2)
    scenes = {str(number): make_scene(rng) for number in range(20)}
    told = references(scenes, seed=1, count=5)
    for name, texts in told.items():
        assert all(read(text).facts == scenes[name].facts for text in texts)
        assert len(set(texts)) >= 4
    assert told == references(scenes, seed=1, count=5)
