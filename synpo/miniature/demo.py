"""`synpo demo`: the paper in minutes on two CPU cores.

Films are rendered to mp4 files; the captioner that ships with the package captions them; a judge that knows the truth
scores its candidates; the best and the worst of each film become a pair; SynPO trains on the pairs; captions of films
that were not trained on are compared, before and after.
"""

import argparse
import json
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from synpo_kernels import objectives

from ..evaluate import paired_bootstrap
from ..options import add_options, given_options, option
from .comparison import compare
from .stages import WAYS, Outcome, call, mean, prepare, train

LEAST_GAIN, LEAST_GRAMMATICAL, MOST_DRIFT = 0.15, 0.9, 0.1


@dataclass
class DemoConfig:
    """Options of `synpo demo`."""

    out: str = option("runs/demo", "Folder for everything that is made.")
    films: int = option(400, "Films that pairs are made from.")
    test_films: int = option(100, "Films whose captions are compared; none of them is trained on.")
    steps: int = option(60, "Optimizer steps of 32 pairs.")
    rate: float = option(1e-3, "Learning rate.")
    seed: int = option(0, "Of the films, the captions and the training.")
    compare: bool = option(False, "Train with several objectives, rates and seeds instead, and compare them.")
    objectives: list[str] = option(["synpo", "dpo", "simpo", "cpo"], "compare: losses of `synpo train`.")
    rates: list[float] = option([3e-4, 1e-3, 3e-3], "compare: learning rates, each objective with each.")
    seeds: list[int] = option([0, 1, 2], "compare: each with films, pairs and captions of its own.")

    def __post_init__(self) -> None:
        for name, least in (("films", 20), ("test_films", 10), ("steps", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} is {getattr(self, name)}; it has to be at least {least}")
        for name in ("objectives", "rates", "seeds"):
            values = getattr(self, name)
            if not values or len(set(values)) != len(values):
                raise ValueError(f"{name} is {values}; one or more are needed, each once")
        if unknown := [name for name in self.objectives if name not in objectives.REGISTRY]:
            raise ValueError(f"objectives: {unknown[0]!r} is not known; known: {', '.join(objectives.REGISTRY)}")
        if wrong := [rate for rate in (self.rate, *self.rates) if not 0 < rate < math.inf]:
            raise ValueError(f"a rate is {wrong[0]}; it has to be greater than 0")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """--config, and a flag for every option."""
    add_options(parser, DemoConfig)


def main(args: argparse.Namespace) -> int:
    """The whole way; 0 when captions became better as the paper says, else 1. With --compare: 0 when all has run."""
    started = time.perf_counter()
    config = DemoConfig(**given_options(args, DemoConfig))
    out = Path(config.out)
    sizes = {"films": config.films, "test_films": config.test_films}
    if config.compare:
        files = compare(out, config.objectives, config.rates, config.seeds, steps=config.steps, **sizes)
        print(f"\n{files[0].read_text(encoding='utf-8')}\n{'  '.join(map(str, files))}")
        return 0
    world = prepare(out, seed=config.seed, **sizes)
    outcome = train(world, out / "run", objective="synpo", rate=config.rate, steps=config.steps)
    call("report", str(out / "run"), "--out", str(out))
    print("\n" + table(out / "run", outcome))
    problems = check(outcome)
    for problem in problems:
        print(f"NOT as it should be: {problem}")
    print(f"report {out / 'report.html'} | all in {out} | {time.perf_counter() - started:.0f} s")
    return 1 if problems else 0


def check(outcome: Outcome) -> list[str]:
    """What the paper promises and these captions do not keep."""
    problems = []
    before, after = outcome.told["sampled"]
    gain = mean(after.facts) - mean(before.facts)
    if gain < LEAST_GAIN:
        problems.append(f"sampled captions gained {gain:+.3f} of the facts; at least {LEAST_GAIN} is wanted")
    least = min(mean(told.grammatical) for _, told in outcome.told.values())
    if least < LEAST_GRAMMATICAL:
        problems.append(f"{least:.3f} of the captions are grammatical; at least {LEAST_GRAMMATICAL} is wanted")
    before, after = outcome.told["greedy"]
    change = paired_bootstrap(before.facts, after.facts)
    if change.high < 0:
        problems.append(f"greedy captions lost facts: {change.mean:+.3f}, at most {change.high:+.3f}")
    moved = paired_bootstrap(*outcome.chosen).mean
    if abs(moved) >= MOST_DRIFT:
        problems.append(f"the log-prob of the chosen captions moved by {moved:+.3f}; less than {MOST_DRIFT} is wanted")
    return problems


def table(run: Path, outcome: Outcome) -> str:
    """What changed, in lines of text."""
    lines = [f"{'':<30}{'before':>9}{'after':>9}{'change':>9}   95 % interval"]
    for way in WAYS:
        metrics = json.loads((run / "evaluation" / f"{way}.json").read_text(encoding="utf-8"))["metrics"]
        for name in ("facts right", "grammatical", "CIDEr", "words", "perplexity", "diversity"):
            row = metrics[name]
            lines.append(_line(f"{name}, {way}", row["values"], row.get("change")))
    for name, values in (("chosen", outcome.chosen), ("rejected", outcome.rejected)):
        change = paired_bootstrap(*values)._asdict()
        lines.append(_line(f"log-prob per token, {name}", [mean(part) for part in values], change))
    return "\n".join(lines)


def _line(name: str, values: Sequence[float], change: dict[str, float] | None) -> str:
    before, after = values
    interval = f"   [{change['low']:+.3f}, {change['high']:+.3f}]" if change else ""
    return f"{name:<30}{before:>9.3f}{after:>9.3f}{after - before:>+9.3f}{interval}"
