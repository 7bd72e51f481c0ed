"""`python -m synpo.miniature.demo`: the paper in minutes on two CPU cores, by the commands that every user has.

Films are rendered to mp4 files; the captioner that ships with the package captions them; a judge that knows the truth
scores its candidates; the best and the worst of each film become a pair; SynPO trains on the pairs; captions of films
that were not trained on are compared, before and after.
"""

import argparse
import json
import shlex
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from .. import cli
from ..evaluate import Change, paired_bootstrap
from ..evaluate.files import read_hypotheses
from ..run_files import read_json_lines, write_atomically
from .captioner import WEIGHTS
from .films import make_films, references
from .language import language
from .oracle import accuracy
from .world import Scene

JUDGE = "python:synpo.miniature.oracle:judge"
LENGTH = "48"  # tokens; the longest caption has 34
# How captions are written, for the comparison: the likeliest, and as candidates are drawn
WAYS = {
    "greedy": ["--temperature", "0", "--top_p", "1", "--top_k", "0"],
    "sampled": ["--temperature", "0.9", "--top_p", "0.95", "--top_k", "32"],
}
RECIPE = {
    "objective": "synpo",
    "learning_rate": "2e-3",
    "lora_r": "16",
    "lora_alpha": "32",
    "lora_dropout": "0",
    "warmup_steps": "5",
    "per_device_train_batch_size": "16",
    "gradient_accumulation_steps": "1",
    "per_device_eval_batch_size": "16",
    "eval_fraction": "0.15",
    "max_length": "128",
    "save_strategy": "no",
}
LEAST_GAIN, LEAST_GRAMMATICAL, MOST_DRIFT = 0.15, 0.9, 0.1


class Captions(NamedTuple):
    """Captions of the test films, written in one way by one model; `right` is the share of facts, film by film."""

    right: list[float]
    grammatical: float
    perplexity: float
    diversity: float
    words: float

    @property
    def accuracy(self) -> float:
        return sum(self.right) / len(self.right)


def call(*words: str) -> None:
    """A command of synpo, shown as it would be typed. Errors: RuntimeError where it fails."""
    print(f"\n$ synpo {shlex.join(words)}", flush=True)
    if code := cli.main(words):
        raise RuntimeError(f"synpo {words[0]} ended with {code}")


def caption(model: str, folder: Path, out: Path, scenes: Mapping[str, Scene], seed: int) -> dict[str, Captions]:
    """Captions of the test films by a model, in both ways, through `synpo caption`."""
    found = {}
    for way, options in WAYS.items():
        file = out.with_name(f"{out.name}-{way}.jsonl")
        plain = ["--contrast", "off", "--retrospective", "0", "--max_new_tokens", LENGTH, "--seed", str(seed)]
        call("caption", str(folder), "--model", model, "--out", str(file), *options, *plain)
        texts = read_hypotheses(file).captions
        right = [accuracy(texts.get(name, ""), scene.facts) for name, scene in scenes.items()]
        found[way] = Captions(right, *language(list(texts.values())))
    return found


def run(
    out: Path, model: str = str(WEIGHTS), *, films: int, test_films: int, steps: int, seed: int,
    recipe: Mapping[str, str] | None = None,
) -> int:  # fmt: skip
    """The whole way from films to a report in folder `out`; 0 when captions became better as the paper says, else 1."""
    started = time.perf_counter()
    make_films(out / "films", films, seed)
    scenes = make_films(out / "test", test_films, seed + 1, prefix="test")
    truth = out / "references.json"
    write_atomically(truth, json.dumps(references(scenes, seed), indent=0) + "\n")
    before = caption(model, out / "test", out / "before", scenes, seed)
    call(
        "pairs", "--videos", str(out / "films"), "--model", model, "--judge", JUDGE, "--out", str(out / "pairs"),
        "--min_score_gap", "3", "--max_new_tokens", LENGTH, "--seed", str(seed),
    )  # fmt: skip
    trained = out / "run"
    options = [word for name, value in (RECIPE | dict(recipe or {})).items() for word in (f"--{name}", value)]
    call(
        "train", "--model", model, "--data", str(out / "pairs"), "--output_dir", str(trained), "--max_steps",
        str(steps), "--seed", str(seed), "--vision_cache", str(out / "features"), *options,
    )  # fmt: skip
    after = caption(str(trained), out / "test", out / "after", scenes, seed)
    for way in WAYS:
        files = [str(out / f"{when}-{way}.jsonl") for when in ("before", "after")]
        numbers = str(out / f"metrics-{way}.json")
        call("evaluate", *files, "--references", str(truth), "--meteor", "off", "--out", numbers, "--partial")
    call("report", str(trained), "--out", str(out))

    logps = [
        {name: [row[name] for row in read_json_lines(trained / "eval_pairs" / f"eval-{step}.jsonl")]
         for name in ("logps/chosen", "logps/rejected")} for step in (0, steps)
    ]  # fmt: skip
    print("\n" + table(before, after, logps, out))
    problems = check(before, after, logps)
    for problem in problems:
        print(f"NOT as it should be: {problem}")
    print(f"curves {out / 'curves.png'} | all in {out} | {time.perf_counter() - started:.0f} s")
    return 1 if problems else 0


def check(
    before: Mapping[str, Captions], after: Mapping[str, Captions], logps: Sequence[Mapping[str, list[float]]]
) -> list[str]:
    """What the paper promises and these captions do not keep."""
    problems = []
    gain = after["sampled"].accuracy - before["sampled"].accuracy
    if gain < LEAST_GAIN:
        problems.append(f"sampled captions gained {gain:+.3f} of the facts; at least {LEAST_GAIN} is wanted")
    if (least := min(captions.grammatical for captions in after.values())) < LEAST_GRAMMATICAL:
        problems.append(f"{least:.3f} of the captions are grammatical; at least {LEAST_GRAMMATICAL} is wanted")
    change = paired_bootstrap(before["greedy"].right, after["greedy"].right)
    if change.high < 0:
        problems.append(f"greedy captions lost facts: {change.mean:+.3f}, at most {change.high:+.3f}")
    moved = _moved(logps, "logps/chosen").mean
    if abs(moved) >= MOST_DRIFT:
        problems.append(f"the log-prob of the chosen captions moved by {moved:+.3f}; less than {MOST_DRIFT} is wanted")
    return problems


def _moved(logps: Sequence[Mapping[str, list[float]]], name: str) -> Change:
    return paired_bootstrap(logps[0][name], logps[1][name])


def table(
    before: Mapping[str, Captions],
    after: Mapping[str, Captions],
    logps: Sequence[Mapping[str, list[float]]],
    out: Path,
) -> str:
    """What changed, in lines of text."""
    lines = [f"{'':<34}{'before':>9}{'after':>9}{'change':>9}   95 % interval"]
    for way in WAYS:
        change = paired_bootstrap(before[way].right, after[way].right)
        values = (before[way].accuracy, after[way].accuracy)
        lines.append(_line(f"facts right, {way}", *values, f"   [{change.low:+.3f}, {change.high:+.3f}]"))
        metrics = json.loads((out / f"metrics-{way}.json").read_text(encoding="utf-8"))["metrics"]
        cider = metrics["CIDEr"]
        interval = f"   [{cider['change']['low']:+.3f}, {cider['change']['high']:+.3f}]"
        lines.append(_line(f"CIDEr, {way}", *cider["values"], interval))
        for name in ("grammatical", "perplexity", "diversity", "words"):
            lines.append(_line(f"{name}, {way}", getattr(before[way], name), getattr(after[way], name)))
    for name, told in (("logps/chosen", "log-prob per token, chosen"), ("logps/rejected", "rejected")):
        change = _moved(logps, name)
        values = [sum(part[name]) / len(part[name]) for part in logps]
        lines.append(_line(told, *values, f"   [{change.low:+.3f}, {change.high:+.3f}]"))
    return "\n".join(lines)


def _line(name: str, before: float, after: float, interval: str = "") -> str:
    return f"{name:<34}{before:>9.3f}{after:>9.3f}{after - before:>+9.3f}{interval}"


def main() -> int:
    """The demo with its own sizes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/miniature"), help="default: runs/miniature")
    parser.add_argument("--films", type=int, default=150, help="films that pairs are made from (default 150)")
    parser.add_argument("--test_films", type=int, default=100, help="films for the comparison (default 100)")
    parser.add_argument("--steps", type=int, default=60, help="optimizer steps of 16 pairs (default 60)")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    return run(args.out, films=args.films, test_films=args.test_films, steps=args.steps, seed=args.seed)


if __name__ == "__main__":
    raise SystemExit(main())
