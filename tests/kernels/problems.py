"""Inputs that reach the branches of the kernels; why each is there stands beside it."""

import torch
from torch import Tensor

from tests.kernels.oracle import Head

# How far a row's hidden state is pushed towards its target (+) or towards another token (-), in logits. Among a few
# hundred tokens +26 gives p_y = 1 - 1e-6 and better, -300 gives p_y = e^-300; the guard raises a row's reference when
# a logit passes the target's by 40, float32's exp overflows at 88, fp16 ends at 65504.
MARGINS = (
    *(32.0, 26.0, 20.0, 17.0, 14.0, 8.0, 2.0, 0.0, -2.0, -8.0, -30.0),
    *(-36.0, -38.0, -39.5, -40.0, -40.5, -42.0, -44.0, -60.0, -87.0, -89.0, -120.0, -300.0),
)


def ordinary(n: int = 37, H: int = 40, V: int = 301, **options: object) -> Head:
    """Random rows with some ignored; odd sizes, so that no tile of a kernel is full."""
    targets = torch.randint(0, V, (n,))
    targets[::5] = -100
    return Head(torch.randn(n, H), torch.randn(V, H), targets, **options)  # type: ignore[arg-type]


def margins(H: int = 48, V: int = 301, repeats: int = 2) -> Head:
    """Rows whose target stands at every margin of MARGINS against the best other token."""
    weight = torch.randn(V, H)
    push = torch.tensor(MARGINS).repeat(repeats)
    targets = torch.randint(0, V, (len(push),))
    towards = torch.where(push > 0, targets, (targets + 1 + torch.randint(0, V - 1, targets.shape)) % V)
    direction = weight[towards] / weight[towards].square().sum(1, keepdim=True)
    return Head(0.05 * torch.randn(len(push), H) + push.abs()[:, None] * direction, weight, targets)


def rising(n: int = 24, H: int = 16, V: int = 1203, top: float = 400.0) -> Head:
    """Logits that rise along the vocabulary, so that every tile passes the ones before it: the reference of a row must
    be raised again and again, and what was summed must be rescaled. Half of the rows fall instead. Targets at the
    start, in the middle and at the end."""
    weight = torch.randn(V, H)
    weight[:, 0] = torch.linspace(0, top / 8, V)  # 8 logits a unit: exact enough in bfloat16
    hidden = 0.1 * torch.randn(n, H)
    hidden[:, 0] = torch.where(torch.arange(n) % 2 == 0, 8.0, -8.0)
    targets = torch.tensor([0, 1, V // 2, V - 2, V - 1, 7]).repeat_interleave(2).repeat(n // 12 + 1)[:n]
    return Head(hidden, weight, targets)


def confident(H: int = 48, V: int = 301) -> Head:
    """Rows of p_y from about 1 - 1e-2 to 1 - 1e-6 and beyond, where 1 - p_y has no digits left in float32."""
    head = margins(H, V, 1)
    keep = torch.tensor(MARGINS) >= 8
    return head._replace(hidden=head.hidden[keep], targets=head.targets[keep])


PROBLEMS = {
    "ordinary": lambda: ordinary(),
    "bias": lambda: ordinary()._replace(bias=torch.randn(301)),
    "scaled and capped": lambda: ordinary()._replace(bias=torch.randn(301), logit_scale=0.7, softcap=5.0),
    "negative scale": lambda: ordinary(logit_scale=-1.3),
    "margins": lambda: margins(),
    "margins, capped": lambda: margins()._replace(softcap=50.0),
    "rising": lambda: rising(),
    "tile edges": lambda: ordinary(n=65, H=64, V=513),
}


def upstream(n: int) -> Tensor:
    """A gradient that is neither 1 nor of one sign."""
    return torch.linspace(-1.5, 2.5, n)
