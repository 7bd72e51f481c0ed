"""Adapters of other kinds than LoRA: DoRA, and LoRA over weights of 4 bits where bitsandbytes is installed."""

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

from synpo.pretrained import load_model
from synpo.train import SynPOTrainer, lora_recipe
from tests.train import tiny

OPTIONS: dict[str, Any] = {"max_steps": 3, "optim": "sgd", "learning_rate": 0.1, "per_device_train_batch_size": 2}


def steps(trainer: SynPOTrainer) -> torch.Tensor:
    """(loss, gradient norm) of every step."""
    trainer.train()
    lines = [line for line in trainer.state.log_history if "loss" in line]
    return torch.tensor([[line["loss"], line["grad_norm"]] for line in lines])


@pytest.mark.parametrize("objective", ["synpo", "dpo"])
def test_dora_trains_alike_in_every_form(tmp_path: Path, objective: str) -> None:
    dora = lora_recipe(r=4, alpha=8, dropout=0.0, dora=True)
    options = OPTIONS | {"peft_config": dora, "objective": objective}
    shared = tiny.trainer(tmp_path / "shared", 8, **options)
    names = [name for name, p in shared.model.named_parameters() if p.requires_grad]
    assert any("lora_magnitude_vector" in name for name in names)
    found = steps(shared)
    torch.testing.assert_close(
        found, steps(tiny.trainer(tmp_path / "plain", 8, prefix_sharing=False, **options)), atol=1e-5, rtol=1e-5
    )
    torch.testing.assert_close(
        found, steps(tiny.trainer(tmp_path / "eager", 8, fused=False, **options)), atol=1e-5, rtol=1e-5
    )
    assert (tmp_path / "shared").exists()


def saved(folder: Path) -> str:
    tiny.model(hidden_size=64, intermediate_size=64).save_pretrained(folder)
    return str(folder)


@pytest.mark.skipif(find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed")
@pytest.mark.filterwarnings("ignore")
def test_four_bits_train_under_an_adapter(tmp_path: Path) -> None:
    model = load_model(saved(tmp_path / "model"), load_in_4bit=True)
    kinds = {type(module).__name__ for module in model.modules()}
    assert "Linear4bit" in kinds
    assert type(model.lm_head) is torch.nn.Linear
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    found = steps(tiny.trainer(tmp_path / "run", 8, model=model, **OPTIONS | {"objective": "dpo"}))
    assert found[0, 0] == pytest.approx(0.6931, abs=1e-3)
    assert (found[:, 1] > 0).all()
    assert found[-1, 0] != found[0, 0]  # the adapter moved
    for name, parameter in model.named_parameters():
        if "lora" not in name:
            assert torch.equal(parameter, before[name.replace("base_layer.", "")]), name


def test_four_bits_say_what_they_need(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("synpo.pretrained.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"load_in_4bit needs bitsandbytes: pip install 'synpo\[qlora\]'"):
        load_model(saved(tmp_path), load_in_4bit=True)
