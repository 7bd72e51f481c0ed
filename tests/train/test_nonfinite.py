"""A loss or gradient that is not finite: the step is skipped, counted and logged, and too many of them stop the run."""

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainerCallback, TrainingArguments

from synpo.train import SynPOTrainer
from tests.train import tiny


def trainable(trainer: SynPOTrainer) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad}


class Recorder(TrainerCallback):
    """Keeps the weights after every step."""

    def __init__(self) -> None:
        self.weights: list[dict[str, torch.Tensor]] = []
        self.trainer: SynPOTrainer | None = None

    def on_step_end(self, args: TrainingArguments, state: Any, control: Any, **_: Any) -> None:
        assert self.trainer is not None
        self.weights.append(trainable(self.trainer))


def poisoned(folder: Path, monkeypatch: pytest.MonkeyPatch, bad_rows: set[int], value: float, **changes: Any) -> Any:
    """A trainer whose hidden states turn into ``value`` on some rows of the dataset."""
    trainer = tiny.trainer(folder, 8, train_sampling_strategy="sequential", **changes)
    loss = trainer.scorer.loss
    norm = trainer.model.get_base_model().model.norm

    def poisoning(model: Any, batch: dict[str, Any], ref_sums: Any = None) -> Any:
        if not bad_rows & set(batch["indices"]):
            return loss(model, batch, ref_sums)
        hook = norm.register_forward_hook(lambda _, __, hidden: hidden * value)
        try:
            return loss(model, batch, ref_sums)
        finally:
            hook.remove()

    monkeypatch.setattr(trainer.scorer, "loss", poisoning)
    recorder = Recorder()
    recorder.trainer = trainer
    trainer.add_callback(recorder)
    return trainer, recorder


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("max_grad_norm", [1.0, 0.0])
def test_a_bad_step_is_skipped_counted_and_logged(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    value: float,
    max_grad_norm: float,
) -> None:
    options = {"gradient_accumulation_steps": 2, "num_train_epochs": 1, "max_grad_norm": max_grad_norm}
    trainer, recorder = poisoned(tmp_path, monkeypatch, {3}, value, **options)
    with caplog.at_level(logging.WARNING):
        trainer.train()
    first, second, third, fourth = recorder.weights
    assert all(torch.equal(weight, second[name]) for name, weight in first.items())  # rows 2 and 3: nothing moved
    assert any(not torch.equal(weight, third[name]) for name, weight in second.items())
    assert all(weight.isfinite().all() for weight in fourth.values())
    assert "step 2 skipped: the loss is not finite (rows 2, 3 of the train dataset); 1 of at most 10" in caplog.text

    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["nonfinite_steps"] for line in lines if "loss" in line] == [0, 1, 1, 1]
    assert lines[1]["loss"] is None
    assert all(line["loss"] is not None for line in (lines[0], lines[2], lines[3]))
    assert torch.isfinite(torch.tensor(lines[-1]["train_loss"]))


def test_a_bad_gradient_alone_counts_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = tiny.trainer(tmp_path, 4, max_steps=1)
    before = trainable(trainer)
    parameter = next(p for p in trainer.model.parameters() if p.requires_grad)
    parameter.register_hook(lambda grad: grad * float("nan"))
    trainer.train()
    assert trainer.nonfinite_steps == 1
    assert all(torch.equal(weight, before[name]) for name, weight in trainable(trainer).items())


def test_too_many_stop_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer, _ = poisoned(tmp_path, monkeypatch, {1, 3, 4}, float("nan"), max_nonfinite_steps=2)
    message = r"2 optimizer steps had .* the last at step 4 \(rows 3 of the train dataset\); lower learning_rate"
    with pytest.raises(FloatingPointError, match=message):
        trainer.train()


def test_the_count_survives_a_resume(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = {"max_nonfinite_steps": 2, "save_strategy": "steps", "save_steps": 2, "max_steps": 8}
    trainer, _ = poisoned(tmp_path, monkeypatch, {1, 5}, float("nan"), **options)
    with pytest.raises(FloatingPointError):
        trainer.train()
    resumed, _ = poisoned(tmp_path, monkeypatch, {5}, float("nan"), **options)
    with pytest.raises(FloatingPointError, match=r"2 optimizer steps .* step 6"):
        resumed.train(resume_from_checkpoint=True)
