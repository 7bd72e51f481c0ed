"""Oracles: every op in its shortest correct form, any float dtype, full logits and autograd; for checks alone."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import objectives


def linear_logps(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    ignore_index: int = -100,
    logit_scale: float = 1.0,
    softcap: float | None = None,
) -> Tensor:
    """hidden (..., H), weight (V, H), targets (...) -> log-probs in the inputs' dtype, 0 at ignored positions."""
    logits = logit_scale * torch.nn.functional.linear(hidden, weight, bias)
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    valid = targets != ignore_index
    picked = logits.log_softmax(-1).gather(-1, targets.where(valid, torch.zeros_like(targets))[..., None])[..., 0]
    return picked.where(valid, torch.zeros_like(picked))


def preference_loss(
    objective: str,
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    *,
    ref_logps: Tensor | None = None,
    ignore_index: int = -100,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    **hyperparameters: Any,
) -> Tensor:
    """The scalar loss of FusedPreferenceLoss, padded or packed."""
    logps = linear_logps(
        hidden, weight, labels, bias=bias, ignore_index=ignore_index, logit_scale=logit_scale, softcap=softcap
    ).reshape(-1)
    if cu_seqlens is None:
        cu_seqlens = torch.arange(labels.shape[0] + 1, device=labels.device) * labels.shape[1]
    valid = labels.reshape(-1) != ignore_index
    running = torch.nn.functional.pad(valid.cumsum(0), (1, 0))
    function = objectives.REGISTRY[objective].function
    return function(logps[valid], running[cu_seqlens.long()], ref_logps=ref_logps, **hyperparameters).mean()


def prefix_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    pieces: Sequence[tuple[int, int, int, int]],
    *,
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
) -> Tensor:
    """query (T, h, d), key and value (T, g, d) -> (T, h, d), 0 outside of pieces: one softmax under a (T, T) mask."""
    T, h, d = query.shape
    key, value = (x.repeat_interleave(h // x.shape[1], dim=1) for x in (key, value))
    places = torch.arange(T, device=query.device)
    visible = torch.zeros((T, T), dtype=torch.bool, device=query.device)
    for start, stop, prompt_start, prompt_stop in pieces:
        own, prompt = slice(start, stop), slice(prompt_start, prompt_stop)
        length = prompt_stop - prompt_start
        back = length + places[: stop - start, None] - places[: length + stop - start]  # in the sequence by itself
        seen = (back >= 0) & (back < (T if window is None else window))
        visible[own, prompt], visible[own, own] = seen[:, :length], seen[:, length:]
    z = torch.einsum("qhd,khd->hqk", query, key) * (d**-0.5 if scale is None else scale)
    if softcap is not None:
        z = softcap * torch.tanh(z / softcap)
    p = z.masked_fill(~visible, -math.inf).softmax(-1)
    return torch.einsum("hqk,khd->qhd", p.masked_fill(~visible, 0.0), value)


def contrastive_logits(
    logits: Tensor, contrast: Tensor | None = None, *, alpha: float = 0.5, plausibility: float = 0.0
) -> Tensor:
    """(B, V) each -> combined logits in the inputs' dtype, -inf at tokens that are masked or implausible.

    Without a contrast the logits themselves, likewise cut. float32 rounds as the kernels do: the bits are theirs.
    """
    masked = logits.isneginf()
    if plausibility > 0:  # among numbers: NaN makes no token implausible
        masked |= logits < logits.masked_fill(logits.isnan(), -math.inf).amax(dim=1, keepdim=True) + math.log(
            plausibility
        )
    if contrast is None:
        combined = logits
    else:
        masked |= contrast.isneginf()
        combined = (1 + alpha) * logits - alpha * contrast
    return combined.where(~masked, torch.full_like(combined, -math.inf))


def contrastive_law(
    combined: Tensor, *, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Combined logits (B, V), one token of each row at least unmasked -> the probabilities (B, V) that
    contrastive_sample draws from, and the order (B, V) of the tokens in which it inverts them.
    """
    ids = torch.arange(combined.shape[1], device=combined.device).expand_as(combined)
    if temperature == 0:
        return torch.nn.functional.one_hot(combined.argmax(dim=1), combined.shape[1]).to(combined.dtype), ids
    values, order = combined.sort(dim=1, descending=True, stable=True)
    values = (values - values[:, :1]) / temperature
    values[:, top_k or combined.shape[1] :] = -math.inf
    p = values.softmax(dim=1)
    p = p.where(p.cumsum(dim=1) - p < top_p, torch.zeros_like(p))
    law = torch.zeros_like(p).scatter(1, order, p / p.sum(dim=1, keepdim=True))
    return law, order if top_k > 0 or top_p < 1 else ids
