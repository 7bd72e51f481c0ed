"""python -m bench.gpu on a CPU with tiny shapes: the plumbing of every part."""

import csv
import json
import os
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
from _pytest.mark.expression import Expression

from bench import cases, gpu, gpu_attention, gpu_jobs, gpu_kernels, gpu_machine, gpu_steps, gpu_tune
from bench.cases import Case
from bench.gpu_peers import liger_cute_logps
from bench.implementations import IMPLEMENTATIONS, naive_logps
from synpo_kernels import tiling

# Loading torch's compiler warns about torch's own use.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
TINY = Case("tiny", H=16, V=64, cpu_n=(8,), gpu_n=(8,), pair_tokens=4)


class Inline:
    """A worker in this process."""

    def __init__(self, *_: object) -> None:
        pass

    def run(self, call: str, arguments: dict, limit: float) -> tuple[object, str]:
        assert limit > 0
        answer = gpu_jobs.call(call, json.loads(json.dumps(arguments)))
        return json.loads(json.dumps(answer)), ""

    def close(self) -> None:
        pass


@pytest.fixture(autouse=True)
def _tiny(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(gpu_jobs, "Worker", Inline)
    monkeypatch.setitem(cases.CASES, "tiny", TINY)
    for name in ("GOAL_CASES", "OTHER_CASES"):
        monkeypatch.setattr(gpu_kernels, name, ("tiny",))
    monkeypatch.setattr(gpu_kernels, "PEER_MODULES", ("cut_cross_entropy", "no_such_package"))
    monkeypatch.setattr(gpu_tune, "SHAPES", (("tiny", 8),))
    monkeypatch.setattr(gpu, "build_native", lambda log: None)
    monkeypatch.setattr(gpu, "install_native", lambda building, seconds: "built")
    names = ("naive", "ours", "quack")
    monkeypatch.setattr(gpu_kernels, "FORWARD_PEERS", ("quack",))
    monkeypatch.setattr(gpu_kernels, "IMPLEMENTATIONS", {name: IMPLEMENTATIONS[name] for name in names})


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def run(part: str, out: Path, *rest: str) -> int:
    return gpu.main([part, "--device", "cpu", "--out", str(out), *rest])


def test_kernels_write_rows_tables_and_reasons_and_go_on_where_they_ended(tmp_path, capsys):
    assert run("kernels", tmp_path) == 0
    (path,) = tmp_path.glob("cpu-*threads.csv")
    found = rows(path)
    assert {row["implementation"] for row in found} == {"naive", "ours", "quack"}
    assert {(row["op"], row["head"]) for row in found if row["p50_ms"]} >= {
        ("synpo_loss", "frozen"), ("synpo_loss", "trainable"), ("linear_logps", "frozen"), ("cross_entropy", "frozen"),
    }  # fmt: skip
    assert "the package quack is not installed" in capsys.readouterr().out
    assert "| frozen, forward and backward / GEMM | <= 2.3 |" in (tmp_path / "kernels.md").read_text()
    assert rows(tmp_path / "peers.csv")[1]["import"].startswith("ModuleNotFoundError")
    assert next(iter(rows(tmp_path / "ceilings.csv")))["what"].startswith("copy")
    assert json.loads((tmp_path / "world.json").read_text())["torch"] == torch.__version__
    (tmp_path / "second").mkdir()
    assert run("kernels", tmp_path / "second", "--resume", str(tmp_path)) == 0
    assert rows(tmp_path / "second" / path.name) == found


def test_kernels_stop_at_the_deadline(tmp_path, capsys):
    assert run("kernels", tmp_path, "--minutes", "0.08") == 0
    assert "rows are left; the same command goes on with them" in capsys.readouterr().out


def test_a_row_that_runs_out_of_memory_or_lacks_a_package_says_so(monkeypatch):
    def raises(error):
        def measured(*_):
            raise error

        return measured

    spec = {"op": "synpo_loss", "implementation": "naive", "case": "tiny", "dtype": "fp32", "N": 8, "head": "frozen",
            "phase": "forward", "device": "cpu", "rounds": 1, "budget": 1.0}  # fmt: skip
    for error in (torch.OutOfMemoryError("needs 90 GiB\nmore"), ImportError("no module")):
        monkeypatch.setattr(gpu_kernels.measure, "measure", raises(error))
        result = gpu_kernels.measure_row(**spec)
        assert result["status"] == "cannot run"
        assert str(error).splitlines()[0] in result["note"]


def test_the_profiled_step_runs(monkeypatch):
    monkeypatch.setattr(gpu_kernels, "PROFILED", ("tiny",))
    gpu_kernels.profiled("cpu")


def test_tune_times_checks_and_advises(tmp_path, capsys, monkeypatch):
    """On a CPU without a table there are no fused tiles to run; the advice is tried on rows as a GPU gives them."""

    def store(hidden, weight, targets, tile):
        if tile is not None:
            tile.zero_()
        z = (hidden @ weight.T).scatter(1, targets.targets[:, None], float("-inf"))
        return targets.reference, (z - targets.reference[:, None]).exp().sum(1)

    monkeypatch.setattr(gpu_tune.vocab_cuda, "store", store)
    assert run("tune", tmp_path) == 0
    found = rows(tmp_path / "tune.csv")
    assert {row["kind"] for row in found} == {"library store", "library sums", "second product"}
    assert all(row["ratio_to_gemm"] for row in found)
    for job in gpu_tune.plan("cuda", 90):
        assert job["kind"] in gpu_tune.KINDS
    tiles = [gpu_tune.describe({"tile": list(tile)}) for tile in gpu_tune.tiles(90, "store")]
    made = [{"case": "tiny", "H": "16", "V": "64", "n": "8", "kind": "store", "choice": tile, "ratio_to_gemm": str(r)}
            for r, tile in enumerate(tiles, start=1)]  # fmt: skip
    text = gpu_tune.advice(made)
    assert text.index(tiles[0]) < text.index(tiles[1])
    for line in text.splitlines():
        if "ScoreTile(" in line:  # what is to be pasted is Python that makes a tile
            assert isinstance(eval(line.strip().rstrip(","), {"ScoreTile": tiling.ScoreTile}), tiling.ScoreTile)
    assert "fused_store_until=16," in text
    monkeypatch.setattr(gpu_tune.vocab_cuda, "store", lambda *a: (a[2].reference, torch.ones(8)))
    wrong = gpu_tune.time_candidate("tiny", 8, "library store", {"block": [4, 32, 4], "mb": 1}, "cpu")
    assert wrong["note"].startswith("wrong: its log sums are")


def test_attention_is_checked_timed_and_advised_on(tmp_path, capsys):
    """On a CPU: the op's plain form, and no flash attention."""
    assert run("attention", tmp_path) == 0
    found = rows(tmp_path / "attention.csv")
    assert [row["implementation"] for row in found if row["both_ms"]] == ["kernels", "plain", "pieces"]
    assert all("off plain rows" in row["note"] for row in found)
    assert "FLASH_IS_FASTER: without (0, 0)" in (tmp_path / "attention.txt").read_text()
    assert run("attention", tmp_path) == 0
    assert len(rows(tmp_path / "attention.csv")) == len(found)


def test_what_attentions_times_say():
    def row(implementation, tile, ms):
        shape = {"model": "llama3-8b", "prompt": "4096", "answer": "512", "pairs": "1"}
        return shape | {"implementation": implementation, "tile": tile, "both_ms": ms}

    made = [row("kernels", "", "2"), row("boundaries", "", "1"), row("kernels", "forward (64, 64, 3, 4)", "1.5")]
    made += [row("kernels", "forward (128, 128, 2, 8)", "3"), row("kernels", "grad_key (64, 64, 2, 8)", "")]
    text = gpu_attention.advice(made, (9, 0))
    assert "FLASH_IS_FASTER: with (9, 0)  # 0.50" in text
    assert "# tiling.ATTENTION, heads of 128: forward (64, 64, 3, 4) 0.750 of the time in use" in text
    assert "(128, 128, 2, 8)" not in text
    made[1]["both_ms"] = "3"
    assert "FLASH_IS_FASTER: without (9, 0)" in gpu_attention.advice(made, (9, 0))
    jobs = gpu_attention.plan("cuda")
    assert len({tuple(job[name] for name in gpu_attention.NAMES) for job in jobs}) == len(jobs)
    assert all(row[name] == str(jobs[0][name]) for row in made[:1] for name in gpu_attention.NAMES)


def test_a_wrong_attention_is_not_timed(monkeypatch):
    job = gpu_attention.plan("cpu")[0]
    monkeypatch.setattr(
        gpu_attention.pieces, "_by_kernels", lambda q, k, v, *_: q.transpose(1, 2) + 0 * (k.sum() + v.sum())
    )
    assert gpu_attention.measure_attention(**job["arguments"])["note"].startswith("wrong: ")


def test_steps_of_every_loss_are_taken_and_written(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(gpu_steps, "LOSSES", ("ours", "naive", "liger"))
    for name in ("synpo-trainer-plain", "trl-dpo-trainer"):  # trl takes ten seconds to import
        monkeypatch.delitem(gpu_steps.TRAINERS, name)
    with torch.compiler.set_stance("force_eager"):
        run("steps", tmp_path)
    found = rows(tmp_path / "steps.csv")
    assert [row["loss"] for row in found] == ["ours", "naive", "liger", "synpo-trainer"]
    assert all(float(row["step_ms"]) > 0 for row in found), found
    assert all(float(row["head_share"]) > 0 for row in found[:3]), found
    assert "| tiny | 2, 5 + 4 | ours |" in (tmp_path / "steps.md").read_text()
    run("steps", tmp_path)
    assert len(rows(tmp_path / "steps.csv")) == 4


def test_the_losses_of_a_step_agree():
    """ours, naive and liger are one loss: the same step."""
    model = gpu_steps.with_adapter(gpu_steps.build("tiny", torch.device("cpu")), 4, checkpointing=False)
    batch = gpu_steps._Batch(2, 5, 4, 97, torch.device("cpu"))
    with torch.compiler.set_stance("force_eager"):
        ours, naive, liger = (gpu_steps._step(model, loss, batch).item() for loss in ("ours", "naive", "liger"))
    assert ours == pytest.approx(naive, abs=1e-5)
    assert liger == pytest.approx(naive, abs=1e-5)


def test_the_call_of_ligers_per_token_kernel():
    """On a CPU the same entry point runs in plain PyTorch."""
    hidden, weight, labels = torch.randn(6, 16), torch.randn(40, 16), torch.randint(40, (6,))
    want = naive_logps(hidden, weight, labels, None)
    torch.testing.assert_close(liger_cute_logps(hidden, weight, labels, None), want, rtol=1e-4, atol=1e-5)


def test_tests_run_pytest_on_the_device_and_report(tmp_path, monkeypatch):
    """The command is real; the tests it would run are replaced by one that passes and one that fails."""
    sample = tmp_path / "test_sample.py"
    sample.write_text("def test_right(): pass\ndef test_wrong(): assert 0\n")
    (tmp_path / "conftest.py").write_text("def pytest_addoption(parser): parser.addoption('--device')\n")
    monkeypatch.setattr(gpu, "DEVICE_TESTS", (str(sample),))
    monkeypatch.setattr(gpu, "several", list)
    monkeypatch.setattr(gpu.shutil, "which", lambda name: None)
    assert run("tests", tmp_path) == 1
    log = (tmp_path / "tests.log").read_text()
    assert "1 failed, 1 passed" in log


def test_a_command_past_its_time_is_ended_with_what_it_started(tmp_path, capsys):
    started = gpu.Run(tmp_path, 1, "cpu", dict(os.environ))
    assert not gpu._watch(started, "slow.log", ["sh", "-c", "echo begun; sleep 60 & sleep 60"], 1.0)
    assert "slow.log: cut short\nbegun" in capsys.readouterr().out


def test_every_test_of_the_device_exists():
    Expression.compile(gpu.SANITIZED)  # -k takes an expression
    assert [name for name in gpu.DEVICE_TESTS if not (gpu_machine.ROOT / name).is_file()] == []


def test_a_worker_answers_fails_hangs_and_dies_one_job_at_a_time(tmp_path, monkeypatch):
    monkeypatch.undo()
    with (tmp_path / "log").open("w") as log:
        worker = gpu_jobs.Worker(log, dict(os.environ))
        try:
            assert worker.run("json:loads", {"s": "[1, 2]"}, 30) == ([1, 2], "")
            assert worker.run("json:loads", {"s": "["}, 30)[1].startswith("JSONDecodeError: Expecting value")
            assert worker.run("time:sleep", {"seconds": 60}, 30)[1].startswith("TypeError")
            assert "ended with status 7" in worker.run("os:_exit", {"status": 7}, 30)[1]
            assert worker.run("json:loads", {"s": "3"}, 30) == (3, "")
            assert worker.run("subprocess:run", {"args": ["sleep", "60"]}, 0.5) == (None, "given up after 0 s")
            assert worker.run("json:loads", {"s": "4"}, 30) == (4, "")
        finally:
            worker.close()


def test_wheels_are_unpacked_once_and_refused_where_there_are_none(tmp_path, monkeypatch):
    calls: list[list[str]] = []

    def pip(command, **_):
        calls.append(command)
        (tmp_path / "build" / "gpu-site").mkdir(parents=True)
        return types.SimpleNamespace(returncode=0, stderr="")

    monkeypatch.setattr(gpu_machine, "BUILD", tmp_path / "build")
    monkeypatch.setattr(gpu_machine.subprocess, "run", pip)
    with pytest.raises(SystemExit, match=r"holds no \.whl file"):
        gpu_machine.unpack(tmp_path)
    (tmp_path / "peer-1-py3-none-any.whl").touch()
    paths = gpu_machine.unpack(tmp_path)
    assert paths[1] == str(tmp_path / "build" / "gpu-site")
    assert gpu_machine.unpack(tmp_path) == paths
    assert len(calls) == 1
    assert "--no-index" in calls[0]


def test_without_a_compiler_the_run_goes_on(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_machine, "BUILD", tmp_path)
    failed = subprocess.Popen([sys.executable, "-c", "raise SystemExit(1)"])
    assert "PyTorch does the CPU's work" in gpu_machine.install_native(failed, 30)
