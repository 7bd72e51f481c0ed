"""A captioner on this machine: synpo.caption's, as the first stage wants it."""

from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any

from ..caption import Caption, Captioner, Sampling
from ..video import View
from .captioning import Shrink, Written

MAX_SIDE = 1280
_GREEDY = {"temperature": 0.0, "top_p": 1.0, "top_k": 0}


class LocalCaptioner:
    """Clip captions greedily, candidates sampled, each after one retrospective pass; no contrastive decoding.

    Args:
        captioner: of synpo.caption.
        name: of the model, for provenance.
        sampling: of the candidates; its length and stop strings hold for clip captions too.
        max_side: pixels of a frame's longer side; larger frames are scaled down before the model's own scaling.
    """

    parallel = 1

    def __init__(self, captioner: Captioner, name: str, sampling: Sampling, max_side: int = MAX_SIDE) -> None:
        self._captioner, self._sampling, self.shrink = captioner, sampling, Shrink(max_side)
        dtype = str(captioner.model.dtype).removeprefix("torch.")
        self.settings: dict[str, Any] = {"model": name, "dtype": dtype, "max_side": max_side, **asdict(sampling)}

    def __call__(self, views: Sequence[View], instruction: str, seeds: Sequence[int] | None) -> list[list[Written]]:
        """As synpo.pairs.captioning.Captioner."""
        greedy = seeds is None
        captions = self._captioner.captions(
            views,
            instruction,
            sampling=replace(self._sampling, **_GREEDY) if greedy else self._sampling,
            candidates=1 if seeds is None else len(seeds),
            seeds=[0] * len(views) if seeds is None else list(seeds) * len(views),
            contrast=None,
        )
        return [[_written(caption) for caption in of_view] for of_view in captions]

    def close(self) -> None:
        pass


def _written(caption: Caption) -> Written:
    if caption.draft is None:  # the first pass failed, so that there was none to look at again
        return Written(None, None)
    return Written(caption.draft.text, caption.text if caption.failure is None else None)
