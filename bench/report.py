"""Rows of results: writing them, the latest of each kind, a table, a plot."""

import csv
import datetime
from pathlib import Path
from typing import Any

import torch
import triton

from .cases import CASES
from .implementations import IMPLEMENTATIONS
from .measure import Result, Spec, commit, device_name

COLUMNS = [
    "date", "commit", "device", "torch", "triton", "op", "implementation", "case", "dtype", "N", "H", "V", "head",
    "phase", "p20_ms", "p50_ms", "p80_ms", "gemm_ms", "ratio_to_gemm", "peak_extra_mb",
    "max_logp_error", "grad_rel_error",
]  # fmt: skip
KEY = ("op", "case", "dtype", "N", "head", "phase", "implementation")
NOTE_COLUMNS = ["date", "commit", *KEY, "status", "rounds", "note"]

Row = dict[str, str]


def notes_path(path: Path) -> Path:
    """Beside the numbers: one row for each of theirs with its status, rounds and a note."""
    return path.with_suffix(".notes.csv")


def append(path: Path, spec: Spec, result: Result) -> None:
    """A row for every attempt, with empty cells for what was not measured."""
    case = CASES[spec.case]
    row: dict[str, Any] = {name: getattr(spec, name) for name in KEY}
    row |= {"date": datetime.date.today().isoformat(), "commit": commit()}
    numbers = {name: f"{value:.5g}" for name, value in result.values.items()}
    world = {
        "device": device_name(spec.device),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "H": case.H,
        "V": case.V,
    }
    _write(path, COLUMNS, row | world | numbers)
    _write(
        notes_path(path), NOTE_COLUMNS, row | {"status": result.status, "rounds": result.rounds, "note": result.note}
    )


def _write(path: Path, columns: list[str], row: dict[str, Any]) -> None:
    new = not path.exists()
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, columns, restval="", lineterminator="\n")
        if new:
            writer.writeheader()
        writer.writerow(row)


def latest(path: Path) -> list[Row]:
    """The last attempt at every measurement, its status and note with it, in the order they were first made."""
    rows: dict[tuple[str, ...], Row] = {}
    for source, columns in ((path, COLUMNS), (notes_path(path), NOTE_COLUMNS)):
        with source.open(newline="") as file:
            reader = csv.DictReader(file)
            if reader.fieldnames != columns:
                raise ValueError(f"{source}: columns are {reader.fieldnames}, expected {columns}")
            for row in reader:
                key = tuple(row[name] for name in KEY)
                rows[key] = (rows.get(key, {}) if source != path else {}) | row
    return list(rows.values())


def _groups(rows: list[Row]) -> dict[tuple[str, ...], list[Row]]:
    groups: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault(tuple(row[name] for name in KEY[:-1]), []).append(row)
    return groups


def _figure(text: str, digits: int = 3) -> str:
    if not text:
        return ""
    value = float(text)
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.{digits}g}"


def table(rows: list[Row]) -> str:
    """Markdown: one table a shape, dtype, head and phase, with the speed-up over naive where naive was timed."""
    out = []
    for (op, case, dtype, n, head, phase), members in _groups(rows).items():
        shape = f"N {n}, H {members[0]['H']}, V {members[0]['V']}"
        out.append(f"**{op}, {case} ({shape}), {dtype}, {head} head, {phase}**\n")
        out.append(
            "| implementation | p50 ms | of GEMM | over naive | extra MB | log-prob error | gradient error | note |"
        )
        out.append("|---|---|---|---|---|---|---|---|")
        naive = next(
            (float(r["ratio_to_gemm"]) for r in members if r["implementation"] == "naive" and r["ratio_to_gemm"]), None
        )
        for row in members:
            ratio = row["ratio_to_gemm"]
            over = f"{naive / float(ratio):.2f}x" if naive and ratio else ""
            note = ": ".join(x for x in (row["status"] if row["status"] != "ok" else "", row["note"]) if x)
            numbers = (
                _figure(row["p50_ms"]),
                f"{float(ratio):.2f}" if ratio else "",
                over,
                _figure(row["peak_extra_mb"]),
            )
            errors = (_figure(row["max_logp_error"], 2), _figure(row["grad_rel_error"], 2))
            out.append("| " + " | ".join((row["implementation"], *numbers, *errors, note.replace("|", "/"))) + " |")
        out.append("")
    out.append(
        "GEMM is the plain product hidden @ weight.T in the same dtype, timed between the rounds. The head is 2 to\n"
        "8 % of the arithmetic of an 8B model's step (V 32k to 152k), so a faster loss alone moves such a step by a\n"
        "few percent; its memory is what shows end to end."
    )
    return "\n".join(out)


def plot(
    rows: list[Row], path: Path, op: str = "synpo_loss", head: str = "frozen", phase: str = "forward+backward"
) -> None:
    """Time and extra memory by implementation, one column a shape, one colour a dtype. ValueError when nothing was
    timed.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    chosen = [r for r in rows if (r["op"], r["head"], r["phase"]) == (op, head, phase)]
    timed = [r for r in chosen if r["p50_ms"]]
    if not timed:
        raise ValueError(f"no timed row of {op}, {head} head, {phase} to plot")
    shapes = list(dict.fromkeys((r["case"], r["N"]) for r in timed))
    names = [name for name in IMPLEMENTATIONS if any(r["implementation"] == name for r in timed)]
    dtypes = list(dict.fromkeys(r["dtype"] for r in timed))
    size = (2.2 + 3.6 * len(shapes), 1.8 + 0.3 * len(names) * (1 + len(dtypes)))
    figure, axes = plt.subplots(2, len(shapes), figsize=size, squeeze=False, layout="constrained")
    measures = (
        ("p50_ms", "time, ms"),
        ("peak_extra_mb", "extra memory at the peak, MB"),
    )
    for (column, label), line in zip(measures, axes, strict=True):
        for (case, n), ax in zip(shapes, line, strict=True):
            here = {(r["implementation"], r["dtype"]): r[column] for r in timed if (r["case"], r["N"]) == (case, n)}
            _bars(ax, here, names, dtypes)
            ax.set_xlabel(label)
            if ax is not line[0]:
                ax.set_yticklabels([])
        for ax, (case, n) in zip(axes[0], shapes, strict=True):
            ax.set_title(f"{case}, N {n}", fontsize=10)
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower right", ncols=len(dtypes), frameon=False)
    figure.suptitle(f"{op}, {head} head, {phase}: less is better\n{timed[0]['device']}", fontsize=11)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    plt.close(figure)


_COLOURS = {"fp32": "#4878a8", "bf16": "#d97b3c", "fp16": "#6a9f58"}


def _bars(ax: Any, values: dict[tuple[str, str], str], names: list[str], dtypes: list[str]) -> None:
    """One bar an implementation and dtype, its figure beside it; bars over twice naive's are cut, with an arrow."""
    numbers = {key: float(value) for key, value in values.items() if value}
    naive = [v for (name, _), v in numbers.items() if name == "naive"]
    edge = 2 * max(naive or numbers.values())
    height = 0.8 / len(dtypes)
    for i, dtype in enumerate(dtypes):
        places = [y + (i - (len(dtypes) - 1) / 2) * height for y in range(len(names))]
        widths = [min(numbers.get((name, dtype), 0.0), edge) for name in names]
        ax.barh(places, widths, height, color=_COLOURS[dtype], label=dtype)
        for name, place, width in zip(names, places, widths, strict=True):
            value = numbers.get((name, dtype))
            text = "-" if value is None else _figure(str(value)) + (" →" if value > edge else "")
            ax.annotate(f" {text}", (width, place), va="center", fontsize=8)
    ax.set_xlim(0, edge * 1.25)
    ax.set_yticks(range(len(names)), names)
    for tick in ax.get_yticklabels():
        tick.set_fontweight("bold" if tick.get_text() == "ours" else "normal")
    ax.invert_yaxis()
    ax.spines[["top", "right"]].set_visible(False)
