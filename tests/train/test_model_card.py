"""README.md beside a trained adapter says what it is, and what model hubs read of it is well-formed."""

import json
from pathlib import Path

import pytest
import yaml

from synpo import cli
from synpo.train.model_card import PAPERS, Origin, model_card, write_model_card
from synpo_kernels import objectives
from tests.train import tiny


def front_matter(card: str) -> dict[str, object]:
    _, matter, _ = card.split("---\n", 2)
    return yaml.safe_load(matter)


def test_the_command_leaves_a_card(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, data, out = tmp_path / "model", tmp_path / "pairs.jsonl", tmp_path / "my-adapter"
    tiny.model().save_pretrained(model)
    tiny.tokenizer().save_pretrained(model)
    data.write_text("".join(json.dumps(row) + "\n" for row in tiny.pairs(10)))
    command = [
        "train", "--model", str(model), "--data", str(data), "--output_dir", str(out), "--eval_fraction", "0.2",
        "--lora_r", "4", "--max_steps", "2", "--gradient_accumulation_steps", "2", "--use_cpu",
    ]  # fmt: skip
    assert cli.main(command) == 0
    card = (out / "README.md").read_text()
    table = [line for line in capsys.readouterr().out.splitlines() if line.startswith("rewards/margins")]
    assert table
    assert table[0] in card
    for line in (
        "# my-adapter", f"`{model}`", "| alpha | 30.0 |", "| adapter's rank | 4 |", "| pairs from | `pairs.jsonl` |",
        "| pairs trained on | 8 |", "| pairs held out | 2 |", "| pairs per optimizer step | 2 |",
        "| optimizer steps | 2 |", "| max_steps | 2 |", "arXiv 2506.00835", "| synpo | ", "| transformers | ",
    ):  # fmt: skip
        assert line in card, line
    matter = front_matter(card)
    assert matter["library_name"] == "peft"
    assert matter["pipeline_tag"] == "text-generation"
    assert "base_model" not in matter  # a folder of this machine


def test_a_hub_name_and_a_whole_model(tmp_path: Path) -> None:
    trainer = tiny.trainer(tmp_path / "run", 4, lora=False, objective="simpo", gamma=0.7, max_steps=1)
    trainer.train()
    path = write_model_card(trainer, Origin("someone/a-model", "pairs.jsonl"))
    card = path.read_text()
    assert front_matter(card) == {
        "base_model": "someone/a-model", "library_name": "transformers", "pipeline_tag": "text-generation",
        "tags": ["preference-optimization", "simpo"],
    }  # fmt: skip
    assert "| gamma | 0.7 |" in card
    assert "No pairs were held out." in card
    assert "rank" not in card
    assert model_card(trainer, Origin("someone/a-model", "pairs.jsonl")) == card


def test_every_objective_has_its_paper() -> None:
    assert PAPERS.keys() == objectives.REGISTRY.keys()
