"""Metrics in closed form against autograd, and means over pairs."""

import logging
from pathlib import Path

import numpy as np
import pytest
import torch

from synpo.run_files import read_json_lines, write_json_lines
from synpo.train import samples
from synpo.train.diagnostics import RunningMeans, displacement, pair_metrics
from synpo.train.side_norms import side_norms
from synpo_kernels import PreferenceOutput, objectives
from tests.train import seeing, tiny


def output(logps: list[torch.Tensor]) -> PreferenceOutput:
    """What the losses report for log-probs of sequences, chosen first."""
    pairs = len(logps) // 2
    means = torch.stack([l.mean() for l in logps])
    language = torch.stack([l.exp().mean() for l in logps[:pairs]])
    return PreferenceOutput(torch.zeros(()), *means.chunk(2), *means.exp().chunk(2), language)


@pytest.mark.parametrize("form", ["sigmoid", "logsigmoid"])
def test_shares_and_saturation_are_those_of_the_gradient(tmp_path: Path, form: str) -> None:
    # Gaps small, large of either sign, and answers of different lengths: all parts and both tails of the slope.
    torch.manual_seed(0)
    centres = [-0.3, -1.0, -0.05, -2.0, -0.4, -1.1, -3.0, -0.1]
    logps = [
        c + 0.02 * torch.randn(n, dtype=torch.float64) for c, n in zip(centres, (3, 7, 1, 5, 4, 2, 6, 8), strict=True)
    ]
    args = tiny.arguments(tmp_path, alpha=10.0, beta=0.3, form=form)
    metrics = pair_metrics(output([l.detach() for l in logps]), args)

    def norms(beta: float) -> torch.Tensor:
        """L1 norm over tokens of the gradient of every sequence, by autograd."""
        leaves = [l.clone().requires_grad_() for l in logps]
        bounds = torch.tensor([0, *(len(l) for l in leaves)]).cumsum(0)
        objectives.synpo(torch.cat(leaves), bounds, alpha=10.0, beta=beta, form=form).sum().backward()
        return torch.stack([leaf.grad.abs().sum() for leaf in leaves])

    ranking = norms(beta=0.0)
    language = norms(beta=0.3)[:4] - ranking[:4]  # both push a chosen token the same way
    total = ranking[:4] + ranking[4:] + language
    torch.testing.assert_close(metrics["grad_share/chosen"], ranking[:4] / total)
    torch.testing.assert_close(metrics["grad_share/rejected"], ranking[4:] / total)
    torch.testing.assert_close(metrics["grad_share/language"], language / total)
    steepest = 0.25 if form == "sigmoid" else 1.0
    slope = ranking[:4] / (10.0 * torch.stack([l.mean().exp() for l in logps[:4]]))
    torch.testing.assert_close(metrics["saturation"], 1 - slope / steepest)


def test_other_objectives_have_no_shares(tmp_path: Path) -> None:
    metrics = pair_metrics(
        output([torch.tensor([-1.0]), torch.tensor([-2.0])]), tiny.arguments(tmp_path, objective="dpo")
    )
    assert "saturation" not in metrics
    assert metrics["rewards/accuracies"].tolist() == [1.0]


def test_means_weigh_every_pair_alike() -> None:
    means = RunningMeans()
    means.add(torch.tensor(1.0), {"rewards/chosen": torch.tensor([1.0, 2.0, 6.0])})
    means.add(torch.tensor(5.0), {"rewards/chosen": torch.tensor([7.0])})
    assert means.read() == (4, {"loss": 2.0, "rewards/chosen": 4.0})
    assert means.read() == (0, {})


# Displacement


def columns(chosen: list[float], margins: list[float]) -> dict[str, np.ndarray]:
    index = np.arange(float(len(chosen)))
    return {"index": index, "logps/chosen": np.array(chosen), "rewards/margins": np.array(margins)}


def records(found: dict[str, np.ndarray]) -> list[dict[str, float]]:
    return [{name: column[i] for name, column in found.items()} for i in range(len(found["index"]))]


def test_displacement_is_chosen_answers_falling_while_margins_grow() -> None:
    before = records(columns([-1.0, -2.0, -1.5, -1.2], [0.1, 0.0, -0.1, 0.2]))
    fallen = displacement(3, before, columns([-1.5, -2.4, -2.0, -1.6], [0.6, 0.4, 0.5, 0.7]))
    assert fallen.alarming
    assert fallen.share == 1.0
    assert fallen.chosen.mean == pytest.approx(-0.45)
    assert "since step 3 margins grew by 0.5 while chosen answers lost 0.45 nats" in str(fallen)
    # One pair alone pays, the others gain: nothing to be alarmed about.
    mixed = displacement(0, before, columns([-1.5, -1.0, -1.0, -1.0], [0.6, 0.4, 0.5, 0.7]))
    assert (mixed.alarming, mixed.share) == (False, 0.25)
    # Chosen answers fall and so do the margins: a run that gets worse, but not this failure.
    assert not displacement(0, before, columns([-1.5, -2.4, -2.0, -1.6], [-1.0, -1.0, -1.0, -1.0])).alarming


def test_a_run_that_makes_good_answers_unlikely_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A first evaluation that had chosen answers likelier by a nat and margins smaller by one."""
    rows = tiny.pairs(6, 1)
    trainer = tiny.trainer(tmp_path, 6, eval_dataset=rows, max_steps=4, eval_strategy="steps", eval_steps=2)
    trainer.evaluate()
    first = trainer.pairs_file("eval", 0)
    records = read_json_lines(first)
    for record in records:
        record["logps/chosen"] += 1.0
        record["rewards/margins"] -= 1.0
    write_json_lines(first, records)
    with caplog.at_level(logging.WARNING):
        trainer.train()
    evaluations = [line for line in read_json_lines(tmp_path / "metrics.jsonl") if "eval_loss" in line]
    assert ["eval_displacement" in line for line in evaluations] == [False, True, True]
    found = displacement(0, records, table(trainer.pairs_file("eval", 4)))
    assert evaluations[-1]["eval_displacement"] == found.share == 1.0
    assert found.alarming
    assert f"eval pairs: {found}" in caplog.messages


def table(file: Path) -> dict[str, np.ndarray]:
    rows = read_json_lines(file)
    return {name: np.array([float(row[name]) for row in rows]) for name in rows[0]}


# Norms of the sides


@pytest.mark.parametrize("objective", ["synpo", "dpo", "simpo"])
def test_norms_of_the_sides_are_those_of_separate_losses(tmp_path: Path, objective: str) -> None:
    trainer = tiny.trainer(tmp_path, 3, objective=objective, per_device_train_batch_size=3)
    for name, parameter in trainer.model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    (batch,) = trainer.data_collator(trainer.train_dataset.pairs)["passes"]
    scorer, model, args = trainer.scorer, trainer.model, trainer.args
    refs = None
    if trainer.references is not None:
        refs = trainer.references.sums(scorer, model, batch)
    found = side_norms(args, scorer, model, batch, refs)
    assert all(parameter.grad is None for parameter in model.parameters())

    weights = [parameter for parameter in model.parameters() if parameter.requires_grad]
    function = objectives.REGISTRY[objective].function
    bounds = batch["cu_seqlens"]
    first_rejected = int(bounds[3])

    def norm(chosen: bool, **changes: float) -> float:
        logps = scorer.logps(model, batch)
        side = torch.arange(len(logps)) < first_rejected
        only = torch.where(side == chosen, logps, logps.detach())
        loss = function(only, bounds, ref_logps=refs, **{**args.hyperparameters, **changes}).mean()
        parts = torch.autograd.grad(loss, weights)
        return float(torch.stack([part.square().sum() for part in parts]).sum().sqrt())

    ranking = {"beta": 0.0} if objective == "synpo" else {}
    assert found["grad_norm/chosen"] == pytest.approx(norm(True, **ranking), rel=1e-4)
    assert found["grad_norm/rejected"] == pytest.approx(norm(False, **ranking), rel=1e-4)
    assert ("grad_norm/language" in found) == (objective == "synpo")
    assert len(set(found.values())) == len(found)


def test_measuring_the_sides_changes_nothing(tmp_path: Path) -> None:
    options = {"max_steps": 5, "dropout": 0.2, "gradient_accumulation_steps": 2}
    plain = tiny.trainer(tmp_path / "plain", 10, **options)
    measured = tiny.trainer(tmp_path / "measured", 10, side_norms_every=2, **options)
    for trainer in (plain, measured):
        torch.manual_seed(0)
        trainer.train()
    for (name, a), (_, b) in zip(plain.model.named_parameters(), measured.model.named_parameters(), strict=True):
        assert torch.equal(a, b), name
    lines = [line for line in read_json_lines(tmp_path / "measured" / "metrics.jsonl") if "loss" in line]
    assert [line["step"] for line in lines if "grad_norm/chosen" in line] == [1, 3, 5]


# Samples


def greedy(model: torch.nn.Module, ids: torch.Tensor, count: int, **options: object) -> list[int]:
    """Without a cache."""
    found: list[int] = []
    for _ in range(count):
        whole = torch.cat([ids, torch.tensor(found, dtype=torch.int64)])[None]
        found.append(int(model(input_ids=whole, **options).logits[0, -1].argmax()))
    return found


def test_samples_are_greedy_answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(samples, "MOST_TOKENS", 6)
    trainer = tiny.trainer(tmp_path, 4, eval_dataset=tiny.pairs(3, 1), sample_captions=2, max_steps=1)
    trainer.evaluate()
    trainer.train()
    written = read_json_lines(tmp_path / "eval_samples" / "eval-0.jsonl")
    assert [record["index"] for record in written] == [0, 1]
    pair = trainer.eval_dataset[0]
    ids = greedy(tiny.model().eval(), pair.prompt, 6)
    end = next((i for i, token in enumerate(ids) if token in (2, int(pair.chosen[-1]))), 6)
    assert written[0]["answer"] == tiny.tokenizer().decode(ids[:end], skip_special_tokens=True)
    assert written[0]["chosen"] == tiny.pairs(3, 1)[0]["chosen"][0]["content"]


@pytest.mark.parametrize("family", ["llava_onevision", "qwen2_5_vl", "auroracap"])
def test_samples_of_videos(tmp_path: Path, family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(samples, "MOST_TOKENS", 5)
    trainer = seeing.trainer(tmp_path, family, 2)
    pair = trainer.train_dataset[1]
    model = trainer.model.eval()
    got = samples._greedy(model, pair, trainer.scorer.vision, trainer.processing_class)
    media = trainer.scorer.vision.options(model, [pair.media])
    found: list[int] = []
    for _ in range(5):
        ids = torch.cat([pair.prompt, torch.tensor(found, dtype=torch.int64)])
        places = torch.arange(len(ids)) if pair.places is None else torch.cat(
            [pair.places, (pair.places.max() + 1 + torch.arange(len(found))).expand(3, -1)], 1
        )  # fmt: skip
        logits = model(input_ids=ids[None], position_ids=places.unsqueeze(-2), use_cache=False, **media).logits
        found.append(int(logits[0, -1].argmax()))
    end = next((i for i, token in enumerate(found) if token in (2, int(pair.chosen[-1]))), 5)
    assert got == found[:end]
