"""`synpo demo` end to end, with a tiny random model in the place of the real one."""

import json
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from synpo import cli, demo, scenes
from synpo.run_files import read_json_lines
from tests.train import tiny

# peft 0.21 asks transformers 5.23 by a name that is about to go.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

FAITHFUL, INVENTED = "a red car drives away from the camera", "some green birds sing over the old harbour wall"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A tiny model on disk whose words are those of the scenes."""
    texts = [pair[column][0]["content"] for pair in scenes.make_pairs() for column in ("prompt", "chosen", "rejected")]
    specials = ["<unk>", "<s>", "</s>", "<|user|>", "<|assistant|>", "<|end|>"]
    words = sorted({word for text in [*texts, FAITHFUL, INVENTED] for word in text.split()})
    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(specials + words)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        additional_special_tokens=specials[3:],
    )
    tokenizer.chat_template = tiny.TEMPLATE
    folder = tmp_path / "model"
    tokenizer.save_pretrained(folder)
    tiny.model(vocab_size=len(specials) + len(words), max_position_embeddings=256).save_pretrained(folder)
    return folder


@pytest.fixture
def easy(tmp_path: Path) -> Path:
    """Pairs whose answers are told apart by their words alone, so that any model learns them."""
    file = tmp_path / "easy.jsonl"
    rows = [
        {
            "prompt": [{"role": "user", "content": prompt["prompt"][0]["content"]}],
            "chosen": [{"role": "assistant", "content": FAITHFUL}],
            "rejected": [{"role": "assistant", "content": INVENTED}],
        }
        for prompt in scenes.make_pairs(60)
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def margins(out: Path, step: int) -> list[float]:
    return [record["rewards/margins"] for record in read_json_lines(out / "eval_pairs" / f"eval-{step}.jsonl")]


def test_a_margin_that_rose_is_success(model, easy, tmp_path, capsys):
    out = tmp_path / "out"
    assert demo.run(model, easy, out, steps=8, seed=0, max_eval_pairs=12) == 0
    text = capsys.readouterr().out
    for part in (
        "logps/chosen",
        "logps/rejected",
        "rewards/margins",
        "95 % interval",
        "before:",
        "after:",
        "faithful caption wins",
        "rose: +",
    ):
        assert part in text
    before, after = margins(out, 0), margins(out, 8)
    assert len(before) == len(after) == 12
    assert sum(after) > sum(before)
    assert {record["step"] for record in read_json_lines(out / "metrics.jsonl")} == set(range(9))
    assert (out / "curves.png").stat().st_size > 10_000
    assert (out / "adapter_model.safetensors").exists()


def test_a_margin_that_did_not_rise_is_failure(model, easy, tmp_path, capsys):
    # the first step of the warm-up has learning rate 0
    assert demo.run(model, easy, tmp_path / "out", steps=1, seed=0, max_eval_pairs=12) == 1
    assert "did NOT rise: +0.0000" in capsys.readouterr().out


def test_the_command_trains_on_the_example_pairs_and_starts_anew(model, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(demo, "smollm2", lambda: model)
    out = tmp_path / "out"
    flags = ["demo", "--steps", "2", "--seed", "3", "--out", str(out)]
    outcome = cli.main(flags), margins(out, 2)
    assert outcome[0] in (0, 1)
    assert (out / "pairs.jsonl").read_bytes() == (Path(__file__).parents[1] / "examples" / "pairs.jsonl").read_bytes()
    (out / "mine.txt").write_text("kept")
    torch.manual_seed(99)  # the command's own seed counts
    assert (cli.main(flags), margins(out, 2)) == outcome
    assert [record["step"] for record in read_json_lines(out / "metrics.jsonl") if "loss" in record] == [1, 2]
    assert (out / "mine.txt").exists()


def test_steps_are_checked(capsys):
    assert cli.main(["demo", "--steps", "0"]) == 2
    assert "--steps is 0" in capsys.readouterr().err
