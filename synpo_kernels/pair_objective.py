"""An objective's value, its metrics, and dL / dl_t of every token, from the log-probs of whole pairs.

The objectives of objectives.py are evaluated by autograd on those few numbers. One has an op of its own here,
``synpo::synpo_loss``, which loss_triton.py overrides on CUDA.
"""

from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import objectives


class Evaluation(NamedTuple):
    """An objective's value on log-probs (n,) of B pairs."""

    metrics: tuple[Tensor, ...]  # what PreferenceOutput holds, in its order
    coef: Tensor  # (n,) c_t = d loss / d logps_t; (0,) where nobody asked


class BoundObjective(NamedTuple):
    """An objective bound to its hyperparameters and to the number of pairs its mean is over."""

    objective: str
    settings: dict[str, Any]
    pairs: int

    def evaluate(
        self, logps: Tensor, cu_seqlens: Tensor, ref_logps: Tensor | None, want_coef: bool = True
    ) -> Evaluation:
        """Loss = sum of these pairs' losses / pairs, the metrics, and the tokens' coefficients."""
        if self.objective == "synpo":
            *metrics, coef = torch.ops.synpo.synpo_loss(
                logps, cu_seqlens, **self.settings, pairs=self.pairs, want_coef=want_coef
            )
            return Evaluation(tuple(metrics), coef)
        return self.by_autograd(logps, cu_seqlens, ref_logps, want_coef)

    def by_autograd(self, logps: Tensor, cu_seqlens: Tensor, ref_logps: Tensor | None, want_coef: bool) -> Evaluation:
        """``evaluate`` through objectives.py and autograd."""
        function = partial(objectives.REGISTRY[self.objective].function, ref_logps=ref_logps, **self.settings)
        if want_coef:
            # Inside an op's kernel autograd is switched off one level below grad mode; the guard lifts that for these
            # few small tensors, so that each objective is written once, without a hand-made derivative beside it.
            autograd = torch._C.DispatchKey.AutogradFunctionality
            with torch.enable_grad(), torch._C._SetExcludeDispatchKeyGuard(autograd, False):
                leaf = logps.detach().requires_grad_()
                loss = function(leaf, cu_seqlens).sum() / self.pairs
                (coef,) = torch.autograd.grad(loss, leaf)
        else:
            loss, coef = function(logps, cu_seqlens).sum() / self.pairs, logps.new_empty(0)
        metrics = per_pair_metrics(logps, cu_seqlens, ref_logps, self.objective, self.settings)
        return Evaluation((loss.detach(), *metrics), coef)


def per_pair_metrics(
    logps: Tensor, cu_seqlens: Tensor, refs: Tensor | None, objective: str, hyperparameters: dict[str, Any]
) -> list[Tensor]:
    """The five per-pair metrics of PreferenceOutput."""
    sums = objectives.segment_sums(logps, cu_seqlens)
    lengths = cu_seqlens.diff().to(logps.dtype)
    means = sums / lengths
    rewards = objectives.REGISTRY[objective].rewards(sums, means, refs, hyperparameters)
    language = objectives.segment_sums(logps.exp(), cu_seqlens) / lengths
    # Copies: the outputs of an op must not share memory.
    return [x.clone() for x in (*means.chunk(2), *rewards.chunk(2), language.chunk(2)[0])]


def synpo_loss(
    logps: Tensor, cu_seqlens: Tensor, alpha: float, beta: float, form: str, pairs: int, want_coef: bool
) -> tuple[Tensor, ...]:
    """The op's kernel for any device."""
    loss = BoundObjective("synpo", {"alpha": alpha, "beta": beta, "form": form}, pairs)
    metrics, coef = loss.by_autograd(logps, cu_seqlens, None, want_coef)
    return *metrics, coef


_LIBRARY = torch.library.Library("synpo", "FRAGMENT")
_LIBRARY.define(
    "synpo_loss(Tensor logps, Tensor cu_seqlens, float alpha, float beta, str form, int pairs, bool want_coef)"
    " -> (Tensor loss, Tensor chosen_logps, Tensor rejected_logps, Tensor chosen_rewards, Tensor rejected_rewards,"
    " Tensor language, Tensor coef)"
)
_LIBRARY.impl("synpo_loss", synpo_loss, "CompositeExplicitAutograd")
