"""Per-token log-probs and their gradients written out in float64, without autograd and without synpo_kernels.

log p = z_y - log sum_v exp(z_v)        d log p / dz_v = 1[v = y] - p_v        1 - p_y = sum over v != y of p_v
"""

from typing import NamedTuple

import torch
from torch import Tensor


class Head(NamedTuple):
    """One problem: what linear_logps takes."""

    hidden: Tensor  # (N, H)
    weight: Tensor  # (V, H)
    targets: Tensor  # (N,)
    bias: Tensor | None = None
    logit_scale: float = 1.0
    softcap: float | None = None
    ignore_index: int = -100

    def to(self, dtype: torch.dtype) -> "Head":
        bias = None if self.bias is None else self.bias.to(dtype)
        return self._replace(hidden=self.hidden.to(dtype), weight=self.weight.to(dtype), bias=bias)

    def options(self) -> dict[str, float | int | None]:
        return {"logit_scale": self.logit_scale, "softcap": self.softcap, "ignore_index": self.ignore_index}


class Answer(NamedTuple):
    logps: Tensor  # (N,)
    hidden: Tensor  # (N, H) gradient of sum(upstream * logps)
    weight: Tensor  # (V, H)
    bias: Tensor  # (V,)


def exact(head: Head, upstream: Tensor) -> Answer:
    """The closed forms in float64, at the values the inputs have in their own dtype."""
    h, w = head.hidden.double(), head.weight.double()
    raw = h @ w.T
    if head.bias is not None:
        raw = raw + head.bias.double()
    z = raw * head.logit_scale
    slope = torch.full_like(z, head.logit_scale)
    if head.softcap is not None:
        z = head.softcap * torch.tanh(z / head.softcap)
        slope = head.logit_scale * (1 - (z / head.softcap) ** 2)
    valid = head.targets != head.ignore_index
    y = head.targets.clamp(0, len(w) - 1)[:, None]
    others = z.scatter(1, y, float("-inf"))
    log_others = torch.logsumexp(others, 1)  # of all but the target, so that a confident token keeps its digits
    gap = z.gather(1, y)[:, 0] - log_others
    logps = torch.nn.functional.logsigmoid(gap)
    p = torch.exp(z - torch.logsumexp(z, 1)[:, None])
    by_logit = (-p).scatter(1, y, torch.sigmoid(-gap)[:, None]) * slope * valid[:, None]
    c = upstream.double()[:, None] * by_logit
    return Answer(logps * valid, c @ w, c.T @ h, c.sum(0))


def naive(head: Head, upstream: Tensor) -> Answer:
    """The same by the operations everyone writes, in the inputs' own dtype, with autograd."""
    h, w = head.hidden.detach().clone().requires_grad_(), head.weight.detach().clone().requires_grad_()
    b = torch.zeros_like(w[:, 0]) if head.bias is None else head.bias.detach().clone()
    b.requires_grad_()
    z = head.logit_scale * (h @ w.T + b)
    if head.softcap is not None:
        z = head.softcap * torch.tanh(z / head.softcap)
    valid = head.targets != head.ignore_index
    logps = z.log_softmax(-1).gather(1, head.targets.clamp(0, len(w) - 1)[:, None])[:, 0] * valid
    return Answer(logps.detach(), *torch.autograd.grad(logps, (h, w, b), upstream.to(logps.dtype)))


def largest_logit(head: Head) -> float:
    """Largest magnitude of a logit before a softcap, which is what a product's rounding error is measured by."""
    raw = head.hidden.double() @ head.weight.double().T
    return float(((raw if head.bias is None else raw + head.bias.double()) * head.logit_scale).abs().max())
