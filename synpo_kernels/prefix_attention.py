"""Causal attention within pieces of one row of tokens, pieces that may share a prompt which stands in the row once.

A piece is tokens [start, stop) and the prompt [prompt_start, prompt_stop) they go on from: what comes before it in its
sequence, anywhere earlier in the row, or nothing. For query i and key j, of head m and of the head of keys it shares,

    back_ij = i - j                              for j in the piece: how many places j stands before i
            = i - j - (start - prompt_stop)      for j in its prompt
    z_ij = phi(scale <q_i, k_j>)                 phi(x) = softcap tanh(x / softcap), or x
    p_ij = exp(z_ij - lse_i)                     lse_i = log sum_j exp(z_ij), over keys with 0 <= back_ij < window
    o_i = sum_j p_ij v_j

which is attention (Vaswani et al., arXiv 1706.03762) of each sequence by itself. With D_i = <do_i, o_i> the gradients:

    dv_j = sum_i p_ij do_i        ds_ij = scale phi'_ij p_ij (<do_i, v_j> - D_i)        phi' = 1 - (z / softcap)^2
    dq_i = sum_j ds_ij k_j        dk_j = sum_i ds_ij q_i

with sums over i for every query that sees j: of all pieces that share the prompt, and of all heads that share k and v.
The probabilities are made again from lse, as in FlashAttention-2 (Dao, arXiv 2307.08691).

The ops are defined here with plain PyTorch kernels that run on every device and hold a piece's probabilities whole;
prefix_attention_cuda.py overrides them on CUDA.
"""

import functools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .door import own_precision, refuse_second_order

_FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)

_SETTINGS = "int[] pieces, float scale, int window, float softcap"
_LIBRARY = torch.library.Library("synpo", "FRAGMENT")
_LIBRARY.define(f"prefix_attention(Tensor query, Tensor key, Tensor value, {_SETTINGS}) -> (Tensor out, Tensor lse)")
_LIBRARY.define(
    "prefix_attention_backward(Tensor grad, Tensor query, Tensor key, Tensor value, Tensor out, Tensor lse,"
    f" {_SETTINGS}) -> (Tensor grad_query, Tensor grad_key, Tensor grad_value)"
)


class Settings(NamedTuple):
    """What the ops take beside tensors, as it stands in their schemas."""

    pieces: Sequence[int]  # start, stop, prompt_start, prompt_stop of one piece after another
    scale: float
    window: int  # 0 = none
    softcap: float  # 0.0 = none


def covers(pieces: Sequence[int], tokens: int) -> bool:
    """Whether every token belongs to a piece; what does not is padding, for which the ops give 0."""
    return sum(pieces[1::4]) - sum(pieces[0::4]) == tokens


@functools.lru_cache(maxsize=64)  # a model's layers ask for the same pieces
def check_pieces(flat: tuple[int, ...], tokens: int) -> None:
    """ValueError for pieces that do not lie in order within the tokens, or go on from what is not there."""
    if len(flat) % 4:
        raise ValueError(f"pieces are tuples of 4 numbers; got {len(flat)} numbers in all")
    pieces = list(zip(*[iter(flat)] * 4, strict=True))
    end = 0
    for number, (start, stop, prompt_start, prompt_stop) in enumerate(pieces):
        if not end <= start < stop <= tokens:
            raise ValueError(f"piece {number} is [{start}, {stop}); it must lie in order within [{end}, {tokens})")
        end = stop
        if not 0 <= prompt_start <= prompt_stop <= start:
            raise ValueError(f"piece {number}, from {start} on, has the prompt [{prompt_start}, {prompt_stop})")
        inside = sum(max(0, min(prompt_stop, b) - max(prompt_start, a)) for a, b, _, _ in pieces[:number])
        if inside < prompt_stop - prompt_start:
            raise ValueError(f"piece {number} has the prompt [{prompt_start}, {prompt_stop}); parts of it are padding")


def _seen(settings: Settings, device: torch.device) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Of each piece: its queries, the places (n_k,) of its keys, and which of these each query sees (n_q, n_k)."""
    for start, stop, prompt_start, prompt_stop in zip(*[iter(settings.pieces)] * 4, strict=True):
        places = torch.cat(
            (torch.arange(prompt_start, prompt_stop, device=device), torch.arange(start, stop, device=device))
        )
        order = torch.arange(len(places), device=device)
        back = order[len(places) - (stop - start) :, None] - order
        yield slice(start, stop), places, (back >= 0) & (back < (settings.window or len(places)))


def _logits(query: Tensor, key: Tensor, settings: Settings) -> Tensor:
    """z (g, h / g, n_q, n_k) of query (n_q, g, h / g, d) and key (n_k, g, d)."""
    z: Tensor = settings.scale * torch.einsum("qgmd,kgd->gmqk", query, key)
    if not settings.softcap:
        return z
    capped: Tensor = settings.softcap * torch.tanh(z / settings.softcap)
    return capped


def _grouped(x: Tensor, groups: int) -> Tensor:
    """(T, h, d) -> (T, g, h / g, d), as it is accumulated: float32, float64 for float64."""
    grouped: Tensor = x.to(_accumulator(x.dtype)).unflatten(1, (groups, -1))
    return grouped


def _accumulator(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


@own_precision
def _forward(query: Tensor, key: Tensor, value: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    settings = Settings(*rest)
    check_pieces(tuple(settings.pieces), len(query))
    q, k, v = _grouped(query, key.shape[1]), *(x.to(_accumulator(x.dtype)) for x in (key, value))
    out, lse = q.new_zeros(q.shape), q.new_zeros(query.shape[1], len(query))
    for own, places, visible in _seen(settings, query.device):
        z = _logits(q[own], k[places], settings).masked_fill(~visible, float("-inf"))
        norm = z.logsumexp(-1)
        out[own] = torch.einsum("gmqk,kgd->qgmd", (z - norm[..., None]).exp(), v[places])
        lse[:, own] = norm.flatten(0, 1)
    return out.flatten(1, 2).to(query.dtype), lse


@own_precision
def _backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    settings = Settings(*rest)
    q, do, o = (_grouped(x, key.shape[1]) for x in (query, grad, out))
    k, v = (x.to(_accumulator(x.dtype)) for x in (key, value))
    norm = lse.unflatten(0, q.shape[1:3])
    delta = torch.linalg.vecdot(do, o).permute(1, 2, 0)
    dq, dk, dv = torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
    for own, places, visible in _seen(settings, query.device):
        z = _logits(q[own], k[places], settings)
        p = (z - norm[..., own, None]).exp().masked_fill(~visible, 0.0)
        dp = torch.einsum("qgmd,kgd->gmqk", do[own], v[places])
        ds = settings.scale * p * (dp - delta[..., own, None])
        if settings.softcap:
            ds *= 1 - (z / settings.softcap).square()
        dq[own] = torch.einsum("gmqk,kgd->qgmd", ds, k[places])
        dk[places] += torch.einsum("gmqk,qgmd->kgd", ds, q[own])
        dv[places] += torch.einsum("gmqk,qgmd->kgd", p, do[own])
    return dq.flatten(1, 2).to(query.dtype), dk.to(key.dtype), dv.to(value.dtype)


def _forward_fake(query: Tensor, key: Tensor, value: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return (
        query.new_empty(query.shape),
        query.new_empty((query.shape[1], query.shape[0]), dtype=_accumulator(query.dtype)),
    )


def _backward_fake(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return query.new_empty(query.shape), key.new_empty(key.shape), value.new_empty(value.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    query, key, value, *rest = inputs
    ctx.settings = Settings(*rest)
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(query, key, value, *output)


def _autograd(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    refuse_second_order("prefix_attention")
    grads = torch.ops.synpo.prefix_attention_backward(grad, *ctx.saved_tensors, *ctx.settings)
    return *grads, *(None,) * len(ctx.settings)


_LIBRARY.impl("prefix_attention", _forward, "CompositeExplicitAutograd")
_LIBRARY.impl("prefix_attention_backward", _backward, "CompositeExplicitAutograd")
torch.library.register_fake("synpo::prefix_attention", _forward_fake, lib=_LIBRARY)
torch.library.register_fake("synpo::prefix_attention_backward", _backward_fake, lib=_LIBRARY)
torch.library.register_autograd("synpo::prefix_attention", _autograd, setup_context=_setup_context, lib=_LIBRARY)


def prefix_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    pieces: Sequence[tuple[int, int, int, int]],
    *,
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
) -> Tensor:
    """Causal attention of each piece of a row to its prompt and to itself: (T, h, d) in the inputs' dtype.

    A pair of answers that share a prompt of p tokens, in a row [prompt | chosen | rejected] with the prompt once::

        prefix_attention(query, key, value, [(0, p + c, 0, 0), (p + c, p + c + r, 0, p)])

    Equivalent to, for each piece (start, stop, prompt_start, prompt_stop) by itself::

        seen = [*range(prompt_start, prompt_stop), *range(start, stop)]
        causal_attention(query[start:stop], key[seen], value[seen])     # the last query sees all keys

    query (T, h, d), key and value (T, g, d) of one dtype (float64, float32, bfloat16, float16; or autocast is on), h
    a multiple of g, any strides. pieces: in order, each longer than 0, a prompt before the piece that goes on from it
    and within earlier pieces; several pieces may share one. They are Python numbers, so that no work list is read back
    from a GPU. Tokens outside of all pieces are padding: they give 0 and get no gradient.

    scale: of the scores, default d^-0.5. window >= 1: a token sees so many tokens of its sequence, itself included.
    softcap > 0: scores pass through softcap * tanh(score / softcap). Differentiable once in query, key and value; the
    same inputs give the same bits. On CUDA nothing is gathered or copied, and memory beyond the results is 8 T h bytes.
    Errors: TypeError for dtypes, ValueError for shapes, devices, pieces and values out of range, RuntimeError for a
    second derivative.
    """
    query, key, value = _autocast(query, key, value)
    _check(query, key, value, window, softcap)
    flat = tuple(place for piece in pieces for place in piece)
    settings = Settings(flat, query.shape[-1] ** -0.5 if scale is None else scale, window or 0, softcap or 0.0)
    out: Tensor = torch.ops.synpo.prefix_attention(*map(_adjacent, (query, key, value)), *settings)[0]
    return out


def _adjacent(x: Tensor) -> Tensor:
    """x with the numbers of a head side by side in memory; tokens and heads may lie anywhere."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors in autocast's dtype where it is on, as attention in PyTorch takes them; float64 stays."""
    kind = tensors[0].device.type
    if not torch.is_autocast_enabled(kind) or tensors[0].dtype == torch.float64:
        return tensors
    return tuple(x.to(torch.get_autocast_dtype(kind)) for x in tensors)


def _check(query: Tensor, key: Tensor, value: Tensor, window: int | None, softcap: float | None) -> None:
    if query.dtype not in _FLOATS:
        raise TypeError(f"query has dtype {query.dtype}; allowed: float64, float32, bfloat16, float16")
    if query.ndim != 3 or 0 in query.shape[1:]:
        raise ValueError(f"query has shape {tuple(query.shape)}; expected (T, h, d) with h and d >= 1")
    T, h, d = query.shape
    for name, x in (("key", key), ("value", value)):
        if x.dtype != query.dtype:
            raise TypeError(f"query is {query.dtype} but {name} is {x.dtype}: give both one dtype, or use autocast")
        if x.ndim != 3 or (x.shape[0], x.shape[2]) != (T, d) or not x.shape[1] or h % x.shape[1]:
            raise ValueError(f"{name} has shape {tuple(x.shape)}; expected ({T}, g, {d}) with g a divisor of {h}")
        if x.device != query.device:
            raise ValueError(f"query is on {query.device} but {name} on {x.device}")
    if key.shape != value.shape:
        raise ValueError(f"key has shape {tuple(key.shape)} but value {tuple(value.shape)}; give both g heads")
    if window is not None and window < 1:
        raise ValueError(f"window is {window}; it must be at least 1 (a token sees itself), or None for none")
    if softcap is not None and not softcap > 0:
        raise ValueError(f"softcap is {softcap}; it must be > 0, or None for none")
