"""Every number of README's and the bench page's tables comes from bench/results; two commits can be compared."""

from contextlib import nullcontext

import pytest

from bench import __main__ as command
from bench import compare, figures, report
from bench.cases import CASES, SWEEPS
from bench.measure import Result, Spec


def test_the_pages_show_what_is_recorded():
    """After new rows: python -m bench.figures."""
    for path, text in figures.pages().items():
        assert path.read_text() == text, f"{path.name} is not what bench/results says"
        for line in text.splitlines():
            if line.startswith("![") and "figures/" in line:
                assert (path.parent / line.split("(")[1].rstrip(")")).is_file(), line


def _rows(tmp_path, points):
    out = tmp_path / "cpu-here.csv"
    for case, n in points:
        for name, ratio, mb in (("naive", 2.0, 300.0), ("liger", 1.9, 190.0), ("ours", 1.25, 15.0)):
            s = Spec("synpo_loss", name, case, "fp32", n, "frozen", "forward+backward", "cpu", 5, 60)
            values = {"p50_ms": 100 * ratio, "ratio_to_gemm": ratio, "peak_extra_mb": mb}
            report.append(out, s, Result("ok", "", 5, values))
    return report.latest(out)


def test_the_table_has_the_fastest_peer_and_the_gain(tmp_path):
    table = figures.loss_table(_rows(tmp_path, [("llama3-8b", 1024)]))
    assert "| 0.200 s, 300 MB | liger: 0.190 s, 190 MB | 0.125 s, 15 MB | 1.60x, 20x less memory |" in table


def test_a_row_given_up_shows_its_bound(tmp_path):
    out = tmp_path / "cpu-here.csv"
    note = "given up after 240 s in its first full run, 1503 MB above what was held before"
    for name, result in (
        ("naive", Result("timed out", note)),
        ("ours", Result("ok", "", 5, {"p50_ms": 1e4, "ratio_to_gemm": 1.0, "peak_extra_mb": 15.0})),
    ):
        s = Spec("synpo_loss", name, "llama3-8b", "bf16", 1024, "frozen", "forward+backward", "cpu", 5, 60)
        report.append(out, s, result)
    assert "| given up after 240 s, over 1503 MB |  | 10.0 s, 15 MB |  |" in figures.loss_table(report.latest(out))


def test_sweeps_are_drawn_along_every_axis(tmp_path):
    points = {(case.name, n): None for axis in SWEEPS.values() for case, n in axis["cpu"]}
    rows = _rows(tmp_path, points)
    assert figures.swept(rows, "cpu") == {(case, str(n)) for case, n in points}
    figures.plot_sweeps(rows, "cpu", tmp_path / "sweeps.png")
    assert (tmp_path / "sweeps.png").read_bytes()[:4] == b"\x89PNG"
    assert [x for x, *_ in figures.along("masked", "cpu")] == [0.0, 0.25, 0.5, 0.75]
    assert CASES["1024x49152-masked-0.5"].masked == 0.5


def test_a_base_that_git_does_not_know_is_named():
    with pytest.raises(SystemExit, match="no-such-commit"):
        command.main(["--case", "smollm2-135m", "--n", "2", "--dtype", "fp32", "--base", "no-such-commit"])


def test_two_trees_are_measured_in_turns(tmp_path, monkeypatch):
    """Of each tree's processes the median ratio and the highest peak count; both trees answer one oracle."""
    calls = []

    def process(arguments, limit, root=compare.ROOT):
        calls.append((arguments[0], root))
        if arguments[0] == "expect":
            return "{}", ""
        ratio = (2.0, 9.0, 2.2)[len(calls) // 2 - 1] if root == tmp_path else 1.1
        values = f'{{"ratio_to_gemm": {ratio}, "peak_extra_mb": {len(calls)}}}'
        return f'{{"status": "ok", "note": "", "rounds": 5, "values": {values}}}', ""

    monkeypatch.setattr(compare, "tree_of", lambda ref: nullcontext(tmp_path))
    monkeypatch.setattr(compare.measure, "in_fresh_process", process)
    s = Spec("synpo_loss", "naive", "llama3-8b", "fp32", 1024, "frozen", "forward+backward", "cpu", 5, 60)
    table, good = compare.compare([s, s], "v1", 60.0)
    assert good
    assert [root for kind, root in calls if kind == "measure"] == [tmp_path, compare.ROOT] * 3
    assert "| 2.200 | 1.100 | -50.0% | 6.0 | 7.0 |" in table
