"""Preference objectives on per-token log-probs: torch only, differentiable, in whatever float dtype the log-probs have.

Every function has one shape of call::

    objective(logps (N,), cu_seqlens (2B+1,), *, ref_logps=None, **hyperparameters) -> (B,) per-pair losses

``logps`` holds the log-probs (nats) of the N valid answer tokens, the B chosen sequences first and their rejected
answers after them in the same order; ``cu_seqlens`` holds the boundaries: sequence i is
``logps[cu_seqlens[i]:cu_seqlens[i + 1]]`` and is never empty. ``ref_logps`` are the reference model's, either (N,)
per token or (2B,) sums per sequence, or None for zeros where an objective has no use for a reference; an objective
that needs one raises ValueError without it.

Letters: l = sum of a sequence's log-probs, m = their mean, h = (l+ - ref+) - (l- - ref-).
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

__all__ = [
    "REGISTRY",
    "Objective",
    "cpo",
    "dpo",
    "dpop",
    "ipo",
    "kto",
    "orpo",
    "resolve",
    "segment_sums",
    "simpo",
    "synpo",
]


_FORMS = ("sigmoid", "logsigmoid")


def segment_sums(values: Tensor, cu_seqlens: Tensor) -> Tensor:
    """(N,) values -> (S,) sums over the S segments that ``cu_seqlens`` (S+1,) bounds; deterministic on every device."""
    return torch.segment_reduce(values, "sum", offsets=cu_seqlens.to(torch.int64), unsafe=True)


def _means(values: Tensor, cu_seqlens: Tensor) -> Tensor:
    return segment_sums(values, cu_seqlens) / cu_seqlens.diff().to(values.dtype)


def _halves(per_sequence: Tensor) -> tuple[Tensor, Tensor]:
    chosen, rejected = per_sequence.chunk(2)
    return chosen, rejected


def _log_ratios(
    logps: Tensor, cu_seqlens: Tensor, ref_logps: Tensor | None, name: str
) -> tuple[Tensor, Tensor, Tensor]:
    """l - ref for chosen and rejected, and ref of the chosen: (B,) each."""
    if ref_logps is None:
        raise ValueError(
            f"{name} needs ref_logps: the reference model's log-probs, (N,) per token or (2B,) sums per sequence"
        )
    if ref_logps.shape == logps.shape:
        ref = segment_sums(ref_logps.to(logps.dtype), cu_seqlens)
    elif ref_logps.shape == (cu_seqlens.numel() - 1,):
        ref = ref_logps.to(logps.dtype)
    else:
        raise ValueError(
            f"ref_logps has shape {tuple(ref_logps.shape)}; expected ({logps.numel()},) per valid token or "
            f"({cu_seqlens.numel() - 1},) sums per sequence"
        )
    chosen, rejected = _halves(segment_sums(logps, cu_seqlens) - ref)
    return chosen, rejected, ref.chunk(2)[0]


def synpo(
    logps: Tensor,
    cu_seqlens: Tensor,
    *,
    ref_logps: Tensor | None = None,
    alpha: float = 30.0,
    beta: float = 0.2,
    form: str = "sigmoid",
) -> Tensor:
    """rank(alpha (r+ - r-)) - beta q+ with r = exp(m), q = mean exp(log-prob): SynPO, arXiv 2506.00835.

    rank(u) = -sigmoid(u) for form "sigmoid" (what the release trains with), -logsigmoid(u) for form "logsigmoid".
    Errors: ValueError for another form.
    """
    chosen, rejected = _halves(_means(logps, cu_seqlens).exp())
    language = _means(logps.exp(), cu_seqlens).chunk(2)[0]
    if form not in _FORMS:
        raise ValueError(f"form is {form!r}; allowed: {', '.join(_FORMS)}")
    gap = alpha * (chosen - rejected)
    rank = gap.sigmoid() if form == "sigmoid" else logsigmoid(gap)
    return -rank - beta * language


def dpo(logps: Tensor, cu_seqlens: Tensor, *, ref_logps: Tensor | None = None, beta: float = 0.1) -> Tensor:
    """-log sigmoid(beta h): arXiv 2305.18290, equation 7."""
    chosen, rejected, _ = _log_ratios(logps, cu_seqlens, ref_logps, "dpo")
    return -logsigmoid(beta * (chosen - rejected))


def dpop(
    logps: Tensor, cu_seqlens: Tensor, *, ref_logps: Tensor | None = None, beta: float = 0.1, dpop_lambda: float = 50.0
) -> Tensor:
    """-log sigmoid(beta (h - lambda max(0, ref+ - l+))): arXiv 2402.13228, equation 3."""
    chosen, rejected, _ = _log_ratios(logps, cu_seqlens, ref_logps, "dpop")
    return -logsigmoid(beta * (chosen - rejected - dpop_lambda * (-chosen).clamp(min=0)))


def ipo(logps: Tensor, cu_seqlens: Tensor, *, ref_logps: Tensor | None = None, beta: float = 0.1) -> Tensor:
    """(h - 1/(2 beta))^2, h on length-averaged log-probs as the common trainers do: arXiv 2310.12036, equation 17."""
    chosen, rejected, _ = _log_ratios(logps, cu_seqlens, ref_logps, "ipo")
    chosen_tokens, rejected_tokens = _halves(cu_seqlens.diff().to(logps.dtype))
    return (chosen / chosen_tokens - rejected / rejected_tokens - 1 / (2 * beta)) ** 2


def simpo(
    logps: Tensor, cu_seqlens: Tensor, *, ref_logps: Tensor | None = None, beta: float = 2.0, gamma: float = 0.5
) -> Tensor:
    """-log sigmoid(beta m+ - beta m- - gamma): arXiv 2405.14734, equation 6."""
    chosen, rejected = _halves(_means(logps, cu_seqlens))
    return -logsigmoid(beta * (chosen - rejected) - gamma)


def kto(logps: Tensor, cu_seqlens: Tensor, *, ref_logps: Tensor | None = None, beta: float = 0.1) -> Tensor:
    """(2 - sigmoid(beta (h+ - z-)) - sigmoid(beta (z+ - h-))) / 2, h+- = l+- - ref+-: arXiv 2402.01306, paired.

    z+- = max(0, batch mean of h+-) without gradient: the batch's estimate of the KL term, so the pairs of one call
    are coupled.
    """
    chosen, rejected, _ = _log_ratios(logps, cu_seqlens, ref_logps, "kto")
    chosen_kl, rejected_kl = chosen.detach().mean().clamp(min=0), rejected.detach().mean().clamp(min=0)
    return 1 - ((beta * (chosen - rejected_kl)).sigmoid() + (beta * (chosen_kl - rejected)).sigmoid()) / 2


def cpo(logps: Tensor, cu_seqlens: Tensor, *, ref_logps: Tensor | None = None, beta: float = 0.1) -> Tensor:
    """-log sigmoid(beta (l+ - l-)) - m+: arXiv 2401.08417, equation 5, the NLL averaged over a sequence's tokens."""
    chosen, rejected = _halves(segment_sums(logps, cu_seqlens))
    return -logsigmoid(beta * (chosen - rejected)) - _means(logps, cu_seqlens).chunk(2)[0]


def orpo(logps: Tensor, cu_seqlens: Tensor, *, ref_logps: Tensor | None = None, beta: float = 0.1) -> Tensor:
    """-m+ - beta log sigmoid(log odds+ - log odds-), log odds = m - log(1 - exp(m)): arXiv 2403.07691, equations 6-7.

    beta is the paper's lambda. m is held at -1e-7 or below, where the odds are still finite.
    """
    chosen, rejected = _halves(_means(logps, cu_seqlens))
    chosen_odds, rejected_odds = (
        m - (-torch.expm1(m)).log() for m in (chosen.clamp(max=-1e-7), rejected.clamp(max=-1e-7))
    )
    return -chosen - beta * logsigmoid(chosen_odds - rejected_odds)


class Objective(NamedTuple):
    """What a caller has to know of an objective beside its function."""

    function: Callable[..., Tensor]
    defaults: dict[str, float | str]
    reference: bool = False  # needs ref_logps
    coupled: bool = False  # a pair's loss depends on the other pairs of the call
    reward: str = "beta_sum"  # which quantity of a sequence the metrics call its reward

    def rewards(
        self, sums: Tensor, means: Tensor, ref_sums: Tensor | None, hyperparameters: dict[str, float | str]
    ) -> Tensor:
        """Rewards of the sequences from their summed and mean log-probs, all (2B,)."""
        if self.reward == "probability":
            return means.exp()
        base = means if self.reward == "beta_mean" else sums if ref_sums is None else sums - ref_sums
        return float(hyperparameters.get("beta", 1.0)) * base


REGISTRY: dict[str, Objective] = {
    "synpo": Objective(synpo, {"alpha": 30.0, "beta": 0.2, "form": "sigmoid"}, reward="probability"),
    "dpo": Objective(dpo, {"beta": 0.1}, reference=True),
    "dpop": Objective(dpop, {"beta": 0.1, "dpop_lambda": 50.0}, reference=True),
    "ipo": Objective(ipo, {"beta": 0.1}, reference=True),
    "simpo": Objective(simpo, {"beta": 2.0, "gamma": 0.5}, reward="beta_mean"),
    "kto": Objective(kto, {"beta": 0.1}, reference=True, coupled=True),
    "cpo": Objective(cpo, {"beta": 0.1}),
    "orpo": Objective(orpo, {"beta": 0.1}, reward="beta_mean"),
}
_POSITIVE = {"alpha", "beta"}


def resolve(name: str, hyperparameters: dict[str, float | str]) -> dict[str, float | str]:
    """The full hyperparameters of a named objective: defaults, overridden by what is given (None = the default).

    Errors: ValueError for an unknown name, an unknown hyperparameter or a value out of range.
    """
    if name not in REGISTRY:
        raise ValueError(f"objective {name!r} is unknown; known: {', '.join(REGISTRY)}")
    defaults = REGISTRY[name].defaults
    unknown = sorted(set(hyperparameters) - set(defaults))
    if unknown:
        raise ValueError(f"{name} has no hyperparameter {unknown[0]!r}; it takes {', '.join(defaults)}")
    full = defaults | {key: value for key, value in hyperparameters.items() if value is not None}
    for key, value in full.items():
        if key == "form":
            if value not in _FORMS:
                raise ValueError(f"form is {value!r}; allowed: {', '.join(_FORMS)}")
            continue
        if isinstance(value, str) or not math.isfinite(value):
            raise ValueError(f"{key} is {value!r}; a finite number is needed")
        # SynPO's and ORPO's beta weighs an extra term, so 0 switches that term off; elsewhere beta is an inverse
        # temperature.
        lowest_is_zero = key not in _POSITIVE or (key == "beta" and name in ("synpo", "orpo"))
        if value < 0 or (value == 0 and not lowest_is_zero):
            raise ValueError(f"{key} is {value}; {name} needs {key} {'>= 0' if lowest_is_zero else '> 0'}")
    return full
