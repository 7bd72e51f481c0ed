"""References of the dpo family: three sources of the same numbers, a cache that is right or absent, refusals."""

import copy
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from peft import get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer

from synpo.train import SynPOTrainer, lora_recipe, references
from synpo.train.passes import PairScorer
from synpo.train.reference_table import Identity, read_tables, write_table
from tests.train import tiny

OPTIONS: dict[str, Any] = {"objective": "dpo", "max_steps": 6, "optim": "sgd", "learning_rate": 0.3}


def losses(trainer: SynPOTrainer) -> list[float]:
    trainer.train()
    return [line["loss"] for line in trainer.state.log_history if "loss" in line]


@pytest.mark.parametrize("objective", ["dpo", "kto"])
def test_three_sources_agree(tmp_path: Path, objective: str) -> None:
    options = OPTIONS | {"objective": objective}
    adapter_off = losses(tiny.trainer(tmp_path / "off", **options))
    separate = losses(tiny.trainer(tmp_path / "model", ref_model=tiny.model(), **options))
    precomputed = losses(tiny.trainer(tmp_path / "file", precompute_ref_logps=True, **options))
    # One model, one dtype; only the shape of the batch differs between a pass and the precomputation.
    assert adapter_off == pytest.approx(separate, abs=1e-6)
    assert adapter_off == pytest.approx(precomputed, abs=1e-6)
    assert len(set(adapter_off)) == 6


def test_the_reference_is_the_base_model_without_dropout(tmp_path: Path) -> None:
    """A DPO step at an adapter that changes nothing yet starts at log 2, whatever the dropout."""
    trainer = tiny.trainer(tmp_path, dropout=0.5, **OPTIONS | {"max_steps": 1})
    trainer.model.train()
    state = torch.random.get_rng_state()
    batch = trainer.data_collator(trainer.train_dataset.pairs[:2])["passes"][0]
    sums = trainer.references.sums(trainer.scorer, trainer.model, batch)
    assert torch.equal(state, torch.random.get_rng_state())
    base = tiny.model().eval()
    expected = PairScorer(trainer.args, base).sums(base, batch)
    torch.testing.assert_close(sums, expected, atol=1e-5, rtol=1e-6)
    assert trainer.model.training
    layers = [module for module in trainer.model.modules() if isinstance(module, BaseTunerLayer)]
    assert layers
    assert not any(layer.disable_adapters for layer in layers)
    assert losses(trainer)[0] == pytest.approx(0.6931, abs=1e-3)


def test_cached_values_are_used_and_keyed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = OPTIONS | {"precompute_ref_logps": True, "ref_cache_dir": str(tmp_path / "cache"), "max_steps": 1}
    held_out = tiny.pairs(3, 1)
    calls: list[int] = []
    sums = PairScorer.sums

    def counting(self: PairScorer, model: Any, batch: dict[str, Any]) -> Any:
        calls.append(len(batch["indices"]))
        return sums(self, model, batch)

    monkeypatch.setattr(PairScorer, "sums", counting)
    first = tiny.trainer(tmp_path / "a", 8, eval_dataset=held_out, **options)
    before = first.evaluate()
    assert sum(calls) == 11  # 8 + 3 pairs, once
    (file,) = (tmp_path / "cache").iterdir()
    assert file.suffix == ".parquet"
    rows = pq.read_table(file).to_pylist()
    assert len({row["pair"] for row in rows}) == len(rows) == 11
    assert len({(row["model"], row["template"]) for row in rows}) == 1

    calls.clear()
    again = tiny.trainer(tmp_path / "b", 8, eval_dataset=held_out, **options)
    assert again.evaluate()["eval_loss"] == before["eval_loss"]
    assert calls == []  # all from the file

    more = tiny.trainer(tmp_path / "c", 8, train_dataset=tiny.pairs(8) + tiny.pairs(2, 5), **options)
    more.train()
    assert sum(calls) == 2  # the new pairs alone
    calls.clear()
    other = tiny.trainer(tmp_path / "d", 8, model=tiny.model(seed=1), **options)
    other.train()
    assert sum(calls) == 8  # another model, another file
    assert len(list((tmp_path / "cache").iterdir())) == 2
    calls.clear()
    tiny.trainer(tmp_path / "e", 8, peft_config=lora_recipe(r=2, targets=("q_proj",)), **options).train()
    tiny.trainer(tmp_path / "f", 8, lora=False, **options).train()
    assert calls == []  # the adapter does not matter to the reference, nor whether there is one
    told = tiny.tokenizer(tiny.TEMPLATE + "{# the same words #}")
    tiny.trainer(tmp_path / "g", 8, processing_class=told, **options).train()
    assert sum(calls) == 8  # another template, though it writes the same


def test_an_interrupted_precomputation_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = OPTIONS | {"precompute_ref_logps": True, "max_steps": 1}
    monkeypatch.setattr(references, "CHUNK", 3)
    calls: list[int] = []
    sums = PairScorer.sums

    def dies_once(self: PairScorer, model: Any, batch: dict[str, Any]) -> Any:
        calls.append(1)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return sums(self, model, batch)

    monkeypatch.setattr(PairScorer, "sums", dies_once)
    with pytest.raises(KeyboardInterrupt):
        tiny.trainer(tmp_path, 8, **options).train()
    calls[:] = [0] * 5
    tiny.trainer(tmp_path, 8, **options).train()
    assert len(calls) - 5 == 8 - 3


def test_tables_can_lie_side_by_side(tmp_path: Path) -> None:
    """Rows of another model or template are passed over; tables of one reference add up."""
    mine, other = Identity("a" * 32, "b" * 32), Identity("c" * 32, "b" * 32)
    write_table(tmp_path, mine, {"1": (-1.0, -2.0)}).rename(tmp_path / "from elsewhere.parquet")
    write_table(tmp_path, mine, {"2": (-3.0, -4.0)})
    write_table(tmp_path, other, {"1": (-9.0, -9.0)})
    assert {pair: tuple(sums) for pair, sums in read_tables(tmp_path, mine).items()} == {
        "1": (-1.0, -2.0),
        "2": (-3.0, -4.0),
    }
    assert read_tables(tmp_path, Identity(mine.model, "d" * 32)) == {}


def test_a_file_that_is_none_is_refused(tmp_path: Path) -> None:
    options = OPTIONS | {"precompute_ref_logps": True, "ref_cache_dir": str(tmp_path / "cache"), "max_steps": 1}
    tiny.trainer(tmp_path / "a", **options).train()
    (file,) = (tmp_path / "cache").iterdir()
    file.write_bytes(b"no table")
    with pytest.raises(ValueError, match=r"is not a table of reference log-probs .*delete it"):
        tiny.trainer(tmp_path / "b", **options).train()


def test_pairs_without_precomputed_references_are_named(tmp_path: Path) -> None:
    trainer = tiny.trainer(tmp_path, precompute_ref_logps=True, **OPTIONS)
    with pytest.raises(ValueError, match=r"rows \[0\] have no precomputed reference log-probs; give their dataset"):
        trainer.evaluate(tiny.pairs(2, 9))


def test_a_full_model_is_its_own_reference_only_at_the_start(tmp_path: Path) -> None:
    trainer = tiny.trainer(tmp_path, lora=False, precompute_ref_logps=True, **OPTIONS)
    assert losses(trainer)[0] == pytest.approx(0.6931, abs=1e-3)
    assert losses(trainer)[-1] != pytest.approx(0.6931, abs=1e-3)


def test_refusals(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="dpo needs a reference and the whole model is trained: pass ref_model"):
        tiny.trainer(tmp_path, lora=False, **OPTIONS)
    with pytest.raises(ValueError, match="ref_model is given but synpo has no reference"):
        tiny.trainer(tmp_path, ref_model=tiny.model())
    model = tiny.model()
    with pytest.raises(ValueError, match="ref_model is the model that is trained"):
        tiny.trainer(tmp_path, model=model, ref_model=model, lora=False, **OPTIONS)


def test_the_adapter_of_a_given_peft_model_is_off_for_the_reference(tmp_path: Path) -> None:
    model = get_peft_model(tiny.model(), lora_recipe(r=4, alpha=8, dropout=0.0))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    trained = tiny.trainer(tmp_path, model=copy.deepcopy(model), peft_config=None, **OPTIONS | {"max_steps": 1})
    assert abs(losses(trained)[0] - 0.6931) > 1e-3  # the adapter already changes the model, its reference is the base
