"""`synpo report`: the curves of one or more runs, drawn from their metrics.jsonl."""

import argparse
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.lines import Line2D

from .run_files import read_json_lines

METRICS_FILE = "metrics.jsonl"
CURVES_FILE = "curves.png"
# Okabe and Ito's colours, which the colour-blind can tell apart
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
STYLES = ("-", "--", ":")


class Panel(NamedTuple):
    """One plot: metrics that share an axis."""

    title: str
    unit: str
    metrics: Mapping[str, str]  # metric name: its name in the legend


PANELS = (
    Panel("log-prob per token", "nats", {"logps/chosen": "chosen", "logps/rejected": "rejected"}),
    Panel("reward", "", {"rewards/chosen": "chosen", "rewards/rejected": "rejected"}),
    Panel("margin (chosen reward - rejected reward)", "", {"rewards/margins": "margin"}),
    Panel("accuracy (margin above 0)", "share of pairs", {"rewards/accuracies": "accuracy"}),
    Panel(
        "share of the gradient",
        "share",
        {"grad_share/chosen": "chosen", "grad_share/rejected": "rejected", "grad_share/language": "language"},
    ),
    Panel("loss", "", {"loss": "loss"}),
)

Series = list[tuple[float, float]]  # (step, value)


class Run(NamedTuple):
    """The curves of one run by metric name."""

    label: str
    training: dict[str, Series]
    held_out: dict[str, Series]


def read_run(path: Path, label: str) -> Run:
    """The curves of a run's folder, or of its metrics.jsonl.

    Errors: FileNotFoundError; ValueError naming file and line of a record that is none, and for a run without a curve.
    """
    file = path / METRICS_FILE if path.is_dir() else path
    if not file.exists():
        raise FileNotFoundError(f"{path}: no {METRICS_FILE} here; give the output_dir of a run")
    names = [name for panel in PANELS for name in panel.metrics]
    training: dict[str, Series] = {}
    held_out: dict[str, Series] = {}
    for number, record in enumerate(read_json_lines(file), start=1):
        if not isinstance(record, dict) or not isinstance(record.get("step"), int | float):
            raise ValueError(f"{file}:{number}: a record with a number `step` is needed, got {str(record)[:80]}")
        for name in names:
            for curves, key in ((training, name), (held_out, f"eval_{name}")):
                if key in record:
                    value = math.nan if record[key] is None else float(record[key])  # null: it was not finite
                    curves.setdefault(name, []).append((float(record["step"]), value))
    if not training and not held_out:
        raise ValueError(f"{file}: no curve in it; the run has not logged a step yet")
    return Run(label, training, held_out)


def labels(paths: Sequence[Path]) -> list[str]:
    """The shortest names that tell the runs apart: the ends of their paths."""
    parts = [path.resolve().parts for path in paths]
    depth = 1
    while depth < max(map(len, parts)) and len({p[-depth:] for p in parts}) < len(set(parts)):
        depth += 1
    return ["/".join(p[-depth:]) for p in parts]


def smooth(series: Series) -> Series:
    """Centred means over a twentieth of the curve's points; values that are not finite are left out of them."""
    half = len(series) // 40
    out = []
    for i, (step, _) in enumerate(series):
        width = min(half, i, len(series) - 1 - i)  # even on both sides, so that the ends are not pulled
        near = [value for _, value in series[i - width : i + width + 1] if math.isfinite(value)]
        out.append((step, sum(near) / len(near) if near else math.nan))
    return out


def _draw_panel(axes: Axes, panel: Panel, runs: Sequence[Run]) -> None:
    for r, run in enumerate(runs):
        for m, name in enumerate(panel.metrics):
            # one run: colours tell the metrics apart; several: colours are the runs, and dashes the metrics
            colour = COLOURS[(m if len(runs) == 1 else r) % len(COLOURS)]
            style = STYLES[m % len(STYLES)]
            if series := run.training.get(name):
                marker = "." if len(series) == 1 else None
                axes.plot(*zip(*smooth(series), strict=True), style, color=colour, linewidth=1.6, marker=marker)
                if len(series) >= 40:
                    axes.plot(*zip(*series, strict=True), style, color=colour, linewidth=0.6, alpha=0.3)
            if series := run.held_out.get(name):
                face, edge = (colour, "black") if m == 0 else ("white", colour)
                axes.plot(
                    *zip(*sorted(series), strict=True),
                    "o",
                    markersize=5.5,
                    markerfacecolor=face,
                    markeredgecolor=edge,
                    markeredgewidth=1.2,
                    clip_on=False,
                    zorder=3,
                )
    axes.set_title(panel.title, fontsize=10)
    axes.set_ylabel(panel.unit, fontsize=9)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=8)
    axes.xaxis.get_major_locator().set_params(integer=True)
    if len(panel.metrics) > 1:
        keys = [
            Line2D([], [], color=COLOURS[m] if len(runs) == 1 else "0.3", linestyle=STYLES[m], label=text)
            for m, text in enumerate(panel.metrics.values())
        ]
        axes.legend(handles=keys, fontsize=8, framealpha=0.7)


def draw_curves(runs: Sequence[Run], file: Path) -> None:
    """Writes the panels of which a run has data as one PNG; training as lines, held-out pairs as circles."""
    present = {name for run in runs for name in (*run.training, *run.held_out)}
    panels = [panel for panel in PANELS if present & panel.metrics.keys()]
    columns = min(3, len(panels))
    rows = -(-len(panels) // columns)
    size = (4.2 * columns, 3.0 * rows + 0.5)
    figure, grid = plt.subplots(rows, columns, figsize=size, squeeze=False, layout="constrained")
    for axes, panel in zip(grid.flat, panels, strict=False):
        _draw_panel(axes, panel, runs)
    for axes in grid.flat[len(panels) :]:
        axes.set_visible(False)
    figure.supxlabel("optimizer step", fontsize=9)
    keys = []
    if len(runs) > 1:
        keys = [Line2D([], [], color=COLOURS[r % len(COLOURS)], label=run.label) for r, run in enumerate(runs)]
    if any(run.held_out for run in runs):
        keys.append(Line2D([], [], linestyle="", marker="o", color="0.4", label="held-out pairs"))
    if keys:
        figure.legend(handles=keys, loc="outside upper center", ncols=min(len(keys), 5), fontsize=9, frameon=False)
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_suffix(".partial.png")
    figure.savefig(partial, dpi=130)
    plt.close(figure)
    os.replace(partial, file)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The runs, and where the curves go."""
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="output_dir of a run, or its metrics.jsonl")
    parser.add_argument("--out", type=Path, default=Path(), metavar="DIR", help="where curves.png goes (default: here)")


def main(args: argparse.Namespace) -> int:
    """Draw the runs over one another."""
    runs = [read_run(path, label) for path, label in zip(args.runs, labels(args.runs), strict=True)]
    file = args.out / CURVES_FILE
    draw_curves(runs, file)
    print(file)
    return 0
