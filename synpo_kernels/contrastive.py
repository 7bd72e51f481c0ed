"""Contrastive decoding: two views' logits combined, truncated and sampled without a (B, V) temporary.

With l the logits of the full view and l' those of the contrast view (a third of the frames, say), in float32:

    c_v = (1 + alpha) l_v - alpha l'_v       where l_v >= max l + log(plausibility), l_v > -inf and l'_v > -inf
    c_v = -inf                               elsewhere
    q_v = exp(c_v / temperature) / sum over the kept, kept = top_k of c, then top_p of what top_k left

The combination is visual contrastive decoding (Leng et al., arXiv 2311.16922, equation 3), which SynPO's captions use
(arXiv 2506.00835); the plausibility constraint is contrastive decoding's (Li et al., arXiv 2210.15097, equation 2).
-inf masks a token in either view, so masks laid over both never make NaN.

A token is drawn by inverting the distribution at one uniform number u: in ascending order of id, or, under top-k or
top-p, in descending order of c (ties: lowest id first). u = Philox4x32-10(key = the row's seed, counter = step), so a
row's token depends on its logits, its seed and the step, and on nothing else in the batch.

The two ops are defined here with plain PyTorch kernels that run on every device. csrc/cpu/contrastive.cpp overrides
them on the CPU, contrastive_triton.py on CUDA. docs/contrastive.md says how those keep to one pass over the rows.
"""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

OK, NOT_FINITE, ALL_MASKED = 0, 1, 2

_LOWEST = float("-inf")
_WORD = 0xFFFFFFFF

_LIBRARY = torch.library.Library("synpo", "FRAGMENT")
_LIBRARY.define("contrastive_logits(Tensor logits, Tensor contrast, float alpha, float plausibility) -> Tensor")
_LIBRARY.define(
    "contrastive_sample(Tensor logits, Tensor? contrast, Tensor seeds, SymInt step, float alpha, float plausibility,"
    " float temperature, int top_k, float top_p) -> (Tensor tokens, Tensor logps, Tensor model_logps, Tensor status)"
)


class SampleOutput(NamedTuple):
    """One drawn token a row. Where status is not 0 there is no law to draw from: token -1, both log-probs NaN."""

    tokens: Tensor  # (B,) int64
    logps: Tensor  # (B,) float32, nats: log q of the token, the law it was drawn from (0 when greedy)
    model_logps: Tensor  # (B,) float32, nats: log softmax(logits) of the token, the plain model at temperature 1
    status: Tensor  # (B,) uint8: 0 ok, 1 NaN or +inf in logits (or in contrast, at a plausible token), 2 all masked


def philox(seeds: Tensor, step: int) -> Tensor:
    """Uniform numbers in [0, 1), multiples of 2^-53, (B,) float64: words 0 and 1 of Philox4x32-10 (Salmon et al. 2011).

    seeds (B,) int64 are the keys, step is the low 64 bits of the counter.
    """
    k0, k1 = seeds & _WORD, (seeds >> 32) & _WORD
    zero = torch.zeros_like(seeds)
    x0, x1, x2, x3 = zero + (step & _WORD), zero + (step >> 32 & _WORD), zero, zero
    for _ in range(10):
        # 64-bit products wrap; the bits are right, and >> copies the sign, hence the mask.
        a, b = x0 * 0xD2511F53, x2 * 0xCD9E8D57
        x0, x1 = ((b >> 32) & _WORD) ^ x1 ^ k0, b & _WORD
        x2, x3 = ((a >> 32) & _WORD) ^ x3 ^ k1, a & _WORD
        k0, k1 = (k0 + 0x9E3779B9) & _WORD, (k1 + 0xBB67AE85) & _WORD
    return ((x0 >> 5) * 2**26 + (x1 >> 6)).double() * 2.0**-53


def _combine(l: Tensor, contrast: Tensor | None, alpha: float, plausibility: float) -> tuple[Tensor, Tensor]:
    """c, and the tokens that a mask or the plausibility constraint takes out; NaN stays NaN. l as accumulated."""
    masked = l == _LOWEST
    if plausibility > 0:  # the largest number: a NaN makes no token implausible
        top = l.masked_fill(l.isnan(), _LOWEST).amax(dim=1, keepdim=True)
        masked |= l < top + math.log(plausibility)
    c = l
    if contrast is not None:
        contrast = contrast.to(l.dtype)
        masked |= contrast == _LOWEST
        c = (1 + alpha) * l - alpha * contrast
    return c.masked_fill(masked, _LOWEST), masked


def _logits(logits: Tensor, contrast: Tensor, alpha: float, plausibility: float) -> Tensor:
    l = logits.to(_result_dtype(logits.dtype))
    return _combine(l, contrast, alpha, plausibility)[0] if l.numel() else torch.empty_like(l)


def _sample(
    logits: Tensor,
    contrast: Tensor | None,
    seeds: Tensor,
    step: int,
    alpha: float,
    plausibility: float,
    temperature: float,
    top_k: int,
    top_p: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    l = logits.float()
    c, out = _combine(l, contrast, alpha, plausibility)
    infinite = ~(l < math.inf)
    if contrast is not None:
        infinite |= ~out & ~((contrast < math.inf) & (c < math.inf))
    failed, masked = infinite.any(dim=1), (c == _LOWEST).all(dim=1)
    status = torch.where(failed, NOT_FINITE, torch.where(masked, ALL_MASKED, OK)).to(torch.uint8)
    c = c.masked_fill((status != OK)[:, None], 0.0)

    if temperature == 0:
        tokens = c.argmax(dim=1)
        logps = torch.zeros_like(c[:, 0])
    else:
        ordered = top_k > 0 or top_p < 1
        values, ids = c.sort(dim=1, descending=True, stable=True) if ordered else (c, None)
        scaled = (values - values.amax(dim=1, keepdim=True)) * inverse_temperature(temperature)
        weights = scaled.exp().double()
        if top_k > 0:
            weights[:, top_k:] = 0
        if top_p < 1:
            running = weights.cumsum(dim=1)
            weights *= running - weights < top_p * running[:, -1:]
        running = weights.cumsum(dim=1)
        total = running[:, -1:]
        # The product may round up to the total itself; the last token that has a weight then takes it.
        position = torch.minimum(
            torch.searchsorted(running, philox(seeds, step)[:, None] * total, right=True),
            (running < total).sum(dim=1, keepdim=True),
        )
        tokens = (position if ids is None else ids.gather(1, position))[:, 0]
        logps = (scaled.gather(1, position) - total.log())[:, 0].float()

    model_logps = l.gather(1, tokens[:, None])[:, 0] - l.logsumexp(dim=1)
    wrong = status != OK
    return (
        tokens.masked_fill(wrong, -1),
        logps.masked_fill(wrong, math.nan),
        model_logps.masked_fill(wrong, math.nan),
        status,
    )


def _result_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def inverse_temperature(temperature: float) -> float:
    """1 / temperature within float32's normal numbers, so that neither 0 * inf nor inf * 0 can appear."""
    return min(max(1 / max(temperature, 2.0**-126), 2.0**-126), 2.0**126)


def _logits_fake(logits: Tensor, contrast: Tensor, alpha: float, plausibility: float) -> Tensor:
    return logits.new_empty(logits.shape, dtype=_result_dtype(logits.dtype))


def _sample_fake(logits: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rows = logits.shape[:1]
    return (
        logits.new_empty(rows, dtype=torch.int64),
        logits.new_empty(rows, dtype=torch.float32),
        logits.new_empty(rows, dtype=torch.float32),
        logits.new_empty(rows, dtype=torch.uint8),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    logits, contrast, ctx.alpha, _ = inputs
    ctx.dtypes = logits.dtype, contrast.dtype
    ctx.save_for_backward(output)


def _logits_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
    # dc/dl = 1 + alpha and dc/dl' = -alpha where the token survives. Masked tokens get 0: c is constant there.
    (c,) = ctx.saved_tensors
    kept = grad.masked_fill(c == _LOWEST, 0.0)
    return (
        ((1 + ctx.alpha) * kept).to(ctx.dtypes[0]) if ctx.needs_input_grad[0] else None,
        (-ctx.alpha * kept).to(ctx.dtypes[1]) if ctx.needs_input_grad[1] else None,
        None,
        None,
    )


_LIBRARY.impl("contrastive_logits", _logits, "CompositeExplicitAutograd")
_LIBRARY.impl("contrastive_sample", _sample, "CompositeExplicitAutograd")
torch.library.register_fake("synpo::contrastive_logits", _logits_fake, lib=_LIBRARY)
torch.library.register_fake("synpo::contrastive_sample", _sample_fake, lib=_LIBRARY)
torch.library.register_autograd(
    "synpo::contrastive_logits", _logits_backward, setup_context=_setup_context, lib=_LIBRARY
)


def contrastive_logits(
    logits: Tensor, contrast: Tensor, *, alpha: float = 0.5, plausibility: float = 0.0
) -> Tensor:
    """The combined logits c of this module's first lines: (B, V) float32, float64 for float64 inputs.

    Equivalent to, for inputs without masked tokens::

        c = (1 + alpha) * logits.float() - alpha * contrast.float()
        c[logits < logits.amax(-1, keepdim=True) + log(plausibility)] = -inf

    logits and contrast: (B, V) of one dtype (float64, float32, bfloat16, float16) on one device, any row stride.
    Differentiable in both; the gradient is 0 at masked tokens. alpha >= 0 is the strength; plausibility in [0, 1], 0
    switches the constraint off. Errors: TypeError for dtypes, ValueError for shapes, devices and values out of range.
    """
    _check_rows(logits, contrast, (torch.float64, *_LOW_AND_SINGLE))
    _check_law(alpha, plausibility)
    c: Tensor = torch.ops.synpo.contrastive_logits(_rows(logits), _rows(contrast), alpha, plausibility)
    return c


def contrastive_sample(
    logits: Tensor,
    contrast: Tensor | None = None,
    *,
    alpha: float = 0.5,
    plausibility: float = 0.0,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int | Tensor | None = None,
    step: int = 0,
) -> SampleOutput:
    """Draw one token a row from the law q of this module's first lines. Not differentiable.

    logits (B, V) float32, bfloat16 or float16; contrast the same, or None to sample from logits alone (plausibility is
    then min-p). Any row stride, so the halves of one (2B, V) tensor serve as they are.

    temperature 0 is greedy. top_k 0 and top_p 1 keep everything; top_k comes first, top_p renormalises what it left and
    keeps the token that crosses; ties go to the lowest id. seed: (B,) int64, one stream a row, or an int s meaning
    s, s + 1, ... by row, or None for fresh seeds from torch's generator. step: the position in the streams, 0 <= step
    < 2^63. The same seed, step and logits give the same token in any batch, order and run on one kind of device.

    Bad numbers never raise and never wait for the device: they end their own row (SampleOutput.status). Errors:
    TypeError for dtypes, ValueError for shapes, devices and values out of range.
    """
    _check_rows(logits, contrast, _LOW_AND_SINGLE)
    _check_law(alpha, plausibility)
    if not 0 <= temperature < math.inf:
        raise ValueError(f"temperature is {temperature}; it must be finite and >= 0 (0 is greedy)")
    if top_k < 0:
        raise ValueError(f"top_k is {top_k}; it must be >= 0 (0 keeps every token)")
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p is {top_p}; it must be in (0, 1] (1 keeps every token)")
    if not 0 <= step < 2**63:
        raise ValueError(f"step is {step}; it must be >= 0 and less than 2^63")
    contrast = None if contrast is None else _rows(contrast.detach())
    seeds = _seeds(seed, logits)
    return SampleOutput(
        *torch.ops.synpo.contrastive_sample(
            _rows(logits.detach()), contrast, seeds, step, alpha, plausibility, temperature, top_k, top_p
        )
    )


_LOW_AND_SINGLE = (torch.float32, torch.bfloat16, torch.float16)


def _rows(x: Tensor) -> Tensor:
    """x with neighbouring tokens side by side in memory; rows may lie anywhere."""
    # Not contiguous(): it takes one token, or no row, of any stride as they are.
    return x if x.stride(1) == 1 else x.clone(memory_format=torch.contiguous_format)


def _seeds(seed: int | Tensor | None, logits: Tensor) -> Tensor:
    rows = len(logits)
    if seed is None:
        return torch.randint(2**63 - 1, (rows,), dtype=torch.int64, device=logits.device)
    if isinstance(seed, Tensor):
        if seed.dtype != torch.int64:
            raise TypeError(f"seed has dtype {seed.dtype}; int64 is needed")
        if seed.shape != (rows,):
            raise ValueError(f"seed has shape {tuple(seed.shape)}; expected one per row of logits, ({rows},)")
        if seed.device != logits.device:
            raise ValueError(f"logits are on {logits.device} but seed on {seed.device}")
        return seed
    if not -(2**63) <= seed <= 2**63 - max(rows, 1):
        raise ValueError(f"seed is {seed}; it and those of the rows behind it must fit a signed 64-bit integer")
    return torch.arange(rows, dtype=torch.int64, device=logits.device) + seed


def _check_rows(logits: Tensor, contrast: Tensor | None, dtypes: tuple[torch.dtype, ...]) -> None:
    if logits.dtype not in dtypes:
        allowed = ", ".join(str(d).removeprefix("torch.") for d in dtypes)
        raise TypeError(f"logits have dtype {logits.dtype}; allowed: {allowed}")
    if logits.ndim != 2 or logits.shape[1] == 0:
        raise ValueError(f"logits have shape {tuple(logits.shape)}; expected (B, V) with V >= 1")
    if contrast is None:
        return
    if contrast.dtype != logits.dtype:
        raise TypeError(f"logits are {logits.dtype} but contrast is {contrast.dtype}: give both one dtype")
    if contrast.ndim == 2 and contrast.shape[1] != logits.shape[1]:
        raise ValueError(
            f"contrast has a vocabulary of {contrast.shape[1]} but logits one of {logits.shape[1]}: both views must "
            "come from one model"
        )
    if contrast.shape != logits.shape:
        raise ValueError(f"contrast has shape {tuple(contrast.shape)}; expected that of logits, {tuple(logits.shape)}")
    if contrast.device != logits.device:
        raise ValueError(f"logits are on {logits.device} but contrast on {contrast.device}")


def _check_law(alpha: float, plausibility: float) -> None:
    if not 0 <= alpha < math.inf:
        raise ValueError(f"alpha is {alpha}; it must be finite and >= 0")
    if not 0 <= plausibility <= 1:
        raise ValueError(f"plausibility is {plausibility}; it must be in [0, 1] (0 switches it off)")
