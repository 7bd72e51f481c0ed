"""Log-probs and losses of answers for any training loop around a transformers model, without full-vocabulary logits.

Batches are those that such loops have: input_ids, attention_mask and labels (R, T), labels beside their own tokens
(labels[t] is input_ids[t]) and -100 on prompt and padding; for pairs R = 2B, the B chosen answers first and their
rejected ones after them in the same order.

The model is called as ever, through DDP, FSDP or whatever else wraps it, with its lm_head swapped for the kernel
during that one call; so the wrapper's hooks run, and the result comes back through the model's own output.
"""

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from synpo_kernels import FusedPreferenceLoss, PreferenceOutput, linear_logps

from ..train.model import base_model, find_head, head_replaced
from ..train.tokenise import PairTokenizer

IGNORED = -100


def next_tokens(labels: Tensor) -> Tensor:
    """labels (R, T) beside their own tokens -> (R, T) beside the positions that predict them; the last has none."""
    return nn.functional.pad(labels[:, 1:], (0, 1), value=IGNORED)


class AnswerScorer:
    """Log-probs of answers from a causal language model's last hidden states and its lm_head.

    model: a transformers model, with or without peft adapters, before DDP, FSDP or an accelerator wraps it. At the
    first call the log-probs are compared with the model's own logits. Errors: ValueError for a model without an
    lm_head of its own, and at the first call for one that does something unknown to its logits.
    """

    def __init__(self, model: nn.Module, *, workspace_mb: int | None = None) -> None:
        """workspace_mb: working memory of the kernel, as in ``synpo_kernels.linear_logps``."""
        self.base = base_model(model)
        if getattr(self.base.config, "is_encoder_decoder", False):
            raise ValueError(f"{type(self.base).__name__} is an encoder-decoder; a causal language model is needed")
        self.head = find_head(model)
        self.options: dict[str, Any] = {
            "logit_scale": self.head.logit_scale,
            "softcap": self.head.softcap,
            "workspace_mb": workspace_mb,
        }
        self._keeps_logits = "logits_to_keep" in inspect.signature(self.base.forward).parameters
        self._verified = False

    def run(self, model: Callable[..., Any], compute: Callable[[Tensor], Tensor], **inputs: Any) -> Any:
        """model(**inputs)'s output with compute(hidden (R, T, H)) in the place of its logits.

        model: the model, or whatever wraps it. Errors: ValueError for nn.DataParallel, whose replicas would each score
        their part of the rows against the labels of all.
        """
        if isinstance(model, nn.DataParallel):
            raise ValueError(
                "model is wrapped in nn.DataParallel: start one process for each GPU, with torchrun or accelerate "
                "launch, or make one GPU visible with CUDA_VISIBLE_DEVICES"
            )
        inputs["use_cache"] = False
        if not self._verified:
            self._verify(model, inputs)
        with head_replaced(self.head, compute):
            return model(**inputs)

    def compute_logps(self, hidden: Tensor, labels: Tensor) -> Tensor:
        """hidden (R, T, H), labels (R, T) -> log-probs (R, T-1) of the tokens after the first, 0 at ignored labels."""
        module = self.head.module
        hidden = hidden[:, -labels.shape[1] :]  # a prompt-learning adapter puts tokens of its own in front
        return linear_logps(hidden, module.weight, next_tokens(labels), bias=module.bias, **self.options)[:, :-1]

    def logps(self, model: Callable[..., Any], labels: Tensor, **inputs: Any) -> Tensor:
        """Log-probs (nats, float32) of labels[:, 1:], (R, T-1), 0 where the label is -100; differentiable."""
        return self.run(model, lambda hidden: self.compute_logps(hidden, labels), **inputs).logits

    @torch.no_grad()
    def sums(self, model: Callable[..., Any], labels: Tensor, **inputs: Any) -> Tensor:
        """Summed log-probs of the answers, (R,), without gradient: what a reference model is asked for."""
        return self.logps(model, labels, **inputs).sum(1)

    @torch.no_grad()
    def mean_logits(self, hidden: Tensor) -> Tensor:
        """Mean over the vocabulary of the logits, (...) from hidden (..., H), without making them.

        Errors: ValueError for a model that caps its logits, whose mean is not that of a linear map.
        """
        if self.head.softcap is not None:
            raise ValueError(f"{type(self.base).__name__} caps its logits; their mean takes all of them")
        module = self.head.module
        mean = hidden.float() @ module.weight.mean(0, dtype=torch.float32)
        return self.head.logit_scale * (mean if module.bias is None else mean + module.bias.float().mean())

    @torch.no_grad()
    def _verify(self, model: Callable[..., Any], inputs: Mapping[str, Any]) -> None:
        """Compare with the model's own logits: its most and least likely token at the last position of every row."""
        self._verified = True
        precision: list[torch.dtype] = []
        training = self.base.training
        self.base.eval()
        try:
            kept = {"logits_to_keep": 1} if self._keeps_logits else {}
            logits = model(**inputs, **kept).logits[:, -1].float()
            tokens = torch.stack([logits.argmax(-1), logits.argmin(-1)], 1)

            def compute(hidden: Tensor) -> Tensor:
                kind, module = hidden.device.type, self.head.module
                autocast = torch.is_autocast_enabled(kind)  # asked here: it may be switched on by the model's wrapper
                precision.append(torch.get_autocast_dtype(kind) if autocast else hidden.dtype)
                last = hidden[:, -1:].expand(-1, 2, -1)
                return linear_logps(last, module.weight, tokens, bias=module.bias, **self.options)

            with head_replaced(self.head, compute):
                got = model(**inputs).logits
        finally:
            self.base.train(training)
        expected = logits.log_softmax(-1).gather(1, tokens)
        tolerance = 1e-3 + 2 * torch.finfo(precision[0]).eps * float(logits.abs().max())
        error = float((got - expected).abs().max())
        if not error <= tolerance and bool(expected.isfinite().all()):
            raise ValueError(
                f"{type(self.base).__name__}: log-probs from lm_head differ from those of the model's own logits by "
                f"{error:.3g} (allowed {tolerance:.3g}): the model changes its logits after lm_head in a way that is "
                "not known here"
            )


class PairLoss(AnswerScorer):
    """A preference loss on pairs, from a model and a batch of input_ids and labels.

    objective: a name of ``synpo_kernels.objectives``; hyperparameters: its own (synpo: alpha, beta, form). model,
    workspace_mb: as in AnswerScorer. Errors: as there, and ValueError for an unknown objective or hyperparameter.
    """

    def __init__(
        self, model: nn.Module, objective: str = "synpo", *, workspace_mb: int | None = None, **hyperparameters: Any
    ) -> None:
        super().__init__(model, workspace_mb=workspace_mb)
        self.loss = FusedPreferenceLoss(objective, **self.options, **hyperparameters)

    def __call__(
        self, model: Callable[..., Any], labels: Tensor, ref_logps: Tensor | None = None, **inputs: Any
    ) -> PreferenceOutput:
        """The loss, with gradient, and the pairs' metrics.

        model: the model, or whatever wraps it. labels (2B, T); inputs: the other arguments of the model's forward
        call. ref_logps: (2B,) sums of a reference model, from ``sums``, for dpo, dpop, ipo and kto. Errors: those of
        ``synpo_kernels.FusedPreferenceLoss``.
        """
        found: list[PreferenceOutput] = []
        module = self.head.module

        def compute(hidden: Tensor) -> Tensor:
            hidden = hidden[:, -labels.shape[1] :]
            found.append(self.loss(hidden, module.weight, next_tokens(labels), module.bias, None, ref_logps))
            return found[-1].loss

        loss = self.run(model, compute, **inputs).logits
        return found[-1]._replace(loss=loss)


def pair_batch(
    tokenizer: PreTrainedTokenizerBase, rows: Sequence[Mapping[str, Any]], max_length: int = 1024
) -> dict[str, Tensor]:
    """input_ids, attention_mask and labels (2B, T) of B rows with prompt, chosen and rejected, padded on the right.

    Texts and conversations are tokenised, and cut at max_length, as SynPOTrainer does. Usable as a collate function
    with functools.partial. Errors: ValueError naming the row and the column.
    """
    to_pair = PairTokenizer(tokenizer, max_length, "cut")
    pairs = [to_pair(row, index) for index, row in enumerate(rows)]
    sequences = [(pair.prompt, getattr(pair, side)) for side in ("chosen", "rejected") for pair in pairs]
    pad = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    whole = [torch.cat(parts) for parts in sequences]
    labels = [torch.cat([torch.full_like(prompt, IGNORED), answer]) for prompt, answer in sequences]
    padded = nn.utils.rnn.pad_sequence
    return {
        "input_ids": padded(whole, batch_first=True, padding_value=pad),
        "attention_mask": padded([torch.ones_like(ids) for ids in whole], batch_first=True),
        "labels": padded(labels, batch_first=True, padding_value=IGNORED),
    }
