"""Triton kernels of prefix_attention, in the manner of FlashAttention-2; prefix_attention_cuda.py launches them.

    forward      a program for each tile of queries and head: walks the keys of its spans with a running maximum
    grad_query   the same walk for dq; makes D = <do, o> on its way, for the third
    grad_key     a program for each tile of keys and head of keys: walks the queries of its spans, of every head that
                 shares these keys, for dk and dv

The equations are prefix_attention.py's; tiles and spans are prefix_attention_tiles.py's. Keys and values are read where
they stand, whoever shares them. Each result is written by one program and added up in one order, so the same inputs
give the same bits; the price is that the two gradients make the scores once each. Within a span the blocks in which
everything is visible are walked without a mask; under a sliding window all are masked.

Logits are in units of log 2 inside: ``scale`` and ``softcap`` come multiplied by log2(e), since exp2 is what the device
has. Letters: T tokens, ``SIZE`` of a head, ``WIDTH`` the next power of two.
"""

# Device kernels have no Python types.
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

import math

import triton
import triton.language as tl

from .prefix_attention_tiles import SPAN_NUMBERS, TILE_NUMBERS

# Arguments that change from batch to batch and help no address.
_COUNTS = ("T", "window")

_LOG2E = tl.constexpr(math.log2(math.e))
_LN2 = tl.constexpr(math.log(2))
_LOWEST = tl.constexpr(-1e38)  # below every logit, and finite: a row that has seen no key yet makes no NaN
_TILE = tl.constexpr(TILE_NUMBERS)
_SPAN = tl.constexpr(SPAN_NUMBERS)


@triton.jit
def _load(base, rows, stop, stride, SIZE: tl.constexpr, WIDTH: tl.constexpr, MASKED: tl.constexpr):
    """(rows, WIDTH) of a head, 0 from ``stop`` on (MASKED) and beyond SIZE. 64-bit offsets: rows may lie far apart."""
    columns = tl.arange(0, WIDTH)
    at = base + rows.to(tl.int64)[:, None] * stride + columns[None, :]
    if MASKED:
        return tl.load(at, mask=(rows < stop)[:, None] & (columns < SIZE)[None, :], other=0.0)
    if SIZE < WIDTH:
        return tl.load(at, mask=(columns < SIZE)[None, :], other=0.0)
    return tl.load(at)


@triton.jit
def _store(base, rows, stop, stride, x, SIZE: tl.constexpr, WIDTH: tl.constexpr):
    columns = tl.arange(0, WIDTH)
    at = base + rows.to(tl.int64)[:, None] * stride + columns[None, :]
    tl.store(at, x.to(base.dtype.element_ty), mask=(rows < stop)[:, None] & (columns < SIZE)[None, :])


@triton.jit
def _logits(raw, scale, softcap, SOFTCAP: tl.constexpr):
    """z in units of log 2. tanh without a library call, so that the interpreter runs it too."""
    z = raw * scale
    if SOFTCAP:
        z = softcap - 2.0 * softcap / (1.0 + tl.exp2(z * (2.0 * _LOG2E / softcap)))
    return z


@triton.jit
def _visible(queries, keys, key_start, key_stop, gap, window, WINDOW: tl.constexpr):
    """Which of a span's keys each query sees; queries and keys broadcast against each other."""
    back = queries - keys - gap
    seen = (back >= 0) & (keys >= key_start) & (keys < key_stop)
    if WINDOW:
        seen = seen & (back < window)
    return seen


@triton.jit
def _key_range(first, last, key_start, key_stop, gap, window, KEYS: tl.constexpr, WINDOW: tl.constexpr):
    """Keys [begin, end) of a span that queries [first, last) see, and [begin, clear), whole blocks that all see."""
    end = tl.minimum(key_stop, last - gap)
    if WINDOW:
        begin = tl.maximum(key_start, first - gap - window + 1)
        return begin, begin, end
    clear = tl.maximum(tl.minimum(key_stop, first - gap + 1) - key_start, 0) // KEYS * KEYS
    return key_start, key_start + clear, end


@triton.jit
def _attend(
    q, key, value, m, l, acc, queries, begin, end, key_stop, gap, window, key_stride, value_stride, scale, softcap,
    SIZE: tl.constexpr, WIDTH: tl.constexpr, KEYS: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr,
    PRECISION: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Takes keys [begin, end) of a span into a tile of queries' running maximum m, sum l and weighted values acc."""
    for start in range(begin, end, KEYS):
        keys = start + tl.arange(0, KEYS)
        k = _load(key, keys, key_stop, key_stride, SIZE, WIDTH, MASKED)
        z = _logits(tl.dot(q, k.T, input_precision=PRECISION), scale, softcap, SOFTCAP)
        if MASKED:
            seen = _visible(queries[:, None], keys[None, :], begin, key_stop, gap, window, WINDOW)
            z = tl.where(seen, z, float("-inf"))
        top = tl.maximum(m, tl.max(z, axis=1))
        p = tl.exp2(z - top[:, None])
        shrink = tl.exp2(m - top)
        m = top
        l = l * shrink + tl.sum(p, axis=1)
        v = _load(value, keys, key_stop, value_stride, SIZE, WIDTH, MASKED)
        acc = tl.dot(p.to(v.dtype), v, acc * shrink[:, None], input_precision=PRECISION)
    return m, l, acc


@triton.jit(do_not_specialize=_COUNTS)
def forward_kernel(
    query, key, value, out, lse, tiles, spans, T, window, scale, softcap,
    query_stride, query_head, key_stride, key_head, value_stride, value_head, out_stride, out_head,
    HEADS: tl.constexpr, GROUP: tl.constexpr, SIZE: tl.constexpr, WIDTH: tl.constexpr,
    QUERIES: tl.constexpr, KEYS: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(0) % HEADS
    tile = tiles + tl.program_id(0) // HEADS * _TILE
    first = tl.load(tile)
    last = tl.load(tile + 1)
    queries = first + tl.arange(0, QUERIES)
    key += tl.cast(head // GROUP, tl.int64) * key_head
    value += tl.cast(head // GROUP, tl.int64) * value_head
    q = _load(query + tl.cast(head, tl.int64) * query_head, queries, last, query_stride, SIZE, WIDTH, True)
    m = tl.full((QUERIES,), _LOWEST, dtype=tl.float32)
    l = tl.zeros((QUERIES,), dtype=tl.float32)
    acc = tl.zeros((QUERIES, WIDTH), dtype=tl.float32)
    for i in range(tl.load(tile + 2), tl.load(tile + 3)):
        key_start = tl.load(spans + i * _SPAN + 2)
        key_stop = tl.load(spans + i * _SPAN + 3)
        gap = tl.load(spans + i * _SPAN + 4)
        begin, clear, end = _key_range(first, last, key_start, key_stop, gap, window, KEYS, WINDOW)
        if not WINDOW:
            m, l, acc = _attend(
                q, key, value, m, l, acc, queries, begin, clear, key_stop, gap, window, key_stride, value_stride,
                scale, softcap, SIZE, WIDTH, KEYS, WINDOW, SOFTCAP, PRECISION, False,
            )  # fmt: skip
        m, l, acc = _attend(
            q, key, value, m, l, acc, queries, clear, end, key_stop, gap, window, key_stride, value_stride,
            scale, softcap, SIZE, WIDTH, KEYS, WINDOW, SOFTCAP, PRECISION, True,
        )  # fmt: skip
    tl.store(lse + tl.cast(head, tl.int64) * T + queries, (m + tl.log2(l)) * _LN2, mask=queries < last)
    _store(out + tl.cast(head, tl.int64) * out_head, queries, last, out_stride, acc / l[:, None], SIZE, WIDTH)


@triton.jit
def _probabilities(z, lse, seen, MASKED: tl.constexpr):
    p = tl.exp2(z - lse)
    if MASKED:
        p = tl.where(seen, p, 0.0)
    return p


@triton.jit
def _grad_logits(z, p, dp, delta, softcap, SOFTCAP: tl.constexpr):
    """ds / scale; the slope of the softcap is made from z again, late."""
    ds = p * (dp - delta)
    if SOFTCAP:
        t = z / softcap
        ds *= 1.0 - t * t
    return ds


@triton.jit
def _walk_keys(
    dq, q, do, lse, delta, key, value, queries, begin, end, key_stop, gap, window, key_stride, value_stride,
    scale, softcap,
    SIZE: tl.constexpr, WIDTH: tl.constexpr, KEYS: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr,
    PRECISION: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Adds what keys [begin, end) of a span give to dq / scale of a tile of queries."""
    for start in range(begin, end, KEYS):
        keys = start + tl.arange(0, KEYS)
        k = _load(key, keys, key_stop, key_stride, SIZE, WIDTH, MASKED)
        v = _load(value, keys, key_stop, value_stride, SIZE, WIDTH, MASKED)
        z = _logits(tl.dot(q, k.T, input_precision=PRECISION), scale, softcap, SOFTCAP)
        seen = _visible(queries[:, None], keys[None, :], begin, key_stop, gap, window, WINDOW)
        p = _probabilities(z, lse[:, None], seen, MASKED)
        dp = tl.dot(do, v.T, input_precision=PRECISION)
        ds = _grad_logits(z, p, dp, delta[:, None], softcap, SOFTCAP)
        dq = tl.dot(ds.to(k.dtype), k, dq, input_precision=PRECISION)
    return dq


@triton.jit(do_not_specialize=_COUNTS)
def grad_query_kernel(
    query, key, value, out, grad, lse, delta, grad_query, tiles, spans, T, window, scale, softcap,
    query_stride, query_head, key_stride, key_head, value_stride, value_head, out_stride, out_head,
    HEADS: tl.constexpr, GROUP: tl.constexpr, SIZE: tl.constexpr, WIDTH: tl.constexpr,
    QUERIES: tl.constexpr, KEYS: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """out, grad and grad_query have the strides out_*."""
    head = tl.program_id(0) % HEADS
    tile = tiles + tl.program_id(0) // HEADS * _TILE
    first = tl.load(tile)
    last = tl.load(tile + 1)
    queries = first + tl.arange(0, QUERIES)
    key += tl.cast(head // GROUP, tl.int64) * key_head
    value += tl.cast(head // GROUP, tl.int64) * value_head
    at = tl.cast(head, tl.int64) * out_head
    do = _load(grad + at, queries, last, out_stride, SIZE, WIDTH, True)
    o = _load(out + at, queries, last, out_stride, SIZE, WIDTH, True)
    d = tl.sum(o.to(tl.float32) * do.to(tl.float32), axis=1)
    row = tl.cast(head, tl.int64) * T + queries
    tl.store(delta + row, d, mask=queries < last)
    norm = tl.load(lse + row, mask=queries < last, other=0.0) * _LOG2E
    q = _load(query + tl.cast(head, tl.int64) * query_head, queries, last, query_stride, SIZE, WIDTH, True)
    dq = tl.zeros((QUERIES, WIDTH), dtype=tl.float32)
    for i in range(tl.load(tile + 2), tl.load(tile + 3)):
        key_start = tl.load(spans + i * _SPAN + 2)
        key_stop = tl.load(spans + i * _SPAN + 3)
        gap = tl.load(spans + i * _SPAN + 4)
        begin, clear, end = _key_range(first, last, key_start, key_stop, gap, window, KEYS, WINDOW)
        if not WINDOW:
            dq = _walk_keys(
                dq, q, do, norm, d, key, value, queries, begin, clear, key_stop, gap, window, key_stride, value_stride,
                scale, softcap, SIZE, WIDTH, KEYS, WINDOW, SOFTCAP, PRECISION, False,
            )  # fmt: skip
        dq = _walk_keys(
            dq, q, do, norm, d, key, value, queries, clear, end, key_stop, gap, window, key_stride, value_stride,
            scale, softcap, SIZE, WIDTH, KEYS, WINDOW, SOFTCAP, PRECISION, True,
        )  # fmt: skip
    _store(grad_query + at, queries, last, out_stride, dq * (scale * _LN2), SIZE, WIDTH)


@triton.jit
def _walk_queries(
    dk, dv, k, v, query, grad, lse, delta, keys, begin, end, query_stop, key_start, key_stop, gap, window,
    query_stride, grad_stride, scale, softcap,
    SIZE: tl.constexpr, WIDTH: tl.constexpr, QUERIES: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr,
    PRECISION: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Adds what queries [begin, end) of a span give to dk / scale and dv of a tile of keys. Scores stand transposed."""
    for start in range(begin, end, QUERIES):
        queries = start + tl.arange(0, QUERIES)
        q = _load(query, queries, query_stop, query_stride, SIZE, WIDTH, True)
        do = _load(grad, queries, query_stop, grad_stride, SIZE, WIDTH, True)
        # Queries beyond the span are loaded as 0 and add nothing, whatever their probabilities.
        norm = tl.load(lse + queries, mask=queries < query_stop, other=0.0) * _LOG2E
        d = tl.load(delta + queries, mask=queries < query_stop, other=0.0)
        z = _logits(tl.dot(k, q.T, input_precision=PRECISION), scale, softcap, SOFTCAP)
        seen = _visible(queries[None, :], keys[:, None], key_start, key_stop, gap, window, WINDOW)
        p = _probabilities(z, norm[None, :], seen, MASKED)
        dv = tl.dot(p.to(do.dtype), do, dv, input_precision=PRECISION)
        dp = tl.dot(v, do.T, input_precision=PRECISION)
        ds = _grad_logits(z, p, dp, d[None, :], softcap, SOFTCAP)
        dk = tl.dot(ds.to(q.dtype), q, dk, input_precision=PRECISION)
    return dk, dv


@triton.jit(do_not_specialize=_COUNTS)
def grad_key_kernel(
    query, key, value, grad, lse, delta, grad_key, grad_value, tiles, spans, T, window, scale, softcap,
    query_stride, query_head, key_stride, key_head, value_stride, value_head, out_stride, out_head,
    grad_stride, grad_head,
    HEADS: tl.constexpr, GROUP: tl.constexpr, SIZE: tl.constexpr, WIDTH: tl.constexpr,
    QUERIES: tl.constexpr, KEYS: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """HEADS: of keys. grad has the strides out_*, grad_key and grad_value grad_*."""
    shared = tl.program_id(0) % HEADS
    tile = tiles + tl.program_id(0) // HEADS * _TILE
    first = tl.load(tile)
    last = tl.load(tile + 1)
    keys = first + tl.arange(0, KEYS)
    k = _load(key + tl.cast(shared, tl.int64) * key_head, keys, last, key_stride, SIZE, WIDTH, True)
    v = _load(value + tl.cast(shared, tl.int64) * value_head, keys, last, value_stride, SIZE, WIDTH, True)
    dk = tl.zeros((KEYS, WIDTH), dtype=tl.float32)
    dv = tl.zeros((KEYS, WIDTH), dtype=tl.float32)
    for head in range(shared * GROUP, shared * GROUP + GROUP):
        head_query = query + tl.cast(head, tl.int64) * query_head
        head_grad = grad + tl.cast(head, tl.int64) * out_head
        head_lse = lse + tl.cast(head, tl.int64) * T
        head_delta = delta + tl.cast(head, tl.int64) * T
        for i in range(tl.load(tile + 2), tl.load(tile + 3)):
            query_stop = tl.load(spans + i * _SPAN + 1)
            key_start = tl.load(spans + i * _SPAN + 2)
            key_stop = tl.load(spans + i * _SPAN + 3)
            gap = tl.load(spans + i * _SPAN + 4)
            # From the first query that sees a key of the tile; from ``clear`` on all see all of its keys.
            begin = tl.maximum(tl.load(spans + i * _SPAN), first + gap)
            end = query_stop
            clear = query_stop
            if WINDOW:
                end = tl.minimum(end, tl.minimum(key_stop, last) - 1 + gap + window)
            elif (key_start <= first) & (last <= key_stop):
                clear = begin + tl.cdiv(tl.maximum(last - 1 + gap - begin, 0), QUERIES) * QUERIES
            dk, dv = _walk_queries(
                dk, dv, k, v, head_query, head_grad, head_lse, head_delta, keys, begin, tl.minimum(clear, end),
                query_stop, key_start, key_stop, gap, window, query_stride, out_stride, scale, softcap,
                SIZE, WIDTH, QUERIES, WINDOW, SOFTCAP, PRECISION, True,
            )  # fmt: skip
            if not WINDOW:
                dk, dv = _walk_queries(
                    dk, dv, k, v, head_query, head_grad, head_lse, head_delta, keys, clear, end,
                    query_stop, key_start, key_stop, gap, window, query_stride, out_stride, scale, softcap,
                    SIZE, WIDTH, QUERIES, WINDOW, SOFTCAP, PRECISION, False,
                )  # fmt: skip
    at = tl.cast(shared, tl.int64) * grad_head
    _store(grad_key + at, keys, last, grad_stride, dk * (scale * _LN2), SIZE, WIDTH)
    _store(grad_value + at, keys, last, grad_stride, dv, SIZE, WIDTH)
