"""One measurement: a row of the results. It runs in a fresh process, so that a peak of memory is that
implementation's own.

Order: a run on a few tokens loads libraries; the first full run gives the peak of memory and the values to check;
they are checked; only then is time taken, in rounds interleaved with the plain product hidden @ weight.T of the same
dtype, to which every time is a ratio. An implementation that compiles, and on a GPU every one, has a full run before
the peak is taken: the compiler's time and memory are not the loss's.
"""

import datetime
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from . import oracle
from .cases import CASES, Inputs, make_inputs
from .implementations import IMPLEMENTATIONS
from .memory import Peak
from .oracle import Expected

ROOT = Path(__file__).parent.parent
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
HEADS = ("frozen", "trainable")
PHASES = ("forward", "forward+backward")


@dataclass(frozen=True)
class Spec:
    """What to measure."""

    op: str
    implementation: str
    case: str
    dtype: str
    N: int
    head: str
    phase: str
    device: str
    rounds: int  # wanted; fewer where the budget ends first
    budget: float  # seconds for the timed rounds


@dataclass
class Result:
    """What came out; None where nothing was measured. status: ok | mismatch | cannot run | failed | timed out."""

    status: str
    note: str = ""
    rounds: int = 0
    values: dict[str, float] = field(default_factory=dict)  # column -> number


def device_name(device: str = "cpu") -> str:
    """A file name for the hardware: model, and for a CPU its widest vector extension and the threads used."""
    if device == "cuda":
        return _slug(torch.cuda.get_device_name())
    model = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        model = next(
            (line.split(":")[1] for line in info.read_text().splitlines() if line.startswith("model name")), model
        )
    flags = info.read_text() if info.exists() else ""
    vectors = next((name for name in ("avx512_bf16", "avx512f", "avx2") if name in flags), platform.machine())
    return _slug(f"cpu-{model}-{vectors}-{torch.get_num_threads()}-threads")


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def commit() -> str:
    """The commit measured, with "+" where a measured source differs from it; empty outside a git checkout."""

    def git(*command: str) -> str:
        return subprocess.run(["git", "-C", str(ROOT), *command], capture_output=True, text=True).stdout.strip()

    changed = git("status", "--porcelain", "--", "synpo_kernels", "synpo", "csrc", "bench/*.py")
    return git("rev-parse", "--short", "HEAD") + ("+" if changed else "")


def where(device: str) -> dict[str, str]:
    """What a row says of where it was measured."""
    return {
        "date": datetime.date.today().isoformat(),
        "commit": commit(),
        "device": device_name(device),
        "torch": torch.__version__,
    }


def percentile(values: list[float], p: float) -> float:
    """p-th percentile with linear interpolation; one value is all of its percentiles."""
    return (
        values[0] if len(values) == 1 else statistics.quantiles(sorted(values), n=100, method="inclusive")[round(p) - 1]
    )


class Stopwatch:
    """Milliseconds of a call; on a GPU between events around it."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def __call__(self, run: Callable[[], object]) -> float:
        if self.device.type != "cuda":
            start = time.perf_counter()
            run()
            return (time.perf_counter() - start) * 1e3
        torch.cuda.synchronize(self.device)
        start_event, end_event = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start_event.record()
        run()
        end_event.record()
        torch.cuda.synchronize(self.device)
        return start_event.elapsed_time(end_event)


def step(spec: Spec, inputs: Inputs) -> Callable[[], tuple[Tensor, tuple[Tensor, ...]]]:
    """The measured call: gives the log-probs and the gradients that the phase asks for."""
    backward = spec.phase == "forward+backward"
    hidden = inputs.hidden.detach().requires_grad_(backward)
    weight = inputs.weight.detach().requires_grad_(backward and spec.head == "trainable")
    leaves = [x for x in (hidden, weight) if x.requires_grad]
    run = IMPLEMENTATIONS[spec.implementation].bind(spec.op, inputs)

    def call() -> tuple[Tensor, tuple[Tensor, ...]]:
        with torch.set_grad_enabled(backward):
            output, logps = run(hidden, weight)
        if not backward:
            return logps, ()
        incoming = inputs.grad.to(output.dtype) if output.ndim else None
        return logps.detach(), torch.autograd.grad(output, leaves, incoming)

    return call


def few_tokens(inputs: Inputs) -> Inputs:
    """One token an answer and a small vocabulary: enough to load what a first call loads."""
    answers, columns = len(inputs.cu_seqlens) - 1, min(1024, len(inputs.weight))
    return inputs._replace(
        hidden=inputs.hidden[:answers].clone(),
        weight=inputs.weight[:columns].clone(),
        labels=inputs.labels[:answers].clamp(0, columns - 1),
        cu_seqlens=torch.arange(answers + 1, device=inputs.labels.device, dtype=torch.int32),
        grad=inputs.grad[:answers],
    )


def give_up(peak: Peak, limit: float) -> None:
    """End this process with what is known of a first run that has not ended: a lower bound of its memory."""
    note = f"given up after {limit:g} s in its first full run, {peak.extra_mb():.0f} MB above what was held before"
    print(json.dumps(asdict(Result("timed out", note))), flush=True)
    os._exit(0)


def measure(spec: Spec, expected: Expected, limit: float | None = None) -> Result:
    """The row of ``spec``. limit: seconds after which a first full run on a CPU ends the process, in ``give_up``."""
    device, dtype = torch.device(spec.device), DTYPES[spec.dtype]
    inputs = make_inputs(CASES[spec.case], spec.N, dtype, device)
    stopwatch = Stopwatch(device)
    call = step(spec, inputs)
    if device.type == "cpu":
        step(spec, few_tokens(inputs))()
    if device.type != "cpu" or IMPLEMENTATIONS[spec.implementation].compiles:
        call()

    peak = Peak(device)
    outputs: list[tuple[Tensor, tuple[Tensor, ...]]] = []
    watch = None if limit is None or device.type != "cpu" else threading.Timer(limit, give_up, (peak, limit))
    if watch:
        watch.start()
    first_ms = stopwatch(lambda: outputs.append(call()))
    if watch:
        watch.cancel()
    extra_mb = peak.extra_mb()
    errors = oracle.compare(spec.op, expected, *outputs.pop())
    values = {"max_logp_error": errors.max_logp_error}
    if errors.grad_rel_error is not None:
        values["grad_rel_error"] = errors.grad_rel_error
    refused = oracle.mismatch(errors, oracle.tolerance(dtype, expected))
    if refused:
        return Result("mismatch", f"not timed: {refused}", 0, values)

    def gemm() -> Tensor:
        with torch.no_grad():
            return inputs.hidden @ inputs.weight.T

    times, gemms, note = [], [stopwatch(gemm)], ""
    rounds = min(spec.rounds, int(spec.budget * 1e3 / (first_ms + gemms[0])))
    if rounds < 1:  # so slow that a second run is not worth it: the first one counts, cold as it was
        times, note = [first_ms], f"one cold run: {first_ms / 1e3:.0f} s is over the budget of {spec.budget:g} s"
    else:
        gemms.clear()
    for _ in range(rounds):
        gemms.append(stopwatch(gemm))
        times.append(stopwatch(call))
    if 1 <= rounds < spec.rounds:
        note = f"{rounds} of {spec.rounds} rounds within the budget of {spec.budget:g} s"
    gemm_ms = statistics.median(gemms)
    ratio = statistics.median(t / g for t, g in zip(times, gemms, strict=True))
    values |= {f"p{p}_ms": percentile(times, p) for p in (20, 50, 80)}
    values |= {"gemm_ms": gemm_ms, "ratio_to_gemm": ratio, "peak_extra_mb": extra_mb}
    return Result("ok", note, len(times), values)


def write_expected(op: str, case: str, n: int, dtype: str, device: str, path: Path) -> None:
    expected = oracle.expect(op, make_inputs(CASES[case], n, DTYPES[dtype], torch.device(device)))
    save_file({name: value.contiguous() for name, value in expected._asdict().items()}, path)


def read_expected(path: Path, device: str) -> Expected:
    return Expected(**load_file(path, device=device))


def in_fresh_process(arguments: list[str], limit: float, root: Path = ROOT) -> tuple[str, str]:
    """Run this module in the tree ``root``; its last line of output and "", or "" and what went wrong. A first full
    run ends itself after ``limit`` seconds; subprocess.TimeoutExpired where all of it takes twice as long.
    """
    command = [sys.executable, "-m", "bench.measure", *arguments, str(limit)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=2 * limit, cwd=root)
    if done.returncode:
        return "", (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1][:300]
    return done.stdout.strip().splitlines()[-1], ""


def main() -> None:
    kind, payload, path, limit = sys.argv[1:]
    arguments = json.loads(payload)
    if kind == "expect":
        write_expected(**arguments, path=Path(path))
        print("{}")
        return
    spec = Spec(**arguments)
    print(json.dumps(asdict(measure(spec, read_expected(Path(path), spec.device), float(limit)))))


if __name__ == "__main__":
    main()
