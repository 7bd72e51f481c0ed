"""Fused kernels for preference training: per-token log-probs and preference losses without full-vocabulary logits."""

from . import native, objectives
from .contrastive import SampleOutput, contrastive_logits, contrastive_sample
from .linear_logps import linear_logps
from .pair_loss import FusedPreferenceLoss, FusedSynPOLoss, PreferenceOutput

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
]
