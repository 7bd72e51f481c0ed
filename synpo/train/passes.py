"""One pass: a few pairs through the model, straight to log-probs and loss."""

import inspect
import logging
from typing import Any

import torch
from torch import Tensor, nn

from synpo_kernels import FusedPreferenceLoss, PreferenceOutput, linear_logps, objectives

from .collate import PLAIN, Form, assemble
from .config import SynPOConfig
from .model import base_model, find_head, head_replaced
from .prefix import UnsupportedAttention, expects_window, forward_options, refusal, use_layouts
from .vision import Vision

logger = logging.getLogger(__name__)

_CHECKED_TOKENS = 8


def choose_form(args: SynPOConfig, *models: nn.Module) -> Form:
    """How pairs go through these models: what the options say, and what every model can take.

    Errors: ValueError where an option asks for what a model cannot do.
    """
    asked = {name: getattr(args, name) for name in ("prefix_sharing", "padding_free")}
    shared = args.fused and not args.torch_compile if args.prefix_sharing is None else args.prefix_sharing
    packed = shared if args.padding_free is None else args.padding_free
    reason = next(filter(None, map(refusal, models)), None) if shared or packed else None
    if reason is None:
        return Form(shared, packed)
    for name, value in asked.items():
        if value:
            raise ValueError(f"{name}=True, but {reason}; leave it out")
    logger.warning("no prefix sharing: %s; the prompt is computed for each answer", reason)
    return PLAIN


def tokens_per_pass(args: SynPOConfig) -> int | None:
    """The bound of a pass; None: a micro-batch is one pass."""
    if objectives.REGISTRY[args.objective].coupled:
        return None
    return 1024 if args.tokens_per_pass is None and args.device.type == "cpu" else args.tokens_per_pass


class PairScorer:
    """Runs passes (see collate.assemble) through a model, which may be wrapped, and scores their answers.

    form: of the passes to come. At its first pass the model is checked (``verify``); where rows of several sequences
    do not give what plain rows give, the passes are taken apart again and form is PLAIN from then on.
    """

    def __init__(self, args: SynPOConfig, model: nn.Module, form: Form = PLAIN, vision: Vision | None = None) -> None:
        """Errors: ValueError where lm_head cannot be handed to the fused loss."""
        self.form = form
        self.vision = vision
        self.fallbacks = 0
        self.verified = False
        if form != PLAIN:
            use_layouts(model)
        self.objective = objectives.REGISTRY[args.objective]
        self.hyperparameters = args.hyperparameters
        self.workspace_mb = args.workspace_mb
        self.keeps_logits = "logits_to_keep" in inspect.signature(base_model(model).forward).parameters
        self.head = find_head(model) if args.fused else None
        self._fused: FusedPreferenceLoss | None = None
        self._precision = torch.float32  # that lm_head ran in, the last time its log-probs were taken
        if self.head is not None:
            self._fused = FusedPreferenceLoss(args.objective, **self._head_options(), **args.hyperparameters)

    def _head_options(self) -> dict[str, Any]:
        return {"logit_scale": self.head.logit_scale, "softcap": self.head.softcap, "workspace_mb": self.workspace_mb}

    def loss(self, model: nn.Module, batch: dict[str, Any], ref_sums: Tensor | None = None) -> PreferenceOutput:
        """Loss (mean over the pass's pairs, with gradient) and metrics; ref_sums (2b,): the reference's summed
        log-probs.
        """
        batch = self._own_form(model, batch)
        if self._fused is None:
            return self._eager(self._logits_logps(model, batch), batch["cu_seqlens"], ref_sums)
        found: list[PreferenceOutput] = []
        module, fused = self.head.module, self._fused

        def compute(hidden: Tensor) -> Tensor:
            picked = _rows(hidden, batch["positions"])
            found.append(fused(picked, module.weight, batch["labels"], module.bias, batch["cu_seqlens"], ref_sums))
            return found[-1].loss

        with head_replaced(self.head, compute):
            returned = self._forward(model, batch).logits
        return found[-1]._replace(loss=returned)

    def logps(self, model: nn.Module, batch: dict[str, Any]) -> Tensor:
        """(n,) log-probs of the pass's answer tokens, with gradient."""
        return self._logps(model, self._own_form(model, batch))

    @torch.no_grad()
    def sums(self, model: nn.Module, batch: dict[str, Any]) -> Tensor:
        """Summed log-probs of the pass's sequences, (2b,), without gradient."""
        batch = self._own_form(model, batch)
        return objectives.segment_sums(self._logps(model, batch), batch["cu_seqlens"])

    def _own_form(self, model: nn.Module, batch: dict[str, Any]) -> dict[str, Any]:
        if not self.verified:
            self.verify(model, batch)
        return _plain(batch) if self.form == PLAIN and "layout" in batch else batch

    @torch.no_grad()
    def verify(self, model: nn.Module, batch: dict[str, Any]) -> None:
        """Check a model by its first pass: the fused log-probs of a few tokens against those of its own logits, and
        rows of several sequences against plain rows.

        Errors: ValueError where the log-probs differ by more than rounding: the model does something to its logits
        that is not known here.
        """
        self.verified = True
        training = model.training
        model.eval()
        try:
            plain = _plain(batch)
            if self.head is not None:
                self._verify_head(model, plain)
            if "layout" in batch and self.form != PLAIN:
                reason = self._layout_fails(model, batch, plain)
                if reason:
                    self.form = PLAIN
                    self.fallbacks += 1
                    logger.warning(
                        "prefix sharing and packing are switched off for this run: %s. The prompt is computed for each "
                        "answer from here on, which is slower; set prefix_sharing=False to say so from the start",
                        reason,
                    )
        finally:
            model.train(training)

    def _verify_head(self, model: nn.Module, batch: dict[str, Any]) -> None:
        first = int(batch["positions"][0])  # row 0, so the flat position is the position in the row
        count = min(_CHECKED_TOKENS, int(batch["cu_seqlens"][1]))
        row = {
            "input_ids": batch["input_ids"][:1, : first + count],
            "labels": batch["labels"][:count],
            "positions": torch.arange(first, first + count, device=batch["labels"].device),
            "media": batch["media"][:1] if batch["pairs"][0].media is not None else [],
        }
        if "position_ids" in batch:
            row["position_ids"] = batch["position_ids"][..., :1, : first + count]
        options = {"logits_to_keep": count} if self.keeps_logits else {}
        logits = self._forward(model, row, **options).logits[0, -count:].float()
        expected = _gather(logits, row["labels"])
        got = self._head_logps(model, row).float()
        tolerance = 1e-3 + 2 * torch.finfo(self._precision).eps * float(logits.abs().max())
        error = float((got - expected).abs().max())
        if not error <= tolerance and bool(expected.isfinite().all()):
            raise ValueError(
                f"{type(base_model(model)).__name__}: log-probs from lm_head differ from those of the model's own "
                f"logits by {error:.3g} (allowed {tolerance:.3g}): the model changes its logits after lm_head in a way "
                "that is not known here; set fused=False"
            )

    def _layout_fails(self, model: nn.Module, batch: dict[str, Any], plain: dict[str, Any]) -> str:
        """What is wrong with the model's answers on rows of several sequences; empty where nothing is."""
        name = type(base_model(model)).__name__
        try:
            got = self._logps(model, batch).float()
        except UnsupportedAttention as error:
            return str(error)
        windows = batch["layout"].windows
        if not windows:
            return f"{name} did not call the attention function it was given"
        if expects_window(model) and windows == {None}:
            return f"{name} has a sliding window that it does not pass on to its attention function"
        expected = self._logps(model, plain).float()
        # Rounding differs between the two, from token to token; means over an answer's tokens do not add it up.
        error = float(_means(got - expected, batch["cu_seqlens"]).abs().max())
        scale = float(_means(expected, batch["cu_seqlens"]).abs().max())
        tolerance = 1e-4 * max(scale, 1.0) + 8 * _rounding(self._precision, got.device)
        if error <= tolerance or not bool(expected.isfinite().all()):
            return ""
        return (
            f"{name}: mean log-probs of the first pass's answers differ from those of plain rows by {error:.3g} "
            f"(allowed {tolerance:.3g})"
        )

    def _logps(self, model: nn.Module, batch: dict[str, Any]) -> Tensor:
        return self._logits_logps(model, batch) if self.head is None else self._head_logps(model, batch)

    def _head_logps(self, model: nn.Module, batch: dict[str, Any]) -> Tensor:
        module = self.head.module

        def compute(hidden: Tensor) -> Tensor:
            kind = hidden.device.type
            self._precision = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden.dtype
            picked = _rows(hidden, batch["positions"])
            return linear_logps(picked, module.weight, batch["labels"], bias=module.bias, **self._head_options())

        with head_replaced(self.head, compute):
            return self._forward(model, batch).logits

    def _logits_logps(self, model: nn.Module, batch: dict[str, Any]) -> Tensor:
        mask = {} if "layout" in batch else {"attention_mask": batch["attention_mask"]}
        logits = self._forward(model, batch, **mask).logits
        self._precision = logits.dtype
        return _gather(_rows(logits, batch["positions"]), batch["labels"])

    def _forward(self, model: nn.Module, batch: dict[str, Any], **options: Any) -> Any:
        # Plain rows are padded on the right and attention is causal: no token looks at padding, no mask is needed;
        # without one attention skips the upper triangle and holds no (rows, T, T) mask. The eager path passes the mask
        # all the same.
        if "layout" in batch:
            options |= forward_options(batch["layout"], batch["position_ids"])
        elif "position_ids" in batch:
            options["position_ids"] = batch["position_ids"]
        if self.vision is not None:
            options |= self.vision.options(model, batch["media"])
        return model(input_ids=batch["input_ids"], use_cache=False, **options)

    def _eager(self, logps: Tensor, cu_seqlens: Tensor, ref_sums: Tensor | None) -> PreferenceOutput:
        losses = self.objective.function(logps, cu_seqlens, ref_logps=ref_sums, **self.hyperparameters)
        fixed = logps.detach()
        lengths = cu_seqlens.diff()
        sums = objectives.segment_sums(fixed, cu_seqlens)
        rewards = self.objective.rewards(sums, sums / lengths, ref_sums, self.hyperparameters)
        language = _means(fixed.exp(), cu_seqlens).chunk(2)[0]
        return PreferenceOutput(losses.mean(), *(sums / lengths).chunk(2), *rewards.chunk(2), language)


def _plain(batch: dict[str, Any]) -> dict[str, Any]:
    """The same pass with a row for every sequence."""
    if "layout" not in batch:
        return batch
    device = batch["input_ids"].device
    plain = assemble(batch["pairs"], 0, PLAIN)  # what stands in the padding does not matter
    plain = {name: value.to(device) if isinstance(value, Tensor) else value for name, value in plain.items()}
    return plain | {name: value for name, value in batch.items() if name == "ref_logps"}


def _rounding(dtype: torch.dtype, device: torch.device) -> float:
    """Relative rounding of matrix products in this dtype; TF32 keeps 10 bits of a float32."""
    coarse = dtype == torch.float32 and device.type == "cuda" and torch.get_float32_matmul_precision() != "highest"
    return 2.0**-10 if coarse else torch.finfo(dtype).eps


def _means(values: Tensor, cu_seqlens: Tensor) -> Tensor:
    return objectives.segment_sums(values, cu_seqlens) / cu_seqlens.diff()


def _rows(values: Tensor, positions: Tensor) -> Tensor:
    return values.reshape(-1, values.shape[-1]).index_select(0, positions)


def _gather(logits: Tensor, labels: Tensor) -> Tensor:
    if logits.dtype != torch.float64:
        logits = logits.float()
    return logits.log_softmax(-1).gather(-1, labels[:, None]).squeeze(-1)
