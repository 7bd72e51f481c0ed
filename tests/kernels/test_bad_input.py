"""Bad input is refused by an error that names the argument, the position and the value."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from synpo_kernels import FusedPreferenceLoss, FusedSynPOLoss, linear_logps, objectives

V, H = 11, 6


def tokens(**changes: Any) -> dict[str, Any]:
    given = {"hidden": torch.randn(5, H), "weight": torch.randn(V, H), "targets": torch.tensor([0, 3, -100, 10, 4])}
    return given | changes


def pairs(**changes: Any) -> dict[str, Any]:
    labels = torch.tensor([[1, 2, -100], [3, -100, -100], [4, 5, 6], [-100, 7, 8]])
    return {"hidden": torch.randn(4, 3, H), "weight": torch.randn(V, H), "labels": labels} | changes


def changed(labels: dict[tuple[int, int], int]) -> Tensor:
    given = pairs()["labels"]
    for position, value in labels.items():
        given[position] = value
    return given


TOKENS: list[tuple[str, Callable[[], dict[str, Any]], type[Exception], str]] = [
    ("target V", lambda: tokens(targets=torch.tensor([0, 3, -100, V, 4])), IndexError,
     rf"targets: position 3 holds {V}, outside \[0, {V}\) and not ignore_index=-100"),
    ("negative target", lambda: tokens(targets=torch.tensor([0, -1, 2, 3, 4])), IndexError, "position 1 holds -1"),
    ("another ignore_index", lambda: tokens(ignore_index=-1), IndexError, "position 2 holds -100.*ignore_index=-1"),
    ("huge target", lambda: tokens(targets=torch.tensor([0, 1, 2, 3, 2**62])), IndexError, "position 4 holds 46116"),
    ("mixed dtypes", lambda: tokens(weight=torch.randn(V, H).bfloat16()), TypeError,
     "hidden is torch.float32 but weight is torch.bfloat16.*autocast"),
    ("bias dtype", lambda: tokens(bias=torch.randn(V).double()), TypeError, "bias is torch.float64"),
    ("integer hidden", lambda: tokens(hidden=torch.ones(5, H, dtype=torch.int64)), TypeError,
     "hidden has dtype torch.int64; allowed"),
    ("int32 targets", lambda: tokens(targets=torch.zeros(5, dtype=torch.int32)), TypeError,
     "targets have dtype torch.int32; int64 is needed"),
    ("hidden size", lambda: tokens(hidden=torch.randn(5, H + 1)), ValueError, r"\(5, 7\).*weight's H = 6"),
    ("flat hidden", lambda: tokens(hidden=torch.randn(H), targets=torch.tensor(1)), ValueError, r"\(\.\.\., H\)"),
    ("number of targets", lambda: tokens(targets=torch.zeros(4, dtype=torch.int64)), ValueError,
     r"targets have shape \(4,\); expected hidden's \(5,\)"),
    ("weight of 3 dimensions", lambda: tokens(weight=torch.randn(1, V, H)), ValueError, r"expected \(V, H\)"),
    ("no vocabulary", lambda: tokens(weight=torch.randn(0, H)), ValueError, "V >= 1"),
    ("bias shape", lambda: tokens(bias=torch.randn(V + 1)), ValueError, r"bias has shape \(12,\).*\(11,\)"),
    ("softcap 0", lambda: tokens(softcap=0.0), ValueError, "softcap is 0.0; it must be > 0, or None"),
    ("negative softcap", lambda: tokens(softcap=-30.0), ValueError, "softcap is -30.0"),
    ("workspace 0", lambda: tokens(workspace_mb=0), ValueError, "workspace_mb is 0; it must be at least 1"),
    ("weight elsewhere", lambda: tokens(weight=torch.empty(V, H, device="meta")), ValueError,
     "hidden is on cpu but weight on meta"),
    ("targets elsewhere", lambda: tokens(targets=torch.zeros(5, dtype=torch.int64, device="meta")), ValueError,
     "but targets on meta"),
    ("bias elsewhere", lambda: tokens(bias=torch.empty(V, device="meta")), ValueError, "but bias on meta"),
    ("NaN, when asked to look", lambda: tokens(hidden=torch.randn(5, H).index_fill(0, torch.tensor(3), torch.nan),
     check=True), ValueError, "hidden: row 3 holds a value that is not finite"),
]  # fmt: skip

PAIRS: list[tuple[str, Callable[[], dict[str, Any]], type[Exception], str]] = [
    ("odd rows", lambda: pairs(hidden=torch.randn(3, 3, H), labels=pairs()["labels"][:3]), ValueError,
     "got 3 sequences; an even number is needed"),
    ("no rows", lambda: pairs(hidden=torch.randn(0, 3, H), labels=pairs()["labels"][:0]), ValueError,
     "got 0 sequences"),
    ("no positions", lambda: pairs(hidden=torch.randn(4, 0, H), labels=pairs()["labels"][:, :0]), ValueError,
     "no tokens"),
    ("empty chosen", lambda: pairs(labels=changed({(1, 0): -100})), ValueError,
     r"labels: the chosen answer of pair 1 \(row 1\) has no valid token"),
    ("empty rejected", lambda: pairs(labels=changed({(2, 0): -100, (2, 1): -100, (2, 2): -100})), ValueError,
     r"labels: the rejected answer of pair 0 \(row 2\) has no valid token"),
    ("label V", lambda: pairs(labels=changed({(2, 1): V})), IndexError,
     rf"labels: position \(2, 1\) holds {V}, outside \[0, {V}\)"),
    ("negative label", lambda: pairs(labels=changed({(0, 2): -7})), IndexError, r"position \(0, 2\) holds -7"),
    ("flat labels", lambda: pairs(hidden=torch.randn(12, H), labels=pairs()["labels"].flatten()), ValueError,
     "packed input needs cu_seqlens"),
    ("labels' dtype", lambda: pairs(labels=pairs()["labels"].int()), TypeError, "labels have dtype torch.int32"),
    ("labels' shape", lambda: pairs(labels=torch.zeros(4, 2, dtype=torch.int64)), ValueError,
     r"labels have shape \(4, 2\); expected hidden's \(4, 3\)"),
    ("mixed dtypes", lambda: pairs(hidden=torch.randn(4, 3, H).half()), TypeError, "weight is torch.float32"),
    ("references' shape", lambda: pairs(ref_logps=torch.zeros(3)), ValueError,
     r"ref_logps has shape \(3,\); expected \(4,\) sums per sequence, \(8,\) per valid token, or the labels' \(4, 3\)"),
    ("references elsewhere", lambda: pairs(ref_logps=torch.zeros(4, device="meta")), ValueError, "ref_logps on meta"),
]  # fmt: skip


def packed(cu_seqlens: Any, labels: list[int] | None = None) -> dict[str, Any]:
    return {
        "hidden": torch.randn(6, H), "weight": torch.randn(V, H), "labels": torch.tensor(labels or [1, 2, 3, 4, 5, 6]),
        "cu_seqlens": cu_seqlens if isinstance(cu_seqlens, Tensor) else torch.tensor(cu_seqlens, dtype=torch.int32),
    }  # fmt: skip


PACKED: list[tuple[str, Callable[[], dict[str, Any]], type[Exception], str]] = [
    ("odd sequences", lambda: packed([0, 2, 4, 6]), ValueError, "got 3 sequences"),
    ("too short", lambda: packed([0, 2, 5]), ValueError, r"rise from 0 to the number of tokens, 6; got \[0, 2, 5\]"),
    ("too long", lambda: packed([0, 2, 7]), ValueError, r"got \[0, 2, 7\]"),
    ("late start", lambda: packed([1, 2, 6]), ValueError, r"got \[1, 2, 6\]"),
    ("falling", lambda: packed([0, 4, 3, 5, 6]), ValueError, r"got \[0, 4, 3, 5, 6\]"),
    ("negative", lambda: packed([0, -1, 6]), ValueError, r"got \[0, -1, 6\]"),
    ("empty sequence", lambda: packed([0, 6, 6]), ValueError, r"the rejected answer of pair 0 \(row 1\)"),
    ("ignored sequence", lambda: packed([0, 2, 6], [-100, -100, 1, 2, 3, 4]), ValueError,
     "the chosen answer of pair 0"),
    ("float boundaries", lambda: packed(torch.tensor([0.0, 3.0, 6.0])), TypeError,
     "cu_seqlens have dtype torch.float32"),
    ("boundaries' shape", lambda: packed(torch.tensor([[0, 3, 6]])), ValueError, r"\(1, 3\)"),
    ("no boundaries", lambda: packed(torch.tensor([], dtype=torch.int32)), ValueError, "got -1 sequences"),
    ("boundaries elsewhere", lambda: packed(torch.zeros(3, dtype=torch.int32, device="meta")), ValueError,
     "cu_seqlens on meta"),
    ("label", lambda: packed([0, 3, 6], [1, 2, 3, 4, 55, 6]), IndexError, "labels: position 4 holds 55"),
]  # fmt: skip


@pytest.mark.parametrize(("make", "error", "message"), [t[1:] for t in TOKENS], ids=[t[0] for t in TOKENS])
def test_linear_logps(make: Callable[[], dict[str, Any]], error: type[Exception], message: str) -> None:
    given = make()
    with pytest.raises(error, match=message):
        linear_logps(given.pop("hidden"), given.pop("weight"), given.pop("targets"), **given)


def a_callable(logps: Tensor, cu_seqlens: Tensor, ref_logps: Tensor | None = None) -> Tensor:
    return objectives.synpo(logps, cu_seqlens)


# A callable goes another way than a named objective; both have the same manners.
@pytest.mark.parametrize("objective", ["synpo", a_callable], ids=["named", "callable"])
@pytest.mark.parametrize("trainable", [False, True], ids=["frozen", "trainable"])
@pytest.mark.parametrize(
    ("make", "error", "message"), [t[1:] for t in PAIRS + PACKED], ids=[t[0] for t in PAIRS + PACKED]
)
def test_pair_losses(
    make: Callable[[], dict[str, Any]], error: type[Exception], message: str, trainable: bool, objective: Any
) -> None:
    given = make()
    given["weight"].requires_grad_(trainable)
    with pytest.raises(error, match=message):
        FusedPreferenceLoss(objective)(**given)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"alpha": 0.0}, "alpha is 0.0; synpo needs alpha > 0"),
        ({"alpha": -30.0}, "alpha is -30.0"),
        ({"beta": -0.2}, "beta is -0.2; synpo needs beta >= 0"),
        ({"form": "bradley-terry"}, "form is 'bradley-terry'; allowed: sigmoid, logsigmoid"),
    ],
    ids=str,
)
def test_hyperparameters_are_checked_at_construction(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FusedSynPOLoss(**arguments)


def test_unknown_objectives_and_hyperparameters_are_named() -> None:
    with pytest.raises(ValueError, match="objective 'sympo' is unknown; known: synpo, dpo"):
        FusedPreferenceLoss("sympo")
    with pytest.raises(ValueError, match="dpo has no hyperparameter 'gamma'; it takes beta"):
        FusedPreferenceLoss("dpo", gamma=0.5)
    with pytest.raises(TypeError, match="objective is 3; a name"):
        FusedPreferenceLoss(3)  # type: ignore[arg-type]
    FusedSynPOLoss(beta=0.0)


@pytest.mark.parametrize("objective", ["dpo", "dpop", "ipo", "kto"])
def test_a_missing_reference_is_named(objective: str) -> None:
    with pytest.raises(ValueError, match=f"{objective} needs ref_logps"):
        FusedPreferenceLoss(objective)(**pairs())


def test_losses_of_a_callable_must_be_one_per_pair() -> None:
    with pytest.raises(ValueError, match=r"objective: its losses have shape \(\); needed is one per pair, \(2,\)"):
        FusedPreferenceLoss(lambda logps, cu, ref_logps: logps.sum())(**pairs())


def test_check_reaches_the_pair_losses() -> None:
    given = pairs()
    given["hidden"][1, 0, 2] = torch.inf
    with pytest.raises(ValueError, match="hidden: row 3 holds a value that is not finite"):
        FusedSynPOLoss(check=True)(**given)
    assert FusedSynPOLoss()(**given).loss.isnan()
