"""A captioner on this machine: synpo.caption's, as the first stage wants it."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

from ..caption import Caption, Captioner, Sampling
from ..caption.load import load_captioner
from ..video import View
from .captioning import Shrink, Written

MAX_SIDE = 1280
_GREEDY = {"temperature": 0.0, "top_p": 1.0, "top_k": 0}


class LocalCaptioner:
    """Clip captions greedily, candidates sampled, each after one retrospective pass; no contrastive decoding.

    Args:
        captioner: of synpo.caption.
        settings: for provenance; see settings_of.
        sampling: of the candidates; its length and stop strings hold for clip captions too.
        max_side: pixels of a frame's longer side; larger frames are scaled down before the model's own scaling.
    """

    parallel = 1

    def __init__(
        self, captioner: Captioner, settings: Mapping[str, Any], sampling: Sampling, max_side: int = MAX_SIDE
    ) -> None:
        self.settings = settings
        self._captioner, self._sampling, self.shrink = captioner, sampling, Shrink(max_side)

    @classmethod
    def load(cls, name: str, dtype: str | None, sampling: Sampling, max_side: int = MAX_SIDE) -> "LocalCaptioner":
        """A captioner by name; see synpo.caption.load."""
        return cls(load_captioner(name, dtype), settings_of(name, dtype, sampling, max_side), sampling, max_side)

    def __call__(
        self, views: Sequence[View], instruction: str, seeds: Sequence[Sequence[int]] | None
    ) -> list[list[Written]]:
        """As synpo.pairs.captioning.Captioner."""
        greedy = seeds is None
        captions = self._captioner.captions(
            views,
            instruction,
            sampling=replace(self._sampling, **_GREEDY) if greedy else self._sampling,
            candidates=1 if seeds is None else len(seeds[0]),
            seeds=[0] * len(views) if seeds is None else [seed for own in seeds for seed in own],
            contrast=None,
        )
        return [[_written(caption) for caption in of_view] for of_view in captions]

    def close(self) -> None:
        pass


def settings_of(name: str, dtype: str | None, sampling: Sampling, max_side: int) -> dict[str, Any]:
    """What a captioner's texts depend on, known before it is loaded."""
    return {"model": name, "dtype": dtype, "max_side": max_side, **asdict(sampling)}


def _written(caption: Caption) -> Written:
    if caption.draft is None:  # the first pass failed, so that there was none to look at again
        return Written(None, None)
    return Written(caption.draft.text, caption.text if caption.failure is None else None)
