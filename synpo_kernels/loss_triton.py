"""SynPO's loss, its metrics and every token's coefficient in one launch: the inner op ``synpo_loss`` on CUDA.

For pair i of B, with l the log-probs of an answer's tokens, n their number, m = mean l, r = exp(m), q = mean exp(l):

    u = alpha (r+ - r-)        loss = (1 / pairs) sum_i (-rank(u) - beta q+)       rank = sigmoid, or log sigmoid
    d loss / d l+_t = -(rank'(u) alpha r+ + beta exp(l+_t)) / (n+ pairs)
    d loss / d l-_t = rank'(u) alpha r- / (n- pairs)

objectives.synpo is the reference; a test holds this copy to it. One block walks over the pairs: an answer's log-probs
are a few kilobytes, and one block needs no second launch to add up the loss, in an order that never changes.
"""

# Device kernels have no Python types.
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import pair_objective


@triton.jit(do_not_specialize=("B", "pairs"))  # one kernel for any number of pairs
def _synpo_kernel(
    logps, cu_seqlens, loss, chosen_logps, rejected_logps, chosen_rewards, rejected_rewards, language, coef,
    B, pairs, alpha, beta, SIGMOID: tl.constexpr, PAIRS: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    total = tl.zeros((PAIRS,), dtype=tl.float32)
    for first in range(0, B, PAIRS):
        i = first + tl.arange(0, PAIRS)
        mask = i < B
        chosen_start = tl.load(cu_seqlens + i, mask=mask, other=0)
        chosen_tokens = tl.load(cu_seqlens + i + 1, mask=mask, other=0) - chosen_start
        rejected_start = tl.load(cu_seqlens + B + i, mask=mask, other=0)
        rejected_tokens = tl.load(cu_seqlens + B + i + 1, mask=mask, other=0) - rejected_start

        chosen_sum = tl.zeros((PAIRS, TOKENS), dtype=tl.float32)
        chosen_probability = tl.zeros((PAIRS, TOKENS), dtype=tl.float32)
        for t in range(0, tl.max(chosen_tokens, axis=0), TOKENS):
            steps = t + tl.arange(0, TOKENS)
            inside = steps[None, :] < chosen_tokens[:, None]
            values = tl.load(logps + chosen_start[:, None] + steps[None, :], mask=inside, other=float("-inf"))
            chosen_sum += tl.where(inside, values, 0.0)
            chosen_probability += tl.exp(values)
        rejected_sum = tl.zeros((PAIRS, TOKENS), dtype=tl.float32)
        for t in range(0, tl.max(rejected_tokens, axis=0), TOKENS):
            steps = t + tl.arange(0, TOKENS)
            inside = steps[None, :] < rejected_tokens[:, None]
            rejected_sum += tl.load(logps + rejected_start[:, None] + steps[None, :], mask=inside, other=0.0)

        # Pairs beyond the last have no tokens; 1 keeps their unused numbers finite.
        chosen_n = tl.where(mask, chosen_tokens, 1).to(tl.float32)
        rejected_n = tl.where(mask, rejected_tokens, 1).to(tl.float32)
        chosen_mean = tl.sum(chosen_sum, axis=1) / chosen_n
        rejected_mean = tl.sum(rejected_sum, axis=1) / rejected_n
        chosen_reward = tl.exp(chosen_mean)
        rejected_reward = tl.exp(rejected_mean)
        q = tl.sum(chosen_probability, axis=1) / chosen_n
        u = alpha * (chosen_reward - rejected_reward)
        # e <= 1: neither form overflows, and both slopes keep their relative accuracy at both ends.
        e = tl.exp(-tl.abs(u))
        if SIGMOID:
            rank = tl.where(u < 0, e, 1.0) / (1.0 + e)
            slope = e / ((1.0 + e) * (1.0 + e))
        else:
            rank = tl.minimum(u, 0.0) - tl.log(1.0 + e)
            slope = tl.where(u < 0, 1.0, e) / (1.0 + e)
        total += tl.where(mask, -rank - beta * q, 0.0)
        tl.store(chosen_logps + i, chosen_mean, mask=mask)
        tl.store(rejected_logps + i, rejected_mean, mask=mask)
        tl.store(chosen_rewards + i, chosen_reward, mask=mask)
        tl.store(rejected_rewards + i, rejected_reward, mask=mask)
        tl.store(language + i, q, mask=mask)

        if coef is not None:
            shared = slope * alpha * chosen_reward
            for t in range(0, tl.max(chosen_tokens, axis=0), TOKENS):
                steps = t + tl.arange(0, TOKENS)
                inside = steps[None, :] < chosen_tokens[:, None]
                at = chosen_start[:, None] + steps[None, :]
                p = tl.exp(tl.load(logps + at, mask=inside, other=0.0))
                tl.store(coef + at, -(shared[:, None] + beta * p) / (chosen_n * pairs)[:, None], mask=inside)
            shared = slope * alpha * rejected_reward / (rejected_n * pairs)
            for t in range(0, tl.max(rejected_tokens, axis=0), TOKENS):
                steps = t + tl.arange(0, TOKENS)
                inside = steps[None, :] < rejected_tokens[:, None]
                at = rejected_start[:, None] + steps[None, :]
                tl.store(coef + at, tl.zeros((PAIRS, TOKENS), dtype=tl.float32) + shared[:, None], mask=inside)
    tl.store(loss, tl.sum(total, axis=0) / pairs)


def synpo_loss(
    logps: Tensor, cu_seqlens: Tensor, alpha: float, beta: float, form: str, pairs: int, want_coef: bool
) -> tuple[Tensor, ...]:
    """pair_objective.py's op ``synpo_loss``; float64 log-probs take its plain form."""
    if logps.dtype == torch.float64:
        return pair_objective.synpo_loss(logps, cu_seqlens, alpha, beta, form, pairs, want_coef)
    B = (len(cu_seqlens) - 1) // 2
    loss, coef = logps.new_empty(()), logps.new_empty(len(logps) if want_coef else 0)
    metrics = [logps.new_empty(B) for _ in range(5)]
    _synpo_kernel[(1,)](
        logps, cu_seqlens, loss, *metrics, coef if want_coef else None, B, pairs, alpha, beta,
        SIGMOID=form == "sigmoid", PAIRS=8, TOKENS=512, num_warps=8, enable_fp_fusion=True,
    )  # fmt: skip
    return loss, *metrics, coef
