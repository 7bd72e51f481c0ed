"""`synpo demo`: what it checks before it says that all went well, how objectives are compared, and a run in small."""

import csv
import math
from pathlib import Path

import pytest

from synpo import cli
from synpo.miniature import comparison, demo
from synpo.miniature.stages import Outcome, Told


def told(facts: float, grammatical: float = 1.0, words: float = 26.0) -> Told:
    return Told([facts] * 50, [grammatical] * 50, [words] * 50)


def outcome(greedy: Told, sampled: Told, moved: float = 0.0) -> Outcome:
    captions = {"greedy": (told(0.88), greedy), "sampled": (told(0.63), sampled)}
    return Outcome(captions, ([-0.5] * 9, [-0.5 + moved] * 9), ([-0.7] * 9, [-1.0] * 9))


def test_nothing_to_complain_about() -> None:
    assert demo.check(outcome(told(0.88), told(0.80), 0.05)) == []


@pytest.mark.parametrize(
    ("greedy", "sampled", "moved", "problem"),
    [
        (told(0.9), told(0.7), 0.0, "sampled captions gained +0.070 of the facts"),
        (told(0.9), told(0.8, 0.7), 0.0, "0.700 of the captions are grammatical"),
        (told(0.9, 0.7), told(0.8), 0.0, "0.700 of the captions are grammatical"),
        (told(0.8), told(0.8), 0.0, "greedy captions lost facts: -0.080"),
        (told(0.9), told(0.8), -0.2, "log-prob of the chosen captions moved by -0.200"),
        (told(0.9), told(0.8), 0.2, "log-prob of the chosen captions moved by +0.200"),
    ],
)
def test_each_promise_is_checked(greedy: Told, sampled: Told, moved: float, problem: str) -> None:
    (found,) = demo.check(outcome(greedy, sampled, moved))
    assert problem in found


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--films", "3"], "films is 3"),
        (["--steps", "0"], "steps is 0"),
        (["--objectives", "dpo", "sympo"], "objectives: 'sympo' is not known; known: synpo, dpo, "),
        (["--rates", "0"], "a rate is 0.0"),
        (["--rates", "1e-3", "1e-3"], "rates is [0.001, 0.001]; one or more are needed, each once"),
    ],
)
def test_options_are_checked(flags: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["demo", *flags]) == 2
    assert message in capsys.readouterr().err


def test_seeds_are_pooled_film_by_film() -> None:
    one, other = outcome(told(0.9), told(0.7)), outcome(told(0.7), told(0.9))
    row = comparison.summary("dpo", 1e-3, [one, other])
    assert row.before["greedy"] == pytest.approx(0.88)
    assert row.after["greedy"] == pytest.approx(0.8)
    assert row.change["greedy"].mean == pytest.approx(-0.08)
    # 100 films, half of which changed by +.02 and half by -.18: a standard error of .01
    assert row.change["greedy"].high - row.change["greedy"].low == pytest.approx(2 * 1.96 * 0.01, rel=0.1)
    lines = comparison.table([row]).splitlines()
    assert len({line.count("|") for line in lines}) == 1
    assert lines[3].startswith("| dpo | 0.001 | 0.800 [-0.1")


@pytest.mark.slow
def test_the_whole_way_in_small(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Both forms of the command, twice: the numbers stay, and what is done is not done again."""
    sizes = ["--films", "24", "--test_films", "10", "--steps", "2"]
    assert cli.main(["demo", "--out", str(tmp_path / "demo"), *sizes]) == 1  # two steps change little
    first = capsys.readouterr().out
    assert "NOT as it should be: sampled captions gained" in first
    page = (tmp_path / "demo" / "report.html").read_text(encoding="utf-8")
    assert page.count('<img src="data:image/jpeg;base64,') == 6
    for part in ("facts right", "CIDEr", "greedy, 10 videos", "rewards/chosen", "learning_rate", "transformers"):
        assert part in page

    grid = ["--compare", "--objectives", "synpo", "dpo", "--rates", "1e-3", "--seeds", "0"]
    flags = ["demo", "--out", str(tmp_path / "compare"), *sizes, *grid]
    assert cli.main(flags) == 0
    files = {file.name: file.read_bytes() for file in (tmp_path / "compare").glob("comparison.*")}
    assert set(files) == {"comparison.md", "comparison.csv", "comparison.png"}
    rows = list(csv.DictReader(files["comparison.csv"].decode().splitlines()))
    assert [(row["objective"], row["seed"]) for row in rows] == [("synpo", "0"), ("dpo", "0")]
    assert all(math.isfinite(float(row["chosen_after"])) for row in rows)
    # the demo's own run has the same seed, so the same numbers
    facts = next(line.split() for line in first.splitlines() if line.startswith("facts right, sampled"))
    assert float(facts[4]) == pytest.approx(float(rows[0]["sampled_after"]), abs=6e-4)
    capsys.readouterr()
    assert cli.main(flags) == 0
    assert "$ synpo train" not in capsys.readouterr().out
    assert (tmp_path / "compare" / "comparison.csv").read_bytes() == files["comparison.csv"]
