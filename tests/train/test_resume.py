"""Training that stops and goes on is the training that never stopped, bit for bit on a CPU, dropout included."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from synpo.run_files import append_json_line, read_json_lines, rewind_json_lines
from synpo.train import SynPOTrainer
from synpo.train.checkpoints import SAVING, is_complete, newest_checkpoint
from synpo.train.collate import PLAIN
from synpo.train.passes import PairScorer
from tests.train import tiny

# 10 pairs, 2 micro-batches of 1 a step: 5 steps an epoch, so step 3 is mid-epoch and step 7 is in the second one.
OPTIONS: dict[str, Any] = {"gradient_accumulation_steps": 2, "max_steps": 8, "save_strategy": "steps", "dropout": 0.2}


def build(folder: Path, **changes: Any) -> SynPOTrainer:
    return tiny.trainer(folder, 10, eval_dataset=tiny.pairs(2, 1), **OPTIONS | changes)


def weights(trainer: SynPOTrainer) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad}


def losses(folder: Path) -> list[tuple[int, float, float]]:
    """(step, loss, gradient norm) of the metrics file."""
    lines = read_json_lines(folder / "metrics.jsonl")
    return [(line["step"], line["loss"], line["grad_norm"]) for line in lines if "loss" in line]


def assert_same_run(a: SynPOTrainer, b: SynPOTrainer) -> None:
    expected = weights(a)
    for name, weight in weights(b).items():
        assert torch.equal(weight, expected[name]), name
    assert losses(Path(b.args.output_dir)) == losses(Path(a.args.output_dir))
    assert b.counts == a.counts
    assert a.counts["num_tokens"] > 0


@pytest.mark.parametrize("stop", [3, 5, 7])
@pytest.mark.parametrize("sampling", ["random", "group_by_length"])
def test_resumed_is_uninterrupted(tmp_path: Path, stop: int, sampling: str) -> None:
    options = {"train_sampling_strategy": sampling, "save_steps": stop, "eval_strategy": "steps", "eval_steps": 2}
    whole = build(tmp_path / "whole", **options)
    whole.train()

    shutil.copytree(tmp_path / "whole" / f"checkpoint-{stop}", tmp_path / "resumed" / f"checkpoint-{stop}")
    shutil.copy(tmp_path / "whole" / "metrics.jsonl", tmp_path / "resumed")
    resumed = build(tmp_path / "resumed", **options)
    torch.rand(5)  # the state of the random numbers comes from the checkpoint, not from the process
    resumed.train(resume_from_checkpoint=True)
    assert_same_run(whole, resumed)


def test_a_run_that_fell_back_to_plain_rows_stays_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The pass that a resumed run begins with might not show what the first one did."""
    options = {"save_steps": 3, "prefix_sharing": True}
    with monkeypatch.context() as patch:
        patch.setattr(PairScorer, "_layout_fails", lambda *_: "its rows differ")
        whole = build(tmp_path / "whole", **options)
        whole.train()
    shutil.copytree(tmp_path / "whole" / "checkpoint-3", tmp_path / "resumed" / "checkpoint-3")
    shutil.copy(tmp_path / "whole" / "metrics.jsonl", tmp_path / "resumed")
    resumed = build(tmp_path / "resumed", **options)
    resumed.train(resume_from_checkpoint=True)
    assert_same_run(whole, resumed)
    assert resumed.counts["form_fallbacks"] == 1
    assert resumed.scorer.form == resumed.data_collator.form == PLAIN


def test_resume_full_fine_tuning(tmp_path: Path) -> None:
    options = {"lora": False, "dropout": 0.0, "save_steps": 4, "objective": "dpo", "precompute_ref_logps": True}
    whole = build(tmp_path / "whole", **options)
    whole.train()
    shutil.copytree(tmp_path / "whole" / "checkpoint-4", tmp_path / "resumed" / "checkpoint-4")
    shutil.copy(tmp_path / "whole" / "metrics.jsonl", tmp_path / "resumed")
    resumed = build(tmp_path / "resumed", **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "resumed" / "checkpoint-4"))
    assert_same_run(whole, resumed)


_RUN = """
import sys
from pathlib import Path
import warnings
warnings.simplefilter("ignore")
from tests.train import test_resume
trainer = test_resume.build(Path(sys.argv[1]), save_steps=1, max_steps=int(sys.argv[2]))
trainer.train(resume_from_checkpoint=len(sys.argv) > 3)
"""


def test_kill_at_any_moment_resumes(tmp_path: Path) -> None:
    """SIGKILL while steps and saves alternate, again and again; in the end the run is the uninterrupted one."""
    steps = 30
    whole = build(tmp_path / "whole", save_strategy="no", max_steps=steps)
    whole.train()

    folder = tmp_path / "killed"
    kills = 0
    environment = os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    for pause in (0.05, 0.11):
        before = newest_checkpoint(folder)
        resume = ["resume"] if before is not None else []
        process = subprocess.Popen([sys.executable, "-c", _RUN, str(folder), str(steps), *resume], env=environment)
        deadline = time.monotonic() + 120
        while newest_checkpoint(folder) == before and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.002)
        time.sleep(pause)
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
            kills += 1
        process.wait()
        assert newest_checkpoint(folder) is not None
    assert kills >= 1
    resumed = build(folder, save_steps=1, max_steps=steps)
    resumed.train(resume_from_checkpoint=True)
    assert_same_run(whole, resumed)


def test_a_save_that_dies_leaves_no_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = build(tmp_path, save_steps=2)
    saved = trainer._save_optimizer_and_scheduler

    def dies(folder: str) -> None:
        if trainer.state.global_step == 4:
            raise OSError("disk full")
        saved(folder)

    monkeypatch.setattr(trainer, "_save_optimizer_and_scheduler", dies)
    with pytest.raises(OSError, match="disk full"):
        trainer.train()
    assert (tmp_path / SAVING / "checkpoint-4").exists()
    assert newest_checkpoint(tmp_path) == tmp_path / "checkpoint-2"

    resumed = build(tmp_path, save_steps=2)
    resumed.train(resume_from_checkpoint=True)
    assert newest_checkpoint(tmp_path) == tmp_path / "checkpoint-8"
    assert not (tmp_path / SAVING).exists()


def test_incomplete_checkpoints_are_passed_over(tmp_path: Path) -> None:
    trainer = build(tmp_path, save_steps=2)
    trainer.train()
    shutil.copytree(tmp_path / "checkpoint-2", tmp_path / "checkpoint-9")  # a state that is not of the step it names
    shutil.copytree(tmp_path / "checkpoint-8", tmp_path / "checkpoint-10")
    (tmp_path / "checkpoint-8" / "trainer_state.json").write_text('{"global_step": 8')
    (tmp_path / "checkpoint-10" / "trainer_state.json").unlink()
    (tmp_path / "checkpoint-6" / "synpo_state.json").unlink()
    (tmp_path / "checkpoint-latest").mkdir()
    assert newest_checkpoint(tmp_path) == tmp_path / "checkpoint-4"
    assert not is_complete(tmp_path / "checkpoint-latest")
    with pytest.raises(ValueError, match=r"checkpoint-10' is not a complete checkpoint folder"):
        build(tmp_path).train(resume_from_checkpoint=str(tmp_path / "checkpoint-10"))


def test_nothing_to_resume_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="has no complete checkpoint to resume from"):
        build(tmp_path).train(resume_from_checkpoint=True)


def test_checkpoints_hold_no_pickled_options_and_rotate(tmp_path: Path) -> None:
    build(tmp_path, save_steps=2, save_total_limit=2).train()
    assert sorted(p.name for p in tmp_path.glob("checkpoint-*")) == ["checkpoint-6", "checkpoint-8"]
    assert not list(tmp_path.rglob("training_args.bin"))
    options = json.loads((tmp_path / "checkpoint-8" / "training_args.json").read_text())
    assert options["objective"] == "synpo"


def test_the_best_checkpoint_keeps_its_place(tmp_path: Path) -> None:
    options = {"eval_strategy": "steps", "eval_steps": 2, "metric_for_best_model": "rewards/margins"}
    trainer = build(tmp_path, save_steps=2, load_best_model_at_end=True, save_total_limit=1, **options)
    trainer.train()
    margins = {line["step"]: line["eval_rewards/margins"] for line in trainer.state.log_history if "eval_loss" in line}
    best = max(margins, key=margins.__getitem__)
    assert trainer.state.best_model_checkpoint == str(tmp_path / f"checkpoint-{best}")
    assert (tmp_path / f"checkpoint-{best}").exists()
    state = json.loads((newest_checkpoint(tmp_path) / "trainer_state.json").read_text())
    assert SAVING not in str(state["best_model_checkpoint"])


def test_metrics_rewind_to_the_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    for step in (1, 2, 3):
        append_json_line(path, {"step": step})
    with path.open("a") as file:
        file.write('{"step": 4, "lo')  # the line that a crash cut off
    rewind_json_lines(path, 2)
    assert read_json_lines(path) == [{"step": 1}, {"step": 2}]
    path.write_text('{"step": 1}\n{"st\n{"step": 2}\n')
    with pytest.raises(ValueError, match=r"metrics.jsonl:2: not a line of JSON"):
        read_json_lines(path)
