"""The bench of contrastive sampling: right implementations pass its check, wrong ones are refused and not timed."""

import argparse
import csv
from pathlib import Path

import pytest
import torch

from bench import contrastive
from synpo_kernels import native


def arguments(implementation: str, law: str) -> argparse.Namespace:
    return argparse.Namespace(
        impl=[implementation], law=[law], dtype=["bf16"], batch=3, vocabulary=1500, rounds=3, budget=1.0, device="cpu"
    )


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")  # loading torch's compiler
@pytest.mark.parametrize("law", contrastive.LAWS)
@pytest.mark.parametrize("name", contrastive.IMPLEMENTATIONS)
def test_every_implementation_draws_from_the_law(name: str, law: str) -> None:
    with torch.compiler.set_stance("force_eager"):
        row = contrastive.measure(arguments(name, law))
    assert row["max_logp_error"] < 1e-3
    assert 0 < row["p20_ms"] <= row["p50_ms"] <= row["p80_ms"]


def test_a_wrong_law_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def warmer(logits: torch.Tensor, contrast: torch.Tensor, law: contrastive.Law) -> tuple[torch.Tensor, torch.Tensor]:
        return contrastive.ours(logits, contrast, law._replace(temperature=1.1 * law.temperature))

    monkeypatch.setitem(contrastive.IMPLEMENTATIONS, "ours", warmer)
    with pytest.raises(ValueError, match="max_logp_error"):
        contrastive.measure(arguments("ours", "top-k, top-p"))


@pytest.mark.skipif(not native.status()["built"], reason="the C++ kernels are not built")
def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "rows.csv"
    small = ["--law", "greedy", "--dtype", "fp32", "--batch", "2", "--vocabulary", "400", "--rounds", "3"]
    contrastive.main(["--impl", "eager", "ours", *small, "--device", "cpu", "--out", str(out)])
    rows = list(csv.DictReader(out.read_text().splitlines()))
    assert [row["implementation"] for row in rows] == ["eager", "ours"]
    assert float(rows[0]["over_eager"]) == 1.0
    assert float(rows[1]["over_eager"]) == pytest.approx(float(rows[0]["p50_ms"]) / float(rows[1]["p50_ms"]), rel=1e-3)
    assert "| greedy | fp32 | ours |" in capsys.readouterr().out


def test_plain_pytorch_is_not_timed_as_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "status", lambda: {"built": False, "reason": "not built: install"})
    with pytest.raises(SystemExit, match=r"plain PyTorch would be timed: .* not built: install"):
        contrastive.main(["--device", "cpu"])
