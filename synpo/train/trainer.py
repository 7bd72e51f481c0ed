"""SynPOTrainer: preference training of causal language models on transformers.Trainer."""

import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import DistributedType
from peft import PeftConfig
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.utils.data import DataLoader, Dataset, Sampler, SequentialSampler
from transformers import PreTrainedTokenizerBase, TrainerCallback
from transformers.trainer_utils import EvalLoopOutput, EvalPrediction

from ..pretrained import load_model, load_tokenizer
from ..run_files import append_json_line, write_json_lines
from ..video import PixelSpec
from .checkpoints import METRICS_FILE, ResumableTrainer
from .collate import PLAIN, LengthGrouped, PairCollator, PairDataset
from .config import SynPOConfig
from .diagnostics import PAIR_COLUMNS, RunningMeans, pair_metrics, since_first
from .evaluation import pairs_file, samples_file, score_pairs, write_pairs
from .host_memory import return_freed_tensors
from .model import base_model, check_float16, trainable
from .passes import PairScorer, choose_form, tokens_per_pass
from .processes import (
    Evened,
    add_idle_passes,
    check_processes,
    plan_shards,
    seeded_order,
    stop_before_deepspeed,
    synchronised,
)
from .references import References
from .samples import sample_answers
from .side_norms import side_norms
from .tokenise import PairTokenizer
from .vision import open_media, open_vision

logger = logging.getLogger(__name__)


class SynPOTrainer(ResumableTrainer):
    """Trains a causal language model on preference pairs; full-vocabulary logits are never made.

    model: a transformers model, with or without peft adapters, or a name or path to load (a folder or file in gguf
    format too). args: SynPOConfig. train_dataset, eval_dataset: rows with the columns prompt, chosen, rejected
    (strings, concatenated as they are, or conversations, through the chat template) and optionally score_chosen,
    score_rejected, images or videos (see docs/train.md); eval_dataset may be a dict of them. processing_class: the
    tokenizer; default: the model's own. peft_config: an adapter to train instead of the full model. ref_model: the
    reference of dpo, dpop, ipo and kto; default: the model with its adapter switched off. compute_metrics: called with
    EvalPrediction(predictions=array (pairs, 6) with the columns PAIR_COLUMNS, label_ids=None). pixel_spec: how the
    vision tower wants frames; default: what the files beside the model's weights say.

    A step's loss is the mean over all its pairs, over micro-batches and devices alike (kto: means of micro-batches,
    which it couples). output_dir receives metrics.jsonl (every log line), eval_pairs/<name>-<step>.jsonl (margins of
    single pairs) and checkpoints that appear whole or not at all; training resumes bit for bit from them. Errors:
    TypeError and ValueError, before any training, naming what to change; FloatingPointError when max_nonfinite_steps
    optimizer steps had to be skipped.
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
        pixel_spec: PixelSpec | None = None,
    ) -> None:
        if not isinstance(args, SynPOConfig):
            raise TypeError(f"args is a {type(args).__name__}; a SynPOConfig is needed")
        if args.n_gpu > 1:
            raise ValueError(
                f"{args.n_gpu} GPUs in one process: start one process each, with torchrun or accelerate launch"
            )
        if args.low_host_memory and not return_freed_tensors():
            logger.warning("low_host_memory has no effect here: MALLOC_MMAP_THRESHOLD_ is set, or this is not glibc")
        if processing_class is None:
            processing_class = load_tokenizer(model if isinstance(model, str) else _origin(model))
        model = trainable(load_model(model) if isinstance(model, str) else model, peft_config, args.seed)
        form = choose_form(args, *(m for m in (model, ref_model) if m is not None))
        media = open_media(args, model, processing_class, pixel_spec)
        self.scorer = PairScorer(args, model, form, open_vision(model, media))
        name = type(base_model(model)).__name__
        tokenizer = PairTokenizer(processing_class, args.max_length, args.truncation, media, name)
        self._tokenise = partial(PairDataset, tokenizer=tokenizer, broken_media=args.broken_media)
        if isinstance(eval_dataset, Mapping):
            eval_dataset = {name: self._tokenise(rows, name=name) for name, rows in eval_dataset.items()}
        elif eval_dataset is not None:
            eval_dataset = self._tokenise(eval_dataset, name="eval")
        if data_collator is None:
            pad = processing_class.pad_token_id
            data_collator = PairCollator(
                processing_class.eos_token_id if pad is None else pad, tokens_per_pass(args), form
            )

        super().__init__(
            model=model,
            args=args,
            data_collator=data_collator,
            train_dataset=self._tokenise(train_dataset, name="train", min_score_gap=args.min_score_gap),
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            callbacks=callbacks,
            compute_metrics=compute_metrics,
        )
        check_processes(args, self.accelerator)
        if not self.is_deepspeed_enabled:  # whose engine keeps float32 copies and scales by itself
            check_float16(self.model, args.fp16, self.accelerator.scaler is not None)
        self.references = None
        if args.needs_reference:
            vision = None if ref_model is None else open_vision(ref_model, media, cached=False)
            self.references = References(args, self.model, ref_model, self.accelerator, form, vision)
        if self.references is None and ref_model is not None:
            raise ValueError(f"ref_model is given but {args.objective} has no reference; leave it out")
        self._parameter_count = sum(parameter.numel() for parameter in self.model.parameters())
        self._means = RunningMeans()
        self._nonfinite = torch.zeros((), dtype=torch.bool, device=args.device)
        self._window: list[int] = []
        self._order: Sampler | None = None
        self._measured, self._side_norms = -1, {}
        self._last_log = time.perf_counter()

    # Data

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> Any:
        dataset = self.train_dataset if train_dataset is None else train_dataset
        processes = self.accelerator.num_processes
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        if self.args.train_sampling_strategy == "group_by_length":
            window = self.args.train_batch_size * self.args.gradient_accumulation_steps * processes
            sampler = LengthGrouped(dataset.lengths(), window, seed)
        elif self.args.train_sampling_strategy == "random" and processes > 1:
            sampler = seeded_order(dataset, seed)
        else:
            sampler = super()._get_train_sampler(dataset)
        self._order = self._evened(sampler, dataset, self.args.train_batch_size)
        return self._order

    def _get_eval_sampler(self, eval_dataset: Dataset) -> Sampler:
        return self._evened(SequentialSampler(eval_dataset), eval_dataset, self.args.eval_batch_size)

    def _evened(self, sampler: Sampler, dataset: Dataset, batch_size: int) -> Sampler:
        processes = self.accelerator.num_processes
        return sampler if processes == 1 else Evened(sampler, len(dataset), batch_size * processes)

    def _run_epoch(self, model: nn.Module, epoch: int, **options: Any) -> Any:
        # In the epoch that a run resumes in, accelerate's loader reaches no sampler behind its split over processes
        # (accelerate 1.15: SkipBatchSampler over BatchSamplerShard), which would take the first epoch's order.
        if isinstance(self._order, Evened):
            self._order.set_epoch(epoch)
        return super()._run_epoch(model=model, epoch=epoch, **options)

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], float]:
        """The micro-batches of an optimizer step, and the number of pairs in them, averaged over devices."""
        batches = [batch for _, batch in zip(range(num_batches), epoch_iterator, strict=False)]
        pairs = float(sum(batch["pairs"] for batch in batches))
        if self.accelerator.num_processes > 1:
            add_idle_passes(batches, self.accelerator)
            pairs = self.accelerator.reduce(torch.tensor(pairs, device=device), "mean").item()
        return batches, pairs

    def floating_point_ops(self, inputs: Mapping[str, Any]) -> float:
        """6 operations per parameter and token that goes through the model, the usual estimate."""
        tokens = sum(batch["input_ids"].numel() for batch in inputs["passes"] if not batch["idle"])
        return 6.0 * tokens * self._parameter_count

    # A step

    def _loss(self, model: nn.Module, batch: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        batch = self._prepare_inputs(batch)
        ref_sums = None
        if self.references is not None:
            ref_sums = batch.get("ref_logps")
            if ref_sums is None:
                ref_sums = self.references.sums(self.scorer, model, batch)
        output = self.scorer.loss(model, batch, ref_sums)
        if self.scorer.fallbacks:
            self.data_collator.form = self.scorer.form  # so that tokens_per_pass counts what is computed
            self.counts["form_fallbacks"] = self.scorer.fallbacks
        return output, batch

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
            with synchronised(self.accelerator, model, number == len(inputs["passes"])):
                output, batch = self._loss(model, batch)
                loss = output.loss * (0.0 if batch["idle"] else len(batch["indices"]) / window)
                stop_before_deepspeed(self.accelerator, loss, self.state.global_step + 1)
                self.accelerator.backward(loss, **options)
            metrics = pair_metrics(output, self.args)
            if batch["idle"]:
                self._means.add_none(metrics)
                continue
            self._nonfinite |= ~torch.isfinite(output.loss.detach())
            self._means.add(output.loss, metrics)
            self._window += batch["indices"]
            for name, key in (("num_tokens", "tokens"), ("skipped_media", "skipped"), ("truncated_pairs", "cut")):
                self.counts[name] += batch[key]
            total += loss.detach()
        self._measure_sides(model, inputs["passes"][-1])
        # The sum that transformers keeps of this would not survive one NaN; the step is counted in _get_grad_norm.
        return total.nan_to_num(0.0, 0.0, 0.0)

    def _measure_sides(self, model: nn.Module, batch: dict[str, Any]) -> None:
        """Once in side_norms_every optimizer steps, for a pass of the first process, without the others."""
        every, step = self.args.side_norms_every, self.state.global_step
        if every is None or step % every or self._measured == step or not self.is_world_process_zero():
            return
        self._measured = step
        batch, bare = self._prepare_inputs(batch), self.accelerator.unwrap_model(model)
        refs = None
        if self.references is not None:
            refs = batch.get("ref_logps")
            refs = self.references.sums(self.scorer, bare, batch) if refs is None else refs
        with self.accelerator.autocast():
            self._side_norms = side_norms(self.args, self.scorer, bare, batch, refs)

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        """The norm of the step's gradient; a step that is not finite ends here, before it reaches the optimizer."""
        grad_norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        bad_loss = self._nonfinite
        if self.accelerator.num_processes > 1:
            bad_loss = self.accelerator.reduce(bad_loss.float(), "sum") > 0
        # With a loss scaler an infinite gradient is its ordinary signal to shrink the scale, so the loss alone counts.
        norms = grad_norm is not None and self.accelerator.scaler is None
        bad_norm = norms and not math.isfinite(float(grad_norm))
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
                f"{self.nonfinite_steps} optimizer steps had a loss or gradient that is not finite, the last at step "
                f"{self.state.global_step + 1} (rows {pairs} of the train dataset); lower learning_rate, check these "
                "rows, or raise max_nonfinite_steps"
            )

    # Log and metrics

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the metrics of the pairs since the last log line, and append all to metrics.jsonl."""
        if "loss" in logs:
            pairs, means = self._means.read(self._sum if self.accelerator.num_processes > 1 else None)
            logs |= means
            now = time.perf_counter()
            logs["pairs_per_second"] = pairs / (now - self._last_log)
            logs |= self.total_counts() | self._side_norms
            self._side_norms = {}
            logs["nonfinite_steps"] = self.nonfinite_steps
            self._last_log = now
        super().log(logs, start_time)
        if self.is_world_process_zero():
            path = Path(self.args.output_dir, METRICS_FILE)
            append_json_line(path, {"step": self.state.global_step, **_plain(logs)})

    def _sum(self, values: Tensor) -> Tensor:
        return self.accelerator.reduce(values, "sum")

    # Evaluation

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Metrics on held-out pairs: those given at construction, or other rows."""
        if self.is_deepspeed_enabled and not self.accelerator._models:
            raise ValueError("DeepSpeed's engine is there from training on: evaluate after train(), or use FSDP2")
        self._spread()
        self._precompute_references()
        if eval_dataset is not None and not isinstance(eval_dataset, str | Mapping | PairDataset):
            eval_dataset = self._tokenise(eval_dataset, name=metric_key_prefix)
        return super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)

    def evaluation_loop(
        self,
        dataloader: DataLoader,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """The metrics of training, and a file (see pairs_file) with the values of every pair."""
        model = self._wrap_model(self.model, training=False)
        if model is self.model and not self.accelerator._models:
            model = self.accelerator.prepare_model(model, evaluation_mode=True)
        model.eval()
        self.callback_handler.eval_dataloader = dataloader
        started, step = time.perf_counter(), self.state.global_step
        columns, tokens = score_pairs(
            self._ticking(dataloader),
            partial(self._loss, model),
            partial(pair_metrics, args=self.args),
            self.accelerator,
        )
        count = len(columns["index"])
        metrics = {name: float(column.mean()) for name, column in columns.items() if name != "index"}
        metrics |= {"num_tokens": tokens, "pairs_per_second": count / (time.perf_counter() - started)}
        values = np.stack([columns[name] for name in PAIR_COLUMNS], 1)
        if self.compute_metrics is not None:
            metrics |= self.compute_metrics(EvalPrediction(predictions=values, label_ids=None))
        written = self.pairs_file(metric_key_prefix, step)
        fallen = since_first(written.parent, metric_key_prefix, step, columns, self.accelerator)
        if fallen is not None:
            metrics["displacement"] = fallen.share
            if fallen.alarming:
                logger.warning("%s pairs: %s", metric_key_prefix, fallen)
        if self.is_world_process_zero():
            if self.args.sample_captions:
                with self.accelerator.autocast():
                    samples = sample_answers(
                        self.model, dataloader.dataset, self.args.sample_captions, self.scorer.vision
                    )
                write_json_lines(samples_file(self.args.output_dir, metric_key_prefix, step), samples)
            write_pairs(written, columns)
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in metrics.items()}
        return EvalLoopOutput(predictions=values, label_ids=None, metrics=metrics, num_samples=count)

    def _ticking(self, dataloader: DataLoader) -> Iterator[dict[str, Any]]:
        for inputs in dataloader:
            yield inputs
            self.control = self.callback_handler.on_prediction_step(self.args, self.state, self.control)

    def pairs_file(self, prefix: str, step: int) -> Path:
        """Where an evaluation keeps the values of its pairs."""
        return pairs_file(self.args.output_dir, prefix, step)

    def train(self, resume_from_checkpoint: str | bool | None = None, **options: Any) -> Any:
        """See ResumableTrainer.train; reference log-probs that are to be computed once come first."""
        self._spread()
        self._precompute_references()
        self._last_log = time.perf_counter()
        return super().train(resume_from_checkpoint, **options)

    def _restore(self, state: dict[str, Any]) -> None:
        super()._restore(state)
        if self.counts["form_fallbacks"]:  # another first pass might not show what that run's did
            self.scorer.form = self.data_collator.form = PLAIN
            self.scorer.fallbacks = self.counts["form_fallbacks"]

    def _spread(self) -> None:
        """Give DDP or FSDP2 the model, and with it its optimizer, before any other use of it.

        An evaluation would otherwise mark it as prepared without a wrapper, and training leave it so: every process
        would train by itself. Under FSDP2 it would need all the weights on one device.
        """
        if self.accelerator.num_processes == 1 or self.is_deepspeed_enabled:
            return
        if not self.accelerator._models:
            if self.is_fsdp_enabled:
                # A frozen tower runs by itself, before the forward call that would gather its weights.
                frozen = self.scorer.vision is not None and not self.scorer.vision.trains
                whole = frozen and not self.accelerator.state.fsdp_plugin.cpu_ram_efficient_loading
                plan_shards(self.accelerator, base_model(self.model), whole)
            self.create_optimizer()
            self.model_wrapped, self.optimizer = self.accelerator.prepare(self.model, self.optimizer)
            if self.is_fsdp_enabled:
                self.model = self.model_wrapped
        # Training prepares both once more, by the addresses of shards; a forward call leaves the last layers whole.
        for module in self.model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()

    def _precompute_references(self) -> None:
        # Before the first evaluation or step: a model trained as a whole is its own reference only until then.
        if self.references is None or not self.args.precompute_ref_logps or self.data_collator.references is not None:
            return
        held_out = self.eval_dataset.values() if isinstance(self.eval_dataset, Mapping) else [self.eval_dataset]
        datasets = [self.train_dataset, *(dataset for dataset in held_out if dataset is not None)]
        self.data_collator.references = self.references.precompute(
            self.scorer, self.model, self.data_collator, datasets, self.processing_class
        )


def _origin(model: nn.Module) -> str:
    name = getattr(getattr(model, "config", None), "_name_or_path", "")
    if not name:
        raise ValueError("processing_class is missing and the model does not say where it came from; pass a tokenizer")
    return name


def _plain(logs: Mapping[str, Any]) -> dict[str, Any]:
    """Log values as JSON can hold them: non-finite numbers as null."""
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in logs.items()}
