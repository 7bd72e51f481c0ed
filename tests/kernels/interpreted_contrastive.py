"""contrastive_triton.py's launchers against the oracle and the CPU kernels: on a GPU, or under Triton's interpreter.

Not collected by name, for the reason given in interpreted.py; test_triton.py runs both files.
"""

import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor

from synpo_kernels import contrastive, contrastive_scan, contrastive_triton, reference, tiling
from synpo_kernels.contrastive import SampleOutput
from tests.kernels.planted import CONTRASTIVE, Mistake, load
from tests.kernels.views import Views, check_sample, views

# What inf - inf and NaN give a GPU gives without a word; the interpreter warns.
pytestmark = [pytest.mark.filterwarnings("ignore::RuntimeWarning"), pytest.mark.usefixtures("poison")]
STEP = 5 << 40  # both halves of the counter matter
# Of the rows that views() makes: ties of three kinds, a ramp, masks in either view and in both, one token left, none
# left, and a number that is not finite in each view. The interpreter takes 50 ms a row.
SOME = [0, 2, 3, 4, 5, 10, 11, 12, 15, 18, 20]


@pytest.fixture
def on(request: pytest.FixtureRequest) -> str:
    """--device. What the kernels give is compared on the CPU."""
    return request.config.getoption("--device")


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several blocks, and a ragged one, in small rows."""
    monkeypatch.setattr(tiling, "ROW", tiling.RowTile(block=64, group=16, warps=4, draw_warps=8))


def law(plausibility: float, temperature: float, top_k: int, top_p: float, alpha: float = 0.5) -> dict[str, float]:
    settings = {"alpha": alpha, "plausibility": plausibility, "temperature": temperature}
    return settings | {"top_k": top_k, "top_p": top_p}


LAWS = {
    "greedy": law(0.0, 0.0, 0, 1.0),
    "greedy, plausible": law(0.1, 0.0, 0, 1.0),
    "plain": law(0.0, 1.0, 0, 1.0),
    "plain, plausible": law(1e-3, 100.0, 0, 1.0),
    "top-k": law(0.0, 0.7, 5, 1.0),
    "top-k, top-p": law(0.0, 1.0, 64, 0.9),
    "top-k, top-p, plausible": law(1e-3, 1.0, 32, 0.6),
    "one": law(0.0, 1.0, 1, 1.0),
    "top-p alone": law(0.0, 30.0, 0, 0.9),
    "large top-k": law(0.0, 30.0, 100, 1.0),
    "large top-k, top-p, plausible": law(1e-3, 1.0, 1000, 0.9),
}


def run(v: Views, settings: dict[str, float], triton_kernels: ModuleType, on: str, both: bool = True) -> SampleOutput:
    """A draw from every row, checked; on the CPU."""
    contrast = v.contrast if both else None
    seeds = torch.arange(len(v.logits)) * 7919 - (1 << 40)
    inputs = [None if x is None else x.to(on) for x in (v.logits, contrast, seeds)]
    out = SampleOutput(*(x.cpu() for x in triton_kernels.contrastive_sample(*inputs, STEP, *settings.values())))
    check_sample(out, v, contrast, seeds, STEP, **settings)
    return out


WHOLE = ("greedy, plausible", "plain", "top-k, top-p, plausible", "top-p alone")  # laws that see every row


@pytest.mark.parametrize("name", LAWS)
def test_every_path(name: str, on: str) -> None:
    """Every law; and the tokens of the CPU's kernels, no u being near a boundary here."""
    v = views(150) if name in WHOLE else views(150).rows(SOME)
    out = run(v, LAWS[name], contrastive_triton, on)
    seeds = torch.arange(len(v.logits)) * 7919 - (1 << 40)
    want = torch.ops.synpo.contrastive_sample(v.logits, v.contrast, seeds, STEP, *LAWS[name].values())
    assert torch.equal(out.tokens, want[0])


@pytest.mark.parametrize(
    ("V", "dtype", "both", "name"),
    [
        (1, torch.bfloat16, True, "plain"),
        (1, torch.float32, True, "top-k, top-p"),
        (64, torch.float16, True, "plain"),
        (65, torch.bfloat16, False, "top-k, top-p, plausible"),
    ],
    ids=str,
)
def test_edges_dtypes_and_one_view(V: int, dtype: torch.dtype, both: bool, name: str, on: str) -> None:
    run(views(V).rows(SOME).to(dtype), LAWS[name], contrastive_triton, on, both)


def _bits(x: Tensor) -> Tensor:
    return x.nan_to_num(nan=1e38)


@pytest.mark.parametrize(("plausibility", "dtype"), [(0.0, torch.float32), (0.3, torch.bfloat16)], ids=str)
def test_combined_logits_to_the_bit(plausibility: float, dtype: torch.dtype, on: str) -> None:
    v = views(130).to(dtype)
    got = contrastive_triton.contrastive_logits(v.logits.to(on), v.contrast.to(on), 0.7, plausibility).cpu()
    want = reference.contrastive_logits(v.logits.float(), v.contrast.float(), alpha=0.7, plausibility=plausibility)
    assert torch.equal(_bits(got), _bits(want))


@pytest.mark.parametrize("name", ["plain", "top-k, top-p, plausible", "top-p alone"])
def test_a_row_is_the_same_alone_and_anywhere(name: str, on: str) -> None:
    """The last row of a batch whose rows lie apart, against that row alone in a tensor of its own."""
    l, other = torch.randn(3, 210, device=on)[:, 3:153], torch.randn(150, device=on).expand(3, -1)
    settings = LAWS[name].values()
    seeds = torch.tensor([1, 2, -3], device=on)
    whole = contrastive_triton.contrastive_sample(l, other, seeds, 7, *settings)
    alone = contrastive_triton.contrastive_sample(l[2:].clone(), other[2:].clone(), seeds[2:], 7, *settings)
    assert all(torch.equal(a[2:], b) for a, b in zip(whole, alone, strict=True))


def test_offsets_past_two_to_the_31(on: str) -> None:
    """Rows 2^30 elements apart put the third past 2^31: three rows touch a few pages of 4 GB of address space."""
    rows, V, stride = 3, 100, 1 << 30
    memory = torch.UntypedStorage(2 * ((rows - 1) * stride + V), device=on)  # torch.empty would be filled with NaN
    l = torch.empty(0, dtype=torch.float16, device=on).set_(memory, 0, (rows, V), (stride, 1))
    l.copy_(torch.randn(rows, V))
    seeds = torch.arange(rows, device=on)
    for name in ("greedy", "top-k"):
        settings = LAWS[name].values()
        got = contrastive_triton.contrastive_sample(l, None, seeds, 0, *settings)
        want = contrastive._sample(l.clone().cpu(), None, seeds.cpu(), 0, *settings)
        assert torch.equal(got[0].cpu(), want[0])


def test_what_the_kernels_do_not_hold_runs_plain(monkeypatch: pytest.MonkeyPatch, on: str) -> None:
    l, seeds, settings = torch.randn(2, 70, device=on), torch.arange(2, device=on), LAWS["top-k"].values()
    monkeypatch.setattr(contrastive_triton, "_WIDEST", 64)
    out = contrastive_triton.contrastive_sample(l, None, seeds, 0, *settings)
    assert torch.equal(out[0].cpu(), contrastive._sample(l.cpu(), None, seeds.cpu(), 0, *settings)[0])
    assert contrastive_triton.contrastive_logits(l.double(), l.double(), 0.5, 0.1).dtype == torch.float64
    nothing = contrastive_triton.contrastive_sample(l[:0], None, seeds[:0], 0, *settings)
    assert [x.shape for x in nothing] == [(0,)] * 4


def planted(mistake: Mistake, folder: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """contrastive_triton with the mistake, or on top of a contrastive_scan with it."""
    assert contrastive_scan.__file__ is not None
    if mistake.right not in Path(contrastive_scan.__file__).read_text():
        return load(mistake, contrastive_triton, folder)
    wrong = load(mistake, contrastive_scan, folder)
    monkeypatch.setitem(sys.modules, wrong.__name__, wrong)
    name = wrong.__name__.rpartition(".")[2]
    return load(Mistake("from .contrastive_scan import", f"from .{name} import"), contrastive_triton, folder)


@pytest.mark.parametrize("name", CONTRASTIVE)
def test_a_planted_mistake_is_caught(
    name: str, tmp_path: Path, on: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The test of the tests: each of these must make ``run`` fail on the law named with it."""
    mistake = CONTRASTIVE[name]
    module = planted(mistake, tmp_path, monkeypatch)
    with pytest.raises(AssertionError):
        run(views(130).rows(SOME), LAWS[mistake.problem], module, on)
