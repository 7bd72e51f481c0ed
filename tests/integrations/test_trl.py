"""trl's trainers give the same losses and gradients with the swap as without.

Tolerances: both are float32 and sum the same products in another order. A logit sums 32 products and a normaliser 97
exponentials, so a log-prob is off by eps32 sqrt(32 + 97) |z| with |z| below 16, and an answer of at most 12 tokens by
12 times that: LOGPS. A loss of slope at most ``slope`` in an answer's log-prob is off by slope LOGPS. A gradient is the
loss's derivative, whose relative error is at most slope LOGPS as well, times what the model's 2 layers of sums of up
to 97 products make of it: eps32 sqrt(97 * 16) of its largest element.
"""

from pathlib import Path
from typing import Any

import pytest
import torch

from synpo.train import lora_recipe
from tests.integrations import making
from tests.train import tiny

EPS = torch.finfo(torch.float32).eps
LOGPS = EPS * (97 + 32) ** 0.5 * 16 * 12


def both(
    folder: Path, theirs: Any, ours: Any, slope: float, ref_seed: int | None = None, **options: Any
) -> tuple[dict[str, float], dict[str, float]]:
    """A step of trl's trainer and of the swap: losses and gradients compared, the logged metrics of both returned."""
    runs = []
    for name, (kind, config) in (("trl", theirs), ("synpo", ours)):
        refs = {} if ref_seed is None else {"ref_model": tiny.model(ref_seed)}
        runs.append(making.step(making.trainer(kind, config, folder / name, **refs, **options)))
    (trl_loss, trl, trl_logs), (loss, gradients, logs) = runs
    assert abs(loss - trl_loss) <= slope * LOGPS
    assert gradients.keys() == trl.keys()
    assert max(float(g.abs().max()) for g in trl.values()) > 1e-3
    for name, expected in trl.items():
        allowed = (slope * LOGPS + EPS * (97 * 16) ** 0.5) * float(expected.abs().max())
        off = float((gradients[name] - expected).abs().max())
        assert off <= allowed, f"{name}: {off:.3g} off, {allowed:.3g} allowed"
    return trl_logs, logs


def same_metrics(theirs: dict[str, float], ours: dict[str, float], left_out: set[str]) -> None:
    """trl's metrics, but those that are left out."""
    ignored = {"train_runtime", "epoch", "step", "grad_norm"}
    assert theirs.keys() - ours.keys() == left_out
    for name in ours.keys() - ignored:
        assert ours[name] == pytest.approx(theirs[name], abs=LOGPS * max(1.0, abs(theirs[name])), rel=0), name


@pytest.fixture(scope="module")
def dpo() -> Any:
    from trl import DPOConfig, DPOTrainer

    from synpo.integrations.trl_dpo import FusedDPOConfig, FusedDPOTrainer

    return (DPOTrainer, DPOConfig), (FusedDPOTrainer, FusedDPOConfig)


@pytest.fixture(scope="module")
def cpo() -> Any:
    from trl.experimental.cpo import CPOConfig, CPOTrainer

    from synpo.integrations.trl_cpo import FusedCPOConfig, FusedCPOTrainer

    return (CPOTrainer, CPOConfig), (FusedCPOTrainer, FusedCPOConfig)


@pytest.mark.parametrize(
    ("slope", "options"),
    [
        (0.5, {"beta": 0.5}),
        (20.0, {"beta": 0.5, "loss_type": ["ipo", "sft"]}),  # squares of differences of up to 10
        (0.5, {"beta": 0.5, "ld_alpha": 0.3}),
        (0.5, {"beta": 0.5, "precompute_ref_log_probs": True}),
    ],
    ids=["sigmoid", "ipo-and-sft", "ld-dpo", "precomputed"],
)
def test_dpo(tmp_path: Path, dpo: Any, slope: float, options: dict[str, Any]) -> None:
    same_metrics(*both(tmp_path, *dpo, slope=slope, ref_seed=1, **options), left_out={"entropy", "mean_token_accuracy"})


def test_dpo_with_an_adapter(tmp_path: Path, dpo: Any) -> None:
    """The head is frozen, and the reference is the model without its adapter."""
    adapter = lora_recipe(r=4, alpha=8, dropout=0.0)
    logs = both(tmp_path, *dpo, slope=0.5, beta=0.5, peft_config=adapter)
    same_metrics(*logs, left_out={"entropy", "mean_token_accuracy"})


@pytest.mark.parametrize(
    "options",
    [
        {"loss_type": "simpo", "beta": 2.0, "simpo_gamma": 0.5, "cpo_alpha": 0.0},
        {"loss_type": "simpo", "beta": 2.0, "alpha": 0.1, "cpo_alpha": 0.5},
        {"loss_type": "sigmoid", "beta": 0.5},
    ],
    ids=["simpo", "alphapo-with-nll", "cpo"],
)
def test_cpo(tmp_path: Path, cpo: Any, options: dict[str, Any]) -> None:
    same_metrics(*both(tmp_path, *cpo, slope=2.0, **options), left_out=set())


def test_simpo_with_an_adapter(tmp_path: Path, cpo: Any) -> None:
    adapter = lora_recipe(r=4, alpha=8, dropout=0.0)
    logs = both(tmp_path, *cpo, slope=2.0, loss_type="simpo", beta=2.0, cpo_alpha=0.0, peft_config=adapter)
    same_metrics(*logs, left_out=set())


@torch.no_grad()
def synpo_by_hand(batch: dict[str, torch.Tensor]) -> float:
    """The loss of a batch of input_ids, attention_mask and labels (2B, T), in float64 from whole logits."""
    model = tiny.model().double()
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
    labels = batch["labels"][:, 1:]
    kept = labels != -100
    logps = logits.log_softmax(-1).gather(2, labels.clamp(min=0)[..., None])[..., 0] * kept
    means = (logps.sum(1) / kept.sum(1)).exp()
    language = ((logps.exp() * kept).sum(1) / kept.sum(1)).chunk(2)[0]
    chosen, rejected = means.chunk(2)
    return float((-torch.sigmoid(20.0 * (chosen - rejected)) - 0.3 * language).mean())


@pytest.mark.parametrize("which", ["dpo", "cpo"])
def test_synpo_as_loss_type(tmp_path: Path, which: str, request: pytest.FixtureRequest) -> None:
    kind, config = request.getfixturevalue(which)[1]
    options = {"loss_type": "synpo", "synpo_alpha": 20.0, "synpo_beta": 0.3} | (
        {} if which == "dpo" else {"cpo_alpha": 0.0}
    )
    trainer = making.trainer(kind, config, tmp_path, eval_dataset=tiny.pairs(3, 7), **options)
    batch = next(iter(trainer.get_train_dataloader()))
    if which == "dpo":
        assert trainer.ref_model is None
        batch["labels"] = batch["input_ids"].masked_fill(batch["completion_mask"] == 0, -100)
    else:
        labels, batch = trainer._joined(batch)
        batch["labels"] = labels
    expected = synpo_by_hand(batch)
    loss, gradients, logs = making.step(trainer)
    assert loss == pytest.approx(expected, abs=20 * LOGPS)
    assert max(float(g.abs().max()) for g in gradients.values()) > 1e-3
    assert 0 < logs["probs/language"] < 1
    assert {"rewards/margins", "rewards/accuracies", "logps/chosen", "logps/rejected"} <= logs.keys()
    metrics = trainer.evaluate()
    assert {"eval_loss", "eval_rewards/margins", "eval_probs/language"} <= metrics.keys()


def test_what_synpo_has_no_use_for_is_named(tmp_path: Path, dpo: Any, cpo: Any) -> None:
    (_, plain), (kind, config) = dpo
    with pytest.raises(TypeError, match='args is a DPOConfig; loss_type="synpo" needs a FusedDPOConfig'):
        making.trainer(kind, plain, tmp_path, loss_type="synpo")
    with pytest.raises(ValueError, match="ref_model is given but synpo has no reference"):
        making.trainer(kind, config, tmp_path, loss_type="synpo", ref_model=tiny.model(1))
    with pytest.raises(ValueError, match=r"loss_type is \['synpo', 'sft'\]"):
        making.trainer(kind, config, tmp_path, loss_type=["synpo", "sft"])
    with pytest.raises(ValueError, match="precompute_ref_log_probs is True, but synpo has no reference"):
        making.trainer(kind, config, tmp_path, loss_type="synpo", precompute_ref_log_probs=True)
    with pytest.raises(ValueError, match="use_weighting is True, but WPO's weights take the whole distribution"):
        making.trainer(kind, config, tmp_path, use_weighting=True)
    (_, plain), (kind, config) = cpo
    with pytest.raises(TypeError, match="args is a CPOConfig"):
        making.trainer(kind, plain, tmp_path, loss_type="synpo")
    with pytest.raises(ValueError, match=r"cpo_alpha is 1.0, but synpo has a language term.*set cpo_alpha=0.0"):
        making.trainer(kind, config, tmp_path, loss_type="synpo")
    with pytest.raises(ValueError, match=r"alpha is 0\.0; synpo needs alpha > 0"):
        making.trainer(kind, config, tmp_path, loss_type="synpo", cpo_alpha=0.0, synpo_alpha=0.0)


def test_dpo_in_mixed_precision(tmp_path: Path, dpo: Any) -> None:
    """trl's default, bf16: policy and reference are one model at first, so the loss is log 2 to float32."""
    kind, config = dpo[1]
    adapter = lora_recipe(r=4, alpha=8, dropout=0.0)
    loss, gradients, _ = making.step(making.trainer(kind, config, tmp_path, bf16=True, beta=0.5, peft_config=adapter))
    assert loss == pytest.approx(0.6931472, abs=1e-6)
    assert max(float(g.abs().max()) for g in gradients.values()) > 1e-3


def test_capped_logits(tmp_path: Path, dpo: Any) -> None:
    """Their mean takes all of them, so it is left out."""
    from tests.integrations.test_pair_loss import models

    runs = []
    for name, (kind, config) in zip(("trl", "synpo"), dpo, strict=True):
        trainer = making.trainer(kind, config, tmp_path / name, models()["gemma2"], ref_model=models()["gemma2"])
        runs.append(making.step(trainer))
    (theirs, _, their_logs), (ours, _, our_logs) = runs
    assert ours == pytest.approx(theirs, abs=LOGPS)
    left_out = {"entropy", "mean_token_accuracy", "logits/chosen", "logits/rejected"}
    assert their_logs.keys() - our_logs.keys() == left_out
