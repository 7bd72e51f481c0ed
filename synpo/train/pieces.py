"""Attention within the pieces of rows that hold several sequences; what the pieces are for stands in prefix.py.

Four ways to one result. On a GPU one call takes all pieces: prefix_attention's kernels where they have tiles for it,
else PyTorch's variable-length flash attention, which takes no soft cap and wants a shared prompt's keys gathered once
for each answer. Anywhere else, and under dropout, each piece is a call of scaled-dot-product attention, or, with a soft
cap, is written out.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.attention.varlen import varlen_attn
from torch.nn.functional import scaled_dot_product_attention

from synpo_kernels import prefix_attention, tiling

# Arguments of attention functions that change the scores in a way that is not written here.
REFUSED_ARGUMENTS = ("s_aux", "position_bias")
# Compute capabilities (major, minor) whose variable-length flash attention is faster than prefix_attention's kernels,
# in bfloat16 and float16 without a soft cap. Not yet measured: `make gpu PART=attention` says what belongs here.
FLASH_IS_FASTER: frozenset[tuple[int, int]] = frozenset()


class UnsupportedAttention(ValueError):
    """A model's attention does something that pieces cannot reproduce."""


class Piece(NamedTuple):
    """Tokens [start, stop) of a row; their keys are the prompt [prompt_start, prompt_stop), then themselves."""

    start: int
    stop: int
    prompt_start: int = 0
    prompt_stop: int = 0

    def shifted(self, by: int) -> "Piece":
        """The same piece further right in a row."""
        return Piece(*(place + by for place in self))

    @property
    def keys(self) -> int:
        """Number of tokens that the last token of the piece attends to."""
        return self.prompt_stop - self.prompt_start + self.stop - self.start


@dataclass(frozen=True)
class Layout:
    """The pieces of every row, in order and without gaps; what follows the last piece of a row is padding."""

    rows: tuple[tuple[Piece, ...], ...]
    windows: set[int | None] = field(default_factory=set, compare=False)  # what attention was called with so far
    _made: dict[Any, Any] = field(default_factory=dict, compare=False, repr=False)

    def band(self, queries: int, keys: int, window: int, device: torch.device) -> Tensor:
        """(queries, keys) bool: the last ``queries`` of ``keys`` places see the ``window`` places up to their own."""
        key = (queries, keys, window, device)
        if key not in self._made:
            back = torch.arange(keys - queries, keys, device=device)[:, None] - torch.arange(keys, device=device)
            self._made[key] = (back >= 0) & (back < window)
        return self._made[key]

    def flat(self, width: int) -> tuple[Piece, ...]:
        """The pieces of all rows, which are ``width`` tokens wide, as those of one row."""
        if width not in self._made:
            self._made[width] = tuple(p.shifted(row * width) for row, pieces in enumerate(self.rows) for p in pieces)
        return self._made[width]

    def packed(self, width: int, device: torch.device) -> "Packed":
        """The pieces as one list of sequences, for kernels that take boundaries; rows are ``width`` tokens wide."""
        key = (width, device)
        if key not in self._made:
            self._made[key] = _pack(self.flat(width), len(self.rows) * width, device)
        return self._made[key]


class Packed(NamedTuple):
    """Sequences of queries and keys as flat indices into (rows * width) tokens, with their boundaries (int32)."""

    queries: Tensor | None  # None: every token, in order
    keys: Tensor
    cu_queries: Tensor
    cu_keys: Tensor
    longest_queries: int
    longest_keys: int


def _pack(pieces: tuple[Piece, ...], tokens: int, device: torch.device) -> Packed:
    queries, keys, lengths = [], [], []
    for piece in pieces:
        own = torch.arange(piece.start, piece.stop)
        queries.append(own)
        keys += [torch.arange(piece.prompt_start, piece.prompt_stop), own]
        lengths.append((len(own), piece.keys))
    counts = torch.tensor([(0, 0), *lengths]).T
    cu_queries, cu_keys = counts.cumsum(1).to(device, torch.int32)
    longest_queries, longest_keys = counts.amax(1).tolist()
    flat = torch.cat(queries)
    whole = len(flat) == tokens
    return Packed(
        None if whole else flat.to(device),
        torch.cat(keys).to(device),
        cu_queries,
        cu_keys,
        longest_queries,
        longest_keys,
    )


def piecewise(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: Layout,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **options: Any,
) -> Tensor:
    """Attention within the pieces of a layout: query (R, h, T, d), key, value (R, g, T, d) -> (R, T, h, d).

    h is a multiple of g. sliding_window: a token sees so many tokens, itself included. softcap: scores pass through
    softcap * tanh(score / softcap). Padding gives 0. Errors: UnsupportedAttention for what changes scores otherwise.
    """
    strange = [name for name in REFUSED_ARGUMENTS if options.get(name) is not None]
    if strange or not getattr(module, "is_causal", True):
        what = f"with {strange[0]}" if strange else "that is not causal"
        raise UnsupportedAttention(f"{type(module).__name__} has attention {what}")
    layout.windows.add(sliding_window)
    if not dropout:
        kernels = _kernels_take(query, value)
        if _flash_takes(query, value, softcap) and (not kernels or _flash_is_faster(query)):
            return _by_boundaries(query, key, value, layout, scaling, sliding_window)
        if kernels:
            return _by_kernels(query, key, value, layout, scaling, sliding_window, softcap)
    parts: list[Tensor] = []
    for row, pieces in enumerate(layout.rows):
        for piece in pieces:
            own, prompt = slice(piece.start, piece.stop), slice(piece.prompt_start, piece.prompt_stop)
            k, v = (x[row, :, own] for x in (key, value))
            if prompt.stop > prompt.start:
                k, v = (torch.cat((x[row, :, prompt], tail), 1) for x, tail in ((key, k), (value, v)))
            parts += _windowed(query[row, :, own], k, v, layout, scaling, dropout, sliding_window, softcap)
        padding = query.shape[2] - pieces[-1].stop
        if padding:
            parts.append(query.new_zeros(padding, query.shape[1], value.shape[-1]))
    return torch.cat(parts).unflatten(0, (query.shape[0], query.shape[2]))


def _windowed(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: Layout,
    scaling: float | None,
    dropout: float,
    window: int | None,
    softcap: float | None,
) -> Iterator[Tensor]:
    """Causal attention of the last n_q of n_k places, (n_q, h, d), in blocks that a sliding window makes smaller."""
    queries, keys = query.shape[1], key.shape[1]
    first = keys - queries
    seen = keys if window is None else min(window, keys)
    block = queries if seen == keys else seen
    for start in range(0, queries, block):
        stop = min(start + block, queries)
        low, high = max(0, first + start - seen + 1), first + stop
        mask = None
        if softcap is not None or seen < keys or queries < keys:
            mask = layout.band(stop - start, high - low, seen, query.device)
        out = _attend(query[:, start:stop], key[:, low:high], value[:, low:high], mask, scaling, dropout, softcap)
        yield out.transpose(0, 1)


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scaling: float | None,
    dropout: float,
    softcap: float | None,
) -> Tensor:
    """(h, n_q, d) from keys and values (g, n_k, d); mask None: causal."""
    groups = query.shape[0] // key.shape[0]
    if softcap is not None:
        key, value = (x.repeat_interleave(groups, 0) for x in (key, value))
        scores = query @ key.transpose(1, 2) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
        scores = (softcap * torch.tanh(scores / softcap)).masked_fill(~mask, -torch.inf)
        weights = scores.softmax(-1, dtype=torch.float32).to(query.dtype)
        return nn.functional.dropout(weights, dropout) @ value
    if query.is_cuda and mask is not None and groups > 1:
        # With a mask the memory-saving kernel wants as many heads of keys as of queries.
        key, value, groups = key.repeat_interleave(groups, 0), value.repeat_interleave(groups, 0), 1
    out = scaled_dot_product_attention(
        query[None], key[None], value[None], attn_mask=mask, dropout_p=dropout, scale=scaling, is_causal=mask is None,
        enable_gqa=groups > 1,
    )  # fmt: skip
    return out[0]


def _kernels_take(query: Tensor, value: Tensor) -> bool:
    size = query.shape[-1]
    return size == value.shape[-1] and tiling.attention(query.device, query.dtype, size) is not None


def _flash_takes(query: Tensor, value: Tensor, softcap: float | None) -> bool:
    size = query.shape[-1]
    return (
        query.is_cuda
        and query.dtype in (torch.bfloat16, torch.float16)
        and softcap is None
        and size == value.shape[-1] <= 256
        and size % 8 == 0
        and torch.cuda.get_device_capability(query.device) >= (8, 0)
    )


def _flash_is_faster(query: Tensor) -> bool:
    return torch.cuda.get_device_capability(query.device) in FLASH_IS_FASTER


def _in_one_row(*tensors: Tensor) -> list[Tensor]:
    """(R, h, T, d) -> (R * T, h, d) each; views of what a model's projections give."""
    return [x.transpose(1, 2).flatten(0, 1) for x in tensors]


def _by_kernels(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: Layout,
    scaling: float | None,
    window: int | None,
    softcap: float | None,
) -> Tensor:
    """One call of prefix_attention for all pieces."""
    rows, _, width, _ = query.shape
    q, k, v = _in_one_row(query, key, value)
    out = prefix_attention(q, k, v, layout.flat(width), scale=scaling, window=window, softcap=softcap)
    return out.unflatten(0, (rows, width))


def _by_boundaries(
    query: Tensor, key: Tensor, value: Tensor, layout: Layout, scaling: float | None, window: int | None
) -> Tensor:
    """One call of flash attention for all pieces; a shared prompt's keys are gathered once per answer."""
    rows, heads, width, size = query.shape
    packed = layout.packed(width, query.device)
    q, k, v = _in_one_row(query, key, value)
    out = varlen_attn(
        q if packed.queries is None else q.index_select(0, packed.queries),
        k.index_select(0, packed.keys),
        v.index_select(0, packed.keys),
        packed.cu_queries,
        packed.cu_keys,
        packed.longest_queries,
        packed.longest_keys,
        scale=scaling,
        window_size=(-1 if window is None else window - 1, 0),
        enable_gqa=heads != key.shape[1],
    )
    if packed.queries is not None:
        out = out.new_zeros(rows * width, heads, size).index_copy(0, packed.queries, out)
    return out.reshape(rows, width, heads, size)
