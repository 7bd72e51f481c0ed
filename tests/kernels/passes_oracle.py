"""The four inner ops in float64, and how far arithmetic in the accumulator may be from them.

Errors are counted where they arise. A logit is a sum of H products; its absolute error, and that of the subtraction of
the reference, become a relative error of exp(z - reference). A sum of n terms adds eps * sqrt(n) of their magnitudes.
Where bf16 products are pairs, the weights exp(z - reference) d and coef * hidden are rounded to bf16, each by at most
2^-8 of itself, and independently: what that adds to a sum is 2^-8 of the root of the sum of squares, not of the sum,
so that one column left out of hundreds still shows.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from synpo_kernels.vocab_passes import GUARD

_SIGMAS = 4.0  # a rounding error is at most 2^-8 and 0.4 of that on average: 4 roots of the sum of squares are 10 sigma


class Problem(NamedTuple):
    """What the ops take; ``truth`` works on the values the inputs have in their own dtype."""

    hidden: Tensor  # (n, H)
    weight: Tensor  # (V, H)
    bias: Tensor | None  # (V,)
    targets: Tensor  # (n,) int64; outside [0, V): nothing is left out
    reference: Tensor  # (n,) accumulator dtype: target_logits of the forward ops, log_norm of softmax_grads
    coef: Tensor  # (n,) accumulator dtype
    logit_scale: float
    softcap: float  # 0 = none

    @property
    def head(self) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
        return self.hidden, self.weight, self.bias, self.targets


class Weights(NamedTuple):
    """exp(z - shift) and exp(z - shift) d, (n, V) float64 with 0 at the target, and their allowed errors."""

    e: Tensor
    e_error: Tensor
    ed: Tensor
    ed_error: Tensor


def logits(p: Problem) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """z, d, and the allowed absolute errors of both, (n, V) float64; z is -inf at the target."""
    h, w, eps = p.hidden.double(), p.weight.double(), torch.finfo(p.reference.dtype).eps
    bias = torch.zeros(len(w), dtype=torch.float64) if p.bias is None else p.bias.double()
    z = p.logit_scale * (h @ w.T + bias)
    size = abs(p.logit_scale) * (h.abs() @ w.abs().T + bias.abs())
    error = eps * (2 + h.shape[1] ** 0.5) * size
    d, d_error = torch.full_like(z, p.logit_scale), torch.zeros_like(z)
    if p.softcap > 0:
        t = torch.tanh(z / p.softcap)
        error = error * (1 - t**2) + 8 * eps * p.softcap
        d_error = abs(p.logit_scale) * (8 * eps + 2 * error / p.softcap)
        z, d = p.softcap * t, p.logit_scale * (1 - t**2)
    left_out = p.targets[:, None] == torch.arange(len(w))
    return z.masked_fill(left_out, float("-inf")), d, error, d_error


def weights(p: Problem, shift: Tensor) -> Weights:
    """At the references ``shift`` (n,), which an op has chosen or was given."""
    z, d, error, d_error = logits(p)
    eps = torch.finfo(p.reference.dtype).eps
    shift = shift.double()[:, None]
    e = torch.exp(z - shift)
    relative = torch.expm1(error + eps * (z.nan_to_num(neginf=0).abs() + shift.abs() + 8))
    # A piece of a row is exp(z - r) at a reference r of its own, at most e^GUARD, times exp(r - shift) once the row is
    # raised. float32 ends at e^-87: what is then below e^(GUARD - 87) of the row's largest weight may be 0.
    raised = shift != p.reference.double()[:, None]
    lost = 0.0 if p.reference.dtype == torch.float64 else torch.exp(torch.tensor(GUARD - 87.0, dtype=torch.float64))
    e_error = e * relative + raised * torch.minimum(e, torch.as_tensor(lost)) + torch.finfo(p.reference.dtype).tiny
    return Weights(e, e_error, e * d, e_error * d.abs() + e * d_error)


def matrix_product(a: Tensor, a_error: Tensor, b: Tensor, acc: torch.dtype, roundings: int) -> tuple[Tensor, Tensor]:
    """a @ b in float64 and its allowed error; ``roundings``: how often a term was rounded to bf16."""
    b = b.double()
    size = a.abs() @ b.abs()
    allowed = a_error @ b.abs() + torch.finfo(acc).eps * (2 + a.shape[1] ** 0.5) * size + torch.finfo(acc).tiny
    if roundings:
        allowed += _SIGMAS * 2**-8 * (roundings * (a**2 @ b**2)).sqrt()
    return a @ b, allowed
