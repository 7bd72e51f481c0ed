"""python -m bench.figures: plots and tables of what bench/results holds, and nothing that is not there.

Writes docs/figures/<device>_loss.png and <device>_sweeps.png, and the text between ``<!-- figures -->`` and
``<!-- /figures -->`` in README.md and docs/bench.md.
"""

import argparse
import csv
import re
import sys
from pathlib import Path
from typing import Any

from . import report
from .cases import SWEEPS, Case
from .report import Row

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "bench" / "results"
FIGURES = ROOT / "docs" / "figures"
MARKED = re.compile(r"(?<=<!-- figures -->\n).*?(?=<!-- /figures -->)", re.DOTALL)
LOSS = ("synpo_loss", "frozen", "forward+backward")
_KINDS = ("steps", "training", "contrastive", "candidates", "video")  # of other benches: <kind>_<device>.csv
_WORDS = {
    "tokens": "positions",
    "vocabulary": "vocabulary",
    "masked": "share of a row that is prompt",
    "lengths": "rejected answer's length over chosen's",
}


def devices() -> list[str]:
    """Names of the devices that the loss was measured on."""
    names = [path.stem for path in sorted(RESULTS.glob("*.csv")) if not path.stem.endswith(".notes")]
    return [name for name in names if not name.startswith(tuple(f"{kind}_" for kind in _KINDS))]


def losses(device: str) -> list[Row]:
    rows = report.latest(RESULTS / f"{device}.csv")
    return [row for row in rows if (row["op"], row["head"], row["phase"]) == LOSS]


def along(axis: str, kind: str) -> list[tuple[float, Case, int]]:
    """The points of a sweep with where they stand on its axis."""
    place = {"tokens": lambda _, n: n, "vocabulary": lambda c, _: c.V, "masked": lambda c, _: c.masked,
             "lengths": lambda c, _: c.rejected}[axis]  # fmt: skip
    return sorted((place(case, n), case, n) for case, n in SWEEPS[axis][kind])


def swept(rows: list[Row], kind: str) -> set[tuple[str, str]]:
    """(case, N) of every point of every sweep that was measured."""
    points = {(case.name, str(n)) for axis in SWEEPS for _, case, n in along(axis, kind)}
    return points & {(row["case"], row["N"]) for row in rows}


def plot_sweeps(rows: list[Row], kind: str, path: Path) -> None:
    """Time and extra memory along every axis, a line an implementation."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, panels = plt.subplots(2, len(SWEEPS), figsize=(3.4 * len(SWEEPS), 5.6), layout="constrained")
    names = list(dict.fromkeys(row["implementation"] for row in rows))
    for axis, column in zip(SWEEPS, panels.T, strict=True):
        points = along(axis, kind)
        for measure, ax in zip(("p50_ms", "peak_extra_mb"), column, strict=True):
            for name in names:
                found = {(r["case"], r["N"]): r[measure] for r in rows if r["implementation"] == name and r[measure]}
                line = [(x, float(found[case.name, str(n)])) for x, case, n in points if (case.name, str(n)) in found]
                if line:
                    ax.plot(*zip(*line, strict=True), marker="o", label=name, linewidth=2.5 if name == "ours" else 1.2)
            ax.set_xlim(left=0)
            ax.set_ylim(bottom=0)
            ax.grid(alpha=0.3)
            ax.spines[["top", "right"]].set_visible(False)
        column[-1].set_xlabel(_WORDS[axis])
    panels[0, 0].set_ylabel("forward and backward, ms")
    panels[1, 0].set_ylabel("extra memory at the peak, MB")
    handles, labels = panels[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=len(labels), frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _cell(row: Row | None) -> str:
    if row is None:
        return ""
    if not row["p50_ms"]:
        held = re.fullmatch(r"(given up after .*) in its first full run, (\d+ MB) above .*", row["note"])
        return f"{held[1]}, over {held[2]}" if held else row["status"]
    seconds = float(row["p50_ms"]) / 1e3
    return f"{seconds:.{3 if seconds < 1 else 1}f} s, {float(row['peak_extra_mb']):.0f} MB"


def loss_table(rows: list[Row]) -> str:
    """Markdown: a line a shape, naive PyTorch, the fastest of the others and ours, with what ours gains on naive."""
    lines = [
        "| loss, forward and backward, frozen head | naive PyTorch | fastest other | synpo | synpo over naive |",
        "|---|---|---|---|---|",
    ]
    for key in dict.fromkeys((row["case"], row["N"], row["dtype"]) for row in rows):
        here = {r["implementation"]: r for r in rows if (r["case"], r["N"], r["dtype"]) == key}
        ours, naive = here.get("ours"), here.get("naive")
        if ours is None or not ours["p50_ms"] or naive is None:
            continue
        others = [r for name, r in here.items() if name not in ("ours", "naive") and r["p50_ms"]]
        best = min(others, key=lambda r: float(r["ratio_to_gemm"]), default=None)
        other = f"{best['implementation']}: {_cell(best)}" if best else ""
        gain = ""
        if naive["p50_ms"]:
            faster = float(naive["ratio_to_gemm"]) / float(ours["ratio_to_gemm"])
            gain = f"{faster:.2f}x, {float(naive['peak_extra_mb']) / float(ours['peak_extra_mb']):.0f}x less memory"
        shape = f"N {key[1]}, H {ours['H']}, V {ours['V']}, {key[2]}"
        lines.append(f"| {shape} | {_cell(naive)} | {other} | {_cell(ours)} | {gain} |")
    return "\n".join(lines)


def step_table(path: Path) -> str:
    """Markdown: the newest training step of each trainer."""
    with path.open(newline="") as file:
        rows = {row["trainer"]: row for row in csv.DictReader(file)}
    one: dict[str, Any] = next(iter(rows.values()))
    lines = [
        f"| training step, {one['pairs']} pairs of {one['max_length']} tokens, LoRA | time | peak memory |",
        "|---|---|---|",
    ]
    names = {
        "synpo-eager": "synpo, plain PyTorch loss",
        "synpo-low-memory": "synpo, `low_host_memory`",
        "trl-dpo": f"trl {one['trl']} DPO",
        "trl-simpo": f"trl {one['trl']} SimPO",
    }
    for name, row in rows.items():
        lines.append(f"| {names.get(name, name)} | {float(row['step_s']):.1f} s | {row['peak_mb']} MB |")
    return "\n".join(lines)


def block(device: str, folder: str, sweeps: bool) -> str:
    """One device's plot and tables as Markdown; folder: the figures' folder as seen from the page."""
    rows = losses(device)
    along_axes = swept(rows, _kind(rows))
    named = [row for row in rows if (row["case"], row["N"]) not in along_axes]
    parts = [
        f"On `{device}` with torch {rows[-1]['torch']}:",
        f"![time and memory of the loss]({folder}/{device}_loss.png)",
        loss_table(named),
    ]
    if sweeps and along_axes:
        parts.append(f"![time and memory along four axes]({folder}/{device}_sweeps.png)")
    steps = RESULTS / f"steps_{device}.csv"
    if steps.exists():
        parts.append(step_table(steps))
    return "\n\n".join(parts) + "\n"


def _kind(rows: list[Row]) -> str:
    return "cpu" if rows[0]["device"].startswith("cpu") else "cuda"


def pages() -> dict[Path, str]:
    """README.md and docs/bench.md as they should read."""
    result = {}
    for path, folder, sweeps in (
        (ROOT / "README.md", "docs/figures", False),
        (ROOT / "docs/bench.md", "figures", True),
    ):
        text = path.read_text()
        if len(MARKED.findall(text)) != 1:
            raise SystemExit(f"{path}: one pair of <!-- figures --> and <!-- /figures --> is needed")
        body = "\n".join(block(device, folder, sweeps) for device in devices())
        result[path] = MARKED.sub(lambda _, body=body: body, text)
    return result


def main(argv: list[str] | None = None) -> int:
    argparse.ArgumentParser(prog="python -m bench.figures", description=__doc__.split("\n")[0]).parse_args(argv)
    for device in devices():
        rows = losses(device)
        along_axes = swept(rows, _kind(rows))
        report.plot([r for r in rows if (r["case"], r["N"]) not in along_axes], FIGURES / f"{device}_loss.png")
        if along_axes:
            plot_sweeps([r for r in rows if (r["case"], r["N"]) in along_axes], _kind(rows),
                        FIGURES / f"{device}_sweeps.png")  # fmt: skip
    for path, text in pages().items():
        path.write_text(text)
        print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
