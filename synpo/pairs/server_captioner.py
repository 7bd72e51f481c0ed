"""A captioner behind an OpenAI-compatible server that takes images (vLLM, SGLang, llama.cpp, ...)."""

import asyncio
import base64
import io
from collections.abc import Sequence
from typing import Any

from PIL import Image

from ..caption.prompts import REVISE
from ..caption.sampling import CANDIDATES, GREEDY, Sampling
from ..judge import Answer, ChatClient, Request
from ..judge.background import Background
from ..video import View
from .captioning import Shrink, Written

_VERSION = 1
MAX_SIDE = 768


class ServerCaptioner:
    """Frames go as JPEG images with their times, texts come back; answers are cached as a judge's are.

    Args:
        client: the model at the server; use it for nothing else.
        background: where requests run.
        sampling: of the candidates. The server draws, with the seed that each caption has; top_k is no part of OpenAI's
            API, and is sent where the client's options hold it.
        max_side: pixels of a frame's longer side; larger frames are scaled down.
    """

    def __init__(
        self,
        client: ChatClient,
        background: Background,
        *,
        sampling: Sampling = CANDIDATES,
        max_side: int = MAX_SIDE,
        parallel: int = 4,
    ) -> None:
        if parallel < 1:
            raise ValueError(f"parallel is {parallel}; it has to be at least 1")
        self.client, self.parallel, self._background = client, parallel, background
        self._sampling, self.shrink = sampling, Shrink(max_side)
        self.settings: dict[str, Any] = {
            "model": client.model,
            "version": _VERSION,
            "max_side": max_side,
            "options": client.options,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "max_new_tokens": sampling.max_new_tokens,
        }

    def __call__(
        self, views: Sequence[View], instruction: str, seeds: Sequence[Sequence[int]] | None
    ) -> list[list[Written]]:
        """As synpo.pairs.captioning.Captioner. Raises: ServerError, when no request would work."""
        return self._background.run(self._write(views, instruction, seeds))

    def close(self) -> None:
        self._background.run(self.client.close())

    async def _write(
        self, views: Sequence[View], instruction: str, seeds: Sequence[Sequence[int]] | None
    ) -> list[list[Written]]:
        async def of_view(view: View, own: Sequence[int | None]) -> list[Written]:
            images = _images(view)
            return await asyncio.gather(*(self._twice(images, instruction, seed) for seed in own))

        each = [[None]] * len(views) if seeds is None else seeds
        return await asyncio.gather(*(of_view(view, own) for view, own in zip(views, each, strict=True)))

    async def _twice(self, images: list[dict[str, Any]], instruction: str, seed: int | None) -> Written:
        draft = await self._text(images, instruction, seed)
        if draft is None:
            return Written(None, None)
        return Written(draft, await self._text(images, REVISE.format(instruction=instruction, caption=draft), seed))

    async def _text(self, images: list[dict[str, Any]], instruction: str, seed: int | None) -> str | None:
        sampling = GREEDY if seed is None else self._sampling
        request = Request(
            [{"role": "user", "content": [*images, {"type": "text", "text": instruction}]}],
            f"caption/{_VERSION}",
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            seed=seed,
            max_tokens=self._sampling.max_new_tokens,
        )
        answer = await self.client.answer(request)
        return _caption(answer)


def _caption(answer: Answer) -> str | None:
    """The text of an answer that ended by itself or at the length limit, as a local model's does."""
    if answer.refusal or answer.finish_reason == "content_filter" or answer.text is None:
        return None
    return answer.text.rpartition("</think>")[2].strip() or None


def _images(view: View) -> list[dict[str, Any]]:
    parts: list[dict[str, Any]] = []
    for time, image in zip(view.times, view.images, strict=True):
        stream = io.BytesIO()
        Image.fromarray(image).save(stream, "JPEG", quality=90)
        data = base64.b64encode(stream.getvalue()).decode()
        parts.append({"type": "text", "text": f"Frame at {float(time) - view.start:.1f} s:"})
        parts.append({"type": "image_url", "image_url": {"url": f"data:image/jpeg;base64,{data}"}})
    return parts
