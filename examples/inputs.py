"""What the scripts beside this share: their options, and pairs from a file."""

import argparse
import json
from pathlib import Path
from typing import Any


def options(meaning: str | None, argv: list[str] | None = None) -> argparse.Namespace:
    """--model, --pairs, --steps and --output_dir."""
    parser = argparse.ArgumentParser(description=(meaning or "").split("\n")[0])
    parser.add_argument("--model", required=True, help="a causal language model: a hub name or a folder")
    parser.add_argument("--pairs", default=Path(__file__).with_name("pairs.jsonl"), type=Path, help="pairs, JSON lines")
    parser.add_argument("--steps", default=10, type=int, help="optimizer steps")
    parser.add_argument("--output_dir", default="runs/example", help="where trainers leave their files")
    return parser.parse_args(argv)


def read_pairs(path: Path) -> list[dict[str, Any]]:
    """Rows with prompt, chosen and rejected."""
    columns = ("prompt", "chosen", "rejected")
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return [{column: row[column] for column in columns} for row in rows]
