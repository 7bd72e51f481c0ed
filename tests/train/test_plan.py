"""A plan's bytes against those of the same step with real tensors, and against sums that are known."""

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from synpo.cli import main
from synpo.train import SynPOConfig, lora_recipe
from synpo.train import plan as planning
from synpo.train.model import trainable
from synpo.train.plan import PARTS, Tally, longest_pairs, plan, two_steps
from tests.train import tiny

SIZES: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "vocab_size": 400}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A model's folder without weights."""
    tiny.config(**SIZES).save_pretrained(tmp_path / "model")
    tiny.tokenizer().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def planned(folder: Path, lora: bool = True, **changes: Any) -> planning.Plan:
    args = tiny.arguments(folder.parent / "out", **{"optim": "adamw_torch_fused"} | changes)
    pairs = longest_pairs(tiny.pairs(8), tiny.tokenizer(), args)
    return plan(args, str(folder), None, lora_recipe(r=4, alpha=8, dropout=0.1) if lora else None, pairs)


def measured(args: SynPOConfig, lora: bool) -> dict[str, int]:
    """The same tally over a step of real tensors."""
    config = lora_recipe(r=4, alpha=8, dropout=0.1) if lora else None
    model = trainable(tiny.model(**SIZES), config, args.seed)
    if args.activation_checkpointing:
        model.activation_checkpointing_enable(args.activation_checkpointing_kwargs)
    pairs = longest_pairs(tiny.pairs(8), tiny.tokenizer(), args)
    batch, passes, scorer = planning._largest_pass(args, model, pairs)
    tally = Tally()
    planning._count_head(scorer, tally, args)
    with tally:
        two_steps(args, model, tally, partial(planning._pass, args, scorer, model, batch), passes)
    return tally.peak


@pytest.mark.parametrize(
    ("lora", "changes"),
    [
        (True, {}),
        (False, {}),
        (True, {"activation_checkpointing": True, "gradient_accumulation_steps": 2}),
        (True, {"prefix_sharing": False, "per_device_train_batch_size": 3}),
        (True, {"bf16": True}),
    ],
    ids=["lora", "full", "checkpointing", "plain", "bf16"],
)
def test_fake_tensors_live_as_real_ones(folder: Path, lora: bool, changes: dict[str, Any]) -> None:
    found = planned(folder, lora, **changes)
    args = tiny.arguments(folder.parent / "out", optim="adamw_torch_fused", **changes)
    expected = measured(args, lora)
    assert found.parts.keys() == expected.keys() == PARTS.keys()
    for name in ("weights", "trained", "optimizer", "head"):
        assert found.parts[name] == expected[name], name
    # Kernels on real tensors make a few views and scalars that fakes do not.
    assert found.total == pytest.approx(sum(expected.values()), rel=0.02)


def test_parts_are_what_they_say(folder: Path) -> None:
    model = tiny.model(**SIZES)
    weights = sum(p.numel() for p in model.parameters()) * 4
    buffers = sum(b.numel() * b.element_size() for b in model.buffers())
    full = planned(folder, lora=False)
    assert full.parts["weights"] == buffers
    assert full.parts["trained"] == weights
    steps = 4 * len(list(model.parameters()))  # Adam counts steps for every tensor
    assert full.parts["optimizer"] == 2 * weights + steps
    adapter = planned(folder)
    assert adapter.parts["weights"] == weights + buffers
    assert 0 < adapter.parts["optimizer"] - 2 * adapter.parts["trained"] < 1000  # the counts of steps
    assert planned(folder, optim="sgd").parts["optimizer"] == 0


def test_what_saves_memory_saves_it_in_the_plan(folder: Path) -> None:
    plain = planned(folder, prefix_sharing=False, per_device_train_batch_size=4)
    shared = planned(folder, per_device_train_batch_size=4)
    saving = planned(folder, per_device_train_batch_size=4, activation_checkpointing=True)
    split = planned(folder, per_device_train_batch_size=4, tokens_per_pass=1)
    assert shared.parts["activations"] < plain.parts["activations"]
    assert saving.parts["activations"] < 0.7 * shared.parts["activations"]
    assert split.parts["activations"] < 0.5 * shared.parts["activations"]
    assert (shared.pairs, split.pairs) == (4, 1)


def test_a_tally_knows_views_and_what_was_freed() -> None:
    with Tally() as tally:
        first = torch.zeros(1000)
        view = first.view(10, 100)
        del first
        assert tally.live["activations"] == 4000
        with tally.part("optimizer"):
            second = torch.ones(500)
        del view
        assert dict(tally.live) == {"activations": 0, "optimizer": 2000}
        tally.belongs(second, "gradients")
        tally.takes_for_a_moment(10**6)
        third = torch.zeros(1)
    assert tally.peak == dict.fromkeys(PARTS, 0) | {"gradients": 2000, "head": 10**6}
    assert isinstance(third, Tensor)


def test_the_command_prints_it_and_makes_nothing(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = folder.parent / "pairs.jsonl"
    data.write_text(
        "\n".join(f'{{"prompt": "w1 w{i}", "chosen": "w2 w3", "rejected": "w4"}}' for i in range(8)), encoding="utf-8"
    )
    out = folder.parent / "out"
    words = ["train", "--plan", "--model", str(folder), "--data", str(data), "--output_dir", str(out), "--use_cpu"]
    assert main(words) == 0
    printed = capsys.readouterr().out
    assert "peak memory of a training step:" in printed
    assert all(text in printed for text in PARTS.values())
    assert not out.exists()
