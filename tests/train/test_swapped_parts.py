"""Other people's parts inside SynPOTrainer: transformers' attentions and liger-kernel's layers, beside our own loss."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from synpo.train import SynPOConfig
from tests.train import tiny


def losses(folder: Path, attention: str, **options: Any) -> list[float]:
    trainer = tiny.trainer(folder, 4, model=tiny.model(attn_implementation=attention), **options)
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def test_every_attention_gives_the_same_losses(tmp_path: Path) -> None:
    """Four steps that move the weights; float32 sums in another order, far below what one step changes (1e-2)."""
    found = {
        (name, shared): losses(tmp_path / f"{name}{shared}", name, prefix_sharing=shared)
        for name in ("sdpa", "eager")
        for shared in (True, False)
    }
    expected = found.pop(("sdpa", False))
    assert max(expected) - min(expected) > 1e-2
    for name, got in found.items():
        assert got == pytest.approx(expected, abs=1e-4), name


def test_an_attention_is_called_under_its_own_name(tmp_path: Path) -> None:
    """Flash attention reads the configuration's name to know which library to load; rows of several sequences have
    put another name there. This one stands for it, since it needs a GPU.
    """
    seen = set()

    def probe(module: torch.nn.Module, *args: Any, **options: Any) -> Any:
        seen.add(module.config._attn_implementation)
        return ALL_ATTENTION_FUNCTIONS["sdpa"](module, *args, **options)

    AttentionInterface.register("probe", probe)
    AttentionMaskInterface.register("probe", sdpa_mask)
    trainer = tiny.trainer(tmp_path, 2, model=tiny.model(attn_implementation="probe"), prefix_sharing=True)
    trainer.train()
    assert seen == {"probe"}  # the first pass checks rows of several sequences against plain ones
    assert trainer.scorer.form.shared


def test_liger_losses_are_refused_and_its_layers_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="use_liger_kernel=True: liger-kernel's kernels need a GPU"):
        tiny.arguments(tmp_path, use_liger_kernel=True)
    with pytest.raises(ValueError, match="liger_kernel_config has fused_linear_cross_entropy: True, a loss of its own"):
        tiny.arguments(tmp_path, use_liger_kernel=True, liger_kernel_config={"fused_linear_cross_entropy": True})
    arguments = tiny.arguments(tmp_path)
    monkeypatch.setattr(SynPOConfig, "device", torch.device("cuda"))
    arguments.use_liger_kernel, arguments.liger_kernel_config = True, {"rope": False}
    arguments._check_liger()
    assert arguments.liger_kernel_config == {"rope": False, "cross_entropy": False, "fused_linear_cross_entropy": False}


INTERPRETED = """
import sys, tempfile, torch
from pathlib import Path
from transformers.integrations.liger import apply_liger_kernel
from transformers.models.llama import modeling_llama
from synpo.train.config import LIGER_LOSSES
from tests.train import tiny

def losses(liger):
    model = tiny.model()
    with tempfile.TemporaryDirectory() as folder:
        made = tiny.trainer(Path(folder), 2, model=model, max_steps=2)
        if liger:  # what Trainer does at the start of training, with what SynPOConfig makes of its options
            options = {"rms_norm": False, "swiglu": False} | dict.fromkeys(LIGER_LOSSES, False)
            apply_liger_kernel(made.model, options)
            assert modeling_llama.apply_rotary_pos_emb.__module__.startswith("liger_kernel")
        made.train()
        return [entry["loss"] for entry in made.state.log_history if "loss" in entry]

plain, liger = losses(False), losses(True)
print(plain, liger)
assert max(abs(a - b) for a, b in zip(plain, liger)) < 1e-4, (plain, liger)
"""


def test_liger_layers_beside_our_loss() -> None:
    """liger's rotary embedding, which has to follow the positions in rows of several sequences, under Triton's
    interpreter. That does not take its norm and MLP ('float' object has no attribute 'to'), which treat every token
    alike. In a process of its own, since a module of transformers is patched for good.
    """
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONWARNINGS": "ignore"}
    done = subprocess.run(
        [sys.executable, "-c", INTERPRETED], env=environment, cwd=Path(__file__).parents[2], capture_output=True,
        text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
