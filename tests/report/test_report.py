"""`synpo report`: reading metrics.jsonl, and what is drawn of it."""

import json
import math
from pathlib import Path
from typing import Any

import matplotlib.image
import matplotlib.pyplot as plt
import numpy as np
import pytest

from synpo import cli, report


def write(folder: Path, records: list[dict[str, Any]]) -> Path:
    folder.mkdir(parents=True)
    (folder / report.METRICS_FILE).write_text("".join(json.dumps(record) + "\n" for record in records))
    return folder


def records(steps: int = 5) -> list[dict[str, Any]]:
    training = [
        {
            "step": step,
            "epoch": step / steps,
            "loss": -0.1 * step,
            "logps/chosen": -2 + 0.1 * step,
            "logps/rejected": -2 - 0.1 * step,
            "grad_share/chosen": 0.5,
        }
        for step in range(1, steps + 1)
    ]
    return [
        {"step": 0, "eval_logps/chosen": -2.5},
        *training,
        {"step": steps, "eval_logps/chosen": -1.5},
        {"step": steps, "train_runtime": 3.0},
    ]


@pytest.fixture
def drawn(monkeypatch):
    """The figures that were drawn, kept open."""
    figures = []
    monkeypatch.setattr(report.plt, "close", figures.append)
    yield figures
    monkeypatch.undo()
    plt.close("all")


def test_training_and_held_out_curves_are_read_apart(tmp_path):
    run = report.read_run(write(tmp_path / "a", records(3)), "a")
    assert run.training["logps/chosen"] == [(1, -1.9), (2, -1.8), (3, pytest.approx(-1.7))]
    assert run.held_out == {"logps/chosen": [(0, -2.5), (3, -1.5)]}
    assert run.training.keys() == {"loss", "logps/chosen", "logps/rejected", "grad_share/chosen"}


def test_a_file_is_a_run_too(tmp_path):
    folder = write(tmp_path / "a", records())
    assert report.read_run(folder / report.METRICS_FILE, "a") == report.read_run(folder, "a")


def test_a_value_that_was_not_finite_is_a_gap(tmp_path):
    rows = [{"step": 1, "loss": 1.0}, {"step": 2, "loss": None}, {"step": 3, "loss": 3.0}]
    series = report.read_run(write(tmp_path / "a", rows), "a").training["loss"]
    assert [math.isnan(value) for _, value in series] == [False, True, False]


@pytest.mark.parametrize(
    ("content", "error", "message"),
    [
        (None, FileNotFoundError, r"no metrics.jsonl"),
        ("", ValueError, r"no curve in it"),
        ('{"step": 1, "epoch": 1}\n', ValueError, r"no curve in it"),
        ('{"step": 1, "loss": 1}\n{"loss": 1}\n', ValueError, r"metrics.jsonl:2: a record with a number `step`"),
        ('{"step": 1, "loss": 1}\n[1]\n', ValueError, r"metrics.jsonl:2: a record with a number `step`"),
        ('{"step": 1, "loss"\n{"step": 2, "loss": 1}\n', ValueError, r"metrics.jsonl:1: not a line of JSON"),
    ],
)
def test_what_is_not_a_run_is_named(tmp_path, content, error, message):
    if content is not None:
        (tmp_path / report.METRICS_FILE).write_text(content)
    with pytest.raises(error, match=message):
        report.read_run(tmp_path, "a")


def test_labels_are_as_short_as_they_can_be():
    assert report.labels([Path("/x/a/run"), Path("/x/dpo")]) == ["run", "dpo"]
    assert report.labels([Path("/x/a/run"), Path("/x/b/run"), Path("/x/dpo")]) == ["a/run", "b/run", "x/dpo"]
    assert report.labels([Path("/x/run"), Path("/x/run")]) == ["run", "run"]


def test_smoothing_keeps_lines_straight_and_steps_over_gaps():
    line = [(float(step), 2.0 * step) for step in range(100)]
    assert np.allclose(report.smooth(line), line, rtol=1e-14)
    assert report.smooth(line[:30]) == line[:30]
    gap = [*line[:50], (50.0, math.nan), *line[51:]]
    assert np.allclose(report.smooth(gap)[50], (50.0, 100.0), rtol=1e-14)


def test_the_command_draws_every_run_of_every_panel(tmp_path, drawn, capsys):
    folders = [write(tmp_path / name, records(60)) for name in ("one", "two")]
    assert cli.main(["report", *map(str, folders), "--out", str(tmp_path / "out")]) == 0
    file = tmp_path / "out" / report.CURVES_FILE
    assert capsys.readouterr().out.split() == [str(file), str(tmp_path / "out" / report.PAGE_FILE)]
    image = matplotlib.image.imread(file)
    assert min(image.shape[:2]) > 300
    assert image.std() > 0.05

    figure, *single = drawn
    assert len(single) == 2 * 3  # each panel by itself, on light and dark ground
    assert [len(one.axes) for one in single] == [1] * 6
    assert single[0].get_facecolor() == figure.get_facecolor() != single[1].get_facecolor()
    axes = {a.get_title(): a for a in figure.axes if a.get_visible()}
    assert axes.keys() == {"log-prob per token", "share of the gradient", "loss"}  # what the runs have
    lines = axes["log-prob per token"].get_lines()
    assert len(lines) == 2 * (2 * 2 + 1)  # per run: two metrics, each smooth and raw, and the held-out points
    assert {line.get_color() for line in axes["loss"].get_lines()} == set(report.SCHEMES["light"].lines[:2])
    held_out = next(line for line in lines if line.get_marker() == "o")
    assert np.array_equal(held_out.get_xydata(), [[0, -2.5], [60, -1.5]])
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["one", "two", "held-out pairs"]


@pytest.mark.parametrize("panels", [1, 3])
@pytest.mark.parametrize("name", ["a", "a-run-with-quite-a-long-name"])
def test_nothing_overlaps(tmp_path, drawn, panels, name):
    runs = [report.read_run(write(tmp_path / name, records(60)), name)] * 3
    report.curves_png(runs, report.panels_of(runs)[:panels])
    (figure,) = drawn
    renderer = figure.canvas.get_renderer()
    boxes = [a.get_tightbbox(renderer) for a in figure.axes if a.get_visible()]
    boxes += [legend.get_window_extent(renderer) for legend in figure.legends]
    for box in boxes:
        assert box.xmin >= 0
        assert box.xmax <= figure.bbox.xmax
        assert box.ymax <= figure.bbox.ymax
    for i, one in enumerate(boxes):
        assert not any(one.overlaps(other) for other in boxes[i + 1 :])


def test_a_bad_run_ends_in_one_line(tmp_path, capsys):
    assert cli.main(["report", str(tmp_path / "nothing")]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "no metrics.jsonl here" in error
