"""The stages of the demo, by the commands that every user has: films, captions, judged pairs, training, captions again.

Each stage leaves files in a folder and goes on from those that are there, so a demo that was stopped can be called
again. What the commands do not know, since they see no truth, is measured here and added to what `synpo evaluate` has
written.
"""

import json
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from .. import cli
from ..evaluate import paired_bootstrap
from ..evaluate.files import read_hypotheses
from ..run_files import read_json_lines, write_atomically, write_json_lines
from .captioner import WEIGHTS
from .films import make_films, references
from .grammar import read
from .language import language
from .oracle import accuracy
from .world import Scene

JUDGE = "python:synpo.miniature.oracle:judge"
LENGTH = "48"  # tokens; the longest caption has 34
# How captions are written, for the comparison: the likeliest, and as candidates are drawn
WAYS = {
    "greedy": ("--temperature", "0", "--top_p", "1", "--top_k", "0"),
    "sampled": ("--temperature", "0.9", "--top_p", "0.95", "--top_k", "32"),
}
RECIPE = {
    "lora_r": "16",
    "lora_alpha": "32",
    "lora_dropout": "0",
    "warmup_steps": "5",
    "per_device_train_batch_size": "32",
    "gradient_accumulation_steps": "1",
    "per_device_eval_batch_size": "32",
    "max_length": "128",
    "save_strategy": "no",
}


class World(NamedTuple):
    """What is there before any training: films to learn from, made into pairs, and films to be tested on."""

    folder: Path
    model: str
    seed: int
    scenes: Mapping[str, Scene]  # of the test films

    @property
    def references(self) -> Path:
        return self.folder / "references.json"

    @property
    def pairs(self) -> Path:
        return self.folder / "pairs"

    @property
    def sides(self) -> dict[str, Path]:
        """Pairs by the option of `synpo train` that they are for."""
        return {"data": self.folder / "pairs-train.jsonl", "eval_data": self.folder / "pairs-held-out.jsonl"}

    def captions(self, way: str) -> Path:
        """Captions of the test films by the untrained model."""
        return self.folder / f"before-{way}.jsonl"


class Told(NamedTuple):
    """What captions of the test films tell, film by film: share of facts right, grammatical (0 or 1), words."""

    facts: list[float]
    grammatical: list[float]
    words: list[float]


class Outcome(NamedTuple):
    """A trained model's captions beside the untrained one's: (before, after) by way of writing, and log-probs per token
    of the chosen and rejected captions of held-out pairs (before, after), pair by pair.
    """

    told: dict[str, tuple[Told, Told]]
    chosen: tuple[list[float], list[float]]
    rejected: tuple[list[float], list[float]]


def call(*words: str, fine: Sequence[int] = (0,)) -> None:
    """A command of synpo, shown as it would be typed. Errors: RuntimeError where its exit code is not one of `fine`."""
    print(f"\n$ synpo {shlex.join(words)}", flush=True)
    if (code := cli.main(words)) not in fine:
        raise RuntimeError(f"synpo {words[0]} ended with {code}")


def prepare(folder: Path, *, films: int, test_films: int, seed: int, model: str = str(WEIGHTS)) -> World:
    """Films of both kinds, captions of the test films by the untrained model, and judged pairs of the others."""
    make_films(folder / "films", films, seed)
    scenes = make_films(folder / "test", test_films, seed + 1_000_000, prefix="test")
    world = World(folder, model, seed, scenes)
    write_atomically(world.references, json.dumps(references(scenes, seed), indent=0) + "\n")
    for way in WAYS:
        _caption(world, model, way, world.captions(way))
    call(
        "pairs", "--videos", str(folder / "films"), "--model", model, "--judge", JUDGE, "--out", str(world.pairs),
        "--min_score_gap", "3", "--max_new_tokens", LENGTH, "--videos_together", "16", "--seed", str(seed),
    )  # fmt: skip
    _hold_out(world)
    return world


def _hold_out(world: World) -> None:
    """Pairs of every tenth film aside. `synpo train` would choose by the films' whole paths, so that a demo in another
    folder would have other numbers.
    """
    pairs = read_json_lines(world.pairs / "pairs.jsonl")
    names = sorted({pair["provenance"]["video"]["name"] for pair in pairs})
    aside = set(names[::10])
    for option, path in world.sides.items():
        side = [p for p in pairs if (p["provenance"]["video"]["name"] in aside) == (option == "eval_data")]
        write_json_lines(path, side)


def _caption(world: World, model: str, way: str, out: Path) -> None:
    plain = (
        "--contrast", "off", "--retrospective", "0", "--max_new_tokens", LENGTH, "--videos_together", "25",
        "--seed", str(world.seed),
    )  # fmt: skip
    # 1: some captions failed, as those of a model that has unlearned to write may; they tell nothing right
    films = str(world.folder / "test")
    call("caption", films, "--model", model, "--out", str(out), *WAYS[way], *plain, fine=(0, 1))


def train(world: World, run: Path, *, objective: str, rate: float, steps: int) -> Outcome:
    """Train on the world's pairs, caption the test films, compare. `run` gets what `synpo train` leaves, the captions,
    and in evaluation/ what `synpo evaluate` and this module measured.
    """
    for way in WAYS:
        (run / f"{way}.jsonl").unlink(missing_ok=True)  # of a model that was there before
    options = RECIPE | {name: str(path) for name, path in world.sides.items()}
    options |= {"objective": objective, "learning_rate": f"{rate:g}", "max_steps": str(steps)}
    call(
        "train", "--model", world.model, "--output_dir", str(run), "--seed", str(world.seed),
        "--vision_cache", str(world.folder / "features"),
        *(word for name, value in options.items() for word in (f"--{name}", value)),
    )  # fmt: skip
    for way in WAYS:
        _caption(world, str(run), way, run / f"{way}.jsonl")
        numbers = run / "evaluation" / f"{way}.json"
        call(
            "evaluate", str(world.captions(way)), str(run / f"{way}.jsonl"), "--references", str(world.references),
            "--meteor", "off", "--out", str(numbers), "--partial",
        )  # fmt: skip
        _add_what_the_truth_tells(numbers, world, run, way)
    return read_outcome(world, run, steps)


def read_outcome(world: World, run: Path, steps: int) -> Outcome:
    """The outcome of a run from its files."""
    told = {way: (_told(world.captions(way), world.scenes), _told(run / f"{way}.jsonl", world.scenes)) for way in WAYS}
    rows = [read_json_lines(run / "eval_pairs" / f"eval-{step}.jsonl") for step in (0, steps)]
    chosen, rejected = (
        tuple([row[f"logps/{side}"] for row in part] for part in rows) for side in ("chosen", "rejected")
    )
    return Outcome(told, chosen, rejected)


def _told(file: Path, scenes: Mapping[str, Scene]) -> Told:
    """A film without a caption has told nothing right."""
    captions = read_hypotheses(file).captions
    texts = [captions.get(name, "") for name in scenes]
    facts = [accuracy(text, scene.facts) for text, scene in zip(texts, scenes.values(), strict=True)]
    return Told(facts, [float(read(text).grammatical) for text in texts], [float(len(text.split())) for text in texts])


def _add_what_the_truth_tells(numbers: Path, world: World, run: Path, way: str) -> None:
    """Facts and language of the captions, in front of the metrics that need no truth."""
    files = (world.captions(way), run / f"{way}.jsonl")
    before, after = (_told(file, world.scenes) for file in files)
    rows: dict[str, Any] = {}
    for name, values in zip(("facts right", "grammatical", "words"), zip(before, after, strict=True), strict=True):
        rows[name] = {"values": [mean(part) for part in values], "change": paired_bootstrap(*values)._asdict()}
    both = [language(list(read_hypotheses(file).captions.values())) for file in files]
    for name in ("perplexity", "diversity"):
        rows[name] = {"values": [getattr(one, name) for one in both]}
    content = json.loads(numbers.read_text(encoding="utf-8"))
    content["metrics"] = rows | content["metrics"]
    write_atomically(numbers, json.dumps(content, indent=1) + "\n")


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
