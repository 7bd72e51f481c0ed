"""SynPOTrainer: what it refuses, what it evaluates, and what it leaves in output_dir."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import EvalPrediction, Trainer, TrainerCallback, TrainingArguments

import synpo
from synpo.train import load_model, lora_recipe
from synpo.train.diagnostics import PAIR_COLUMNS
from synpo.train.model import LORA_TARGETS
from tests.train import tiny


def test_public_names() -> None:
    assert issubclass(synpo.SynPOTrainer, Trainer)
    assert issubclass(synpo.SynPOConfig, TrainingArguments)
    with pytest.raises(AttributeError, match="no attribute 'SynPO'"):
        _ = synpo.SynPO


def test_the_recipe_is_the_release_s() -> None:
    recipe = lora_recipe()
    assert (recipe.r, recipe.lora_alpha, recipe.lora_dropout) == (128, 64, 0.05)
    assert recipe.target_modules == set(LORA_TARGETS)


def test_training_prefers_the_chosen_answers(tmp_path: Path) -> None:
    trainer = tiny.trainer(tmp_path, 8, num_train_epochs=15, per_device_train_batch_size=4, learning_rate=2e-2)
    before = trainer.evaluate(tiny.pairs(8))
    trainer.train()
    after = trainer.evaluate(tiny.pairs(8))
    assert after["eval_loss"] < before["eval_loss"] - 0.1
    assert after["eval_rewards/margins"] > before["eval_rewards/margins"] + 0.05
    assert after["eval_rewards/accuracies"] == 1.0


def test_only_the_adapter_moves(tmp_path: Path) -> None:
    trainer = tiny.trainer(tmp_path, 8, max_steps=3)
    base = {name: p.clone() for name, p in trainer.model.named_parameters() if not p.requires_grad}
    trainer.train()
    assert base
    assert all("lora" not in name for name in base)
    assert all(torch.equal(dict(trainer.model.named_parameters())[name], weight) for name, weight in base.items())


@pytest.mark.parametrize(
    "change",
    [{"target_modules": ["q_proj", "lm_head"]}, {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}],
    ids=["adapter", "trainable copy"],
)
def test_an_adapter_on_lm_head_is_refused_by_name(tmp_path: Path, change: dict[str, Any]) -> None:
    adapter = LoraConfig(r=4, task_type="CAUSAL_LM", **change)
    options = {"model": tiny.model(tie_word_embeddings=False), "peft_config": adapter}
    with pytest.raises(
        ValueError, match=r"lm_head is a peft\..*take lm_head out of target_modules and modules_to_save"
    ):
        tiny.trainer(tmp_path, **options)


def test_a_trainable_lm_head_gets_its_gradient(tmp_path: Path) -> None:
    model = tiny.model(tie_word_embeddings=False)
    before = model.lm_head.weight.detach().clone()
    tiny.trainer(tmp_path, model=model, lora=False, max_steps=1).train()
    assert not torch.equal(model.lm_head.weight, before)


def test_wrong_arguments_are_named(tmp_path: Path) -> None:
    adapted = get_peft_model(tiny.model(), lora_recipe(r=4))
    with pytest.raises(ValueError, match="peft_config is given but model already has an adapter"):
        tiny.trainer(tmp_path, model=adapted)
    frozen = tiny.model().requires_grad_(False)
    with pytest.raises(ValueError, match="the model has no trainable parameter"):
        tiny.trainer(tmp_path, model=frozen, lora=False)
    with pytest.raises(TypeError, match="args is a TrainingArguments; a SynPOConfig is needed"):
        synpo.SynPOTrainer(tiny.model(), TrainingArguments(str(tmp_path)), tiny.pairs(2))
    with pytest.raises(ValueError, match="processing_class is missing"):
        synpo.SynPOTrainer(tiny.model(), tiny.arguments(tmp_path), tiny.pairs(2))
    with pytest.raises(ValueError, match="LlamaModel has no output embeddings"):
        tiny.trainer(tmp_path, model=tiny.model().model, lora=False)
    table = Dataset.from_list([{"prompt": "w1", "chosen": "w2", "worse": "w3"}])
    with pytest.raises(
        ValueError, match="train dataset has no column 'rejected'; its columns are prompt, chosen, worse"
    ):
        tiny.trainer(tmp_path, train_dataset=table)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lora": False}, r"model\.embed_tokens\.weight would be trained in float16"),
        ({}, "the model's weights are float16, and no loss scaler is on"),
        ({"bf16": True}, "the model's weights are float16, and no loss scaler is on"),
        ({"fp16": True, "model": None}, "fp16=True, and no loss scaler is on"),
    ],
)
def test_float16_without_a_scaler_is_refused(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny.trainer(tmp_path, 2, **{"model": tiny.model().half()} | options)


def test_strings_train_too(tmp_path: Path) -> None:
    rows = Dataset.from_list([{"prompt": "w1 w2", "chosen": f"w{i}", "rejected": "w9 w8"} for i in range(10, 14)])
    trainer = tiny.trainer(tmp_path, train_dataset=rows, max_steps=2)
    trainer.train()
    assert trainer.state.global_step == 2


def test_a_model_by_path_brings_its_tokenizer(tmp_path: Path) -> None:
    tiny.model().save_pretrained(tmp_path / "model")
    tiny.tokenizer().save_pretrained(tmp_path / "model")
    trainer = synpo.SynPOTrainer(
        str(tmp_path / "model"),
        tiny.arguments(tmp_path / "run", max_steps=1),
        tiny.pairs(2),
        peft_config=lora_recipe(r=4),
    )
    trainer.train()
    trainer.save_model()
    assert trainer.model.get_base_model().dtype == torch.float32
    loaded = PeftModel.from_pretrained(tiny.model(), tmp_path / "run")
    trained = {name: p for name, p in trainer.model.named_parameters() if "lora" in name}
    assert all(torch.equal(dict(loaded.named_parameters())[name], weight) for name, weight in trained.items())


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("./nowhere", "model './nowhere': no such folder"),
        ("a.gguf", "model 'a.gguf': no such file"),
        (".", r"model '\.': the folder needs a config.json or exactly one .gguf file; it has 0"),
    ],
)
def test_models_that_are_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, message: str) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match=message):
        load_model(name)


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


TWINS = {
    "loss", "rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies", "logps/chosen",
    "logps/rejected", "probs/language", "saturation", "grad_share/chosen", "grad_share/rejected", "grad_share/language",
    "num_tokens", "pairs_per_second",
}  # fmt: skip


class Reported(TrainerCallback):
    """Names of what transformers' integrations (TensorBoard, wandb, ...) are given."""

    def __init__(self) -> None:
        self.names: set[str] = set()

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any], **_: Any) -> None:
        self.names |= set(logs)


def test_metrics_of_training_and_their_twins(tmp_path: Path) -> None:
    trainer = tiny.trainer(tmp_path, 6, eval_dataset=tiny.pairs(5, 1), eval_strategy="epoch", num_train_epochs=2)
    reported = Reported()
    trainer.add_callback(reported)
    trainer.train()
    assert TWINS | {f"eval_{name}" for name in TWINS} <= reported.names
    found = lines(tmp_path)
    train = [line for line in found if "loss" in line]
    held_out = [line for line in found if "eval_loss" in line]
    assert [line["step"] for line in train] == list(range(1, 13))
    assert [line["step"] for line in held_out] == [6, 12]
    assert set(train[0]) >= TWINS
    assert {f"eval_{name}" for name in TWINS} <= set(held_out[0])
    everything = sum(len(p.prompt) * 2 + len(p.chosen) + len(p.rejected) for p in trainer.train_dataset.pairs)
    assert train[-1]["num_tokens"] == 2 * everything


def test_metrics_are_those_of_every_pair(tmp_path: Path) -> None:
    """One evaluation of several pairs at once = the pairs by themselves, from the model's own logits."""
    rows = tiny.pairs(5, 1)
    trainer = tiny.trainer(tmp_path, 2, eval_dataset=rows, per_device_eval_batch_size=3)
    metrics = trainer.evaluate()
    path = trainer.pairs_file("eval", 0)
    assert path == tmp_path / "eval_pairs" / "eval-0.jsonl"
    records = [json.loads(line) for line in path.read_text().splitlines()]
    assert [record["index"] for record in records] == [0, 1, 2, 3, 4]
    expected = []
    for pair in trainer.eval_dataset.pairs:
        values = {}
        for side in ("chosen", "rejected"):
            answer = getattr(pair, side)
            ids = torch.cat((pair.prompt, answer))
            with torch.no_grad():
                logits = trainer.model(input_ids=ids[None]).logits[0, len(pair.prompt) - 1 : -1]
            logps = logits.log_softmax(-1).gather(-1, answer[:, None])[:, 0]
            values[f"logps/{side}"] = float(logps.mean())
            values[f"rewards/{side}"] = float(logps.mean().exp())
            if side == "chosen":
                values["probs/language"] = float(logps.exp().mean())
        values["rewards/margins"] = values["rewards/chosen"] - values["rewards/rejected"]
        expected.append(values)
    for record, values in zip(records, expected, strict=True):
        assert record == pytest.approx({"index": record["index"], **values}, abs=1e-5)
    for name in PAIR_COLUMNS:
        assert metrics[f"eval_{name}"] == pytest.approx(np.mean([record[name] for record in records]), abs=1e-6)
    gaps = np.array([record["rewards/margins"] for record in records])
    language = np.array([record["probs/language"] for record in records])
    loss = np.mean(-1 / (1 + np.exp(-30 * gaps)) - 0.2 * language)
    assert metrics["eval_loss"] == pytest.approx(loss, abs=1e-6)


def test_several_held_out_sets_and_own_metrics(tmp_path: Path) -> None:
    def own(prediction: EvalPrediction) -> dict[str, float]:
        assert prediction.predictions.shape[1] == len(PAIR_COLUMNS)
        return {"worst margin": float(prediction.predictions[:, PAIR_COLUMNS.index("rewards/margins")].min())}

    sets = {"near": tiny.pairs(2, 1), "far": tiny.pairs(3, 2)}
    trainer = tiny.trainer(tmp_path, 2, eval_dataset=sets, compute_metrics=own)
    metrics = trainer.evaluate()
    margins = [
        json.loads(line)["rewards/margins"] for line in trainer.pairs_file("eval_far", 0).read_text().splitlines()
    ]
    assert metrics["eval_far_worst margin"] == min(margins)
    assert "eval_near_loss" in metrics


def test_length_grouping_trains_on_every_pair_once(tmp_path: Path) -> None:
    trainer = tiny.trainer(tmp_path, 9, train_sampling_strategy="group_by_length", per_device_train_batch_size=2)
    seen = [index for batch in trainer.get_train_dataloader() for p in batch["passes"] for index in p["indices"]]
    assert sorted(seen) == list(range(9))


def test_a_given_collator_is_used(tmp_path: Path) -> None:
    collator = synpo.train.collate.PairCollator(pad_token_id=5, tokens_per_pass=1)
    arguments = tiny.arguments(tmp_path, max_steps=1)
    trainer = synpo.SynPOTrainer(
        tiny.model(), arguments, tiny.pairs(2), processing_class=tiny.tokenizer(), data_collator=collator
    )
    assert trainer.data_collator is collator
    assert collator.tokens_per_pass == 1
