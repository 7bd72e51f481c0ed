"""Two commits side by side: ``python -m bench --base REF``. This commit's bench measures both trees' kernels."""

import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path

from tqdm import tqdm

from . import measure
from .measure import ROOT, Result, Spec

REPEATS = 3  # processes of each tree and row, in turns


@contextmanager
def tree_of(ref: str) -> Iterator[Path]:
    """A checkout of ``ref`` with its csrc built and with this bench in place of its own. SystemExit for a ref that git
    does not know, or that does not build.
    """
    with tempfile.TemporaryDirectory(prefix="bench-base-") as folder:
        tree = Path(folder) / "tree"
        _run("git", "-C", str(ROOT), "worktree", "add", "--detach", str(tree), ref)
        try:
            (tree / "bench").rename(tree / "bench-of-base")
            (tree / "bench").symlink_to(ROOT / "bench")
            _run(sys.executable, "setup.py", "-q", "build_ext", "--inplace", cwd=tree)
            yield tree
        finally:
            _run("git", "-C", str(ROOT), "worktree", "remove", "--force", str(tree))


def _run(*command: str, cwd: Path | None = None) -> None:
    done = subprocess.run(command, capture_output=True, text=True, cwd=cwd)
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
        raise SystemExit(f"{' '.join(command)}: {lines[-1]}")


def compare(specs: list[Spec], ref: str, limit: float) -> tuple[str, bool]:
    """Markdown with a line a row, and whether every measurement came out."""
    specs = list(dict.fromkeys(replace(spec, implementation="ours") for spec in specs))
    lines = [
        f"| ours: {ref}, then this tree | of GEMM | | change | extra MB | |",
        "|---|---|---|---|---|---|",
    ]
    good = True
    with (
        tree_of(ref) as base,
        tempfile.TemporaryDirectory() as folder,
        tqdm(total=2 * REPEATS * len(specs), unit="process", file=sys.stderr) as bar,
    ):
        for i, spec in enumerate(specs):
            expected = Path(folder) / f"{i}.safetensors"
            oracle = {"op": spec.op, "case": spec.case, "n": spec.N, "dtype": spec.dtype, "device": spec.device}
            measure.in_fresh_process(["expect", json.dumps(oracle), str(expected)], limit)
            found: dict[Path, list[Result]] = {base: [], ROOT: []}
            for _ in range(REPEATS):
                for root, results in found.items():
                    payload = ["measure", json.dumps(asdict(spec)), str(expected)]
                    answer, wrong = measure.in_fresh_process(payload, limit, root)
                    results.append(Result("failed", wrong) if wrong else Result(**json.loads(answer)))
                    bar.update()
            name = f"{spec.op}, {spec.case}, N {spec.N}, {spec.dtype}, {spec.head} head, {spec.phase}"
            bad = [r for results in found.values() for r in results if r.status != "ok"]
            if bad:
                good = False
                lines.append(f"| {name} | {bad[0].status}: {bad[0].note} | | | | |")
                continue
            before, after = (
                statistics.median(r.values["ratio_to_gemm"] for r in results) for results in found.values()
            )
            held = [max(r.values["peak_extra_mb"] for r in results) for results in found.values()]
            lines.append(
                f"| {name} | {before:.3f} | {after:.3f} | {after / before - 1:+.1%} | {held[0]:.1f} | {held[1]:.1f} |"
            )
    return "\n".join(lines), good
