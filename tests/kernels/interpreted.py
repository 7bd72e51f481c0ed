"""The Triton launchers against the closed forms: on a GPU, or under Triton's interpreter.

Not collected by name: test_triton.py runs this file in a process of its own, since TRITON_INTERPRET=1 must stand before
triton is imported. The interpreter's bfloat16 products are wrong, so there inputs are float32 and float16.
"""

from pathlib import Path
from types import ModuleType

import pytest
import torch
import triton

from synpo_kernels import loss_triton, pair_objective, tiling, vocab_cuda, vocab_passes, vocab_triton
from synpo_kernels.tiling import LIBRARY, Route, ScoreTile
from tests.kernels.conftest import PASSES
from tests.kernels.oracle import Head
from tests.kernels.planted import LOSS, RUNNING, load
from tests.kernels.problems import PROBLEMS, ordinary, rising
from tests.kernels.test_linear_logps import check, run

INTERPRETED = triton.knobs.runtime.interpret
# 16 rows and 64 columns put several tiles, and their ragged edges, into small problems; 3 programs walk them in turns.
ROUTES = {
    "pointers": Route(ScoreTile(16, 64, 32, 2, 4, 1, False, band=2), False, 3),
    "descriptors": Route(ScoreTile(16, 64, 32, 2, 4, 1, True), True, 3),
    "two parts": Route(ScoreTile(32, 64, 16, 2, 4, 2, False, band=1), False, 2),
    "library": LIBRARY,
}
# The interpreter warns where a GPU gives inf or NaN without a word.
GIVES_INF = pytest.mark.filterwarnings("ignore::RuntimeWarning")
pytestmark = pytest.mark.usefixtures("device")


def use(monkeypatch: pytest.MonkeyPatch, route: Route) -> None:
    """The inner ops are the Triton ones, by one route, in small chunks of rows and of columns."""
    for name in PASSES:
        monkeypatch.setattr(vocab_passes, name, getattr(vocab_cuda, name))
    monkeypatch.setattr(tiling, "route", lambda *_: route)
    monkeypatch.setattr(tiling, "PASS", tiling.PassTile(4, 128, 4))
    monkeypatch.setattr(tiling, "LOGIT_BYTES", 1 << 14)
    monkeypatch.setattr(tiling, "ROW_MULTIPLE", 16)
    monkeypatch.setattr(vocab_triton, "_RESCALE_PARTS", 4)
    monkeypatch.setattr(vocab_cuda, "workspace_bytes", lambda *_: 40_000)


# A trainable head runs the sums alone and the stored tiles, a frozen one the sums with their product. Every problem
# runs through both forms of the product, in both dtypes; the rest sees the problems that reach its own lines: the
# guard, ragged edges, bias and softcap.
GRID = [
    *((problem, "descriptors", torch.float32, True) for problem in PROBLEMS),
    *((problem, "pointers", torch.float16, False) for problem in PROBLEMS),
    ("margins", "pointers", torch.float16, True),
    *((problem, "two parts", torch.float32, False) for problem in ("scaled and capped", "margins")),
    *((problem, "library", torch.float32, True) for problem in ("scaled and capped", "margins", "rising")),
    ("margins", "library", torch.float16, True),
]
if not INTERPRETED:
    GRID += [(problem, route, torch.bfloat16, True) for problem in PROBLEMS for route in ROUTES]


@pytest.mark.parametrize(("problem", "route", "dtype", "trainable"), GRID, ids=str)
@pytest.mark.usefixtures("poison")
def test_values_and_gradients(
    problem: str, route: str, dtype: torch.dtype, trainable: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    use(monkeypatch, ROUTES[route])
    check(PROBLEMS[problem]().to(dtype), trainable)


def rows_of(head: Head) -> vocab_triton.Rows:
    """What the launchers take, in float32, with the targets' logits as references."""
    logits = (head.hidden.double() @ head.weight.double().T).gather(1, head.targets.clamp(0)[:, None])[:, 0]
    return vocab_triton.Rows(head.bias, head.targets, logits.float(), head.logit_scale, head.softcap or 0.0)


@pytest.mark.usefixtures("poison")
def test_the_same_bits_whatever_the_grid() -> None:
    head = rising(n=40, V=301)
    tiles = [torch.empty(40, 301) for _ in range(3)]
    results = []
    for tile, programs in zip(tiles, (1, 3, 132), strict=True):
        pairs = vocab_triton.score(
            head.hidden, head.weight, rows_of(head), tile, ROUTES["pointers"].tile, False, programs
        )
        results.append((*vocab_triton.reduce(pairs, tile), tile))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.usefixtures("poison")
def test_a_target_of_another_rank_leaves_nothing_out() -> None:
    head = ordinary(n=8, H=16, V=70)
    head = head._replace(targets=torch.tensor([0, 69, 70, -1, 1 << 20, 5, -70, 71]))
    tile = torch.empty(8, 70)
    reference = torch.zeros(8)
    rows = vocab_triton.Rows(None, head.targets, reference, 1.0, 0.0)
    shift, sums = vocab_triton.reduce(
        vocab_triton.score(head.hidden, head.weight, rows, tile, *ROUTES["pointers"]), tile
    )
    z = head.hidden.double() @ head.weight.double().T
    for row, target in enumerate(head.targets.tolist()):
        if 0 <= target < 70:
            z[row, target] = float("-inf")
    want = z.exp()
    torch.testing.assert_close(tile.double(), want, rtol=1e-5, atol=0)
    torch.testing.assert_close(sums.double(), want.sum(1), rtol=1e-5, atol=0)
    assert torch.equal(shift, reference)


@GIVES_INF
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_hidden_state_that_is_not_finite_spoils_its_own_row_alone(
    value: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    use(monkeypatch, ROUTES["descriptors"])
    head = ordinary(n=20, V=130)
    clean = run(head, torch.ones(20), False)
    head.hidden[2, 7] = value
    logps, gradient = run(head, torch.ones(20), False)
    others = torch.arange(20) != 2
    assert logps[2].isnan()
    assert torch.equal(logps[others], clean[0][others])
    assert torch.equal(gradient[others], clean[1][others])


@pytest.mark.parametrize("trainable", [False, True], ids=["frozen", "trainable"])
def test_no_valid_token(trainable: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, ROUTES["descriptors"])
    head = ordinary()._replace(hidden=torch.randn(2, 40), targets=torch.full((2,), -100))
    assert all((value == 0).all() for value in run(head, torch.ones(2), trainable))


@pytest.mark.parametrize("route", ["pointers", "descriptors"])
def test_offsets_past_two_to_the_31(route: str) -> None:
    """Rows 2^22 elements apart put the last ones past 2^31: 600 rows touch 600 pages of 5 GB of address space."""
    n, V, stride = 600, 20, 1 << 22
    assert (n - 1) * stride > 1 << 31
    head = Head(0.3 * torch.randn(n, 16), torch.randn(V, 16), torch.randint(0, V, (n,)))
    tile = torch.empty(n * stride, dtype=torch.float16).as_strided((n, V), (stride, 1))
    pairs = vocab_triton.score(head.hidden, head.weight, rows_of(head), tile, *ROUTES[route])
    shift, _ = vocab_triton.reduce(pairs, tile)
    z = head.hidden.double() @ head.weight.double().T
    want = (z - shift[:, None].double()).exp().scatter(1, head.targets[:, None], 0.0)
    torch.testing.assert_close(tile.double(), want, rtol=1e-3, atol=1e-7)


# 511 to 513 and 1025 stand at the edges of the loss kernel's steps of 512 tokens, 1, 8 and 9 at those of its 8 pairs.
@pytest.mark.parametrize("form", ["sigmoid", "logsigmoid"])
@pytest.mark.parametrize("lengths", [[1, 1], [3, 1, 2, 7], [511, 512, 513, 1025, 1, 30], [5, 6] * 8, [4, 9, 2] * 6])
@pytest.mark.usefixtures("poison")
def test_the_loss_in_one_launch_is_the_objective(form: str, lengths: list[int]) -> None:
    check_loss(loss_triton, form, lengths)


def check_loss(module: ModuleType, form: str, lengths: list[int]) -> None:
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0)
    # From certain to hopeless, with chosen and rejected far apart and close together: both ends of the sigmoid.
    levels = torch.tensor([1e-7, 0.01, 0.5, 3.0, 40.0])[torch.randint(0, 5, (len(lengths),))]
    logps = -torch.rand(int(cu_seqlens[-1])) * levels.repeat_interleave(torch.tensor(lengths))
    settings = {"alpha": 30.0, "beta": 0.2, "form": form, "pairs": 7}
    want = pair_objective.synpo_loss(logps.double(), cu_seqlens, **settings, want_coef=True)
    got = module.synpo_loss(logps, cu_seqlens, **settings, want_coef=True)
    for ours, exact in zip(got, want, strict=True):
        assert ours.dtype == torch.float32
        # alpha (r+ - r-) loses 30 of float32's steps at a probability of 1.
        torch.testing.assert_close(ours.double(), exact, rtol=64 * 2**-23, atol=64 * 2**-23 * float(exact.abs().max()))
    without = module.synpo_loss(logps, cu_seqlens, **settings, want_coef=False)
    assert without[-1].shape == (0,)
    assert all(torch.equal(a, b) for a, b in zip(without[:-1], got[:-1], strict=True))


@GIVES_INF
@pytest.mark.parametrize("name", LOSS)
@pytest.mark.usefixtures("poison")
def test_a_mistake_planted_in_the_loss_is_caught(name: str, tmp_path: Path) -> None:
    form = "sigmoid" if LOSS[name].problem == "ordinary" else LOSS[name].problem
    with pytest.raises(AssertionError, match="not close"):
        check_loss(load(LOSS[name], loss_triton, tmp_path), form, [511, 40, 513, 1025, 60, 30])


@GIVES_INF
@pytest.mark.parametrize("name", RUNNING)
@pytest.mark.usefixtures("poison")
def test_a_planted_mistake_is_caught(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The test of the tests: each of these must make test_values_and_gradients fail on the problem named with it."""
    mistake = RUNNING[name]
    use(monkeypatch, ROUTES[mistake.route])
    module = load(mistake, vocab_triton, tmp_path)
    for launcher in ("score", "exponentiate", "reduce"):
        monkeypatch.setattr(vocab_cuda, launcher, getattr(module, launcher))
    with pytest.raises(AssertionError, match=r"logps|gradient of"):
        check(PROBLEMS[mistake.problem](), trainable=mistake.trainable)
