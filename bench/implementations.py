"""The implementations: one way each to the same numbers, every peer from its released package and at its best.

``logps`` gives per-token log-probs; ``pair`` a pair loss and the answers' mean log-probs, by default the loss as
everyone writes it over ``logps``. All take hidden (N, H), weight (V, H), labels (N,) and a softcap; gradients come by
autograd wherever an input asks for them.
"""

from collections.abc import Callable
from functools import cache
from importlib.util import find_spec
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import synpo_kernels

from .cases import OPS, Case, Inputs
from .gpu_peers import hopper_only, liger_cute_logps, quack_cross_entropy, trl_logps

ALPHA, BETA = 30.0, 0.2  # SynPO
SIMPO_BETA, SIMPO_GAMMA = 2.0, 0.5
IGNORED = -100  # the label of a position that is not scored
_CHUNK_ROWS = 256

Logps = Callable[[Tensor, Tensor, Tensor, float | None], Tensor]
Pair = Callable[[str, Tensor, Tensor, Tensor, Tensor, float | None], tuple[Tensor, Tensor]]


def pair_loss(op: str, logps: Tensor, labels: Tensor, cu_seqlens: Tensor) -> tuple[Tensor, Tensor]:
    """Mean loss over pairs of rows of equal length, and the answers' mean log-probs (2B,)."""
    logps, valid = (x.view(cu_seqlens.shape[0] - 1, -1) for x in (logps, labels != IGNORED))
    means = logps.sum(1) / valid.sum(1)
    chosen, rejected = means.chunk(2)
    if op == "simpo_loss":
        return -F.logsigmoid(SIMPO_BETA * (chosen - rejected) - SIMPO_GAMMA).mean(), means
    language = (logps.exp() * valid).sum(1).chunk(2)[0] / valid.sum(1).chunk(2)[0]
    return (-torch.sigmoid(ALPHA * (chosen.exp() - rejected.exp())) - BETA * language).mean(), means


def naive_logps(hidden: Tensor, weight: Tensor, labels: Tensor, softcap: float | None) -> Tensor:
    logits = hidden @ weight.T
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    valid = labels != IGNORED
    return logits.float().log_softmax(-1).gather(-1, labels.where(valid, 0)[:, None])[:, 0] * valid


def naive_pair(
    op: str, hidden: Tensor, weight: Tensor, labels: Tensor, cu_seqlens: Tensor, softcap: float | None
) -> tuple[Tensor, Tensor]:
    return pair_loss(op, naive_logps(hidden, weight, labels, softcap), labels, cu_seqlens)


@cache
def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    # At the first call, not on import: torch.compile loads its compiler at once.
    return torch.compile(function)


def compiled_logps(hidden: Tensor, weight: Tensor, labels: Tensor, softcap: float | None) -> Tensor:
    return _compiled(naive_logps)(hidden, weight, labels, softcap)


def compiled_pair(
    op: str, hidden: Tensor, weight: Tensor, labels: Tensor, cu_seqlens: Tensor, softcap: float | None
) -> tuple[Tensor, Tensor]:
    return _compiled(naive_pair)(op, hidden, weight, labels, cu_seqlens, softcap)


def chunked_logps(hidden: Tensor, weight: Tensor, labels: Tensor, softcap: float | None) -> Tensor:
    """The naive loss over blocks of rows, each computed again in the backward pass."""
    return torch.cat([
        checkpoint(naive_logps, h, weight, y, softcap, use_reentrant=False)
        for h, y in zip(hidden.split(_CHUNK_ROWS), labels.split(_CHUNK_ROWS), strict=True)
    ])  # fmt: skip


def torch_logps(hidden: Tensor, weight: Tensor, labels: Tensor, softcap: float | None) -> Tensor:
    options = nn.LinearCrossEntropyOptions()
    return -F.linear_cross_entropy(hidden, weight, labels, reduction="none", options=options)


def cce_logps(
    hidden: Tensor, weight: Tensor, labels: Tensor, softcap: float | None, filter_eps: str | None = "auto"
) -> Tensor:
    from cut_cross_entropy import linear_cross_entropy

    if hidden.is_cuda:
        return -linear_cross_entropy(
            hidden, weight, labels, softcap=softcap, reduction="none", filter_eps=filter_eps, impl="cce"
        )
    return -linear_cross_entropy(hidden, weight, labels, softcap=softcap, reduction="none", impl="torch_compile")


def cce_exact_logps(hidden: Tensor, weight: Tensor, labels: Tensor, softcap: float | None) -> Tensor:
    return cce_logps(hidden, weight, labels, softcap, filter_eps=None)


@cache
def _liger_synpo() -> type[torch.autograd.Function]:
    """SynPO on liger's preference base.

    The base hands a loss the answers' mean log-probs alone; SynPO also needs the mean probability of the chosen
    tokens, so the subclass replaces the base's loss of a chunk. Chunking, compilation and gradients stay liger's.
    """
    from liger_kernel.chunked_loss.fused_linear_preference import LigerFusedLinearPreferenceBase as Base

    def chunk_loss(hidden, weight, target, *, full_target, **_):  # type: ignore[no-untyped-def]
        valid = target != IGNORED
        logps = (hidden @ weight.t()).float().log_softmax(-1).gather(-1, target.where(valid, 0)[..., None])[..., 0]
        means = (logps * valid).sum(1) / valid.sum(1)
        chosen, rejected = means.chunk(2)
        rank = -torch.sigmoid(ALPHA * (chosen.exp() - rejected.exp()))
        language = (logps.exp() * valid).sum(1).chunk(2)[0] / valid.sum(1).chunk(2)[0]
        loss = (rank - BETA * language).sum() / (full_target.shape[0] // 2)
        zero = loss.detach() * 0
        return loss, (chosen, rejected, zero, zero, zero)

    class LigerSynPO(Base):
        @classmethod
        def forward(cls, ctx, hidden, weight, target):  # type: ignore[no-untyped-def]
            with patch.object(Base, "_compute_loss", staticmethod(chunk_loss)):
                return super().forward(cls, ctx, hidden, weight, target, compute_nll_loss=False)

        @staticmethod
        def preference_loss_fn(*_: Tensor) -> Tensor:
            raise AssertionError("the chunk's loss stands in chunk_loss")

        @staticmethod
        def backward(ctx, *grads):  # type: ignore[no-untyped-def]
            return Base.backward(ctx, grads)[:3]

    return LigerSynPO


def liger_pair(
    op: str, hidden: Tensor, weight: Tensor, labels: Tensor, cu_seqlens: Tensor, softcap: float | None
) -> tuple[Tensor, Tensor]:
    from liger_kernel.chunked_loss import LigerFusedLinearSimPOLoss

    answers = cu_seqlens.shape[0] - 1
    padded, target = hidden.view(answers, -1, hidden.shape[1]), labels.view(answers, -1)
    if op == "synpo_loss":
        loss, (chosen, rejected, *_) = _liger_synpo().apply(padded, weight, target)
    else:
        simpo = LigerFusedLinearSimPOLoss(beta=SIMPO_BETA, gamma=SIMPO_GAMMA, compute_nll_loss=False)
        loss, (chosen, rejected, *_) = simpo(weight, padded, target)
    return loss, torch.cat([chosen, rejected])


def ours_logps(hidden: Tensor, weight: Tensor, labels: Tensor, softcap: float | None) -> Tensor:
    return synpo_kernels.linear_logps(hidden, weight, labels, softcap=softcap)


def ours_pair(
    op: str, hidden: Tensor, weight: Tensor, labels: Tensor, cu_seqlens: Tensor, softcap: float | None
) -> tuple[Tensor, Tensor]:
    if op == "synpo_loss":
        loss_fn: nn.Module = synpo_kernels.FusedSynPOLoss(ALPHA, BETA, softcap=softcap)
    else:
        loss_fn = synpo_kernels.FusedPreferenceLoss("simpo", beta=SIMPO_BETA, gamma=SIMPO_GAMMA, softcap=softcap)
    out = loss_fn(hidden, weight, labels, cu_seqlens=cu_seqlens)
    return out.loss, torch.cat([out.chosen_logps, out.rejected_logps])


class Implementation(NamedTuple):
    logps: Logps | None  # None: whole losses alone
    pair: Pair | None = None  # None: the loss as everyone writes it, over logps
    scalar: Callable[[Tensor, Tensor, Tensor], Tensor] | None = None  # cross_entropy; None: the mean of logps
    package: str | None = None  # what must be installed
    softcap: bool = True
    cuda_only: str | None = None  # why not a CPU
    hopper_only: bool = False
    compiles: bool = False  # its first call at a shape compiles

    def cannot(self, op: str, case: Case, device: torch.device) -> str | None:
        """Why this implementation cannot run here, or None."""
        if self.package is not None and find_spec(self.package) is None:
            return f"the package {self.package} is not installed"
        whole = self.scalar if op == "cross_entropy" else self.pair if OPS[op] is not None else None
        if self.logps is None and whole is None:
            return f"it has neither {op} nor per-token log-probs"
        if case.softcap is not None and not self.softcap:
            return "it has no softcap"
        if self.cuda_only is not None and device.type == "cpu":
            return self.cuda_only
        if self.hopper_only and (reason := hopper_only(device)):
            return reason
        if self.logps is torch_logps and not hasattr(F, "linear_cross_entropy"):
            return f"torch {torch.__version__} has no linear_cross_entropy; 2.13 has"
        return None

    def bind(self, op: str, inputs: Inputs) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
        """(hidden, weight) -> what is differentiated, and the log-probs to check: those of ``oracle.compare``."""
        labels, cu_seqlens, softcap = inputs.labels, inputs.cu_seqlens, inputs.softcap

        def run(hidden: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
            if OPS[op] is not None and self.pair is not None:
                return self.pair(op, hidden, weight, labels, cu_seqlens, softcap)
            if op == "cross_entropy" and self.scalar is not None:
                loss = self.scalar(hidden, weight, labels)
                return loss, -loss[None]
            assert self.logps is not None
            logps = self.logps(hidden, weight, labels, softcap)
            if op == "cross_entropy":
                return -logps.mean(), logps
            return (logps, logps) if OPS[op] is None else pair_loss(op, logps, labels, cu_seqlens)

        return run


_TRITON = "its Triton kernels need a GPU"
_CUTE = "its CuTe kernels need a GPU"
IMPLEMENTATIONS: dict[str, Implementation] = {
    "naive": Implementation(naive_logps),
    "torch-compile": Implementation(compiled_logps, compiled_pair, compiles=True),
    "torch-chunked": Implementation(chunked_logps),
    "torch-linear-cross-entropy": Implementation(torch_logps, softcap=False),
    "liger": Implementation(None, liger_pair, package="liger_kernel", softcap=False, compiles=True),
    "cut-cross-entropy": Implementation(cce_logps, package="cut_cross_entropy", compiles=True),
    "cut-cross-entropy-exact": Implementation(cce_exact_logps, package="cut_cross_entropy", cuda_only=_TRITON),
    "liger-cute": Implementation(
        liger_cute_logps, package="liger_kernel", softcap=False, cuda_only=_CUTE, hopper_only=True, compiles=True
    ),
    "quack": Implementation(
        None, scalar=quack_cross_entropy, package="quack", softcap=False, cuda_only=_CUTE, compiles=True
    ),
    "trl-chunked": Implementation(trl_logps, package="trl", cuda_only=_TRITON),
    "ours": Implementation(ours_logps, ours_pair),
}
