"""One step of contrastive sampling: ours, the chain of eager ops everyone writes, the same chain compiled.

    python -m bench.contrastive                             every implementation, law and dtype at V 151936, B 8
    python -m bench.contrastive --impl eager ours --law release --dtype bf16

The protocol is that of python -m bench: a fresh process a row, correct before timed, rounds interleaved with the floor
they are a ratio to. The floor is one read of both rows: PyTorch's integer maximum over their bits, the fastest plain
reduction it has. Every implementation gives a token and its log-prob under the law; both are held to the float64 law.
"""

import argparse
import csv
import datetime
import itertools
import json
import math
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from tqdm import tqdm

from synpo_kernels import contrastive_sample, native, reference

from .measure import DTYPES, Stopwatch, commit, device_name, percentile
from .memory import Peak

ALPHA = 0.5


class Law(NamedTuple):
    plausibility: float
    temperature: float
    top_k: int
    top_p: float


LAWS = {
    "release": Law(0.1, 0.5, 32, 0.9),  # SynPO's captioner, with the plausibility constraint
    "top-k, top-p": Law(0.0, 0.5, 32, 0.9),
    "top-p": Law(0.0, 1.0, 0, 0.9),
    "plain": Law(0.0, 1.0, 0, 1.0),
    "greedy": Law(0.0, 0.0, 0, 1.0),
}
COLUMNS = [
    "date", "commit", "device", "torch", "triton", "op", "implementation", "law", "dtype", "B", "V", "p20_ms", "p50_ms",
    "p80_ms", "read_ms", "ratio_to_read", "over_eager", "peak_extra_mb", "max_logp_error",
]  # fmt: skip
KEY = ("law", "dtype", "B", "V", "implementation")

Sampler = Callable[[Tensor, Tensor, Law], tuple[Tensor, Tensor]]


def chain(logits: Tensor, contrast: Tensor, law: Law) -> tuple[Tensor, Tensor]:
    """Combine, mask, temperature, top-k, top-p, softmax, multinomial, as a generation loop strings them together."""
    logits, contrast = logits.float(), contrast.float()
    scores = (1 + ALPHA) * logits - ALPHA * contrast
    if law.plausibility > 0:
        cutoff = logits.amax(-1, keepdim=True) + math.log(law.plausibility)
        scores = scores.masked_fill(logits < cutoff, -math.inf)
    if law.temperature == 0:
        return scores.argmax(-1), torch.zeros_like(scores[:, 0])
    scores = scores / law.temperature
    if law.top_k > 0:
        scores = scores.masked_fill(scores < scores.topk(law.top_k).values[:, -1:], -math.inf)
    if law.top_p < 1:
        values, ids = scores.sort(descending=True)
        p = values.softmax(-1)
        removed = (p.cumsum(-1) - p >= law.top_p).scatter(1, ids, p.cumsum(-1) - p >= law.top_p)
        scores = scores.masked_fill(removed, -math.inf)
    p = scores.softmax(-1)
    token = torch.multinomial(p, 1)
    return token[:, 0], p.gather(1, token)[:, 0].log()


@cache
def _compiled() -> Callable[..., Any]:
    return torch.compile(chain)


def compiled(logits: Tensor, contrast: Tensor, law: Law) -> tuple[Tensor, Tensor]:
    return _compiled()(logits, contrast, law)


def ours(logits: Tensor, contrast: Tensor, law: Law) -> tuple[Tensor, Tensor]:
    out = contrastive_sample(logits, contrast, alpha=ALPHA, seed=7, **law._asdict())
    return out.tokens, out.logps


IMPLEMENTATIONS: dict[str, Sampler] = {"eager": chain, "torch-compile": compiled, "ours": ours}


def make_views(B: int, V: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """Logits as a language model's: a normal bulk and, in each row, a few tokens far above it; the contrast view has
    the same tokens, less sure. Both are halves of one (2B, V) tensor."""
    generator = torch.Generator(device).manual_seed(V)
    both = 2 * torch.randn(2 * B, V, generator=generator, device=device)
    rows = torch.arange(B, device=device)[:, None]
    likely = torch.randint(V, (B, 24), generator=generator, device=device)
    lift = torch.linspace(16, 8, 24, device=device)
    both[rows, likely] = lift
    both[rows + B, likely] = 0.8 * lift
    return both.to(dtype).chunk(2)  # type: ignore[return-value]


def mismatch(law: Law, logits: Tensor, contrast: Tensor, tokens: Tensor, logps: Tensor) -> tuple[float, str | None]:
    """The largest error of a log-prob against the float64 law, and why it is refused, or None."""
    combined = reference.contrastive_logits(
        logits.float(), contrast.float(), alpha=ALPHA, plausibility=law.plausibility
    )
    want, _ = reference.contrastive_law(
        combined.double(), temperature=law.temperature, top_k=law.top_k, top_p=law.top_p
    )
    p = want.gather(1, tokens[:, None])[:, 0]
    if (p == 0).any():
        return math.inf, f"row {int((p == 0).nonzero()[0])} drew a token that has no probability"
    error = (logps.double() - p.log()).abs().max().item()
    # float32 sums over V terms, and a token at top-p's border in or out.
    allowed = 1e-3 if law.top_p < 1 else 1e-4
    return error, None if error <= allowed else f"max_logp_error {error:.3g} is above {allowed:g}"


def read(logits: Tensor, contrast: Tensor) -> tuple[Tensor, Tensor]:
    bits = torch.int32 if logits.element_size() == 4 else torch.int16
    return logits.view(bits).amax(1), contrast.view(bits).amax(1)


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """One row: p20/p50/p80 of the call, of the read between, of their ratios; ValueError on a mismatch."""
    device, law, sampler = torch.device(args.device), LAWS[args.law[0]], IMPLEMENTATIONS[args.impl[0]]
    logits, contrast = make_views(args.batch, args.vocabulary, DTYPES[args.dtype[0]], device)
    stopwatch = Stopwatch(device)
    with torch.no_grad():
        torch.manual_seed(0)
        sampler(logits[:1, :1000], contrast[:1, :1000], law)
        if sampler is compiled:
            sampler(logits, contrast, law)
        peak = Peak(device)
        tokens, logps = sampler(logits, contrast, law)
        extra_mb = peak.extra_mb()
        error, refused = mismatch(law, logits, contrast, tokens, logps)
        if refused:
            raise ValueError(refused)
        times, reads, start = [], [], time.perf_counter()
        for _ in range(3):
            read(logits, contrast)
        while len(times) < args.rounds and (len(times) < 3 or time.perf_counter() - start < args.budget):
            reads.append(stopwatch(lambda: read(logits, contrast)))
            times.append(stopwatch(lambda: sampler(logits, contrast, law)))
    ratio = statistics.median(t / r for t, r in zip(times, reads, strict=True))
    values = {f"p{p}_ms": percentile(times, p) for p in (20, 50, 80)}
    values |= {"read_ms": statistics.median(reads), "ratio_to_read": ratio}
    return values | {"peak_extra_mb": extra_mb, "max_logp_error": error}


def in_fresh_process(implementation: str, law: str, dtype: str, args: argparse.Namespace) -> dict[str, Any]:
    child = [sys.executable, "-m", "bench.contrastive", "--in-process", "--impl", implementation, "--law", law]
    child += ["--dtype", dtype]
    for name in ("batch", "vocabulary", "rounds", "budget", "device"):
        child += ["--" + name, str(getattr(args, name))]
    done = subprocess.run(child, capture_output=True, text=True, cwd=Path(__file__).parent.parent)
    if done.returncode:
        raise SystemExit(f"{implementation}, {law}, {dtype} failed:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown: one line a row."""
    out = ["| law | dtype | implementation | p50 ms | of one read | over eager | extra MB |", "|---" * 7 + "|"]
    for row in rows:
        over = f"{float(row['over_eager']):.3g}x" if row["over_eager"] != "" else ""
        numbers = (f"{float(row[name]):.3g}" for name in ("p50_ms", "ratio_to_read"))
        cells = (row["law"], row["dtype"], row["implementation"], *numbers, over, f"{float(row['peak_extra_mb']):.2g}")
        out.append("| " + " | ".join(cells) + " |")
    return "\n".join(out)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench.contrastive", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--impl", nargs="+", choices=IMPLEMENTATIONS, default=list(IMPLEMENTATIONS))
    parser.add_argument("--law", nargs="+", choices=LAWS, default=list(LAWS))
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=["bf16", "fp32"])
    parser.add_argument("--batch", type=int, default=8, help="rows of each view (8)")
    parser.add_argument("--vocabulary", type=int, default=151_936, help="V (151936)")
    parser.add_argument("--rounds", type=int, default=100, help="timed rounds of a row (100)")
    parser.add_argument("--budget", type=float, default=5.0, help="seconds for the timed rounds of a row (5)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, help="CSV to append to; default bench/results/contrastive_<device>.csv")
    parser.add_argument("--in-process", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.in_process:
        print("\n" + json.dumps(measure(args)))
        return
    if args.device == "cpu" and not native.status()["built"]:
        raise SystemExit(f"plain PyTorch would be timed: the C++ kernels are {native.status()['reason']}")
    name = device_name(args.device)
    out = args.out or Path(__file__).parent / "results" / f"contrastive_{name}.csv"
    out.parent.mkdir(exist_ok=True)
    world = {
        "date": datetime.date.today().isoformat(), "commit": commit(), "device": name, "torch": torch.__version__,
        "triton": triton.__version__, "op": "contrastive_sample", "B": args.batch, "V": args.vocabulary,
    }  # fmt: skip
    rows: list[dict[str, Any]] = []
    eager: dict[tuple[str, str], float] = {}
    plan = list(itertools.product(args.law, args.dtype, args.impl))
    for law, dtype, implementation in tqdm(plan, unit="row", file=sys.stderr):
        numbers = in_fresh_process(implementation, law, dtype, args)
        if implementation == "eager":
            eager[law, dtype] = numbers["p50_ms"]
        # Times, not ratios to reads: the chain's 40 MB push the rows out of the cache, so reads between its rounds cost
        # two or three times those between ours.
        over = eager[law, dtype] / numbers["p50_ms"] if (law, dtype) in eager else ""
        row = world | {"implementation": implementation, "law": law, "dtype": dtype, "over_eager": over} | numbers
        row = {key: f"{value:.5g}" if isinstance(value, float) else value for key, value in row.items()}
        rows.append(row)
        new = not out.exists()
        with out.open("a", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
            if new:
                writer.writeheader()
            writer.writerow(row)
    print(table(rows))


if __name__ == "__main__":
    main()
