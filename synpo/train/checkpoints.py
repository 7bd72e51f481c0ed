"""Checkpoints that are whole or absent, and runs that go on from them exactly."""

import json
import os
import shutil
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import Trainer
from transformers.trainer_callback import TrainerState
from transformers.trainer_utils import rotate_checkpoints

from ..run_files import rewind_json_lines, sync

METRICS_FILE = "metrics.jsonl"
STATE_FILE = "synpo_state.json"
TRAINER_STATE = "trainer_state.json"
COUNTS = ("num_tokens", "skipped_media", "truncated_pairs", "form_fallbacks")  # since the run's start, of one process
SAVING = ".saving"  # folder in output_dir where a checkpoint grows before it is renamed into place


def step_of(checkpoint: Path) -> int:
    """The optimizer step of a checkpoint-<step> folder; -1 for any other name."""
    name, _, number = checkpoint.name.partition("-")
    return int(number) if name == "checkpoint" and number.isdigit() else -1


def newest_checkpoint(output_dir: str | os.PathLike[str]) -> Path | None:
    """The complete checkpoint with the most steps in a run's folder, None where there is none."""
    found = sorted((p for p in Path(output_dir).glob("checkpoint-*") if is_complete(p)), key=step_of)
    return found[-1] if found else None


def is_complete(checkpoint: Path) -> bool:
    """Whether a folder holds a finished save: its state, readable, and of the step that the folder's name says."""
    try:
        state = TrainerState.load_from_json(str(checkpoint / TRAINER_STATE))
        json.loads((checkpoint / STATE_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError, TypeError):
        return False
    return state.global_step == step_of(checkpoint)


class ResumableTrainer(Trainer):
    """transformers.Trainer whose checkpoints appear by one rename, and whose counters and metrics file resume with
    them.
    """

    nonfinite_steps = 0
    _saving_to: Path | None = None

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.counts = dict.fromkeys(COUNTS, 0)

    def total_counts(self) -> dict[str, int]:
        """COUNTS over all processes, which all have to ask for them."""
        return {name: sum(values) for name, values in self._counts_of_all().items()}

    def _counts_of_all(self) -> dict[str, list[int]]:
        own = torch.tensor([list(self.counts.values())], device=self.args.device)
        return dict(zip(self.counts, self.accelerator.gather(own).T.tolist(), strict=True))

    def train(self, resume_from_checkpoint: str | bool | None = None, **options: Any) -> Any:
        """Train; True or a folder resumes from the newest complete checkpoint in output_dir, or from that one.

        Errors: ValueError where there is no complete checkpoint to resume from.
        """
        if not resume_from_checkpoint:
            return super().train(**options)
        checkpoint = self._resolve(resume_from_checkpoint)
        self._restore(json.loads((checkpoint / STATE_FILE).read_text(encoding="utf-8")))
        if self.is_world_process_zero():
            rewind_json_lines(Path(self.args.output_dir, METRICS_FILE), step_of(checkpoint))
        return super().train(resume_from_checkpoint=str(checkpoint), **options)

    def _restore(self, state: dict[str, Any]) -> None:
        """Take up what STATE_FILE holds."""
        self.nonfinite_steps = state["nonfinite_steps"]
        for name, values in state["counts"].items():
            # With another number of processes than before, the total stays right.
            spread = values if len(values) == self.args.world_size else [sum(values)] + [0] * self.args.world_size
            self.counts[name] = spread[self.args.process_index]

    def _resolve(self, wanted: str | bool) -> Path:
        if wanted is True:
            found = newest_checkpoint(self.args.output_dir)
            if found is None:
                raise ValueError(f"output_dir {self.args.output_dir!r} has no complete checkpoint to resume from")
            return found
        if not is_complete(Path(wanted)):
            raise ValueError(f"resume_from_checkpoint {wanted!r} is not a complete checkpoint folder")
        return Path(wanted)

    def _get_output_dir(self, trial: Any) -> str:
        return super()._get_output_dir(trial) if self._saving_to is None else str(self._saving_to)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Save into a folder beside the checkpoints, and rename it into place once everything is on disk."""
        run_dir = Path(super()._get_output_dir(trial))
        name = f"checkpoint-{self.state.global_step}"
        saving = run_dir / SAVING
        best = self.state.best_model_checkpoint
        if self.args.should_save:
            shutil.rmtree(saving, ignore_errors=True)  # left by a run that was killed while it saved
        self.accelerator.wait_for_everyone()
        self._saving_to = saving
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self._saving_to = None
        counts = self._counts_of_all()
        if self.state.best_global_step:
            candidate = run_dir / f"checkpoint-{self.state.best_global_step}"
            best = str(candidate) if candidate.name == name or candidate.exists() else best
        self.state.best_model_checkpoint = best
        if self.args.should_save:
            state = {"nonfinite_steps": self.nonfinite_steps, "counts": counts}
            (saving / name / STATE_FILE).write_text(json.dumps(state), encoding="utf-8")
            self.state.save_to_json(str(saving / name / TRAINER_STATE))
            _publish(saving / name, run_dir / name)
            saving.rmdir()
            rotate_checkpoints(
                output_dir=str(run_dir),
                save_total_limit=self.args.save_total_limit,
                best_model_checkpoint=best,
                use_mtime=True,
            )
        self.accelerator.wait_for_everyone()

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        """Save the model and the tokenizer; the options as JSON, not as the pickle that transformers writes."""
        with warnings.catch_warnings():
            # A gguf folder has no config.json for peft to compare vocabularies with.
            warnings.filterwarnings("ignore", message="Could not find a config file in")
            super()._save(output_dir, state_dict)
        folder = Path(self.args.output_dir if output_dir is None else output_dir)
        if self.args.should_save:
            (folder / "training_args.bin").unlink(missing_ok=True)
            (folder / "training_args.json").write_text(self.args.to_json_string(), encoding="utf-8")


def _publish(partial: Path, final: Path) -> None:
    for file in partial.rglob("*"):
        if file.is_file():
            sync(file)
    if final.exists():  # this step was saved before, by the run that is resumed from an earlier checkpoint
        shutil.rmtree(final)
    os.replace(partial, final)
    sync(final.parent)
