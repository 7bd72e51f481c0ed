"""prefix_attention in plain PyTorch: the oracle's values and gradients, what PyTorch does with the op, bad input; and
the work lists of its kernels."""

import re
from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor

from synpo_kernels import prefix_attention, reference
from synpo_kernels.prefix_attention_tiles import Span, tiles
from tests.kernels.attention_problems import PROBLEMS, Problem, by_autograd, check, ordinary, pair

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
SMALL: dict[str, Any] = {
    "plain": {},
    "window": {"window": 3},
    "soft cap": {"softcap": 1.5, "scale": 0.7},
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", PROBLEMS)
@pytest.mark.usefixtures("device", "poison")
def test_values_and_gradients(name: str, dtype: torch.dtype) -> None:
    p = PROBLEMS[name]().to(dtype)
    check(p, by_autograd(prefix_attention, p))


def test_the_oracle_is_each_sequence_by_itself() -> None:
    """PyTorch's own causal attention on [prompt | answer], against the oracle on the row that holds the prompt once."""
    p = ordinary(pair(0, 5, 4, 6), h=2, g=2, T=17).to(torch.float64)
    got = reference.prefix_attention(p.query, p.key, p.value, p.pieces)
    prompt, chosen, rejected, padding = torch.arange(17).split([5, 4, 6, 2])
    for answer in (chosen, rejected):
        seen = torch.cat((prompt, answer))
        q, k, v = (x[seen].transpose(0, 1)[None] for x in (p.query, p.key, p.value))
        alone = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)[0].transpose(0, 1)
        torch.testing.assert_close(got[answer], alone[5:])
        torch.testing.assert_close(got[prompt], alone[:5])
    assert not got[padding].any()


@pytest.mark.parametrize("options", SMALL.values(), ids=SMALL)
def test_gradcheck(options: dict[str, Any]) -> None:
    p = ordinary(pair(0, 3, 2, 4), T=10, h=2, g=1, d=3, **options).to(torch.float64)
    leaves = [x.requires_grad_() for x in (p.query, p.key, p.value)]
    assert torch.autograd.gradcheck(lambda *qkv: prefix_attention(*qkv, p.pieces, **p.options), leaves)


@pytest.mark.parametrize("options", SMALL.values(), ids=SMALL)
def test_opcheck(options: dict[str, Any]) -> None:
    p = ordinary(pair(0, 3, 2, 4), T=10, h=2, g=1, d=3, **options)
    leaves = [x.requires_grad_() for x in (p.query, p.key, p.value)]
    settings = list(p.flat), p.scale or 3**-0.5, p.window or 0, p.softcap or 0.0
    torch.library.opcheck(torch.ops.synpo.prefix_attention.default, (*leaves, *settings))


def test_compiled_whole() -> None:
    p = ordinary(pair(0, 3, 2, 4))

    def work(query: Tensor, key: Tensor, value: Tensor, pieces: Any, **options: Any) -> Tensor:
        return prefix_attention(torch.sin(query), key, value, pieces, **options)

    torch._dynamo.reset()
    got = by_autograd(torch.compile(work, fullgraph=True, backend="aot_eager"), p)
    for ours, want in zip(got, by_autograd(work, p), strict=True):
        torch.testing.assert_close(ours, want)


def test_autocast_casts_as_attention_in_pytorch_does() -> None:
    p = PROBLEMS["a pair"]()
    with torch.autocast("cpu", torch.bfloat16):
        mixed = prefix_attention(p.query, p.key.bfloat16(), p.value, p.pieces)
        high = prefix_attention(p.query.double(), p.key.double(), p.value.double(), p.pieces)
    low = p.to(torch.bfloat16)
    assert torch.equal(mixed, prefix_attention(low.query, low.key, low.value, p.pieces))
    assert high.dtype == torch.float64


def test_a_second_derivative_is_refused() -> None:
    p = ordinary(pair(0, 3, 2, 4))
    out = prefix_attention(p.query.requires_grad_(), p.key, p.value, p.pieces)
    with pytest.raises(RuntimeError, match="prefix_attention is differentiable once"):
        torch.autograd.grad(out.square().sum(), p.query, create_graph=True)


def test_no_token_and_no_piece() -> None:
    for T, pieces in ((0, []), (3, [])):
        p = ordinary([(0, 3, 0, 0)], T=3)
        q, k, v = (x[:T].requires_grad_() for x in (p.query, p.key, p.value))
        out = prefix_attention(q, k, v, pieces)
        out.sum().backward()
        assert out.shape == (T, 2, 20)
        assert not out.any()


GIVEN = ordinary([(0, 4, 0, 0), (5, 9, 0, 4)], T=10, h=4, g=2)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"query": GIVEN.query.long()}, TypeError, "query has dtype torch.int64; allowed"),
        ({"key": GIVEN.key.half()}, TypeError, "query is torch.float32 but key is torch.float16"),
        ({"query": GIVEN.query[0]}, ValueError, "query has shape (4, 20); expected (T, h, d)"),
        ({"key": GIVEN.key[:9]}, ValueError, "key has shape (9, 2, 20); expected (10, g, 20) with g a divisor of 4"),
        ({"value": torch.randn(10, 3, 20)}, ValueError, "value has shape (10, 3, 20); expected (10, g, 20)"),
        ({"value": torch.randn(10, 4, 20)}, ValueError, "key has shape (10, 2, 20) but value (10, 4, 20)"),
        ({"value": torch.empty(10, 2, 20, device="meta")}, ValueError, "query is on cpu but value on meta"),
        ({"window": 0}, ValueError, "window is 0; it must be at least 1"),
        ({"softcap": 0.0}, ValueError, "softcap is 0.0; it must be > 0"),
        ({"pieces": [(0, 4, 0)]}, ValueError, "pieces are tuples of 4 numbers; got 3 numbers in all"),
        ({"pieces": [(0, 11, 0, 0)]}, ValueError, "piece 0 is [0, 11); it must lie in order within [0, 10)"),
        ({"pieces": [(3, 3, 0, 0)]}, ValueError, "piece 0 is [3, 3)"),
        ({"pieces": [(0, 4, 0, 0), (3, 8, 0, 0)]}, ValueError, "piece 1 is [3, 8); it must lie in order within [4,"),
        ({"pieces": [(0, 4, 0, 0), (4, 8, 2, 5)]}, ValueError, "piece 1, from 4 on, has the prompt [2, 5)"),
        ({"pieces": [(0, 4, 0, 0), (5, 9, 0, 5)]}, ValueError, "piece 1 has the prompt [0, 5); parts of it are"),
    ],
)  # fmt: skip
def test_bad_input(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    given = {"query": GIVEN.query, "key": GIVEN.key, "value": GIVEN.value, "pieces": GIVEN.pieces} | changes
    with pytest.raises(error, match=re.escape(message)):
        prefix_attention(**given)


def seen_by(p: Problem) -> Tensor:
    """(T, T) bool: which keys a query sees, read off the oracle: what a key's value changes."""
    T = len(p.query)
    equal = torch.zeros(T, 1, T)
    return reference.prefix_attention(equal, equal, torch.eye(T)[:, None], p.pieces)[:, 0] > 0


@pytest.mark.parametrize("of_keys", [False, True], ids=["queries", "keys"])
@pytest.mark.parametrize("name", ["edges", "pairs in one row", "padding", "a prompt of several pieces, shared"])
def test_work_lists_hold_every_score_once(name: str, of_keys: bool) -> None:
    p = PROBLEMS[name]()
    work = tiles(p.flat, 16, of_keys, torch.device("cpu"))
    spans = [Span(*row) for row in work.spans.tolist()]
    found: Counter[tuple[int, int]] = Counter()
    lengths = []
    for first, last, begin, end in work.tiles.tolist():
        assert first < last <= first + 16
        lengths.append(sum(span.work(first, last, of_keys) for span in spans[begin:end]))
        for span in spans[begin:end]:
            queries, keys = set(range(span.query_start, span.query_stop)), set(range(span.key_start, span.key_stop))
            (keys if of_keys else queries).intersection_update(range(first, last))
            found.update((i, j) for i in queries for j in keys if i - j - span.gap >= 0)
    assert set(found.values()) == {1}
    assert set(found) == {(i, j) for i, j in seen_by(p).nonzero().tolist()}
    assert lengths == sorted(lengths, reverse=True)  # the longest tile does not come last and alone
