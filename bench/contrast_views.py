"""`python -m bench.contrast_views`: what contrasting views is worth where the truth is known, in the small world.

The captioner that ships with the package writes a caption of each film by `synpo caption`, with no contrast and with
each view; the films are the same, and so are the seeds. The table has the facts that are right, their change against
no contrast with its 95 % interval (paired bootstrap over films), and those facts that views may differ in.
"""

import argparse
from pathlib import Path

from synpo import cli
from synpo.evaluate import paired_bootstrap
from synpo.evaluate.files import read_hypotheses
from synpo.miniature.captioner import WEIGHTS
from synpo.miniature.films import make_films
from synpo.miniature.grammar import read
from synpo.miniature.world import FACTS

PLAIN = "off"
WAYS = {
    PLAIN: {},
    "third, alpha 0.5": {"contrast": "third", "alpha": "0.5"},
    "third, alpha 1": {"contrast": "third", "alpha": "1"},
    "third, alpha 0.5, plausibility 0.1": {"contrast": "third", "alpha": "0.5", "plausibility": "0.1"},
    "shuffled, alpha 0.5": {"contrast": "shuffled", "alpha": "0.5"},
    "blank, alpha 0.5": {"contrast": "blank", "alpha": "0.5"},
    "no_video, alpha 0.5": {"contrast": "no_video", "alpha": "0.5"},
    "off, one retrospective pass": {"retrospective": "1"},
    "third, alpha 0.5, one retrospective pass": {"contrast": "third", "alpha": "0.5", "retrospective": "1"},
}
COMMON = {
    "contrast": "off", "retrospective": "0", "top_p": "0.9", "top_k": "32", "max_new_tokens": "48",
    "videos_together": "25",
}  # fmt: skip
GROUPS = {  # columns of the table
    "facts right": tuple(FACTS),
    "event": ("event",),
    "time": ("time",),
    "all others": tuple(fact for fact in FACTS if fact not in ("event", "time")),
}


def main() -> None:
    """Captions into a folder, gone on with if it is there; then the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/contrast_views"))
    parser.add_argument("--films", type=int, default=400)
    parser.add_argument("--temperature", default="0.5")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    scenes = make_films(args.out / "films", args.films, 2_000_000 + args.seed)
    right: dict[str, list[dict[str, bool]]] = {}
    grammatical: dict[str, float] = {}
    for way, options in WAYS.items():
        out = args.out / f"{way.replace(', ', '-').replace(' ', '_')}-T{args.temperature}-{args.seed}.jsonl"
        given = COMMON | {"temperature": args.temperature, "seed": str(args.seed), "out": str(out)} | options
        words = [word for name, value in given.items() for word in (f"--{name}", value)]
        if cli.main(["caption", str(args.out / "films"), "--model", str(WEIGHTS), *words]) > 1:
            raise SystemExit(f"synpo caption failed for {way}")
        captions = read_hypotheses(out).captions
        told = [read(captions.get(name, "")) for name in scenes]
        grammatical[way] = sum(reading.grammatical for reading in told) / len(told)
        right[way] = [
            {fact: reading.facts.get(fact) == scene.facts[fact] for fact in FACTS}
            for reading, scene in zip(told, scenes.values(), strict=True)
        ]
    print(
        f"| contrast | {' | '.join(GROUPS)} | change of facts right | grammatical |\n|---|{'---|' * (len(GROUPS) + 2)}"
    )
    for way, films in right.items():
        shares = {
            name: [sum(film[fact] for fact in facts) / len(facts) for film in films] for name, facts in GROUPS.items()
        }
        before = [sum(film.values()) / len(FACTS) for film in right[PLAIN]]
        change = paired_bootstrap(before, shares["facts right"])
        values = [f"{sum(share) / len(films):.3f}" for share in shares.values()]
        moved = f"{change.mean:+.3f} [{change.low:+.3f}, {change.high:+.3f}]" if way != PLAIN else ""
        print(f"| {way} | {' | '.join(values)} | {moved} | {grammatical[way]:.3f} |")


if __name__ == "__main__":
    main()
