"""What a right implementation gives on a case's inputs: float64, by synpo_kernels.reference.

The log-probs of all N tokens are exact. Gradients are checked on a subset, rows of hidden and rows of the head, so
that the oracle costs one float64 product and never holds (N, V).
"""

from typing import NamedTuple

import torch
from torch import Tensor

from synpo_kernels import objectives, reference

from .cases import OPS, Inputs
from .implementations import IGNORED, naive_logps

SUBSET = 32  # rows of hidden, and rows of the head beside the targets of those
_CHUNK_BYTES = 256 << 20  # of float64 logits at once


class Expected(NamedTuple):
    """float64, but for the two index tensors."""

    logps: Tensor  # (N,), 0 where the label is ignored
    means: Tensor  # (2B,) of the answers' log-probs
    largest_logit: Tensor  # () max |z_y|, the size that rounding of logits is relative to
    rows: Tensor  # (R,) int64 rows of hidden
    grad_hidden: Tensor  # (R, H)
    columns: Tensor  # (C,) int64 rows of the head
    grad_weight: Tensor  # (C, H)
    naive_error: Tensor  # () the naive loss's own error in grad_hidden, in the inputs' dtype: relative Frobenius norm


def expect(op: str, inputs: Inputs) -> Expected:
    weight, softcap = inputs.weight, inputs.softcap
    scored = (inputs.labels != IGNORED).nonzero()[:, 0]
    hidden, labels, grad = inputs.hidden[scored], inputs.labels[scored], inputs.grad[scored]
    cu_seqlens = torch.searchsorted(scored, inputs.cu_seqlens.long())  # of the scored positions alone
    n, columns = len(labels), len(weight)
    head = weight.double()
    logps = torch.cat([
        reference.linear_logps(h.double(), head, y, softcap=softcap)
        for h, y in zip(*(x.split(max(1, _CHUNK_BYTES // (8 * columns))) for x in (hidden, labels)), strict=True)
    ])  # fmt: skip
    coefficients = _coefficients(op, logps, cu_seqlens, grad)

    rows = torch.linspace(0, n - 1, min(n, SUBSET), device=labels.device).long().unique()
    leaf = hidden[rows].double().requires_grad_()
    reference.linear_logps(leaf, head, labels[rows], softcap=softcap).backward(coefficients[rows])

    assert leaf.grad is not None
    naive = hidden[rows].detach().requires_grad_()
    naive_logps(naive, weight, labels[rows], softcap).backward(coefficients[rows].float())
    assert naive.grad is not None
    naive_error = (naive.grad.double() - leaf.grad).norm() / leaf.grad.norm()

    chosen = torch.cat([labels[rows], torch.linspace(0, columns - 1, SUBSET, device=labels.device).long()]).unique()
    part = head[chosen].requires_grad_()
    del head
    z_y = _cap((hidden.double() * weight[labels].double()).sum(1), softcap)
    z = _cap(hidden.double() @ part.T, softcap)
    probabilities = (z.detach() - (z_y - logps)[:, None]).exp()
    hits = (labels[:, None] == chosen).double()
    # d l_t / d z_tv = [v = y_t] - p_tv: a sum whose gradient in the chosen rows of the head is the loss's.
    (coefficients[:, None] * (hits - probabilities) * z).sum().backward()
    assert part.grad is not None
    means = objectives.segment_sums(logps, cu_seqlens) / cu_seqlens.diff().double()
    everywhere = logps.new_zeros(len(inputs.labels)).index_copy(0, scored, logps)
    return Expected(everywhere, means, z_y.abs().max(), scored[rows], leaf.grad, chosen, part.grad, naive_error)


def _cap(raw: Tensor, softcap: float | None) -> Tensor:
    return raw if softcap is None else softcap * torch.tanh(raw / softcap)


def _coefficients(op: str, logps: Tensor, cu_seqlens: Tensor, grad: Tensor) -> Tensor:
    """c_t = d loss / d l_t."""
    objective = OPS[op]
    if op == "cross_entropy":
        return torch.full_like(logps, -1 / len(logps))
    if objective is None:
        return grad.double()
    leaf = logps.detach().requires_grad_()
    objectives.REGISTRY[objective].function(leaf, cu_seqlens).mean().backward()
    assert leaf.grad is not None
    return leaf.grad


class Errors(NamedTuple):
    max_logp_error: float  # nats; per token for linear_logps, of the answers' mean log-probs for the pair losses
    grad_rel_error: float | None  # relative Frobenius norm, the larger of hidden's and the head's; None for a forward


def compare(op: str, expected: Expected, logps: Tensor, gradients: tuple[Tensor, ...]) -> Errors:
    want = expected.logps if OPS[op] is None else expected.means
    if op == "cross_entropy" and len(logps) == 1:  # what a scalar loss tells of the log-probs is their mean
        want = want.mean()[None]
    error = (logps.double() - want).abs().max().item()
    if not gradients:
        return Errors(error, None)
    pairs = zip(
        gradients, (expected.rows, expected.columns), (expected.grad_hidden, expected.grad_weight), strict=False
    )
    return Errors(error, max(((got[at].double() - right).norm() / right.norm()).item() for got, at, right in pairs))


def tolerance(dtype: torch.dtype, expected: Expected) -> Errors:
    """What an honest implementation in this dtype stays under.

    Log-probs: logits rounded to the dtype err by eps/2 of the largest of them, twice (target and denominator), and
    as much again for slack. Gradients: twice the naive loss's own error (large where tokens are confident, p near 1:
    there it is a difference of nearly equal numbers), and 16 eps for coefficients made of such log-probs. To both 1e-4
    for float32 sums over H and V. An error that has a cause other than rounding (a skipped tile, a wrong coefficient)
    is larger by orders of magnitude in float32.
    """
    eps = torch.finfo(dtype).eps
    logps = 2 * eps * max(1.0, expected.largest_logit.item()) + 1e-4
    return Errors(logps, 2 * expected.naive_error.item() + 16 * eps + 1e-4)


def mismatch(errors: Errors, allowed: Errors) -> str | None:
    """Why the errors are refused, or None. Not-a-number is refused."""
    for name, error, limit in zip(Errors._fields, errors, allowed, strict=True):
        if error is not None and not error <= limit:
            return f"{name} {error:.3g} is above {limit:.3g}"
    return None
