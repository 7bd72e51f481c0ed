"""Evaluation: captions against references, judged scores, differences with their confidence intervals.

    caption_metrics({"v1": "A dog runs."}, {"v1": ["A dog is running.", "The dog runs."]})

The judged scores (synpo.evaluate.judged) and the exports for other harnesses (synpo.evaluate.harness) are modules of
their own, so that this import stays light.
"""

from .bootstrap import Change, paired_bootstrap
from .captions import caption_metrics

__all__ = ["Change", "caption_metrics", "paired_bootstrap"]
