"""python -m bench from end to end: rows, columns, reasons, table and plot."""

import csv
import itertools

import pytest

from bench import __main__ as command
from bench import report
from bench.measure import Result, Spec

COLUMNS = (
    "date,commit,device,torch,triton,op,implementation,case,dtype,N,H,V,head,phase,"
    "p20_ms,p50_ms,p80_ms,gemm_ms,ratio_to_gemm,peak_extra_mb,max_logp_error,grad_rel_error"
)
TIMES = {"p20_ms": 1.5, "p50_ms": 2.0, "p80_ms": 2.5, "gemm_ms": 1.0, "ratio_to_gemm": 2.0, "peak_extra_mb": 10.0}


def test_a_run_appends_rows_with_exactly_the_columns_and_prints_a_table(tmp_path, capsys):
    out = tmp_path / "results" / "here.csv"  # the folder is made by the first row
    arguments = ["--case", "smollm2-135m", "--n", "2", "--dtype", "fp32", "--rounds", "2", "--device", "cpu"]
    assert command.main([*arguments, "--impl", "naive", "cut-cross-entropy-exact", "--out", str(out)]) == 0
    assert out.read_text().splitlines()[0] == COLUMNS
    naive, absent = csv.DictReader(out.read_text().splitlines())
    assert (naive["implementation"], naive["N"], naive["H"], naive["V"]) == ("naive", "2", "576", "49152")
    assert float(naive["p20_ms"]) <= float(naive["p50_ms"]) <= float(naive["p80_ms"])
    assert float(naive["max_logp_error"]) < 1e-4
    assert absent["p50_ms"] == ""
    printed = capsys.readouterr()
    assert "cannot run: its Triton kernels need a GPU" in printed.out
    assert "2/2" in printed.err


def _fill(path):
    for name, dtype in itertools.product(("naive", "ours"), ("fp32", "bf16")):
        s = Spec("synpo_loss", name, "llama3-8b", dtype, 1024, "frozen", "forward+backward", "cpu", 5, 60)
        numbers = TIMES | {"max_logp_error": 1e-6, "grad_rel_error": 2e-6}
        if name == "ours":
            numbers |= {"ratio_to_gemm": 0.8, "peak_extra_mb": 1.0}
        report.append(path, s, Result("ok", "", 5, numbers))
    return s


def test_report_renders_a_table_and_a_plot(tmp_path, capsys):
    out, png = tmp_path / "r.csv", tmp_path / "plots" / "r.png"
    _fill(out)
    assert command.main(["--report", "--out", str(out), "--plot", str(png)]) == 0
    assert "| ours | 2 | 0.80 | 2.50x | 1 | 1e-06 | 2e-06 |  |" in capsys.readouterr().out
    assert png.read_bytes()[:4] == b"\x89PNG"


def test_the_latest_attempt_at_a_measurement_counts(tmp_path):
    out = tmp_path / "r.csv"
    s = _fill(out)
    report.append(out, s, Result("mismatch", "not timed: | off", 0, {"max_logp_error": 3.0}))
    rows = report.latest(out)
    assert len(rows) == 4
    assert rows[-1]["p50_ms"] == ""
    assert "mismatch: not timed: / off" in report.table(rows)
    assert "| 3 |" in report.table(rows)


def test_a_file_with_other_columns_is_refused(tmp_path):
    out = tmp_path / "r.csv"
    out.write_text("date,op\n")
    with pytest.raises(ValueError, match=r"r\.csv: columns are \['date', 'op'\]"):
        report.latest(out)


def test_a_plot_of_nothing_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no timed row"):
        report.plot([], tmp_path / "x.png")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--n", "7"], "--n 7"),
        (["--case", "llama4"], "invalid choice: 'llama4'"),
        (["--report", "--out", "nowhere.csv"], "nowhere.csv does not exist"),
    ],
)
def test_bad_arguments_end_with_one_line(arguments, message, capsys):
    with pytest.raises(SystemExit) as error:
        command.main([*arguments, "--device", "cpu"])
    assert error.value.code == 2
    assert message in capsys.readouterr().err
