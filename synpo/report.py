"""`synpo report`: one or more runs as a page and as curves, from their metrics.jsonl and what lies beside it."""

import argparse
import io
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

from .report_page import page
from .report_samples import read_files, samples
from .run_files import read_json_lines, write_atomically

METRICS_FILE = "metrics.jsonl"
CURVES_FILE, PAGE_FILE = "curves.png", "report.html"
STYLES = ("-", "--", ":")
LEGEND_LETTERS = 50  # of a run's name, beside one another over one panel


class Scheme(NamedTuple):
    """Colours of a figure: its ground, what is written on it, and lines."""

    paper: str
    ink: str
    lines: tuple[str, ...]


# Okabe and Ito's colours, which the colour-blind can tell apart; on dark ground the lighter of them first
SCHEMES = {
    "light": Scheme("white", "black", ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#333333")),
    "dark": Scheme("#16181c", "#e6e6e6", ("#56B4E9", "#E69F00", "#2BC79A", "#CC79A7", "#F0E442", "#D55E00", "#e6e6e6")),
}


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
    Panel(
        "norm of the gradient of each side",
        "L2 over the weights",
        {"grad_norm/chosen": "chosen", "grad_norm/rejected": "rejected", "grad_norm/language": "language"},
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


def _draw_panel(axes: Axes, panel: Panel, runs: Sequence[Run], scheme: Scheme) -> None:
    for r, run in enumerate(runs):
        for m, name in enumerate(panel.metrics):
            # one run: colours tell the metrics apart; several: colours are the runs, and dashes the metrics
            colour = scheme.lines[(m if len(runs) == 1 else r) % len(scheme.lines)]
            style = STYLES[m % len(STYLES)]
            if series := run.training.get(name):
                marker = "." if len(series) == 1 else None
                axes.plot(*zip(*smooth(series), strict=True), style, color=colour, linewidth=1.6, marker=marker)
                if len(series) >= 40:
                    axes.plot(*zip(*series, strict=True), style, color=colour, linewidth=0.6, alpha=0.3)
            if series := run.held_out.get(name):
                face, edge = (colour, scheme.ink) if m == 0 else (scheme.paper, colour)
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
            Line2D([], [], color=scheme.lines[m] if len(runs) == 1 else "0.5", linestyle=STYLES[m], label=text)
            for m, text in enumerate(panel.metrics.values())
        ]
        axes.legend(handles=keys, fontsize=8, framealpha=0.7)


def panels_of(runs: Sequence[Run]) -> list[Panel]:
    """The panels that a run has data for."""
    present = {name for run in runs for name in (*run.training, *run.held_out)}
    return [panel for panel in PANELS if present & panel.metrics.keys()]


def curves_png(runs: Sequence[Run], panels: Sequence[Panel], scheme: Scheme = SCHEMES["light"]) -> bytes:
    """Panels as one PNG; training as lines, held-out pairs as circles."""
    columns = min(3, len(panels))
    rows = -(-len(panels) // columns)
    size = (4.2 * columns, 3.0 * rows + 0.5)
    ink = dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), scheme.ink)
    paper = dict.fromkeys(("figure.facecolor", "axes.facecolor", "savefig.facecolor"), scheme.paper)
    with plt.rc_context(ink | paper):
        figure, grid = plt.subplots(rows, columns, figsize=size, squeeze=False, layout="constrained")
        for axes, panel in zip(grid.flat, panels, strict=False):
            _draw_panel(axes, panel, runs, scheme)
        for axes in grid.flat[len(panels) :]:
            axes.set_visible(False)
        figure.supxlabel("optimizer step", fontsize=9)
        keys = []
        if len(runs) > 1:
            colours = scheme.lines
            keys = [Line2D([], [], color=colours[r % len(colours)], label=run.label) for r, run in enumerate(runs)]
        if any(run.held_out for run in runs):
            keys.append(Line2D([], [], linestyle="", marker="o", color="0.5", label="held-out pairs"))
        if keys:
            longest = max(len(str(key.get_label())) for key in keys)
            fit = max(1, LEGEND_LETTERS * columns // (longest + 8))  # 8 letters: a key's line and the space around it
            figure.legend(handles=keys, loc="outside upper center", ncols=fit, fontsize=9, frameon=False)
        stream = io.BytesIO()
        figure.savefig(stream, dpi=130, format="png")
        plt.close(figure)
    return stream.getvalue()


def draw_curves(runs: Sequence[Run], file: Path) -> None:
    """Writes the curves as a PNG file."""
    _write_png(file, curves_png(runs, panels_of(runs)))


def _write_png(file: Path, content: bytes) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_suffix(".partial.png")
    partial.write_bytes(content)
    os.replace(partial, file)


def held_out_values(runs: Sequence[Run]) -> dict[str, list[tuple[float, float] | None]]:
    """Metric: for each run its first and last finite value on held-out pairs; None where it has not two."""
    found: dict[str, list[tuple[float, float] | None]] = {}
    for name in dict.fromkeys(name for panel in PANELS for name in panel.metrics):
        values = [[v for _, v in sorted(run.held_out.get(name, ())) if math.isfinite(v)] for run in runs]
        if any(len(series) > 1 for series in values):
            found[name] = [(series[0], series[-1]) if len(series) > 1 else None for series in values]
    return found


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The runs, and where the report goes."""
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="output_dir of a run, or its metrics.jsonl")
    parser.add_argument(
        "--out", type=Path, default=Path(), metavar="DIR", help=f"for {CURVES_FILE} and {PAGE_FILE} (default: here)"
    )


def main(args: argparse.Namespace) -> int:
    """Draw the runs over one another, and write the page."""
    names = labels(args.runs)
    runs = [read_run(path, name) for path, name in zip(args.runs, names, strict=True)]
    files = [read_files(path, name) for path, name in zip(args.runs, names, strict=True)]
    panels = panels_of(runs)
    _write_png(args.out / CURVES_FILE, curves_png(runs, panels))
    # one picture each on the page, so that a narrow one shows them below one another
    light, dark = SCHEMES["light"], SCHEMES["dark"]
    curves = {p.title: (curves_png(runs, [p], light), curves_png(runs, [p], dark)) for p in panels}
    write_atomically(args.out / PAGE_FILE, page(files, held_out_values(runs), curves, samples(files)))
    print(args.out / CURVES_FILE)
    print(args.out / PAGE_FILE)
    return 0
