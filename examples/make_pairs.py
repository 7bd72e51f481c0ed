"""Writes examples/pairs.jsonl: faithful against hallucinated captions of structured scenes. Same seed, same bytes.

    python examples/make_pairs.py [--out examples/pairs.jsonl] [--count 200] [--seed 0]
"""

import argparse
from pathlib import Path

from synpo.scenes import write_pairs

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Make preference pairs from structured scenes.")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("pairs.jsonl"))
    parser.add_argument("--count", type=int, default=200, help="number of pairs (default 200)")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    write_pairs(args.out, args.count, args.seed)
    print(f"{args.out}: {args.count} pairs")
