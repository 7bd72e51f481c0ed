"""python -m bench: measure the implementations on the cases, append rows to bench/results/<device>.csv, print the
table.

    python -m bench                                       the default cases of this device
    python -m bench --case llama3-8b --dtype bf16 --impl naive ours
    python -m bench --sweep masked --dtype fp32 --impl naive ours
    python -m bench --base HEAD~1 --dtype fp32            our kernels here and at another commit, side by side
    python -m bench --report                              measure nothing: table and plot of what is recorded

Every row is a fresh process; a mismatch with the float64 oracle is recorded and not timed; what cannot run here is
recorded with its reason in <device>.notes.csv, as is every row that was cut short.
"""

import argparse
import itertools
import json
import subprocess
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path

import torch
from tqdm import tqdm

from . import compare, measure, report
from .cases import CASES, DEFAULT, OPS, SWEEPS
from .implementations import IMPLEMENTATIONS
from .measure import DTYPES, HEADS, PHASES, Result, Spec


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog="python -m bench", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    p.add_argument("--case", nargs="+", choices=CASES, help="named shapes; default: this device's")
    p.add_argument("--sweep", nargs="+", choices=SWEEPS, help="axes to walk along from this device's middle")
    p.add_argument(
        "--impl",
        nargs="+",
        choices=IMPLEMENTATIONS,
        default=list(IMPLEMENTATIONS),
        help="implementations; default: all",
    )
    p.add_argument("--op", nargs="+", choices=OPS, default=["synpo_loss"], help="default: synpo_loss")
    p.add_argument("--dtype", nargs="+", choices=DTYPES, help="default: bf16, and on a CPU fp32 too")
    p.add_argument("--n", nargs="+", type=int, help="tokens; default: the case's for this device")
    p.add_argument(
        "--head", nargs="+", choices=HEADS, default=["frozen"], help="whether lm_head gets a gradient; default: frozen"
    )
    p.add_argument("--phase", nargs="+", choices=PHASES, default=["forward+backward"], help="default: forward+backward")
    p.add_argument("--rounds", type=int, default=20, help="timed rounds of a row (20)")
    p.add_argument("--budget", type=float, default=60.0, help="seconds for the timed rounds of a row (60)")
    p.add_argument("--limit", type=float, default=900.0, help="seconds after which a first run is given up (900)")
    p.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    p.add_argument("--out", type=Path, help="CSV; default bench/results/<device>.csv")
    p.add_argument("--plot", type=Path, help="PNG to draw from the CSV")
    p.add_argument("--base", metavar="REF", help="measure ours here and at this commit, in turns; nothing is recorded")
    p.add_argument("--report", action="store_true", help="measure nothing: table and plot of what --out holds")
    return p


def plan(args: argparse.Namespace) -> list[Spec]:
    """Every row to measure, those that share an oracle side by side. ValueError for token counts that a case cannot
    split.
    """
    specs = []
    dtypes = args.dtype or (["fp32", "bf16"] if args.device == "cpu" else ["bf16"])
    points = [(case.name, n) for axis in args.sweep or () for case, n in SWEEPS[axis][args.device]]
    for case in args.case or ([] if args.sweep else DEFAULT[args.device]):
        counts = args.n or (CASES[case].cpu_n if args.device == "cpu" else CASES[case].gpu_n)
        points += [(case, n) for n in counts]
    for (case, n), dtype, op in itertools.product(dict.fromkeys(points), dtypes, args.op):
        if OPS[op] is not None:
            CASES[case].pairs(n)
        for head, phase, name in itertools.product(args.head, args.phase, args.impl):
            specs.append(Spec(op, name, case, dtype, n, head, phase, args.device, args.rounds, args.budget))
    return specs


def run_row(spec: Spec, expected: Path, limit: float) -> Result:
    reason = IMPLEMENTATIONS[spec.implementation].cannot(spec.op, CASES[spec.case], torch.device(spec.device))
    if reason:
        return Result("cannot run", reason)
    try:
        if not expected.exists():
            oracle = {"op": spec.op, "case": spec.case, "n": spec.N, "dtype": spec.dtype, "device": spec.device}
            _, wrong = measure.in_fresh_process(["expect", json.dumps(oracle), str(expected)], limit)
            if wrong:
                return Result("failed", f"the oracle: {wrong}")
        answer, wrong = measure.in_fresh_process(["measure", json.dumps(asdict(spec)), str(expected)], limit)
    except subprocess.TimeoutExpired:
        return Result("timed out", f"given up after {2 * limit:g} s")
    return Result("failed", wrong) if wrong else Result(**json.loads(answer))


def main(argv: list[str] | None = None) -> int:
    p = parser()
    args = p.parse_args(argv)
    if args.device == "cuda" and not torch.cuda.is_available():
        p.error("--device cuda: torch sees no GPU here")
    out = args.out or Path(__file__).parent / "results" / f"{measure.device_name(args.device)}.csv"
    failed = False
    if not args.report:
        try:
            specs = plan(args)
        except ValueError as error:
            p.error(str(error))
        if args.base:
            table, good = compare.compare(specs, args.base, args.limit)
            print(table)
            return int(not good)
        with tempfile.TemporaryDirectory() as folder, tqdm(specs, unit="row", file=sys.stderr) as bar:
            for spec in bar:
                bar.set_postfix_str(
                    f"{spec.case} N={spec.N} {spec.dtype} {spec.head} {spec.phase} {spec.op} {spec.implementation}"
                )
                expected = Path(folder) / f"{spec.op}-{spec.case}-{spec.N}-{spec.dtype}.safetensors"
                result = run_row(spec, expected, args.limit)
                failed |= result.status in ("failed", "mismatch")
                report.append(out, spec, result)
                if result.status != "ok":
                    bar.write(f"{spec.implementation} on {spec.case}: {result.status}: {result.note}", file=sys.stderr)
    if not out.exists():
        p.error(f"--out: {out} does not exist")
    rows = report.latest(out)
    print(report.table(rows))
    if args.plot:
        report.plot(rows, args.plot)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
