"""Preference pairs: read from the formats in use, normalise, check, filter, split."""

from .check import PairsReport, check_pairs
from .conversations import load_conversations
from .filters import FilterReport, apply_filters, split_pairs
from .formats import FORMATS, VIDEO_PROMPT
from .importers import as_pairs, load_pairs
from .schema import PAIR_FEATURES, PairError, normalise_pair

__all__ = [
    "FORMATS",
    "PAIR_FEATURES",
    "VIDEO_PROMPT",
    "FilterReport",
    "PairError",
    "PairsReport",
    "apply_filters",
    "as_pairs",
    "check_pairs",
    "load_conversations",
    "load_pairs",
    "normalise_pair",
    "split_pairs",
]
