"""Fused kernels for preference training: per-token log-probs and preference losses without full-vocabulary logits."""

import torch

from . import native, objectives
from .contrastive import SampleOutput, contrastive_logits, contrastive_sample
from .linear_logps import linear_logps
from .pair_loss import FusedPreferenceLoss, FusedSynPOLoss, PreferenceOutput
from .prefix_attention import prefix_attention

if torch.version.cuda is not None:  # a torch built for CUDA; triton comes with it
    from . import vocab_cuda

    vocab_cuda.register()

__all__ = [
    "FusedPreferenceLoss",
    "FusedSynPOLoss",
    "PreferenceOutput",
    "SampleOutput",
    "contrastive_logits",
    "contrastive_sample",
    "linear_logps",
    "native",
    "objectives",
    "prefix_attention",
]
