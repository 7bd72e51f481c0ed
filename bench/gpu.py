"""python -m bench.gpu: everything that waits for a GPU, on a machine without a network.

    python -m bench.gpu                the kernel tests, then the benchmark's kernels
    python -m bench.gpu tests          the kernel tests on the GPU, and compute-sanitizer on small shapes
    python -m bench.gpu kernels        ceilings, and every case against every peer that imports
    python -m bench.gpu tune           times the candidates of tiling.py, and prints the lines to paste there
    python -m bench.gpu steps          training steps in the shapes of 8B models
    python -m bench.gpu attention      prefix_attention beside PyTorch's attention, in the shapes of models
    python -m bench.gpu decoding       bench.contrastive for 1, 8 and 64 rows, V 32,000 and 151,936

Needs Python, torch, triton and pytest; --wheels names a folder of wheels to use beside what is installed. Every row is
written as soon as it is measured; rows found in --out (or copied there by --resume) are not measured again, so a run
that was cut short goes on. C++ kernels are built beside the measurements where there is a compiler.
"""

import argparse
import csv
import importlib.util
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .gpu_machine import BUILD, ROOT, build_native, install_native, unpack, world

PARTS = ("tests", "kernels", "tune", "steps", "attention", "decoding")
MINUTES = 8.5  # of a part by itself, and of the two that run by default
TEST_MINUTES = 3.5  # of them, the tests'
# The launchers themselves, and the tests of the ops that ask for a device.
DEVICE_TESTS = (
    "tests/kernels/interpreted.py", "tests/kernels/interpreted_attention.py", "tests/kernels/test_on_gpu.py",
    "tests/kernels/test_linear_logps.py", "tests/kernels/test_pair_loss.py", "tests/kernels/test_prefix_attention.py",
    "tests/kernels/test_golden.py", "tests/kernels/test_as_torch_ops.py",
)  # fmt: skip
SANITIZED = "edges or one_launch"  # of the first two, under compute-sanitizer: ragged tiles of every route, the loss
SANITIZER_SECONDS = 100
# Nsight Compute on our kernels, before tuning: how near each unit is to its peak, and what warps wait for.
PROFILER = (
    "ncu", "--clock-control", "none", "--launch-count", "16",
    "--kernel-name", "regex:_score_kernel|_pass_kernel|_reduce_kernel|_rescale_kernel|_synpo_kernel",
    "--section", "SpeedOfLight", "--section", "ComputeWorkloadAnalysis", "--section", "MemoryWorkloadAnalysis",
    "--section", "WarpStateStats", "--section", "Occupancy",
)  # fmt: skip
PROFILER_SECONDS = 90
DECODING = tuple(itertools.product((64, 8, 1), (151_936, 32_000)))  # rows of each view, V; the goal's first


class Run:
    """A run's outputs, its clock and the environment of its processes."""

    def __init__(self, out: Path, minutes: float, device: str, environment: dict[str, str]) -> None:
        self.out, self.device, self.environment = out, device, environment
        self.started = time.monotonic()
        self.deadline = self.started + 60 * minutes

    def left(self) -> float:
        """Seconds until the deadline."""
        return self.deadline - time.monotonic()

    def say(self, text: str) -> None:
        print(f"[{time.monotonic() - self.started:5.0f} s] {text}", flush=True)


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog="python -m bench.gpu", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    p.add_argument("part", nargs="?", choices=PARTS, help="default: tests, then kernels")
    p.add_argument("--out", type=Path, default=BUILD / "gpu", help="folder of the outputs (build/gpu)")
    p.add_argument("--wheels", type=Path, help="folder of wheels to unpack and use; nothing is fetched")
    p.add_argument("--resume", type=Path, help="--out of an earlier run, whose rows are kept")
    p.add_argument("--minutes", type=float, default=MINUTES, help=f"time for all of it ({MINUTES:g})")
    p.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: to try the command out (cuda)")
    return p


def main(argv: list[str] | None = None) -> int:
    p = parser()
    args = p.parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    BUILD.mkdir(exist_ok=True)
    if args.resume is not None:
        for path in args.resume.glob("*.csv"):
            if not (args.out / path.name).exists():
                shutil.copy(path, args.out)
    paths = unpack(args.wheels)
    sys.path[:0] = paths
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "PYTHONUNBUFFERED": "1"}
    run = Run(args.out.resolve(), args.minutes, args.device, environment)
    if args.device == "cuda":
        import torch

        if not torch.cuda.is_available():
            p.error("torch sees no GPU here; --device cpu tries the command out")
    (run.out / "world.json").write_text(json.dumps(world(), indent=1))
    with (run.out / "native.log").open("w") as log:
        building = build_native(log)
        failed = [part for part in ([args.part] if args.part else PARTS[:2]) if not _run(part, run, args.part is None)]
        run.say(f"C++ kernels: {install_native(building, max(run.left(), 1.0))}")
    if failed:
        run.say(f"failed: {', '.join(failed)}")
    return int(bool(failed))


def _run(part: str, run: Run, shared: bool) -> bool:
    run.say(part)
    if part == "tests":
        return run_tests(run, min(run.left(), 60 * TEST_MINUTES) if shared else run.left())
    parts = {"kernels": run_kernels, "tune": run_tune, "steps": run_steps, "attention": run_attention}
    return (parts | {"decoding": run_decoding})[part](run)


def pytest_command(run: Run, *rest: str) -> list[str]:
    """Warnings are shown, not raised: the versions here are not those the project is tested with."""
    quiet = ("-p", "no:cacheprovider", "-p", "no:benchmark", "-W", "default", "--durations=15", "--tb=short")
    return [sys.executable, "-m", "pytest", *quiet, "--device", run.device, *rest]


def several() -> list[str]:
    """Several processes where pytest-xdist is there: most of the time is Triton compiling."""
    return ["-n", "6"] if importlib.util.find_spec("xdist") else []


def run_tests(run: Run, seconds: float) -> bool:
    """The kernel tests on the device, then a few of them under compute-sanitizer where it is installed."""
    start = time.monotonic()
    command = pytest_command(run, "-v", *several(), *DEVICE_TESTS)
    passed = _watch(run, "tests.log", command, seconds)
    tool = shutil.which("compute-sanitizer")
    left = seconds - (time.monotonic() - start)
    if tool is None:
        run.say("compute-sanitizer is not installed")
    elif left < 20:
        run.say("compute-sanitizer: no time left for it")
    else:
        checked = [tool, "--error-exitcode", "9", *pytest_command(run, *DEVICE_TESTS[:2])]
        # Without the caching allocator a tensor ends where its allocation does, so that a step beyond it shows.
        passed &= _watch(
            run,
            "sanitizer.log",
            [*checked, "-k", SANITIZED],
            min(left, SANITIZER_SECONDS),
            {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
        )
    return passed


def _watch(run: Run, name: str, command: list[str], seconds: float, extra: dict[str, str] | None = None) -> bool:
    """Runs a command with its output in a file of --out; says how it ended and shows the last lines."""
    path = run.out / name
    environment = run.environment | {"CUBLAS_WORKSPACE_CONFIG": ":4096:8"} | (extra or {})
    with path.open("w") as log:
        # A session of its own: what the command started ends with it.
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            status: int | None = process.wait(max(seconds, 1.0))
        except subprocess.TimeoutExpired:
            status = None
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    lines = path.read_text(errors="replace").splitlines()
    shown = [line for line in lines if line.startswith(("FAILED", "ERROR"))][:40] + lines[-4:]
    run.say(f"{name}: {'cut short' if status is None else f'exit status {status}'}\n" + "\n".join(shown))
    return status == 0


def run_kernels(run: Run) -> bool:
    """Ceilings, then the rows of gpu_kernels.plan until the time is up; their table, and the goals'."""
    from dataclasses import asdict

    from . import gpu_kernels, report
    from .gpu_jobs import Worker
    from .measure import Result, device_name

    out = run.out / f"{device_name(run.device)}.csv"
    specs = gpu_kernels.plan(run.device)
    known = {tuple(row[name] for name in report.KEY) for row in report.latest(out)
             if row["status"] not in ("failed", "timed out")} if out.exists() else set()  # fmt: skip
    todo = [spec for spec in specs if tuple(str(getattr(spec, name)) for name in report.KEY) not in known]
    failed = 0
    with (run.out / "worker.log").open("a") as log:
        worker = Worker(log, run.environment)
        try:
            _imports(run, worker)
            _ceilings(run, worker, list(gpu_kernels.GOAL_CASES))
            for number, spec in enumerate(todo):
                if run.left() < 5:
                    run.say(f"{len(todo) - number} of {len(specs)} rows are left; the same command goes on with them")
                    break
                limit = min(gpu_kernels.LIMIT, run.left())
                answer, wrong = worker.run("bench.gpu_kernels:measure_row", asdict(spec), limit)
                if wrong and run.left() < 1:
                    break  # cut off by the deadline, not by the row's own limit
                status = "timed out" if wrong.startswith("given up") else "failed"
                result = Result(status, wrong) if wrong else Result(**answer)
                report.append(out, spec, result)
                failed += result.status in ("failed", "mismatch")
                run.say(_line(spec, result))
        finally:
            worker.close()
    if out.exists():
        rows = report.latest(out)
        text = f"{gpu_kernels.goals(rows)}\n\n{report.table(rows)}\n"
        (run.out / "kernels.md").write_text(text)
        print(gpu_kernels.goals(rows))
    return not failed


def _line(spec: Any, result: Any) -> str:
    values = result.values
    figures = f"{values['p50_ms']:.2f} ms, {values['ratio_to_gemm']:.2f} of GEMM" if "p50_ms" in values else result.note
    row = f"{spec.case} N={spec.N} {spec.head} {spec.phase} {spec.op} {spec.implementation}"
    return f"{row}: {result.status}: {figures}"


def _imports(run: Run, worker: Any) -> None:
    """Which peers import here, and why the others do not."""
    answer, wrong = worker.run("bench.gpu_kernels:imports", {}, min(90.0, run.left()))
    rows = [{"package": "all", "import": wrong}] if wrong else answer
    (run.out / "peers.csv").unlink(missing_ok=True)
    append(run.out / "peers.csv", ["package", "import"], rows)
    for row in rows:
        run.say(f"{row['package']}: {row['import']}")


def _ceilings(run: Run, worker: Any, cases: list[str]) -> None:
    path = run.out / "ceilings.csv"
    if path.exists():
        return
    arguments = {"device": run.device, "cases": cases}
    answer, wrong = worker.run("bench.gpu_kernels:ceilings", arguments, min(120.0, run.left()))
    if wrong:
        run.say(f"ceilings: {wrong}")
        return
    append(path, ["what", "shape", "ms", "per_s"], answer)
    for row in answer:
        run.say(f"{row['what']} {row['shape']}: {row['ms']:.3f} ms, {row['per_s'] / 1e12:.4g} T/s")


def append(path: Path, columns: list[str], rows: list[dict[str, Any]]) -> None:
    """Rows at the end of a CSV, which gets its columns' names where it is new."""
    new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, columns, restval="", lineterminator="\n")
        if new:
            writer.writeheader()
        writer.writerows(rows)


def read(path: Path) -> list[dict[str, str]]:
    """The rows of a CSV; none where there is no file."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def _measured(
    run: Run, path: Path, names: tuple[str, ...], jobs: list[dict[str, Any]], call: str, limit: float
) -> Iterator[tuple[dict[str, Any], Any, str]]:
    """Each job that has no row in ``path`` yet, by these names, with its answer or what went wrong, until the time is
    up; all in one worker.
    """
    from .gpu_jobs import Worker

    done = {tuple(row[name] for name in names) for row in read(path)}
    with (run.out / "worker.log").open("a") as log:
        worker = Worker(log, run.environment)
        try:
            for job in jobs:
                if tuple(str(job[name]) for name in names) in done:
                    continue
                if run.left() < 5:
                    run.say("the time is up; the same command goes on with the rest")
                    break
                yield job, *worker.run(call, job["arguments"], min(limit, run.left()))
        finally:
            worker.close()


def run_tune(run: Run) -> bool:
    """Times every candidate on every shape until the time is up; the advice from all rows so far."""
    import torch

    from . import gpu_tune
    from .cases import CASES

    path = run.out / "tune.csv"
    if shutil.which(PROFILER[0]) is None:
        run.say("Nsight Compute (ncu) is not installed: no profile")
    elif not (run.out / "ncu.log").exists():
        code = f"from bench.gpu_kernels import profiled; profiled({run.device!r})"
        _watch(run, "ncu.log", [*PROFILER, sys.executable, "-c", code], min(PROFILER_SECONDS, run.left()))
    jobs = gpu_tune.plan(run.device, gpu_tune.architecture(torch.device(run.device)))
    names = ("case", "n", "kind", "choice")
    for job, answer, wrong in _measured(run, path, names, jobs, "bench.gpu_tune:time_candidate", gpu_tune.LIMIT):
        case = CASES[job["case"]]
        row = {name: job[name] for name in names} | {"H": case.H, "V": case.V} | (answer or {"note": wrong})
        append(path, gpu_tune.COLUMNS, [row])
        run.say(f"{row['case']} n={row['n']} {row['kind']} {row['choice']}: {row.get('ratio_to_gemm') or row['note']}")
    advice = gpu_tune.advice(read(path))
    (run.out / "tiling.txt").write_text(advice + "\n")
    print(advice)
    return True


def run_steps(run: Run) -> bool:
    """The rows of gpu_steps.plan, a fresh process each, until the time is up."""
    from . import gpu_steps
    from .gpu_jobs import Worker

    path = run.out / "steps.csv"
    identity = ("model", "loss", "pairs", "prompt", "answer", "checkpointing")
    done = {tuple(row[name] for name in identity) for row in read(path) if row["step_ms"]}
    failed = False
    with (run.out / "worker.log").open("a") as log:
        for job in gpu_steps.plan(run.device):
            if tuple(str(job[name]) for name in identity) in done:
                continue
            if run.left() < 20:
                run.say("the time is up; the same command goes on with the rest")
                break
            worker = Worker(log, run.environment)
            try:
                answer, wrong = worker.run(
                    "bench.gpu_steps:measure_steps", job | {"device": run.device}, min(gpu_steps.LIMIT, run.left())
                )
            finally:
                worker.close()
            row = gpu_steps.world(run.device) | job | (answer or {"note": wrong})
            append(path, gpu_steps.COLUMNS, [row])
            failed |= bool(wrong) and "OutOfMemory" not in wrong and "ModuleNotFound" not in wrong
            run.say(gpu_steps.line(row))
    table = gpu_steps.table(read(path))
    (run.out / "steps.md").write_text(table + "\n")
    print(table)
    return not failed


def run_attention(run: Run) -> bool:
    """The rows of gpu_attention.plan until the time is up, and the advice from all rows so far."""
    import torch

    from . import gpu_attention
    from .measure import where

    path, passed = run.out / "attention.csv", True
    jobs, limit = gpu_attention.plan(run.device), gpu_attention.LIMIT
    call = "bench.gpu_attention:measure_attention"
    for job, answer, wrong in _measured(run, path, gpu_attention.NAMES, jobs, call, limit):
        row = {name: job[name] for name in gpu_attention.NAMES} | where(run.device)
        row |= answer or {"note": wrong}
        append(path, gpu_attention.COLUMNS, [row])
        passed &= bool(job["tile"] or row.get("both_ms"))  # a tile may not fit; what is used must run
        run.say(gpu_attention.line(row))
    capability = torch.cuda.get_device_capability() if run.device == "cuda" else (0, 0)
    text = gpu_attention.advice(read(path), capability)
    (run.out / "attention.txt").write_text(text + "\n")
    print(text)
    return passed


def run_decoding(run: Run) -> bool:
    """bench.contrastive on every size, until the time is up."""
    path, passed = run.out / "contrastive.csv", True
    for batch, vocabulary in DECODING:
        if any((row["B"], row["V"]) == (str(batch), str(vocabulary)) for row in read(path)):
            continue
        if run.left() < 20:
            run.say("the time is up; the same command goes on with the rest")
            break
        sizes = ("--batch", str(batch), "--vocabulary", str(vocabulary))
        laws = ("--law", "top-k, top-p", "release", "greedy")
        where = ("--dtype", "bf16", "--device", run.device, "--out", str(path))
        command = [sys.executable, "-m", "bench.contrastive", *sizes, *laws, *where]
        passed &= _watch(run, f"contrastive-{batch}-{vocabulary}.log", command, run.left())
    return passed


if __name__ == "__main__":
    sys.exit(main())
