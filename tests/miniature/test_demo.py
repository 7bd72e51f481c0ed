"""What the demo checks before it says that all went well."""

import pytest

from synpo.miniature.demo import Captions, check


def captions(right: float, grammatical: float = 1.0) -> Captions:
    return Captions([right] * 50, grammatical, 2.5, 0.9, 26.0)


def logps(moved: float = 0.0) -> list[dict[str, list[float]]]:
    rejected = [-0.7] * 9
    return [
        {"logps/chosen": [-0.5] * 9, "logps/rejected": rejected},
        {"logps/chosen": [-0.5 + moved] * 9, "logps/rejected": rejected},
    ]


BEFORE = {"greedy": captions(0.88), "sampled": captions(0.63)}


def test_nothing_to_complain_about() -> None:
    assert check(BEFORE, {"greedy": captions(0.88), "sampled": captions(0.80)}, logps(0.05)) == []


@pytest.mark.parametrize(
    ("greedy", "sampled", "moved", "problem"),
    [
        (captions(0.9), captions(0.7), 0.0, "sampled captions gained +0.070 of the facts"),
        (captions(0.9), captions(0.8, 0.7), 0.0, "0.700 of the captions are grammatical"),
        (captions(0.8), captions(0.8), 0.0, "greedy captions lost facts: -0.080"),
        (captions(0.9), captions(0.8), -0.2, "log-prob of the chosen captions moved by -0.200"),
    ],
)
def test_each_promise_is_checked(greedy: Captions, sampled: Captions, moved: float, problem: str) -> None:
    (found,) = check(BEFORE, {"greedy": greedy, "sampled": sampled}, logps(moved))
    assert problem in found
