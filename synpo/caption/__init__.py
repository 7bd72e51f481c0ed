"""Captions from models: contrastive decoding, candidates from one prefill, retrospective passes."""

from .captioner import Caption, Captioner, UnusableFrames
from .decoding import Generated, contrastive_decode
from .features import FAMILIES, Features
from .load import load_captioner
from .prompts import CERTAIN, DESCRIBE, REVISE, Prompt
from .sampling import CANDIDATES, GREEDY, Sampling, StopStrings
from .views import VIEWS, ContrastView, contrast_view

__all__ = [
    "CANDIDATES",
    "CERTAIN",
    "DESCRIBE",
    "FAMILIES",
    "GREEDY",
    "REVISE",
    "VIEWS",
    "Caption",
    "Captioner",
    "ContrastView",
    "Features",
    "Generated",
    "Prompt",
    "Sampling",
    "StopStrings",
    "UnusableFrames",
    "contrast_view",
    "contrastive_decode",
    "load_captioner",
]
