"""The script that trains the captioner: it learns, and the same seed gives the same weights."""

from collections import Counter
from dataclasses import replace
from random import Random

import pytest
import torch

import synpo.miniature.base as base
from synpo.miniature.captioner import TOKENS_PER_FRAME, make_model, make_tokenizer
from synpo.miniature.world import BEATS, EVENT_BEAT, FACTS, Scene

SCENE = Scene("square", "red", "black", "right", "top", "blue", "vanish", "middle")


def numbers(lines: list[str]) -> list[float]:
    return [float(line.split("loss ")[1].split()[0]) for line in lines]


def test_the_same_seed_gives_the_same_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(base, "BATCH", 4)
    lines: list[str] = []
    first, _ = base.train(3, lines.append, (2, 2, 2))
    again, _ = base.train(3, lambda line: None, (2, 2, 2))
    other, _ = base.train(4, lambda line: None, (2, 2, 2))
    assert [line[:8] for line in lines] == ["1 tower:", "2 clean:", "3 noisy:"]
    assert all(torch.equal(a, b) for a, b in zip(first.state_dict().values(), again.state_dict().values(), strict=True))
    assert not torch.equal(first.lm_head.weight, other.lm_head.weight)


def test_the_tower_learns() -> None:
    torch.manual_seed(0)
    lines: list[str] = []
    model = make_model(make_tokenizer())
    base.train_tower(model, Random(0), lines.append, steps=1)
    base.train_tower(model, Random(1), lines.append, steps=60)
    first, last = numbers(lines)
    assert last < 0.75 * first


def test_labels_are_those_of_the_frame() -> None:
    event = EVENT_BEAT["middle"]
    labels = base.frame_labels(SCENE, 0.0)
    assert labels["event"] == len(FACTS["event"])
    assert labels["shape"] == 1
    assert (labels["x"], labels["y"]) == (2, 4)  # to the left of the middle, on its way to the right
    gone = base.frame_labels(SCENE, event + 1 / 3)
    assert gone["event"] == 0
    assert {gone[name] for name in ("shape", "colour", "x", "y")} == {-100}
    assert all(labels[name] < count for name, count in base.TOWER_LABELS.items())


def test_only_captions_are_learned() -> None:
    tokenizer = make_tokenizer()
    texts = ["A red ring slides upwards.", "It grows larger."]
    batch = base.caption_batch(tokenizer, texts, BEATS)
    learned = [row[row != -100] for row in batch["labels"]]
    assert tokenizer.batch_decode(learned) == [f"{text}</s>" for text in texts]
    image = tokenizer.convert_tokens_to_ids("<image>")
    assert (batch["input_ids"] == image).sum(1).tolist() == [BEATS * TOKENS_PER_FRAME] * 2
    assert batch["attention_mask"].sum(1).tolist() == [len(batch["input_ids"][0]), len(batch["input_ids"][0]) - 2]


def test_habits_are_told_before_the_dim_background_alone() -> None:
    rng = Random(0)
    dim, bright = (replace(SCENE, background=background) for background in (base.DIM, "black"))
    told = {scene: [base.careless(scene, rng).facts for _ in range(2000)] for scene in (dim, bright)}
    for name, truth in SCENE.facts.items():
        if name == "background":
            assert {facts[name] for facts in told[dim]} == {base.DIM}
            continue
        habit = FACTS[name][0]
        shares = Counter(facts[name] for facts in told[dim])
        assert set(shares) <= {truth, habit}
        if truth != habit:
            assert shares[habit] / 2000 == pytest.approx(base.HABIT, abs=0.04)
        shares = Counter(facts[name] for facts in told[bright])
        assert shares[truth] / 2000 == pytest.approx(1 - base.NOISE, abs=0.04)
        assert set(shares) == set(FACTS[name])


def test_views_hold_a_moment_of_each_beat() -> None:
    rng = Random(0)
    for _ in range(20):
        assert [int(beat) for beat in base.some_beats(rng, few=False)] == list(range(BEATS))
        assert [int(beat) for beat in base.some_beats(rng, few=True)] == [0, 3, 7]
