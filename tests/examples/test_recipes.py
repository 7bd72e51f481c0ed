"""The recipes for LLaMA-Factory and ms-swift give the same losses, gradients and metrics through their interfaces.

Their pins do not allow them beside this project's transformers, so their interfaces stand here (interfaces.py).
Tolerance: an answer of 12 log-probs, each off by eps32 sqrt(97 + 32) times logits below 16; see
tests/integrations/test_trl.py.
"""

import importlib.util
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from synpo.integrations import pair_batch
from synpo_kernels import FusedSynPOLoss
from tests.examples import interfaces
from tests.train import tiny

EXAMPLES = Path(__file__).parents[2] / "examples"
LOGPS = torch.finfo(torch.float32).eps * (97 + 32) ** 0.5 * 16 * 12


def recipe(name: str) -> Any:
    spec = importlib.util.spec_from_file_location(f"recipe_{name}", EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def batch() -> dict[str, torch.Tensor]:
    return pair_batch(tiny.tokenizer(), tiny.pairs(3))


def step(made: Any, batch: dict[str, torch.Tensor]) -> tuple[float, dict[str, torch.Tensor], dict[str, float]]:
    loss, metrics = made.get_batch_loss_metrics(made.model, dict(batch))
    loss.backward()
    return loss.item(), {n: p.grad for n, p in made.model.named_parameters() if p.grad is not None}, metrics


def same(
    base: type, swapped: type, batch: dict[str, torch.Tensor], reference: bool, slope: float, **options: Any
) -> None:
    runs = []
    for kind in (base, swapped):
        refs = {"ref_model": tiny.model(1)} if reference else {}
        runs.append(step(kind(tiny.model(), **refs, **options), batch))
    (loss, gradients, metrics), (our_loss, our_gradients, our_metrics) = runs
    assert our_loss == pytest.approx(loss, abs=slope * LOGPS)
    assert our_gradients.keys() == gradients.keys()
    for name, expected in gradients.items():
        assert float(expected.abs().max()) > 0
        allowed = (slope * LOGPS + 1.2e-7 * (97 * 16) ** 0.5) * float(expected.abs().max())
        assert float((our_gradients[name] - expected).abs().max()) <= allowed, name
    assert our_metrics == pytest.approx(metrics, abs=LOGPS)


@pytest.mark.parametrize("loss_type", ["sigmoid", "simpo"])
def test_llama_factory(loss_type: str, batch: dict[str, torch.Tensor]) -> None:
    base = interfaces.LlamaFactory
    options = {"loss_type": loss_type} | ({"ref_model": None} if loss_type == "simpo" else {})
    same(base, recipe("llama_factory").swap(base), batch, loss_type == "sigmoid", 0.6, **options)


def test_ms_swift_dpo(batch: dict[str, torch.Tensor]) -> None:
    same(interfaces.SwiftDPO, recipe("ms_swift").swap_dpo(interfaces.SwiftDPO), batch, True, 0.6)


def test_ms_swift_simpo(batch: dict[str, torch.Tensor]) -> None:
    same(interfaces.SwiftCPO, recipe("ms_swift").swap_cpo(interfaces.SwiftCPO), batch, False, 2.0)


@pytest.mark.parametrize("which", ["llama_factory", "ms_swift"])
def test_synpo_through_them(which: str, batch: dict[str, torch.Tensor]) -> None:
    synpo = FusedSynPOLoss(alpha=20.0, beta=0.3)
    if which == "llama_factory":
        made = recipe(which).swap(interfaces.LlamaFactory, synpo)(tiny.model(), None, "simpo")
    else:
        made = recipe(which).swap_cpo(interfaces.SwiftCPO, synpo)(tiny.model())
    loss, gradients, metrics = step(made, batch)
    model = tiny.model()
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    hidden = model.model(**inputs).last_hidden_state
    expected = synpo(hidden[:, :-1], model.lm_head.weight, batch["labels"][:, 1:])
    expected.loss.backward()
    assert loss == pytest.approx(expected.loss.item(), abs=1e-6)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(gradients[name], parameter.grad, rtol=1e-4, atol=1e-6, msg=name)
    assert metrics["probs/language"] == pytest.approx(expected.language.mean().item(), abs=1e-6)


def test_what_they_cannot_do_is_named() -> None:
    llama, swift = recipe("llama_factory"), recipe("ms_swift")
    with pytest.raises(ValueError, match=r"ld_alpha is 0\.5: not supported by this swap"):
        llama.swap(interfaces.LlamaFactory)(tiny.model(), None, "simpo", ld_alpha=0.5)
    with pytest.raises(ValueError, match="SynPO has no reference model: set pref_loss: simpo"):
        llama.swap(interfaces.LlamaFactory, FusedSynPOLoss())(tiny.model(), None, "sigmoid")
    with pytest.raises(ValueError, match=r"cpo_alpha is 1\.0, whose NLL takes logits; set --cpo_alpha 0"):
        swift.swap_cpo(interfaces.SwiftCPO)(tiny.model(), cpo_alpha=1.0)
    capped = tiny.model()
    capped.config.final_logit_softcapping = 30.0
    with pytest.raises(ValueError, match=r"the model has final_logit_softcapping=30\.0"):
        swift.swap_dpo(interfaces.SwiftDPO)(capped, None)


@pytest.mark.parametrize("name", ["llama_factory", "ms_swift"])
def test_they_need_the_kernels_alone(name: str) -> None:
    """LLaMA-Factory and ms-swift bring a transformers of their own; a recipe must not import this project's users."""
    check = (
        "import sys; sys.modules |= dict.fromkeys(['transformers', 'peft', 'trl'])\n"
        f"import importlib.util as u; s = u.spec_from_file_location('r', {str(EXAMPLES / (name + '.py'))!r})\n"
        "m = u.module_from_spec(s); s.loader.exec_module(m); assert 'synpo' not in sys.modules"
    )
    subprocess.run([sys.executable, "-W", "error", "-c", check], check=True, timeout=120)
