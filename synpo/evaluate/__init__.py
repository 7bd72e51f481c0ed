"""Evaluation: captions against references, judged scores, differences with their confidence intervals."""

from .bootstrap import Change, paired_bootstrap

__all__ = ["Change", "paired_bootstrap"]
