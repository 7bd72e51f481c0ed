"""Inputs that reach the branches of prefix_attention's kernels, why each is there, and the comparison that holds an
implementation to the oracle in float64. Kernels are tested in blocks of 16 and 32."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from synpo_kernels import reference
from tests.closeness import assert_close, tolerance

Pieces = list[tuple[int, int, int, int]]
Results = tuple[Tensor, Tensor, Tensor, Tensor]  # out and the gradients of query, key and value


class Problem(NamedTuple):
    """What prefix_attention takes, and the gradient that comes back to it."""

    query: Tensor  # (T, h, d)
    key: Tensor  # (T, g, d)
    value: Tensor  # (T, g, d)
    grad: Tensor  # (T, h, d)
    pieces: Pieces
    scale: float | None = None
    window: int | None = None
    softcap: float | None = None

    def to(self, dtype: torch.dtype) -> "Problem":
        return self._replace(**{name: getattr(self, name).to(dtype) for name in ("query", "key", "value", "grad")})

    @property
    def options(self) -> dict[str, Any]:
        return {"scale": self.scale, "window": self.window, "softcap": self.softcap}

    @property
    def flat(self) -> tuple[int, ...]:
        return tuple(place for piece in self.pieces for place in piece)


def pair(start: int, prompt: int, chosen: int, rejected: int) -> Pieces:
    """[prompt | chosen | rejected] from a place on, as the trainer lays it out."""
    first, last = start + prompt + chosen, start + prompt + chosen + rejected
    return [(start, first, 0, 0), (first, last, start, start + prompt)]


def ordinary(pieces: Pieces, T: int | None = None, h: int = 2, g: int = 1, d: int = 20, **options: Any) -> Problem:
    """Random numbers; T beyond the last piece is padding. d 20 leaves a part of every vector of 32 empty."""
    T = pieces[-1][1] if T is None else T
    return Problem(torch.randn(T, h, d), *torch.randn(2, T, g, d), torch.randn(T, h, d), pieces, **options)


def rising(pieces: Pieces, top: float = 60.0) -> Problem:
    """Scores that rise along the row for half of the heads, so that every block of keys passes the ones before it and
    what was summed must be rescaled; for the others they fall."""
    p = ordinary(pieces, d=16, scale=1.0)
    p.query[:, ::2, 0], p.query[:, 1::2, 0] = 4.0, -4.0
    p.key[..., 0] = torch.linspace(0, top / 4, len(p.key))[:, None]
    p.query[..., 1:] *= 0.3
    return p


def of_a_model(rows: int, width: int, pieces: Pieces, **options: Any) -> Problem:
    """Queries (R, h, T, d) that are views of (R, T, h, d), keys and values parts of one product, as a model gives."""
    p = ordinary(pieces, rows * width, h=4, g=2, d=16, **options)
    query = p.query.view(rows, width, 4, 16).transpose(1, 2)
    both = torch.randn(rows, width, 4 * 16).view(rows, width, 4, 16).transpose(1, 2)
    query, key, value = (x.transpose(1, 2).flatten(0, 1) for x in (query, both[:, :2], both[:, 2:]))
    assert not key.is_contiguous()
    return p._replace(query=query, key=key, value=value)


PAIR = pair(0, 35, 6, 19)
SHARED = [(0, 21, 0, 0), (21, 32, 0, 21), (32, 49, 0, 21), (49, 66, 0, 21), (66, 70, 5, 49)]
PROBLEMS: dict[str, Callable[[], Problem]] = {
    "one sequence": lambda: ordinary([(0, 33, 0, 0)], h=2, g=2, d=16),
    "a pair": lambda: ordinary(PAIR),
    # Own keys and prompts that end one before, at and one after the edge of a block.
    "edges": lambda: ordinary([(0, 31, 0, 0), (31, 63, 0, 15), (63, 96, 31, 63), (96, 112, 63, 96), (112, 129, 0, 17)]),
    "one token": lambda: ordinary([(0, 1, 0, 0), (1, 2, 0, 1), (2, 19, 0, 1), (19, 20, 0, 19)]),
    "pairs in one row": lambda: ordinary([*pair(0, 17, 9, 20), *pair(46, 1, 3, 5), *pair(55, 33, 2, 1)]),
    "padding": lambda: ordinary([*pair(0, 10, 9, 14), *pair(40, 20, 1, 17)], T=90),
    "a prompt of several pieces, shared": lambda: ordinary(SHARED, h=1),
    "a window in the answers": lambda: ordinary(PAIR, window=5),
    "a window of one": lambda: ordinary(PAIR, window=1),
    # 18 places from the last of 32 keys end one after a block of 16 queries.
    "a window into the prompt": lambda: ordinary([*pair(0, 40, 12, 11), *pair(63, 17, 9, 3)], window=18),
    "a window of all but one": lambda: ordinary(PAIR, window=53),
    "a window of everything": lambda: ordinary(PAIR, window=54),
    "a soft cap": lambda: ordinary(PAIR, softcap=2.0, scale=0.5),
    "a soft cap in a window": lambda: ordinary(PAIR, softcap=2.0, scale=0.5, window=18),
    "rising": lambda: rising(PAIR),
    "rising in a window": lambda: rising(PAIR)._replace(window=24),
    "heads of 80": lambda: ordinary(pair(0, 18, 9, 17), d=80),
    "heads of 128": lambda: ordinary(pair(0, 18, 9, 17), d=128),
    "of a model": lambda: of_a_model(2, 40, [*pair(0, 10, 9, 14), *pair(40, 20, 1, 17)]),
}


def by_autograd(function: Callable[..., Tensor], p: Problem) -> Results:
    """A differentiable function's results."""
    leaves = [x.detach().requires_grad_() for x in (p.query, p.key, p.value)]
    out = function(*leaves, p.pieces, **p.options)
    return out.detach(), *torch.autograd.grad(out, leaves, p.grad)


def check(p: Problem, got: Results) -> None:
    """Every result within its derived tolerance of the oracle's in float64."""
    exact = by_autograd(reference.prefix_attention, p.to(torch.float64))
    naive = by_autograd(reference.prefix_attention, p)
    (T, h, d), dtype = p.query.shape, p.query.dtype
    q, k, v, do = (x.double() for x in (p.query, p.key, p.value, p.grad))
    k, v = (x.repeat_interleave(h // x.shape[1], dim=1) for x in (k, v))
    scale = abs(d**-0.5 if p.scale is None else p.scale)
    # A score is a sum of d products; through the exponential its absolute error becomes a relative one of p.
    score = d**0.5 * (1 + scale * float(torch.einsum("qhd,khd->hqk", q, k).abs().max()))
    slope = 2 * scale * float(torch.einsum("qhd,khd->hqk", do, v).abs().max())  # bounds |ds / p|
    summands = {"out": v, "query": slope * k, "key": slope * q, "value": do}
    for ours, want, by_plain, (name, summand) in zip(got, exact, naive, summands.items(), strict=True):
        assert ours.dtype == dtype
        size = (T**0.5 + score) * float(summand.abs().max())
        assert_close(ours, want, tolerance(want, by_plain, dtype, dtype, 1, size), f"gradient of {name}")
