"""SynPOTrainer: preference training of causal language models on transformers.Trainer."""

import json
import logging
import math
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import DistributedType
from peft import PeftConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from transformers import PreTrainedTokenizerBase, Trainer, TrainerCallback
from transformers.trainer_pt_utils import LengthGroupedSampler
from transformers.trainer_utils import EvalLoopOutput, EvalPrediction, rotate_checkpoints

from . import checkpoints
from .collate import PairCollator, PairDataset, PairTokenizer
from .config import SynPOConfig
from .diagnostics import RunningMeans, pair_metrics
from .model import load_model, load_tokenizer
from .passes import PairScorer
from .references import References

logger = logging.getLogger(__name__)

METRICS_FILE = "metrics.jsonl"
STATE_FILE = "synpo_state.json"
EVALUATED = (
    "index",
    "logps/chosen",
    "logps/rejected",
    "rewards/chosen",
    "rewards/rejected",
    "rewards/margins",
    "probs/language",
)


class SynPOTrainer(Trainer):
    """Trains a causal language model on preference pairs; full-vocabulary logits are never made.

    model: a transformers model, with or without peft adapters, or a name or path to load (a folder or file in gguf format too).
    args: SynPOConfig. train_dataset, eval_dataset: rows with the columns prompt, chosen, rejected (strings, concatenated as they are,
    or conversations, through the chat template) and optionally score_chosen, score_rejected; eval_dataset may be a dict of them.
    processing_class: the tokenizer; default: the model's own. peft_config: an adapter to train instead of the full model.
    ref_model: the reference of dpo, dpop, ipo and kto; default: the model with its adapter switched off. compute_metrics: called
    with EvalPrediction(predictions=array (pairs, 6) with the columns of EVALUATED after "index", label_ids=None).

    A step's loss is the mean over all its pairs, over micro-batches and devices alike (kto: means of micro-batches, which it couples).
    output_dir receives metrics.jsonl (every log line), eval_pairs/<name>-<step>.jsonl (margins of single pairs) and checkpoints that
    appear whole or not at all; training resumes bit for bit from them. Errors: TypeError and ValueError, before any training, naming
    what to change; FloatingPointError when max_nonfinite_steps optimizer steps had to be skipped.
    """

    args: SynPOConfig
    loss_is_scaled_for_ga = True

    def __init__(
        self,
        model: str | nn.Module,
        args: SynPOConfig,
        train_dataset: Any,
        eval_dataset: Any = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        data_collator: PairCollator | None = None,
        peft_config: PeftConfig | None = None,
        ref_model: nn.Module | None = None,
        callbacks: list[TrainerCallback] | None = None,
        compute_metrics: Callable[[EvalPrediction], dict[str, float]] | None = None,
    ) -> None:
        if not isinstance(args, SynPOConfig):
            raise TypeError(f"args is a {type(args).__name__}; a SynPOConfig is needed")
        if args.n_gpu > 1:
            raise ValueError(
                f"{args.n_gpu} GPUs in one process: start one process each, with torchrun or accelerate launch"
            )
        name = model if isinstance(model, str) else base_name(model)
        if processing_class is None:
            if not name:
                raise ValueError(
                    "processing_class is missing and the model does not say where it came from; pass the tokenizer"
                )
            processing_class = load_tokenizer(name)
        if isinstance(model, str):
            model = load_model(model)
        if peft_config is not None:
            if isinstance(model, PeftModel):
                raise ValueError("peft_config is given but model already has an adapter; leave one of them out")
            model = get_peft_model(model, peft_config)
        if not any(parameter.requires_grad for parameter in model.parameters()):
            raise ValueError(
                "the model has no trainable parameter; pass peft_config, or load the adapter with is_trainable=True"
            )

        self.scorer = PairScorer(args, model)
        tokenizer = PairTokenizer(processing_class, args.max_length, args.truncation)
        train_pairs = PairDataset(_rows(train_dataset, "train"), tokenizer, "train", args.min_score_gap)
        eval_pairs = None
        if isinstance(eval_dataset, Mapping):
            eval_pairs = {k: PairDataset(_rows(v, k), tokenizer, k) for k, v in eval_dataset.items()}
        elif eval_dataset is not None:
            eval_pairs = PairDataset(_rows(eval_dataset, "eval"), tokenizer, "eval")
        if data_collator is None:
            pad = processing_class.pad_token_id
            data_collator = PairCollator(processing_class.eos_token_id if pad is None else pad)
        data_collator.tokens_per_pass = self._tokens_per_pass(args)

        super().__init__(
            model=model,
            args=args,
            data_collator=data_collator,
            train_dataset=train_pairs,
            eval_dataset=eval_pairs,
            processing_class=processing_class,
            callbacks=callbacks,
            compute_metrics=compute_metrics,
        )
        self.references = References(args, self.model, ref_model, self.accelerator) if args.needs_reference else None
        if self.references is None and ref_model is not None:
            raise ValueError(f"ref_model is given but {args.objective} has no reference; leave it out")
        self._verified = False
        self._saving_to: Path | None = None
        self._means = RunningMeans()
        self._nonfinite = torch.zeros((), dtype=torch.bool, device=args.device)
        self._window: list[int] = []
        self.nonfinite_steps = 0
        self.num_tokens = 0
        self._last_log = time.perf_counter()

    def _tokens_per_pass(self, args: SynPOConfig) -> int | None:
        if self.scorer.objective.coupled:
            return None
        if args.tokens_per_pass is None and args.device.type == "cpu":
            return 1024
        return args.tokens_per_pass

    # Data

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> Any:
        dataset = self.train_dataset if train_dataset is None else train_dataset
        if self.args.train_sampling_strategy == "group_by_length":
            window = self.args.train_batch_size * self.args.gradient_accumulation_steps
            return LengthGroupedSampler(window, lengths=dataset.lengths())
        return super()._get_train_sampler(dataset)

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], float]:
        """The micro-batches of an optimizer step, and their pairs: in all of them, on this device's share of the average."""
        batches = [batch for _, batch in zip(range(num_batches), epoch_iterator, strict=False)]
        pairs = float(sum(batch["pairs"] for batch in batches))
        if self.accelerator.num_processes > 1:
            pairs = self.accelerator.reduce(torch.tensor(pairs, device=device), "mean").item()
        return batches, pairs

    def floating_point_ops(self, inputs: Mapping[str, Any]) -> float:
        """6 operations per parameter and token, the usual estimate."""
        return 6.0 * sum(batch["tokens"] for batch in inputs["passes"]) * self._parameter_count

    @property
    def _parameter_count(self) -> int:
        if not hasattr(self, "_parameters_counted"):
            self._parameters_counted = sum(parameter.numel() for parameter in self.model.parameters())
        return self._parameters_counted

    # A step

    def _loss(self, model: nn.Module, batch: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        batch = self._prepare_inputs(batch)
        if not self._verified:
            self.scorer.verify(model, batch)
            self._verified = True
        ref_sums = None
        if self.references is not None:
            ref_sums = batch.get("ref_logps")
            if ref_sums is None:
                ref_sums = self.references.sums(self.scorer, model, batch)
        return self.scorer.loss(model, batch, ref_sums), batch

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: float | None = None
    ) -> Tensor:
        """Forward and backward of a micro-batch, pass by pass; returns its share of the step's loss."""
        model.train()
        if hasattr(self.optimizer, "train"):
            self.optimizer.train()
        window = num_items_in_batch or inputs["pairs"]
        total = torch.zeros((), device=self.args.device)
        options = {"scale_wrt_gas": False} if self.accelerator.distributed_type == DistributedType.DEEPSPEED else {}
        for number, batch in enumerate(inputs["passes"], start=1):
            last = number == len(inputs["passes"])
            with nullcontext() if last else self.accelerator.no_sync(model):
                output, batch = self._loss(model, batch)
                loss = output.loss * (len(batch["indices"]) / window)
                self.accelerator.backward(loss, **options)
            finite = torch.isfinite(output.loss.detach())
            self._nonfinite |= ~finite
            self._means.add(output.loss, pair_metrics(output, self.args))
            self._window += batch["indices"]
            self.num_tokens += batch["tokens"]
            total += loss.detach()
        return total

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        """The norm of the step's gradient; a step that is not finite ends here, before it reaches the optimizer."""
        grad_norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        bad_loss = self._nonfinite
        if self.accelerator.num_processes > 1:
            bad_loss = self.accelerator.reduce(bad_loss.float(), "sum") > 0
        # With a loss scaler an infinite gradient is its ordinary signal to shrink the scale, so the loss alone counts.
        bad_norm = self.accelerator.scaler is None and not math.isfinite(float(grad_norm))
        if bool(bad_loss) or bad_norm:
            self._skip_step("loss" if bool(bad_loss) else "gradient", model)
        self._nonfinite.zero_()
        self._window.clear()
        return grad_norm

    def _skip_step(self, what: str, model: nn.Module) -> None:
        self.nonfinite_steps += 1
        model.zero_grad(set_to_none=True)  # parameters without a gradient are left alone by the optimizer
        pairs = ", ".join(map(str, self._window[:8])) + (", ..." if len(self._window) > 8 else "")
        logger.warning(
            "step %d skipped: the %s is not finite (rows %s of the train dataset); %d of at most %d such steps",
            self.state.global_step + 1, what, pairs, self.nonfinite_steps, self.args.max_nonfinite_steps,
        )  # fmt: skip
        if self.nonfinite_steps >= self.args.max_nonfinite_steps:
            raise FloatingPointError(
                f"{self.nonfinite_steps} optimizer steps had a loss or gradient that is not finite, the last at step {self.state.global_step + 1} "
                f"(rows {pairs} of the train dataset); lower learning_rate, check these rows, or raise max_nonfinite_steps"
            )

    # Log and metrics

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the metrics of the pairs since the last log line, and append all to metrics.jsonl."""
        if "loss" in logs:
            pairs, means = self._means.read(self._sum if self.accelerator.num_processes > 1 else None)
            logs |= means
            now = time.perf_counter()
            logs["pairs_per_second"] = pairs / (now - self._last_log)
            logs["num_tokens"] = self.num_tokens
            if self.accelerator.num_processes > 1:
                logs["num_tokens"] = int(self._sum(torch.tensor(self.num_tokens, device=self.args.device)))
            logs["nonfinite_steps"] = self.nonfinite_steps
            self._last_log = now
        super().log(logs, start_time)
        if self.is_world_process_zero():
            path = Path(self.args.output_dir, METRICS_FILE)
            checkpoints.append_json_line(path, {"step": self.state.global_step, **_plain(logs)})

    def _sum(self, values: Tensor) -> Tensor:
        return self.accelerator.reduce(values, "sum")

    # Evaluation

    def evaluate(self, *args: Any, **options: Any) -> dict[str, float]:
        """transformers.Trainer.evaluate, references first."""
        self._precompute_references()
        return super().evaluate(*args, **options)

    def evaluation_loop(
        self,
        dataloader: DataLoader,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """The metrics of training on an evaluation set, and eval_pairs/<prefix>-<step>.jsonl with the values of every pair."""
        model = self._wrap_model(self.model, training=False)
        if model is self.model and not self.accelerator._models:
            model = self.accelerator.prepare_model(model, evaluation_mode=True)
        model.eval()
        self.callback_handler.eval_dataloader = dataloader
        started = time.perf_counter()
        tokens, table = 0, []
        for inputs in dataloader:
            for batch in inputs["passes"]:
                with torch.no_grad():
                    output, batch = self._loss(model, batch)
                metrics = pair_metrics(output, self.args)
                index = torch.tensor(batch["indices"], device=output.loss.device)
                loss = output.loss.expand(len(index))
                names = ["index", "loss", *metrics]
                table.append(torch.stack([index.double(), loss.double(), *(v.double() for v in metrics.values())], 1))
                tokens += batch["tokens"]
            self.control = self.callback_handler.on_prediction_step(self.args, self.state, self.control)
        seconds = time.perf_counter() - started
        values = self._gather_rows(torch.cat(table)).cpu().numpy()
        columns = dict(zip(names, values.T, strict=True))
        means = {name: float(column.mean()) for name, column in columns.items() if name != "index"}
        means |= {"num_tokens": tokens, "pairs_per_second": len(values) / seconds}
        if self.compute_metrics is not None:
            predictions = np.stack([columns[name] for name in EVALUATED[1:]], 1)
            means |= self.compute_metrics(EvalPrediction(predictions=predictions, label_ids=None))
        if self.is_world_process_zero():
            self._write_pairs(columns, metric_key_prefix)
        return EvalLoopOutput(
            predictions=values, label_ids=None, num_samples=len(values),
            metrics={f"{metric_key_prefix}_{name}": value for name, value in means.items()},
        )  # fmt: skip

    def _gather_rows(self, rows: Tensor) -> Tensor:
        """Rows of all processes, one per pair, in the order of their index; a pair that filled up a batch counts once."""
        if self.accelerator.num_processes > 1:
            rows = self.accelerator.gather(self.accelerator.pad_across_processes(rows, pad_index=-1))
            rows = rows[rows[:, 0] >= 0]
        _, first = np.unique(rows[:, 0].cpu().numpy(), return_index=True)
        return rows[torch.from_numpy(first).to(rows.device)]

    def _write_pairs(self, columns: Mapping[str, np.ndarray], prefix: str) -> None:
        count = len(columns["index"])
        records = [
            {name: int(columns[name][i]) if name == "index" else float(columns[name][i]) for name in EVALUATED}
            for i in range(count)
        ]
        checkpoints.write_json_lines(self.pairs_file(prefix, self.state.global_step), records)

    def pairs_file(self, prefix: str, step: int) -> Path:
        """Where an evaluation keeps the values of its pairs."""
        return Path(self.args.output_dir, "eval_pairs", f"{prefix}-{step}.jsonl")

    # Checkpoints

    def train(self, resume_from_checkpoint: str | bool | None = None, **options: Any) -> Any:
        """Train; True or a folder resumes from the newest complete checkpoint in output_dir or from that one.

        Errors: ValueError where there is no complete checkpoint to resume from.
        """
        metrics = Path(self.args.output_dir, METRICS_FILE)
        if resume_from_checkpoint:
            resume_from_checkpoint = self._checkpoint(resume_from_checkpoint)
            state = json.loads(Path(resume_from_checkpoint, STATE_FILE).read_text(encoding="utf-8"))
            self.nonfinite_steps, self.num_tokens = (
                state["nonfinite_steps"],
                state["num_tokens"][self.args.process_index],
            )
            if self.is_world_process_zero():
                checkpoints.rewind_json_lines(metrics, checkpoints.step_of(Path(resume_from_checkpoint)))
        self._precompute_references()
        self._last_log = time.perf_counter()
        return super().train(resume_from_checkpoint=resume_from_checkpoint or None, **options)

    def _checkpoint(self, wanted: str | bool) -> str:
        if wanted is True:
            found = checkpoints.newest_checkpoint(self.args.output_dir)
            if found is None:
                raise ValueError(f"output_dir {self.args.output_dir!r} has no complete checkpoint to resume from")
            return str(found)
        if not checkpoints.is_complete(Path(wanted)):
            raise ValueError(f"resume_from_checkpoint {wanted!r} is not a complete checkpoint folder")
        return str(wanted)

    def _get_output_dir(self, trial: Any) -> str:
        return super()._get_output_dir(trial) if self._saving_to is None else str(self._saving_to)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Save to a folder beside the checkpoints, and rename it into place once everything is on disk."""
        run_dir = Path(super()._get_output_dir(trial))
        step = self.state.global_step
        best = self.state.best_model_checkpoint
        self._saving_to = run_dir / checkpoints.SAVING
        partial, final = self._saving_to / f"checkpoint-{step}", run_dir / f"checkpoint-{step}"
        try:
            if self.is_world_process_zero() and partial.exists():
                shutil.rmtree(partial)
            self.accelerator.wait_for_everyone()
            super()._save_checkpoint(model, trial)
        finally:
            self._saving_to = None
        tokens = self.accelerator.gather(torch.tensor([self.num_tokens], device=self.args.device)).tolist()
        self.accelerator.wait_for_everyone()
        self.state.best_model_checkpoint = (
            str(run_dir / f"checkpoint-{self.state.best_global_step}") if self.state.best_global_step else best
        )
        if self.args.should_save:
            own = {"nonfinite_steps": self.nonfinite_steps, "num_tokens": tokens}
            (partial / STATE_FILE).write_text(json.dumps(own), encoding="utf-8")
            self.state.save_to_json(str(partial / checkpoints.TRAINER_STATE))
            checkpoints.publish(partial, final)
            os.rmdir(partial.parent)
            rotate_checkpoints(
                output_dir=str(run_dir), save_total_limit=self.args.save_total_limit,
                best_model_checkpoint=self.state.best_model_checkpoint, use_mtime=True,
            )  # fmt: skip
        self.accelerator.wait_for_everyone()

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        """The model and tokenizer; the options as readable JSON rather than the pickle that transformers writes."""
        super()._save(output_dir, state_dict)
        folder = Path(self.args.output_dir if output_dir is None else output_dir)
        (folder / "training_args.bin").unlink(missing_ok=True)
        if self.args.should_save:
            (folder / "training_args.json").write_text(self.args.to_json_string(), encoding="utf-8")

    # References

    def _precompute_references(self) -> None:
        # Before the first evaluation or step: a model trained as a whole is its own reference only until then.
        if self.references is None or not self.args.precompute_ref_logps or self.data_collator.references is not None:
            return
        datasets = [self.train_dataset]
        if self.eval_dataset is not None:
            datasets += (
                list(self.eval_dataset.values()) if isinstance(self.eval_dataset, Mapping) else [self.eval_dataset]
            )
        self.data_collator.references = self.references.precompute(
            self.scorer, self.model, self.data_collator, datasets
        )


def base_name(model: nn.Module) -> str:
    """The name or path a model was loaded from; empty where it was made in memory."""
    return getattr(getattr(model, "config", None), "_name_or_path", "")


def _rows(dataset: Any, name: str) -> Sequence[Mapping[str, Any]]:
    if not hasattr(dataset, "__len__") or not hasattr(dataset, "__getitem__"):
        raise TypeError(
            f"{name} dataset is a {type(dataset).__name__}; rows in memory are needed (a list or datasets.Dataset), not a stream"
        )
    columns = getattr(dataset, "column_names", None)
    if columns is not None:
        missing = [column for column in ("prompt", "chosen", "rejected") if column not in columns]
        if missing:
            raise ValueError(f"{name} dataset has no column {missing[0]!r}; its columns are {', '.join(columns)}")
    return dataset


def _plain(logs: Mapping[str, Any]) -> dict[str, Any]:
    """Log values as JSON can hold them: non-finite numbers as null."""
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in logs.items()}
