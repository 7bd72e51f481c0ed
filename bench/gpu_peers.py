"""Peers that run on a GPU alone, each from its released package and at its best; implementations.py lists them.

Their packages are imported at the first call: an import that fails is the reason a row records.
"""

import os

import torch
from torch import Tensor

_QUACK_CHUNK = 4096  # tokens; its own default
_TRL_CHUNK = 32768  # columns; what its trainers use


def hopper_only(device: torch.device) -> str | None:
    """Why kernels written for sm_90 do not run on this device, or None."""
    if device.type == "cuda" and torch.cuda.get_device_capability(device) == (9, 0):
        return None
    return "its kernels are for compute capability 9.0"


def liger_cute_logps(hidden: Tensor, weight: Tensor, labels: Tensor, softcap: float | None) -> Tensor:
    """liger-kernel's CuTe kernels: logits recomputed in the backward pass, the head's gradient made in any case."""
    # Its check of the targets makes the host wait at every call.
    os.environ["LIGER_SCALED_CE_SM90_VALIDATE_TARGETS"] = "0"
    from liger_kernel.ops.fused_linear_scaled_cross_entropy import LigerFusedLinearScaledCrossEntropyFunction

    return -LigerFusedLinearScaledCrossEntropyFunction.apply(hidden, weight, labels)


def trl_logps(hidden: Tensor, weight: Tensor, labels: Tensor, softcap: float | None) -> Tensor:
    """trl's chunked log-probs, as its trainers call them on the valid tokens."""
    from trl.kernels import ChunkedLogProbFunction

    scored = (labels != -100).nonzero()[:, 0]
    rows, targets = hidden[scored], labels[scored]
    logps = ChunkedLogProbFunction.apply(rows, weight, None, targets, 1.0, _TRL_CHUNK, softcap, 1.0, ())[0]
    return logps.new_zeros(len(labels)).index_copy(0, scored, logps)


def quack_cross_entropy(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """quack's mean cross-entropy: a scalar, so its gradients are ready after the forward pass."""
    from quack.linear_cross_entropy import chunked_linear_cross_entropy

    return chunked_linear_cross_entropy(hidden, weight, labels, chunk_size=_QUACK_CHUNK)
