"""`synpo demo --compare`: objectives under the same budget, each at the same rates, on the same pairs and films.

A seed has films, pairs and captions of its own. Changes are taken over the test films of all seeds, each film with its
captions before and after, and their 95 % intervals from a bootstrap over these films.
"""

import csv
import io
import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from ..evaluate import Change, paired_bootstrap
from ..run_files import read_json_lines, write_atomically
from .stages import Outcome, World, call, mean, prepare, read_outcome, train

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#555555", "#7A5195")
# column: how the table and the figure call it
MEASURES = {
    "greedy": "facts right, greedy",
    "sampled": "facts right, sampled",
    "grammatical": "grammatical, sampled",
    "words": "words, greedy",
    "chosen": "log-prob, chosen",
    "rejected": "log-prob, rejected",
}


class Row(NamedTuple):
    """An objective at a rate: by measure its mean before and after, and the change with its interval."""

    objective: str
    rate: float
    seeds: int
    before: dict[str, float]
    after: dict[str, float]
    change: dict[str, Change]


def compare(
    out: Path, objectives: Sequence[str], rates: Sequence[float], seeds: Sequence[int], *, steps: int, films: int,
    test_films: int,
) -> list[Path]:  # fmt: skip
    """Train every objective at every rate for every seed; runs that are done are not made again. Returns the files of
    the table, of the values seed by seed, and of the figure.
    """
    found: dict[tuple[str, float], list[Outcome]] = {}
    runs: list[Path] = []
    for seed in seeds:
        world = prepare(out / f"seed{seed}", films=films, test_films=test_films, seed=seed)
        for objective in objectives:
            for rate in rates:
                run = world.folder / f"{objective}-{rate:g}"
                found.setdefault((objective, rate), []).append(_outcome(world, run, objective, rate, steps))
                runs += [run] if seed == seeds[0] else []
    call("report", *map(str, runs), "--out", str(out))
    rows = [summary(objective, rate, outcomes) for (objective, rate), outcomes in found.items()]
    files = [out / "comparison.md", out / "comparison.csv", out / "comparison.png"]
    write_atomically(files[0], table(rows))
    write_atomically(files[1], _by_seed(found, seeds))
    draw(rows, files[2])
    return files


def _outcome(world: World, run: Path, objective: str, rate: float, steps: int) -> Outcome:
    done = (run / "evaluation" / "sampled.json").exists() and (run / "eval_pairs" / f"eval-{steps}.jsonl").exists()
    if done and read_json_lines(run / "metrics.jsonl")[-1]["step"] == steps:
        return read_outcome(world, run, steps)
    return train(world, run, objective=objective, rate=rate, steps=steps)


def _values(outcome: Outcome) -> dict[str, tuple[list[float], list[float]]]:
    """By measure the values before and after, film by film or pair by pair."""
    greedy, sampled = (outcome.told[way] for way in ("greedy", "sampled"))
    return {
        "greedy": (greedy[0].facts, greedy[1].facts),
        "sampled": (sampled[0].facts, sampled[1].facts),
        "grammatical": (sampled[0].grammatical, sampled[1].grammatical),
        "words": (greedy[0].words, greedy[1].words),
        "chosen": outcome.chosen,
        "rejected": outcome.rejected,
    }


def summary(objective: str, rate: float, outcomes: Sequence[Outcome]) -> Row:
    """The outcomes of all seeds as one row."""
    values = [_values(outcome) for outcome in outcomes]
    pooled = {
        name: tuple([value for one in values for value in one[name][side]] for side in (0, 1)) for name in MEASURES
    }
    before, after = ({name: mean(pair[side]) for name, pair in pooled.items()} for side in (0, 1))
    changes = {name: paired_bootstrap(*pair) for name, pair in pooled.items()}
    return Row(objective, rate, len(outcomes), before, after, changes)


def table(rows: Sequence[Row]) -> str:
    """The rows as a table in Markdown; the first line is the untrained model."""
    lines = [
        "| objective | rate | " + " | ".join(MEASURES.values()) + " |",
        "|---|---|" + "---|" * len(MEASURES),
        "| before | | " + " | ".join(_shown(rows[0].before[name]) for name in MEASURES) + " |",
    ]
    for row in rows:
        cells = [
            f"{_shown(row.after[name])} [{row.change[name].low:+.3f}, {row.change[name].high:+.3f}]"
            for name in MEASURES
        ]
        lines.append(f"| {row.objective} | {row.rate:g} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _shown(value: float) -> str:
    return f"{value:.3f}" if abs(value) < 10 else f"{value:.1f}"


def _by_seed(found: dict[tuple[str, float], list[Outcome]], seeds: Sequence[int]) -> str:
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(
        ["objective", "rate", "seed", *(f"{name}_{when}" for name in MEASURES for when in ("before", "after"))]
    )
    for (objective, rate), outcomes in found.items():
        for seed, outcome in zip(seeds, outcomes, strict=True):
            values = _values(outcome)
            cells = [f"{mean(values[name][side]):.4f}" for name in MEASURES for side in (0, 1)]
            writer.writerow([objective, f"{rate:g}", seed, *cells])
    return stream.getvalue()


def draw(rows: Sequence[Row], file: Path) -> None:
    """Each measure over the rate, a line an objective, with the interval of its change put around what it came to."""
    objectives = list(dict.fromkeys(row.objective for row in rows))
    figure, grid = plt.subplots(2, 3, figsize=(12, 6.6), layout="constrained")
    for axes, (name, title) in zip(grid.flat, MEASURES.items(), strict=True):
        axes.axhline(rows[0].before[name], color="0.5", linewidth=1, linestyle="--")
        for number, objective in enumerate(objectives):
            mine = sorted((row for row in rows if row.objective == objective), key=lambda row: row.rate)
            after = [row.after[name] for row in mine]
            changes = [row.change[name] for row in mine]
            spread = [[c.mean - c.low for c in changes], [c.high - c.mean for c in changes]]
            shift = 1 + 0.03 * (number - (len(objectives) - 1) / 2)  # so that intervals do not hide one another
            rates = [row.rate * shift for row in mine]
            colour = COLOURS[number % len(COLOURS)]
            axes.errorbar(
                rates, after, spread, marker="o", markersize=4, capsize=3, linewidth=1.4, color=colour, label=objective
            )
        axes.set_xscale("log")
        axes.set_xticks(sorted({row.rate for row in rows}), [f"{rate:g}" for rate in sorted({r.rate for r in rows})])
        axes.minorticks_off()
        axes.set_title(title, fontsize=10)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    figure.supxlabel("learning rate (dashed: before training)", fontsize=9)
    handles, names = grid.flat[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside upper center", ncols=len(names), fontsize=9, frameon=False)
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_suffix(".partial.png")
    figure.savefig(partial, dpi=130)
    plt.close(figure)
    os.replace(partial, file)
