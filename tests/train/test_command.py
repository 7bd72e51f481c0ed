"""`synpo train` and `synpo env` in process: a run from YAML and flags, going on where it stopped, one clear line on
bad input.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from synpo import cli, environment
from synpo.options import read_config
from synpo.train import command
from tests.train import tiny


@pytest.fixture
def run(tmp_path: Path) -> dict[str, Any]:
    """Options of a small run, its model and its pairs on disk."""
    model = tmp_path / "model"
    tiny.model().save_pretrained(model)
    tiny.tokenizer().save_pretrained(model)
    data = tmp_path / "pairs.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in tiny.pairs(20)))
    return {
        "model": str(model),
        "data": str(data),
        "output_dir": str(tmp_path / "run"),
        "eval_fraction": 0.2,
        "lora_r": 4,
        "lora_alpha": 8,
        "learning_rate": 0.01,
        "gradient_accumulation_steps": 4,
        "num_train_epochs": 2,
        "save_steps": 2,
        "disable_tqdm": True,
        "use_cpu": True,
    }


def config(tmp_path: Path, options: dict[str, Any]) -> str:
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(options))
    return str(path)


def test_a_run_leaves_adapter_metrics_and_options(
    tmp_path: Path, run: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["train", "--config", config(tmp_path, run), "--learning_rate", "2e-2", "--lora-dropout=0"]) == 0
    folder = Path(run["output_dir"])
    out = capsys.readouterr().out
    assert "held-out pairs: 4" in out
    margins = next(line for line in out.splitlines() if line.startswith("rewards/margins"))
    assert margins.count("[") == 1
    kept = yaml.safe_load((folder / "config.yaml").read_text())
    assert kept["learning_rate"] == 0.02  # the flag wins
    assert kept["lora_dropout"] == 0.0
    assert kept["save_steps"] == 2
    assert (folder / "adapter_model.safetensors").exists()
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "eval_loss" in line] == [0, 8]
    assert max(line["learning_rate"] for line in lines if "loss" in line) == pytest.approx(0.02)


def test_the_same_command_goes_on_and_another_is_refused(
    tmp_path: Path, run: dict[str, Any], capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    path = config(tmp_path, run)
    assert cli.main(["train", "--config", path]) == 0
    first = capsys.readouterr().out
    folder = Path(run["output_dir"])
    adapter = (folder / "adapter_model.safetensors").read_bytes()
    metrics = (folder / "metrics.jsonl").read_text()
    # As if the run had been killed after its checkpoint of step 4.
    for step in (6, 8):
        for file in sorted((folder / f"checkpoint-{step}").glob("*")):
            file.unlink()
        (folder / f"checkpoint-{step}").rmdir()
    (folder / "eval_pairs" / "eval-8.jsonl").unlink()
    assert cli.main(["train", "--config", path]) == 0
    table = [line for line in first.splitlines() if "[" in line]
    assert [line for line in capsys.readouterr().out.splitlines() if "[" in line] == table
    assert (folder / "adapter_model.safetensors").read_bytes() == adapter

    def values(text: str) -> list[tuple[int, float]]:
        found = [json.loads(line) for line in text.splitlines()]
        return [(line["step"], line.get("loss", line.get("eval_loss"))) for line in found if "epoch" in line]

    assert values((folder / "metrics.jsonl").read_text()) == values(metrics)

    assert cli.main(["train", "--config", path, "--learning_rate", "0.5"]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert "holds a run with other options (learning_rate: 0.01 then, 0.5 now); choose another output_dir" in error


def test_without_held_out_pairs(tmp_path: Path, run: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    options = run | {"eval_fraction": 0, "max_steps": 1, "max_train_pairs": 3, "full": True, "save_strategy": "no"}
    assert cli.main(["train", "--config", config(tmp_path, options)]) == 0
    assert "held-out" not in capsys.readouterr().out
    assert (Path(run["output_dir"]) / "model.safetensors").exists()


def test_separate_held_out_pairs(tmp_path: Path, run: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    held_out = tmp_path / "held_out.jsonl"
    held_out.write_text("".join(json.dumps(row) + "\n" for row in tiny.pairs(5, 7)))
    options = run | {"eval_data": str(held_out), "max_eval_pairs": 3, "max_steps": 1, "dtype": "float32"}
    assert cli.main(["train", "--config", config(tmp_path, options)]) == 0
    assert "held-out pairs: 3" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lerning_rate": 1}, "there is no option 'lerning_rate'; did you mean 'learning_rate'?"),
        ({"zzzzzz": 1}, "there is no option 'zzzzzz'"),
        ({"learning_rate": "fast"}, "argument --learning_rate/--learning-rate: invalid float value: 'fast'"),
        ({"model": None}, "model is missing; give --model or set it in the config file"),
        ({"data": None}, "data is missing; give --data or set it in the config file"),
        ({"data": "/nowhere.jsonl"}, "/nowhere.jsonl"),
        ({"model": "./nowhere"}, "model './nowhere': no such folder"),
        ({"eval_fraction": 1.5}, "eval_fraction is 1.5"),
        ({"dtype": "int8"}, "dtype is 'int8'; allowed: auto, float32, bfloat16, float16"),
        ({"lora_r": 0}, "lora_r is 0; it has to be at least 1"),
        ({"objective": "ppo"}, "objective 'ppo' is unknown"),
        ({"resume_from_checkpoint": "/nowhere"}, "resume_from_checkpoint '/nowhere' is not a complete checkpoint"),
    ],
)
def test_bad_options_are_one_clear_line(
    tmp_path: Path, run: dict[str, Any], capsys: pytest.CaptureFixture[str], change: dict[str, Any], message: str
) -> None:
    options = {name: value for name, value in (run | change).items() if value is not None}
    assert cli.main(["train", "--config", config(tmp_path, options)]) == 2
    error = capsys.readouterr().err
    last = error.strip().splitlines()[-1]
    assert last.startswith("synpo train: ")
    assert message in last
    assert "Traceback" not in error


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["train", "--lerning_rate", "1"], "there is no option '--lerning_rate'; did you mean '--learning_rate'?"),
        (["train", "--config", "/nowhere.yaml"], "config '/nowhere.yaml': No such file"),
        (["trian"], "invalid choice: 'trian'"),
        ([], "the following arguments are required: COMMAND"),
    ],
)
def test_bad_usage(capsys: pytest.CaptureFixture[str], words: list[str], message: str) -> None:
    assert cli.main(words) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "message"),
    [("a: [1", "is not YAML"), ("- 1\n", "holds a list; lines of `name: value` are needed"), ("", "holds a NoneType")],
)
def test_bad_config_files(tmp_path: Path, capsys: pytest.CaptureFixture[str], content: str, message: str) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(content)
    assert cli.main(["train", "--config", str(path)]) == 2
    assert message in capsys.readouterr().err


def test_yaml_numbers_lists_and_dicts_are_read_as_flags_are(tmp_path: Path) -> None:
    # YAML 1.1 takes 5e-6 for a string, and a flag would not.
    text = "learning_rate: 5e-6\nlora_targets: [q_proj, v_proj]\naccelerator_config: {split_batches: false}\nbf16: no\n"
    path = tmp_path / "a.yaml"
    path.write_text(text)
    found = read_config(path, *command.OPTIONS)
    assert found["learning_rate"] == 5e-6
    assert found["lora_targets"] == ["q_proj", "v_proj"]
    assert found["bf16"] is False
    assert json.loads(found["accelerator_config"]) == {"split_batches": False}


def test_failures_and_interrupts_have_their_exit_codes(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(error: BaseException) -> int:
        def main(_: Any) -> int:
            raise error

        monkeypatch.setattr(environment, "main", main)
        return cli.main(["env"])

    assert fail(FloatingPointError("3 optimizer steps\nwere lost")) == 1
    assert capsys.readouterr().err == "synpo env: 3 optimizer steps were lost\n"
    assert fail(KeyboardInterrupt()) == 130


def test_debug_shows_where(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    def main(_: Any) -> int:
        raise RuntimeError("lost")

    monkeypatch.setattr(environment, "main", main)
    assert cli.main(["env", "--debug"]) == 1
    assert "Traceback" in caplog.text


def test_help_lists_own_options_first(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["train", "--help"]) == 0
    out = capsys.readouterr().out
    assert out.index("--objective") < out.index("options of TrainingArguments") < out.index("--weight_decay")


def test_env_names_versions_and_kernels(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["env"]) == 0
    out = capsys.readouterr().out
    for name in ("torch", "transformers", "cpu kernels", "processor", "gpu"):
        assert any(line.startswith(name) for line in out.splitlines())
