"""Every case against every peer on a GPU, and the ceilings of the same run: what `python -m bench.gpu kernels` does.

The rows are those of `python -m bench`. One worker process measures them all: on a GPU the allocator's mark, reset
for each row, is that row's own, and a process for each would cost more than the measurements. What decides most comes
first, so that a run cut short has it.
"""

import functools
import importlib
import itertools
import statistics
from collections.abc import Callable, Iterator
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from . import measure, oracle
from .cases import CASES, make_inputs
from .implementations import IMPLEMENTATIONS
from .measure import DTYPES, Result, Spec, Stopwatch
from .oracle import Expected
from .report import Row

ROUNDS, BUDGET = 20, 8.0  # of a row: timed rounds, and seconds for them
LIMIT = 100.0  # seconds of a row: compilers take up to a minute of it
BOTH = "forward+backward"
# Case, and what it stands for in the goals.
GOAL_CASES = ("llama3-8b", "qwen3-8b", "mistral-7b-v0.1")
OTHER_CASES = ("qwen2.5-7b", "gemma2-2b", "mistral-7b", "smollm2-135m")
PEER_MODULES = (
    "liger_kernel.chunked_loss", "liger_kernel.ops.cutedsl.ops.fused_scaled_cross_entropy_sm90", "cut_cross_entropy",
    "quack.linear_cross_entropy", "trl.kernels", "trl.trainer.utils",
)  # fmt: skip
PROFILED = ("smollm2-135m", "llama3-8b")
FORWARD_PEERS = ("cut-cross-entropy-exact", "liger-cute", "trl-chunked", "quack")


def plan(device: str, dtype: str = "bf16") -> list[Spec]:
    """All rows, the most telling first: ours and naive on every shape of the goals, then the peers, then the rest."""

    def rows(cases: tuple[str, ...], op: str, head: str, phase: str, names: Iterator[str] | tuple[str, ...]) -> None:
        for case, name in itertools.product(cases, names):
            counts = CASES[case].gpu_n if device == "cuda" else CASES[case].cpu_n
            for n in sorted(counts, key=lambda n: abs(n - 8192)):
                spec = Spec(op, name, case, dtype, n, head, phase, device, ROUNDS, BUDGET)
                if spec not in found:
                    found.append(spec)

    found: list[Spec] = []
    peers = tuple(name for name in IMPLEMENTATIONS if name not in ("ours", "naive", "quack"))
    main = GOAL_CASES[:2]
    for name in ("ours", "naive"):
        rows(main, "synpo_loss", "frozen", BOTH, (name,))
        rows(main, "synpo_loss", "trainable", BOTH, (name,))
        rows(main, "linear_logps", "frozen", "forward", (name,))
    rows(main, "cross_entropy", "trainable", BOTH, ("quack",))
    rows(main, "synpo_loss", "frozen", BOTH, peers)
    rows(main, "linear_logps", "frozen", "forward", FORWARD_PEERS)
    rows(main, "synpo_loss", "trainable", BOTH, peers)
    rows(main, "cross_entropy", "frozen", BOTH, ("quack", "ours"))
    for cases in (GOAL_CASES[2:], OTHER_CASES):
        rows(cases, "synpo_loss", "frozen", BOTH, ("ours", "naive", *peers))
        rows(cases, "synpo_loss", "trainable", BOTH, ("ours", "naive", *peers))
        rows(cases, "linear_logps", "frozen", "forward", ("ours", "naive"))
    return found


@functools.cache
def _expected(op: str, case: str, n: int, dtype: str, device: str) -> Expected:
    return oracle.expect(op, make_inputs(CASES[case], n, DTYPES[dtype], torch.device(device)))


def measure_row(**spec: Any) -> dict[str, Any]:
    """One row, as ``measure.Result``'s fields; runs in the worker. A row that cannot run says why."""
    row = Spec(**spec)
    reason = IMPLEMENTATIONS[row.implementation].cannot(row.op, CASES[row.case], torch.device(row.device))
    if reason:
        return asdict(Result("cannot run", reason))
    torch.compiler.reset()  # else shapes count towards one limit, past which nothing is compiled
    try:
        return asdict(measure.measure(row, _expected(row.op, row.case, row.N, row.dtype, row.device)))
    except torch.OutOfMemoryError as error:
        return asdict(Result("cannot run", f"out of memory: {str(error).splitlines()[0]}"[:200]))
    except ImportError as error:
        return asdict(Result("cannot run", f"its import failed: {error}"[:200]))


def imports() -> list[dict[str, str]]:
    """For every peer's module whether it imports here, or why not; runs in the worker."""
    rows = []
    for module in PEER_MODULES:
        try:
            importlib.import_module(module)
            rows.append({"package": module, "import": "imports"})
        except Exception as error:  # a broken package may raise anything; the reason is what is asked for
            rows.append({"package": module, "import": f"{type(error).__name__}: {error}"[:200]})
    return rows


def profiled(device: str) -> None:
    """What a profiler looks at: our loss and its gradient at a width that runs fused, and at one that does not."""
    for case in PROFILED:
        n = min(CASES[case].gpu_n if device == "cuda" else CASES[case].cpu_n)
        spec = Spec("synpo_loss", "ours", case, "bf16", n, "frozen", BOTH, device, 1, 1.0)
        measure.step(spec, make_inputs(CASES[case], n, DTYPES["bf16"], torch.device(device)))()


def ceilings(device: str, cases: list[str], dtype: str = "bf16") -> list[dict[str, Any]]:
    """What this device reaches: a copy, a square product, the cases' products into their dtype and into float32."""
    where, kind = torch.device(device), DTYPES[dtype]
    edge, words = (8192, 1 << 30) if device == "cuda" else (256, 1 << 16)
    stopwatch = Stopwatch(where)
    found: list[dict[str, Any]] = []

    def median(run: Callable[[], object]) -> float:
        for _ in range(3):
            run()
        return statistics.median(stopwatch(run) for _ in range(20))

    def product(name: str, a: Tensor, b: Tensor, out: torch.dtype) -> None:
        options = {"out_dtype": out} if out != a.dtype else {}
        if options and device != "cuda":
            return  # the CPU's library has no such product
        ms = median(lambda: torch.mm(a, b.T, **options))
        flops = 2 * a.shape[0] * a.shape[1] * b.shape[0]
        shape = "x".join(map(str, (a.shape[0], a.shape[1], b.shape[0])))
        found.append({"what": f"{name} into {str(out)[6:]}", "shape": shape, "ms": ms, "per_s": flops / ms * 1e3})

    source = torch.empty(words, dtype=torch.float32, device=where).normal_()
    ms = median(functools.partial(torch.empty_like(source).copy_, source))
    found.append({"what": "copy, bytes read and written", "shape": str(words * 4), "ms": ms, "per_s": 8e3 * words / ms})
    del source
    square = torch.randn(edge, edge, device=where).to(kind)
    product("square product", square, square, kind)
    for case in cases:
        for n in CASES[case].gpu_n if device == "cuda" else CASES[case].cpu_n:
            inputs = make_inputs(CASES[case], n, kind, where)
            for out in (kind, torch.float32):
                product(f"{case} head", inputs.hidden, inputs.weight, out)
    return found


def goals(rows: list[Row]) -> str:
    """Markdown: the figures the GPU kernels are held to, from rows of one run."""
    found = {(r["op"], r["implementation"], r["case"], int(r["N"]), r["head"], r["phase"]): r for r in rows}

    def number(column: str, *key: Any) -> float | None:
        text = found.get(key, {}).get(column)
        return float(text) if text else None

    def ratio(op: str, head: str, phase: str) -> Callable[[str, int], str]:
        def cell(case: str, n: int) -> str:
            value = number("ratio_to_gemm", op, "ours", case, n, head, phase)
            return "-" if value is None else f"{value:.2f}"

        return cell

    def against_exact(case: str, n: int) -> str:
        ours = number("p50_ms", "synpo_loss", "ours", case, n, "frozen", BOTH)
        times = {
            name: number("p50_ms", "synpo_loss", name, case, n, "frozen", BOTH)
            for name, entry in IMPLEMENTATIONS.items()
            if entry.logps is not None and name not in ("ours", "naive", "cut-cross-entropy")
        }
        timed = {name: ms for name, ms in times.items() if ms is not None}
        if ours is None or not timed:
            return "-"
        fastest = min(timed, key=lambda name: timed[name])
        return f"{timed[fastest] / ours:.2f}x ({fastest})"

    def against_quack(case: str, n: int) -> str:
        ours = number("p50_ms", "synpo_loss", "ours", case, n, "trainable", BOTH)
        theirs = number("p50_ms", "cross_entropy", "quack", case, n, "trainable", BOTH)
        return "-" if ours is None or theirs is None else f"{theirs / ours:.2f}x"

    def memory(case: str, n: int) -> str:
        ours, naive = (number("peak_extra_mb", "synpo_loss", x, case, n, "frozen", BOTH) for x in ("ours", "naive"))
        return "-" if not ours or naive is None else f"{naive / ours:.1f}x ({ours:.0f} MB)"

    lines: tuple[tuple[str, str, Callable[[str, int], str]], ...] = (
        ("frozen, forward and backward / GEMM", "<= 2.3", ratio("synpo_loss", "frozen", BOTH)),
        ("trainable, forward and backward / GEMM", "<= 3.45", ratio("synpo_loss", "trainable", BOTH)),
        ("forward alone / GEMM", "<= 1.25", ratio("linear_logps", "frozen", "forward")),
        ("over the fastest exact per-token peer, frozen", ">= 1.3x", against_exact),
        ("over quack's scalar loss, trainable", ">= 0.9x", against_quack),
        ("extra memory below naive, frozen", ">= 5x, 18x, 40x", memory),
    )
    out = []
    for case in GOAL_CASES:
        counts = sorted({n for (_, _, c, n, _, _) in found if c == case})
        if not counts:
            continue
        out += [f"**{case}: H {CASES[case].H}, V {CASES[case].V}**\n"]
        out += ["| | goal | " + " | ".join(f"N {n}" for n in counts) + " |", "|---|---|" + "---|" * len(counts)]
        for name, goal, cell in lines:
            out.append(f"| {name} | {goal} | " + " | ".join(cell(case, n) for n in counts) + " |")
        out.append("")
    return "\n".join(out)
