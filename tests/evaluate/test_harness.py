"""Exports to other harnesses: their files, their commands, and lm-eval itself where it is installed."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

from synpo.cli import main
from synpo.evaluate.harness import LEADERBOARD, export, lm_eval
from synpo.train import lora_recipe
from tests.train import tiny


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama with its chat template."""
    folder = tmp_path_factory.mktemp("model")
    tiny.model().save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def adapter(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter on it, as `synpo train` leaves one."""
    from transformers import AutoModelForCausalLM

    folder = tmp_path_factory.mktemp("adapter")
    tuned = AutoModelForCausalLM.from_pretrained(model)
    tuned.add_adapter(lora_recipe(r=4))
    tuned.save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    return folder


def test_alpaca_eval_gets_its_file_and_goes_on(model: Path, tmp_path: Path) -> None:
    questions = [{"instruction": f"w{i} w2", "dataset": "helpful_base"} for i in range(3)]
    file = tmp_path / "alpaca_eval.json"
    file.write_text(json.dumps(questions))
    (command,) = export("alpaca_eval", str(model), tmp_path / "out", file, max_new_tokens=6)
    outputs = json.loads((tmp_path / "out" / "model_outputs.json").read_text())
    assert [{k: row[k] for k in ("instruction", "dataset")} for row in outputs] == questions
    assert all(row["generator"] == model.name and isinstance(row["output"], str) for row in outputs)
    assert command[:3] == ["alpaca_eval", "--model_outputs", str(tmp_path / "out" / "model_outputs.json")]

    # interrupted after two, the second torn: the same file in the end
    answers = tmp_path / "out" / "answers.jsonl"
    lines = answers.read_text().splitlines(keepends=True)
    answers.write_text(lines[0] + lines[1][:-9])
    export("alpaca_eval", str(model), tmp_path / "out", file, max_new_tokens=6)
    assert json.loads((tmp_path / "out" / "model_outputs.json").read_text()) == outputs
    assert len(answers.read_text().splitlines()) == 3


def test_answers_of_another_model_are_not_gone_on_with(model: Path, adapter: Path, tmp_path: Path) -> None:
    file = tmp_path / "alpaca_eval.json"
    file.write_text(json.dumps([{"instruction": "w1 w2"}]))
    export("alpaca_eval", str(model), tmp_path / "out", file, max_new_tokens=6)
    for other, tokens in ((adapter, 6), (model, 7)):
        with pytest.raises(ValueError, match=r"answers.jsonl has answers of .*; give another --out"):
            export("alpaca_eval", str(other), tmp_path / "out", file, max_new_tokens=tokens)


def test_a_model_in_the_folder_one_is_in_has_a_name(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "alpaca_eval.json"
    file.write_text(json.dumps([{"instruction": "w1 w2"}]))
    monkeypatch.chdir(model)
    export("alpaca_eval", ".", tmp_path / "out", file, max_new_tokens=2)
    (output,) = json.loads((tmp_path / "out" / "model_outputs.json").read_text())
    assert output["generator"] == model.name


def test_mt_bench_answers_each_turn_after_those_before(model: Path, tmp_path: Path) -> None:
    rows = [
        {"question_id": 81, "category": "writing", "turns": ["w1 w2", "w3"]},
        {"question_id": 101, "category": "math", "turns": ["w1 w2", "w4"]},
    ]
    file = tmp_path / "question.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert main([
        "evaluate", "export", "mt_bench", "--model", str(model), "--questions", str(file), "--out",
        str(tmp_path / "out"), "--max_new_tokens", "5",
    ]) == 0  # fmt: skip
    answers = tmp_path / "out" / "data" / "mt_bench" / "model_answer" / f"{model.name}.jsonl"
    found = [json.loads(line) for line in answers.read_text().splitlines()]
    assert [row["question_id"] for row in found] == [81, 101]
    assert all(row["model_id"] == model.name for row in found)
    assert all([len(choice["turns"]) for choice in row["choices"]] == [2] for row in found)
    assert len({row["answer_id"] for row in found}) == 2


def test_lm_eval_gets_an_adapter_on_its_base(model: Path, adapter: Path, tmp_path: Path) -> None:
    commands = lm_eval(str(adapter), tmp_path)
    assert [command[command.index("--tasks") + 1] for command in commands] == list(LEADERBOARD)
    arguments = commands[0][commands[0].index("--model_args") + 1]
    assert arguments == f"pretrained={model},peft={adapter},dtype=auto"
    script = (tmp_path / "lm_eval.sh").read_text()
    assert script.count("\nlm_eval ") == len(LEADERBOARD)
    assert subprocess.run(["sh", "-n", tmp_path / "lm_eval.sh"], check=True).returncode == 0
    (plain,) = lm_eval(str(model), tmp_path, {"hellaswag": 10})
    assert f"pretrained={model},dtype=auto" in plain


@pytest.mark.parametrize(
    ("harness", "content", "message"),
    [
        ("helm", None, "harness is 'helm'; allowed: alpaca_eval, mt_bench, lm_eval"),
        ("alpaca_eval", None, "questions is missing; give --questions"),
        ("mt_bench", [{"question_id": 1, "category": "math"}], "questions.jsonl:1: the question has no turns"),
        ("alpaca_eval", [], "questions.jsonl: a list of questions is needed"),
    ],
)
def test_bad_input_is_named(model: Path, tmp_path: Path, harness: str, content: object, message: str) -> None:
    file = None
    if content is not None:
        file = tmp_path / "questions.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in content))
    with pytest.raises(ValueError, match=message):
        export(harness, str(model), tmp_path / "out", file)


TASK = """\
task: tiny_task
dataset_path: json
dataset_kwargs:
  data_files: {data}
test_split: train
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{answer}}}}"
metric_list:
  - metric: acc
"""


@pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="lm-eval is not installed: synpo[eval]")
def test_lm_eval_runs_a_small_task_on_an_adapter(adapter: Path, tmp_path: Path) -> None:
    tasks = tmp_path / "tasks"
    tasks.mkdir()
    rows = [{"question": f"w{i}", "choices": ["w1", "w2"], "answer": i % 2} for i in range(4)]
    (tasks / "data.json").write_text(json.dumps(rows))
    (tasks / "tiny.yaml").write_text(TASK.format(data=tasks / "data.json"))
    (command,) = lm_eval(str(adapter), tmp_path, {"tiny_task": 0}, dtype="float32", device="cpu", include=tasks)
    environment = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "home"), "PYTHONPATH": ":".join(sys.path)}
    code = "import sys; from lm_eval.__main__ import cli_evaluate; sys.argv[0] = 'lm_eval'; cli_evaluate()"
    done = subprocess.run(
        [sys.executable, "-c", code, *command[1:], "--limit", "4"], env=environment, capture_output=True, text=True,
        timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    (file,) = (tmp_path / "tiny_task").rglob("results_*.json")
    accuracy = json.loads(file.read_text())["results"]["tiny_task"]["acc,none"]
    assert accuracy in (0, 0.25, 0.5, 0.75, 1)
