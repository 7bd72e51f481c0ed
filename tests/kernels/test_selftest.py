"""`python -m synpo_kernels.selftest` holds on this machine, names every public kernel, and fails where one is wrong."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

import synpo_kernels
from synpo_kernels import objectives, selftest

KERNELS = {
    "FusedPreferenceLoss": "preference loss dpo",
    "FusedSynPOLoss": "preference loss synpo",
    "contrastive_logits": "contrastive_logits",
    "contrastive_sample": "contrastive_sample",
    "linear_logps": "linear_logps",
    "prefix_attention": "prefix_attention: gradient of key",
}


def test_all_checks_hold_here(capsys: pytest.CaptureFixture[str]) -> None:
    assert selftest.main(["--device", "cpu"]) == 0
    out = capsys.readouterr().out
    assert "all checks hold" in out
    not_kernels = {"PreferenceOutput", "SampleOutput", "native", "objectives"}
    assert set(synpo_kernels.__all__) - not_kernels == KERNELS.keys()
    assert all(name in out for name in KERNELS.values())
    assert all(f"preference loss {name}, trainable head" in out for name in objectives.REGISTRY)


def _off(function: Callable[..., Any], factor: float) -> Callable[..., Any]:
    def wrong(*args: Any, **options: Any) -> Any:
        return function(*args, **options) * factor

    return wrong


class _WrongLoss(synpo_kernels.FusedPreferenceLoss):
    def forward(self, *args: Any, **options: Any) -> Any:
        output = super().forward(*args, **options)
        return output._replace(loss=output.loss * 1.01)  # the value within its bound, the gradients not


@pytest.mark.parametrize(
    ("name", "wrong", "line"),
    [
        ("linear_logps", _off(selftest.linear_logps, 1.001), "linear_logps, frozen head"),
        ("FusedPreferenceLoss", _WrongLoss, "preference loss simpo, trainable head"),
        ("contrastive_logits", _off(selftest.contrastive_logits, 1.00001), "contrastive_logits"),
        ("contrastive_sample", lambda *_, **__: 1 / 0, "contrastive, float32"),
        ("prefix_attention", _off(selftest.prefix_attention, 1.001), "prefix_attention"),
    ],
)
def test_a_kernel_that_is_wrong_fails(
    name: str, wrong: Any, line: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(selftest, name, wrong)
    monkeypatch.setattr(selftest, "DTYPES", (torch.float32,))
    assert selftest.main(["--device", "cpu"]) == 1
    out = capsys.readouterr().out
    assert any(found.startswith(line) and "FAILED" in found for found in out.splitlines())
    assert "checks FAILED" in out
