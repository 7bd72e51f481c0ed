"""Runs that must be the same run: fused and eager, packed and padded, one big batch and many small ones.

Tolerance of curves in float32, over 20 steps that each see the rounding of the ones before: 1e-5 absolute, as losses
are of order one; measured differences are near 1e-7.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    PreTrainedModel,
)

from synpo.train import SynPOTrainer
from synpo_kernels import objectives
from tests.train import tiny


def curve(trainer: SynPOTrainer) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Losses and gradient norms of every step, and the weights at the end."""
    torch.manual_seed(0)  # of dropout
    trainer.train()
    lines = [line for line in trainer.state.log_history if "loss" in line]
    weights = {name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad}
    return torch.tensor([[line["loss"], line["grad_norm"]] for line in lines], dtype=torch.float64), weights


def assert_same(a: SynPOTrainer, b: SynPOTrainer, tolerance: float = 1e-5) -> None:
    (losses_a, weights_a), (losses_b, weights_b) = curve(a), curve(b)
    assert losses_a.shape == losses_b.shape
    torch.testing.assert_close(losses_a, losses_b, atol=tolerance, rtol=tolerance)
    for name, weight in weights_a.items():
        torch.testing.assert_close(weight, weights_b[name], atol=10 * tolerance, rtol=tolerance)


# Plain SGD, so that a difference in a gradient is a difference in a weight of the same size: Adam divides tiny
# gradients by their own size and turns rounding into steps. Learning rates give every objective a loss that moves.
RATES = {"dpop": 1e-3, "kto": 0.3, "ipo": 1e-3, "simpo": 0.05, "cpo": 0.05, "orpo": 0.05, "dpo": 0.3, "synpo": 0.3}


@pytest.mark.parametrize(
    ("objective", "lora"),
    [*((name, True) for name in sorted(objectives.REGISTRY)), ("synpo", False), ("dpo", False), ("orpo", False)],
)
def test_fused_is_eager_over_20_steps(tmp_path: Path, objective: str, lora: bool) -> None:
    options: dict[str, Any] = {
        "objective": objective,
        "max_steps": 20,
        "per_device_train_batch_size": 2,
        "lora": lora,
        "learning_rate": RATES[objective],
        "optim": "sgd",
        "precompute_ref_logps": not lora and objectives.REGISTRY[objective].reference,
    }
    fused = tiny.trainer(tmp_path / "fused", 10, **options)
    eager = tiny.trainer(tmp_path / "eager", 10, fused=False, **options)
    assert fused.scorer.head is not None
    assert eager.scorer.head is None
    assert_same(fused, eager)
    losses = [line["loss"] for line in fused.state.log_history if "loss" in line]
    assert len(set(losses)) == 20  # a run that learned nothing would compare equal to anything


def test_logsigmoid_form(tmp_path: Path) -> None:
    options = {"form": "logsigmoid", "max_steps": 5, "optim": "sgd", "learning_rate": 0.05}
    assert_same(tiny.trainer(tmp_path / "a", **options), tiny.trainer(tmp_path / "b", fused=False, **options))


@pytest.mark.parametrize("other", [{"tokens_per_pass": 1}, {"tokens_per_pass": 50}], ids=["pair by pair", "some"])
def test_passes_do_not_change_the_gradient(tmp_path: Path, other: dict[str, int]) -> None:
    options = {"max_steps": 6, "per_device_train_batch_size": 4, "optim": "sgd", "learning_rate": 0.3}
    whole = tiny.trainer(tmp_path / "whole", 8, tokens_per_pass=4096, **options)
    split = tiny.trainer(tmp_path / "split", 8, **other, **options)
    sizes = [len(trainer.data_collator(trainer.train_dataset.pairs[:4])["passes"]) for trainer in (whole, split)]
    assert sizes[0] == 1 < sizes[1]
    assert_same(whole, split)


@pytest.mark.parametrize(("objective", "rate"), [("synpo", 0.3), ("dpo", 0.3), ("orpo", 0.05)])
def test_accumulation_equals_the_big_batch(tmp_path: Path, objective: str, rate: float) -> None:
    # 20 pairs in windows of 8: the last window of an epoch has 4, and each of its pairs weighs twice as much.
    options = {"objective": objective, "num_train_epochs": 2, "optim": "sgd", "learning_rate": rate}
    big = tiny.trainer(tmp_path / "big", 20, per_device_train_batch_size=8, **options)
    small = tiny.trainer(tmp_path / "small", 20, gradient_accumulation_steps=8, **options)
    uneven = tiny.trainer(
        tmp_path / "uneven", 20, per_device_train_batch_size=4, gradient_accumulation_steps=2, **options
    )
    assert_same(big, small)
    assert_same(tiny.trainer(tmp_path / "again", 20, per_device_train_batch_size=8, **options), uneven)
    assert big.state.global_step == small.state.global_step == uneven.state.global_step == 6


def test_kto_couples_the_pairs_of_a_micro_batch(tmp_path: Path) -> None:
    options = {"objective": "kto", "max_steps": 6, "optim": "sgd", "learning_rate": 1.0}
    big, _ = curve(tiny.trainer(tmp_path / "big", 8, per_device_train_batch_size=8, **options))
    small, _ = curve(tiny.trainer(tmp_path / "small", 8, gradient_accumulation_steps=8, **options))
    assert (big - small).abs().max() > 1e-6


def test_activation_checkpointing_changes_nothing(tmp_path: Path) -> None:
    options = {"max_steps": 4, "optim": "sgd", "learning_rate": 0.3, "dropout": 0.1}
    plain = tiny.trainer(tmp_path / "plain", **options)
    saving = tiny.trainer(tmp_path / "saving", activation_checkpointing=True, **options)
    assert_same(plain, saving)


def test_bf16_autocast_is_near_float32(tmp_path: Path) -> None:
    options = {"max_steps": 4, "optim": "sgd", "learning_rate": 0.3}
    exact, _ = curve(tiny.trainer(tmp_path / "exact", **options))
    rounded, _ = curve(tiny.trainer(tmp_path / "rounded", bf16=True, **options))
    assert 0 < (exact[:, 0] - rounded[:, 0]).abs().max() < 0.02  # bfloat16 carries three digits; losses are near 0.5


def _gemma2() -> PreTrainedModel:
    return Gemma2ForCausalLM(
        Gemma2Config(**tiny.SIZES, head_dim=8, final_logit_softcapping=3.0, query_pre_attn_scalar=8, sliding_window=16)
    )


def _cohere() -> PreTrainedModel:
    return CohereForCausalLM(CohereConfig(**tiny.SIZES, logit_scale=0.25))


def _granite() -> PreTrainedModel:
    return GraniteForCausalLM(GraniteConfig(**tiny.SIZES, logits_scaling=4.0))


@pytest.mark.parametrize(
    "make", [_gemma2, _cohere, _granite], ids=["gemma2 softcap", "cohere scale", "granite scaling"]
)
def test_scaled_logits_reach_the_loss(tmp_path: Path, make: Callable[[], PreTrainedModel]) -> None:
    def build(folder: str, fused: bool) -> SynPOTrainer:
        torch.manual_seed(0)
        options = {"max_steps": 3, "optim": "sgd", "learning_rate": 0.3, "fused": fused}
        return tiny.trainer(tmp_path / folder, model=make(), lora=False, **options)

    fused = build("fused", True)
    head = fused.scorer.head
    assert head is not None
    assert (head.softcap, head.logit_scale) != (None, 1.0)
    before = [getattr(owner, name) for owner, name, _ in head.owners]
    assert_same(fused, build("eager", False))
    assert [getattr(owner, name) for owner, name, _ in head.owners] == before


class Doubled(tiny.LlamaForCausalLM):
    """A model that scales its logits in a way nobody knows."""

    def forward(self, *args: Any, **options: Any) -> Any:
        output = super().forward(*args, **options)
        output.logits = output.logits * 2
        return output


def test_unknown_scaling_is_refused_at_the_first_batch(tmp_path: Path) -> None:
    torch.manual_seed(0)
    trainer = tiny.trainer(tmp_path, model=Doubled(tiny.config()), lora=False, max_steps=2)
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    with pytest.raises(ValueError, match=r"Doubled: log-probs from lm_head differ .* set fused=False"):
        trainer.train()
    assert all(torch.equal(p, before[name]) for name, p in trainer.model.named_parameters())
    tiny.trainer(tmp_path / "eager", model=Doubled(tiny.config()), lora=False, max_steps=1, fused=False).train()


def test_logits_are_never_made(tmp_path: Path) -> None:
    """No tensor as wide as the vocabulary with a row per position appears in the forward pass."""
    trainer = tiny.trainer(tmp_path, 4, max_steps=1)
    trainer.train()
    (batch,) = trainer.data_collator(trainer.train_dataset.pairs[:2])["passes"]
    seen: list[tuple[int, ...]] = []
    hook = trainer.scorer.head.module.register_forward_hook(lambda _, __, output: seen.append(tuple(output.shape)))
    trainer.scorer.loss(trainer.model, batch)
    hook.remove()
    assert seen == [()]  # what lm_head returned: the loss
    assert "forward" not in vars(trainer.scorer.head.module)
