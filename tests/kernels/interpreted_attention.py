"""prefix_attention's Triton launchers against the oracle: on a GPU, or under Triton's interpreter.

Not collected by name, for the reason given in interpreted.py; test_triton.py runs these files.
"""

from pathlib import Path

import pytest
import torch
import triton

from synpo_kernels import prefix_attention_cuda, prefix_attention_triton, tiling
from synpo_kernels.tiling import AttentionTile, AttentionTiles
from tests.kernels.attention_problems import PROBLEMS, Problem, Results, check, ordinary, pair
from tests.kernels.planted import ATTENTION, load

# Rows of a tile beyond its piece see no key and are never stored; the interpreter warns of what they hold.
pytestmark = [pytest.mark.filterwarnings("ignore::RuntimeWarning"), pytest.mark.usefixtures("device", "poison")]
# Several blocks of each kind, and ragged ones, in small problems; queries and keys in blocks of different size.
BLOCKS = AttentionTiles(256, *(AttentionTile(*size, 2, 4) for size in ((16, 32), (32, 16), (16, 32))))
# Every problem in one of the dtypes, every kind of one in float16.
HALVES = ("a pair", "padding", "a window into the prompt", "a soft cap in a window", "rising", "heads of 80")
GRID = [(name, torch.float16 if name in HALVES else torch.float32) for name in PROBLEMS]
if not triton.knobs.runtime.interpret:
    GRID = [(name, dtype) for name in PROBLEMS for dtype in (torch.float32, torch.float16, torch.bfloat16)]


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiling, "attention", lambda *_: BLOCKS)


def run(p: Problem) -> Results:
    """Both ops, called as autograd calls them."""
    settings = p.flat, p.query.shape[2] ** -0.5 if p.scale is None else p.scale, p.window or 0, p.softcap or 0.0
    given = p.query, p.key, p.value
    out, lse = prefix_attention_cuda.prefix_attention(*given, *settings)
    return out, *prefix_attention_cuda.prefix_attention_backward(p.grad, *given, out, lse, *settings)


@pytest.mark.parametrize(("name", "dtype"), GRID, ids=str)
def test_values_and_gradients(name: str, dtype: torch.dtype) -> None:
    p = PROBLEMS[name]().to(dtype)
    check(p, run(p))


def test_a_row_does_not_hear_of_others() -> None:
    """NaN in one pair and in the padding leaves the bits of the other pair alone; and a second run gives the same."""
    p = ordinary([*pair(0, 18, 9, 3), *pair(30, 5, 20, 9)], T=70, d=16)
    first = run(p)
    for x in (p.query, p.key, p.value, p.grad):
        x[30:] = float("nan")
    for ours, again in zip(first, run(p), strict=True):
        assert torch.equal(ours[:30], again[:30])


def test_offsets_past_two_to_the_31(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tokens 2^28 numbers apart put the last ones past 2^31: ten tokens touch a few pages of 5 GB of address space."""
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)
    T, stride = 10, 1 << 28
    assert (T - 1) * stride > 1 << 31
    p = ordinary(pair(0, 4, 3, 3), h=1, g=1, d=16).to(torch.float16)
    spread = torch.empty(T * stride, dtype=torch.float16).as_strided((T, 1, 16), (stride, 16, 1))
    want = run(p)
    for name in ("query", "key", "value"):
        spread.copy_(getattr(p, name))
        assert all(torch.equal(a, b) for a, b in zip(run(p._replace(**{name: spread})), want, strict=True))


@pytest.mark.parametrize("name", ATTENTION)
def test_a_planted_mistake_is_caught(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The test of the tests: each of these must make test_values_and_gradients fail on the problem named with it."""
    monkeypatch.setattr(prefix_attention_cuda, "kernels", load(ATTENTION[name], prefix_attention_triton, tmp_path))
    p = PROBLEMS[ATTENTION[name].problem]()
    with pytest.raises(AssertionError, match="gradient of"):
        check(p, run(p))
