"""Stored values of the SynPO loss: both forms, losses, log-probs and both gradients, by every path of the kernels."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from synpo_kernels import (
    FusedPreferenceLoss,
    FusedSynPOLoss,
    PreferenceOutput,
    linear_logps,
    objectives,
    pair_loss_op,
    reference,
)

CASES = json.loads((Path(__file__).parents[1] / "golden" / "synpo.json").read_text())["cases"]
TOLERANCE = {"rtol": 1e-9, "atol": 1e-9}
FORMS = ["sigmoid", "logsigmoid"]
# How the gradients of a trainable head are made, and the bound on the workspace, in bytes, that leads there.
PATHS = {"one chunk": 1 << 20, "a chunk for each pair": None, "scored again": 8}

pytestmark = pytest.mark.usefixtures("passes", "poison")


@pytest.fixture(params=CASES, ids=[case["name"] for case in CASES])
def case(request: pytest.FixtureRequest) -> dict[str, Any]:
    return request.param


def tensors(case: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
    hidden, weight = (torch.tensor(case[name], dtype=torch.float64).requires_grad_() for name in ("hidden", "weight"))
    return hidden, weight, torch.tensor(case["labels"])


def packed(hidden: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The valid tokens alone, row after row."""
    valid = labels != -100
    cu_seqlens = torch.nn.functional.pad(valid.sum(1).cumsum(0), (1, 0)).to(torch.int32)
    return hidden[valid], labels[valid], cu_seqlens


def same(actual: Tensor, stored: Any) -> None:
    torch.testing.assert_close(actual.detach(), torch.tensor(stored, dtype=torch.float64), **TOLERANCE)


def check(case: dict[str, Any], form: str, out: PreferenceOutput, hidden: Tensor, weight: Tensor) -> None:
    pairs = len(case["language"])
    same(out.loss, case[form]["loss"])
    same(torch.cat([out.chosen_logps, out.rejected_logps]), case["mean_logps"])
    same(torch.cat([out.chosen_rewards, out.rejected_rewards]).log(), case["mean_logps"])
    same(out.language, case["language"])
    assert out.chosen_logps.shape == (pairs,)
    out.loss.backward()
    same(hidden.grad, case[form]["grad_hidden"])
    if weight.requires_grad:
        same(weight.grad, case[form]["grad_weight"])


@pytest.mark.parametrize("layout", ["padded", "packed", "packed with ignored tokens"])
@pytest.mark.parametrize("trainable", [False, True], ids=["frozen", "trainable"])
@pytest.mark.parametrize("form", FORMS)
def test_fused_loss(case: dict[str, Any], form: str, trainable: bool, layout: str) -> None:
    hidden, weight, labels = tensors(case)
    weight.requires_grad_(trainable)
    loss_fn = FusedSynPOLoss(case["alpha"], case["beta"], form)
    if layout == "padded":
        out = loss_fn(hidden, weight, labels)
    elif layout == "packed":
        flat, targets, cu_seqlens = packed(hidden, labels)
        out = loss_fn(flat, weight, targets, cu_seqlens=cu_seqlens)
    else:
        rows, length = labels.shape
        cu_seqlens = torch.arange(0, rows * length + 1, length, dtype=torch.int32)
        out = loss_fn(hidden.flatten(0, 1), weight, labels.flatten(), cu_seqlens=cu_seqlens)
    check(case, form, out, hidden, weight)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("form", FORMS)
def test_every_path_of_a_trainable_head(
    case: dict[str, Any], form: str, path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    hidden, weight, labels = tensors(case)
    tokens = (labels != -100).sum(1)
    pairs = len(labels) // 2
    each = int((tokens[:pairs] + tokens[pairs:]).max()) * weight.shape[0] * 8
    bound = PATHS[path] or each
    monkeypatch.setattr(pair_loss_op, "workspace_bytes", lambda *_: bound)
    runs = {"stored_gradients": 0, "recomputed_gradients": 0}

    def counted(name: str) -> None:
        run = getattr(pair_loss_op, name)

        def count(*arguments: Any) -> Tensor:
            runs[name] += 1
            return run(*arguments)

        monkeypatch.setattr(pair_loss_op, name, count)

    for name in runs:
        counted(name)
    out = FusedSynPOLoss(case["alpha"], case["beta"], form)(hidden, weight, labels)
    check(case, form, out, hidden, weight)
    if path == "scored again":
        assert runs == {"stored_gradients": 0, "recomputed_gradients": pairs}
    else:
        assert runs["recomputed_gradients"] == 0
        assert (runs["stored_gradients"] == 1) == (path == "one chunk" or pairs == 1)


@pytest.mark.parametrize("form", FORMS)
def test_by_name_by_function_and_by_callable(case: dict[str, Any], form: str) -> None:
    def own(logps: Tensor, cu_seqlens: Tensor, **options: Any) -> Tensor:
        return objectives.synpo(logps, cu_seqlens, **options)

    for objective in ("synpo", objectives.synpo, own):
        hidden, weight, labels = tensors(case)
        loss_fn = FusedPreferenceLoss(objective, alpha=case["alpha"], beta=case["beta"], form=form)
        check(case, form, loss_fn(hidden, weight, labels), hidden, weight)


@pytest.mark.parametrize("form", FORMS)
def test_the_reference(case: dict[str, Any], form: str) -> None:
    hidden, weight, labels = tensors(case)
    loss = reference.preference_loss("synpo", hidden, weight, labels, alpha=case["alpha"], beta=case["beta"], form=form)
    same(loss, case[form]["loss"])
    loss.backward()
    same(hidden.grad, case[form]["grad_hidden"])
    same(weight.grad, case[form]["grad_weight"])


def test_token_logps(case: dict[str, Any]) -> None:
    hidden, weight, labels = tensors(case)
    same(linear_logps(hidden, weight, labels), case["token_logps"])
    same(linear_logps(hidden.detach(), weight.detach(), labels), case["token_logps"])
