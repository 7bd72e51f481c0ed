"""`python -m synpo_kernels.selftest`: every kernel on this machine's devices, held to the oracle in float64.

Each line of the table is one kernel in one dtype: the worst element's error, and that error over what is allowed (up
to 1). Allowed is what no implementation avoids: twice the error of plain PyTorch in that dtype, the rounding of the
result, and the rounding of sums in the accumulator. The exit code is 0 where every line holds, 1 elsewhere.
"""

import argparse
import platform
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import native, objectives, reference
from .contrastive import contrastive_logits, contrastive_sample
from .linear_logps import linear_logps
from .pair_loss import FusedPreferenceLoss
from .prefix_attention import prefix_attention

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
N, H, V = 130, 96, 1003  # odd against every tile, so that none is full
HEAD: dict[str, Any] = {"logit_scale": 0.8, "softcap": 20.0}
# Hyperparameters that keep the losses' curvature small: their errors then tell of the kernel, not of the objective.
# CURVATURE: how many times a log-prob's error the loss, or a gradient relative to its size, may be off.
MILD: dict[str, dict[str, Any]] = {"synpo": {"alpha": 5.0}, "dpop": {"dpop_lambda": 3.0}, "ipo": {"beta": 0.5}}
CURVATURE = 60.0
DRAWS, SIDES = 4096, 16
# Two pairs of answers, each pair with its prompt before it; a window that cuts prompts and answers.
PIECES = [(0, 57, 0, 0), (57, 90, 0, 37), (90, 131, 0, 0), (131, 140, 90, 91)]
ATTENTION: dict[str, Any] = {"window": 29, "softcap": 15.0}


class Line(NamedTuple):
    """One line of the table. excess: the worst element's error over what is allowed; 1 or less holds."""

    kernel: str
    dtype: str
    error: float
    excess: float
    note: str = ""

    @property
    def holds(self) -> bool:
        return self.excess <= 1  # False for NaN too


class Problem(NamedTuple):
    """Three pairs as rows (6, T) with prompts and padding, and a head."""

    hidden: Tensor  # (6, T, H)
    weight: Tensor  # (V, H)
    labels: Tensor  # (6, T)
    bias: Tensor  # (V,)
    refs: Tensor  # (6,) summed log-probs of a reference

    def cast(self, dtype: torch.dtype) -> "Problem":
        """The same numbers as leaves of another dtype."""
        hidden, weight, bias = (t.detach().to(dtype).requires_grad_() for t in (self.hidden, self.weight, self.bias))
        return self._replace(hidden=hidden, weight=weight, bias=bias)

    @property
    def leaves(self) -> dict[str, Tensor]:
        return {"hidden": self.hidden, "weight": self.weight, "bias": self.bias}


def make_problem(device: torch.device) -> Problem:
    """Rows of all lengths: a one-token answer, one that fills its row; targets from nearly certain to impossible."""
    rows, length = 6, N // 6 + 1
    labels = torch.randint(0, V, (rows, length))
    for row, (start, end) in enumerate([(2, 9), (0, length), (4, 5), (3, length), (1, 20), (5, 17)]):
        labels[row, :start] = labels[row, end:] = -100
    weight, hidden = 0.3 * torch.randn(V, H), 0.5 * torch.randn(rows, length, H)
    push = torch.linspace(-30, 30, rows * length).view(rows, length, 1) * (torch.arange(length) % 3 == 0)[:, None]
    direction = weight[labels.clamp(min=0)]
    hidden = hidden + push * direction / direction.square().sum(-1, keepdim=True)
    return Problem(*(t.to(device) for t in (hidden, weight, labels, torch.randn(V), -4 - 3 * torch.rand(rows))))


def compare(ours: Tensor, exact: Tensor, plain: Tensor, dtype: torch.dtype, scale: float) -> tuple[float, float]:
    """Worst error, and worst error over what is allowed. scale: magnitude of what an element sums, with the root of
    the number of terms.
    """
    if ours.shape != exact.shape or not bool(ours.isfinite().all()):
        return float("nan"), float("nan")
    plain_error = (plain.double() - exact).abs()
    result, accumulator = torch.finfo(dtype).eps, torch.finfo(torch.float32).eps
    # A gradient waits in the inputs' dtype for the incoming scalar, so it is rounded twice.
    allowed = 2 * plain_error[plain_error.isfinite()].max() + 2 * result * exact.abs() + accumulator * scale
    error = (ours.double() - exact).abs()
    return float(error.max()), float((error / allowed).max())


def check_logps(problem: Problem, dtype: torch.dtype) -> Iterator[Line]:
    """linear_logps: its values, its gradient with a frozen head, and all gradients with a trainable one."""
    upstream = torch.linspace(-1.5, 2.5, problem.labels.numel(), device=problem.labels.device).view_as(problem.labels)

    def run(function: Callable[..., Tensor], kind: torch.dtype, frozen: bool) -> tuple[Tensor, ...]:
        made = problem.cast(dtype).cast(kind)  # the numbers of the tested dtype
        leaves = list(made.leaves.values())[: 1 if frozen else 3]
        if frozen:
            made = made._replace(weight=made.weight.detach(), bias=made.bias.detach())
        logps = function(made.hidden, made.weight, made.labels, bias=made.bias, **HEAD)
        return logps.detach(), *torch.autograd.grad(logps, leaves, upstream.to(logps.dtype))

    largest = 1 + float((problem.hidden @ problem.weight.T).abs().max())
    for head in ("frozen", "trainable"):
        frozen = head == "frozen"
        results = [
            run(linear_logps, dtype, frozen), run(reference.linear_logps, torch.float64, frozen),
            run(reference.linear_logps, dtype, frozen),
        ]  # fmt: skip
        for name, ours, exact, plain in zip(("", "hidden", "weight", "bias"), *results, strict=False):
            # A logit's error, sqrt(H) roundings of products, is a log-prob's error and a probability's relative one.
            scale = H**0.5 * largest * (4 * float(exact.abs().max()) if name else 1.0)
            kernel = f"linear_logps, {head} head" + (f": gradient of {name}" if name else "")
            yield Line(kernel, _name(dtype), *compare(ours, exact, plain, torch.float32 if not name else dtype, scale))


def check_pair_loss(problem: Problem, dtype: torch.dtype, objective: str) -> Iterator[Line]:
    """A preference loss and its gradients; the worst of them is the line."""
    settings = MILD.get(objective, {})
    refs = problem.refs if objectives.REGISTRY[objective].reference else None

    def run(kind: torch.dtype, fused: bool, frozen: bool) -> tuple[Tensor, ...]:
        made = problem.cast(dtype).cast(kind)
        leaves = list(made.leaves.values())[: 1 if frozen else 3]
        if frozen:
            made = made._replace(weight=made.weight.detach(), bias=made.bias.detach())
        hidden, weight, labels, bias, _ = made
        if fused:
            loss_fn = FusedPreferenceLoss(objective, **HEAD, **settings)
            loss = loss_fn(hidden, weight, labels, bias, ref_logps=refs).loss
        else:
            options = {"ref_logps": refs} | HEAD | settings
            loss = reference.preference_loss(objective, hidden, weight, labels, bias, **options)
        return loss.detach(), *torch.autograd.grad(loss, leaves)

    largest = 1 + float((problem.hidden @ problem.weight.T).abs().max())
    for head in ("frozen", "trainable"):
        frozen = head == "frozen"
        results = [run(dtype, True, frozen), run(torch.float64, False, frozen), run(dtype, False, frozen)]
        found = []
        for name, ours, exact, plain in zip(("loss", "hidden", "weight", "bias"), *results, strict=False):
            scale = H**0.5 * largest * CURVATURE * (1.0 if name == "loss" else float(exact.abs().max()))
            found.append(compare(ours, exact, plain, torch.float32 if name == "loss" else dtype, scale))
        error, excess = max(found, key=lambda pair: float("inf") if pair[1] != pair[1] else pair[1])
        yield Line(f"preference loss {objective}, {head} head", _name(dtype), error, excess)


def check_contrastive(device: torch.device, dtype: torch.dtype) -> Iterator[Line]:
    """contrastive_logits to the oracle's rounding; contrastive_sample: greedy tokens, and how often it draws which."""
    logits, contrast = (4 * torch.randn(5, 2049, device=device).to(dtype) for _ in range(2))
    settings: dict[str, Any] = {"alpha": 0.5, "plausibility": 0.01}
    want = reference.contrastive_logits(logits.float(), contrast.float(), **settings)
    got = contrastive_logits(logits, contrast, **settings)
    seen = want.isfinite()
    if bool((got.isneginf() != want.isneginf()).any()):
        yield Line("contrastive_logits", _name(dtype), float("nan"), float("nan"), "other tokens are masked")
    else:
        error = (got - want)[seen].abs()
        allowed = 4 * torch.finfo(torch.float32).eps * want[seen].abs().max()
        yield Line("contrastive_logits", _name(dtype), float(error.max()), float(error.max() / allowed))
    greedy = contrastive_sample(logits, contrast, temperature=0.0, seed=0, **settings)
    wrong = int((greedy.tokens != want.argmax(1)).sum()) + int((greedy.status != 0).sum())
    yield Line("contrastive_sample, greedy", _name(dtype), float(wrong), 2.0 * wrong, f"{wrong} of 5 tokens differ")

    row, other = (2 * torch.randn(1, SIDES, device=device).to(dtype) for _ in range(2))
    combined = reference.contrastive_logits(row.double(), other.double(), alpha=0.5)
    law, _ = reference.contrastive_law(combined, temperature=0.9)
    rows = (x.expand(DRAWS, -1).contiguous() for x in (row, other))
    drawn = contrastive_sample(*rows, alpha=0.5, temperature=0.9, seed=1)
    counts = torch.bincount(drawn.tokens, minlength=SIDES).double()
    deviation = (DRAWS * law[0] * (1 - law[0])).sqrt() + 1
    worst = ((counts - DRAWS * law[0]).abs() / deviation).max()
    # Six standard deviations: one run in 10^7 passes them by chance.
    yield Line("contrastive_sample, frequencies", _name(dtype), float(worst / DRAWS**0.5), float(worst / 6))
    off = (drawn.logps.double() - law[0].log()[drawn.tokens]).abs().max()
    scale = 16 * (1 + float(combined.abs().max())) * torch.finfo(torch.float32).eps
    yield Line("contrastive_sample, log-probs", _name(dtype), float(off), float(off / scale))


def check_attention(device: torch.device, dtype: torch.dtype) -> Iterator[Line]:
    """prefix_attention with grouped heads, a window and a soft cap: its values and all gradients."""
    length, heads, groups, size = PIECES[-1][1], 4, 2, 64
    inputs = [2 * torch.randn(length, n, size, device=device).to(dtype) for n in (heads, groups, groups)]
    upstream = torch.randn(length, heads, size, device=device).to(dtype)

    def run(function: Callable[..., Tensor], kind: torch.dtype) -> tuple[Tensor, ...]:
        leaves = [x.detach().to(kind).requires_grad_() for x in inputs]
        out = function(*leaves, PIECES, **ATTENTION)
        return out.detach(), *torch.autograd.grad(out, leaves, upstream.to(kind))

    results = (
        run(prefix_attention, dtype),
        run(reference.prefix_attention, torch.float64),
        run(reference.prefix_attention, dtype),
    )
    for name, ours, exact, plain in zip(("", "query", "key", "value"), *results, strict=True):
        # A score's error, sqrt(size) roundings of products of up to |q| |k|, is a weight's relative one.
        scale = size**0.5 * float(inputs[0].abs().max()) * float(inputs[1].abs().max()) * float(exact.abs().max())
        kernel = "prefix_attention" + (f": gradient of {name}" if name else "")
        yield Line(kernel, _name(dtype), *compare(ours, exact, plain, dtype, scale))


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def checks(device: torch.device) -> Iterator[tuple[str, Callable[[], Iterator[Line]]]]:
    """What is run on a device, by name."""
    torch.manual_seed(0)
    problem = make_problem(device)
    for dtype in DTYPES:
        yield f"linear_logps, {_name(dtype)}", partial(check_logps, problem, dtype)
        for objective in objectives.REGISTRY if dtype == torch.float32 else ("synpo",):
            yield f"preference loss {objective}, {_name(dtype)}", partial(check_pair_loss, problem, dtype, objective)
        yield f"contrastive, {_name(dtype)}", partial(check_contrastive, device, dtype)
        yield f"prefix_attention, {_name(dtype)}", partial(check_attention, device, dtype)


def describe(device: torch.device) -> str:
    """A device's name, and whose kernels run there."""
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        return f"{torch.cuda.get_device_name(device)} (compute capability {major}.{minor}), Triton kernels"
    found = native.status()
    return (
        f"cpu, {'C++ kernels for ' + str(found['isa']) if found['built'] else 'plain PyTorch: ' + str(found['reason'])}"
    )


def run(device: torch.device) -> list[Line]:
    """All lines of a device. A kernel that raises is a line that does not hold."""
    lines: list[Line] = []
    for name, check in checks(device):
        try:
            lines += check()
        except Exception as error:  # whatever stops a kernel is what this is there to report
            first = (str(error) or "no message").splitlines()[0]
            lines.append(Line(name, "", float("nan"), float("nan"), f"{type(error).__name__}: {first}"))
    return lines


def table(lines: list[Line]) -> str:
    """The lines as aligned text."""
    rows = [("kernel", "dtype", "worst error", "of allowed", "")]
    for line in lines:
        result = "ok" if line.holds else "FAILED " + line.note
        rows.append((line.kernel, line.dtype, f"{line.error:.2e}", f"{line.excess:.3f}", result))
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    return "\n".join("  ".join([*(c.ljust(w) for c, w in zip(row, widths, strict=False)), row[4]]) for row in rows)


def main(argv: list[str] | None = None) -> int:
    """Check the devices, print the tables, return the exit code."""
    present = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    parser = argparse.ArgumentParser(prog="python -m synpo_kernels.selftest", description=(__doc__ or "").split(":")[0])
    parser.add_argument("--device", choices=present, help="check this device alone (default: all that are here)")
    chosen = parser.parse_args(argv).device
    print(f"torch {torch.__version__}, python {platform.python_version()}, {platform.platform()}")
    failed = 0
    for kind in [chosen] if chosen else present:
        device, started = torch.device(kind), time.perf_counter()
        print(f"\n{describe(device)}")
        lines = run(device)
        failed += sum(not line.holds for line in lines)
        print(table(lines))
        print(f"{len(lines)} checks in {time.perf_counter() - started:.1f} s")
    print(f"\n{failed} checks FAILED" if failed else "\nall checks hold")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
