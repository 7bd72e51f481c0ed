"""From prompts to the rows of a batch, and what rows about the same video share: the cache of their common head.

A video is most of a prompt. Its vectors, up to the last one, go through the language model once; candidates,
retrospective passes and whatever else is asked about it go on from that cache. A batch with heads is laid out as

    [ padding | video ][ padding | instruction ]

so that heads and instructions of different lengths stand under each other; the padding is masked, and positions do
not count it.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from .features import Features
from .prompts import Prompt, placeholder

_Key = tuple[int, tuple[int, ...]]


class Heads:
    """The caches of prompts' heads, one row for each different one, computed without padding.

    Sliding windows and recurrent layers would count the padding between head and instruction, so models that have
    them get no heads, and every prompt is computed whole.
    """

    def __init__(self, model: PreTrainedModel, prompts: Sequence[Prompt], most_rows: int | None = None) -> None:
        self.model = model
        self.prompts = tuple(prompts)  # features are known by identity, so they have to stay
        self.length = 0  # positions in the cache
        self._rows: dict[_Key, int] = {}
        self._layers: list[tuple[Tensor, Tensor]] = []  # (heads, kv heads, length, d) keys and values
        if all(type(layer) is DynamicLayer for layer in DynamicCache(config=model.config).layers):
            self._fill({_key(prompt): prompt for prompt in prompts if prompt.head}, most_rows)

    def row(self, prompt: Prompt) -> int | None:
        """Where the cache of a prompt's head is; None where there is none."""
        return self._rows.get(_key(prompt)) if prompt.head else None

    def cache(self, prompts: Sequence[Prompt]) -> DynamicCache:
        """A cache to go on from, a row for each prompt; a row without a head holds anything, to be masked."""
        index = torch.tensor([self.row(prompt) or 0 for prompt in prompts], device=self.model.device)
        cache = DynamicCache(config=self.model.config)
        for number, (keys, values) in enumerate(self._layers):
            cache.update(keys[index], values[index], number)
        return cache

    def _fill(self, wanted: dict[_Key, Prompt], most_rows: int | None) -> None:
        by_length: dict[int, list[Prompt]] = {}
        for prompt in wanted.values():
            by_length.setdefault(prompt.head, []).append(prompt)
        self.length = max(by_length, default=0)
        parts = []
        for length, group in by_length.items():
            step = most_rows or len(group)
            for first in range(0, len(group), step):
                chunk = group[first : first + step]
                for prompt in chunk:
                    self._rows[_key(prompt)] = len(self._rows)
                missing = (0, 0, self.length - length, 0)
                layers = self._run(chunk, length).layers
                parts.append([(pad(layer.keys, missing), pad(layer.values, missing)) for layer in layers])
        self._layers = [
            (torch.cat([keys for keys, _ in layer]), torch.cat([values for _, values in layer]))
            for layer in zip(*parts, strict=True)
        ]

    def _run(self, prompts: Sequence[Prompt], length: int) -> DynamicCache:
        ids = [prompt.ids.to(self.model.device) for prompt in prompts]
        rows = [_embedded(self.model, row, prompt.features)[:length] for row, prompt in zip(ids, prompts, strict=True)]
        inputs: dict[str, Any] = {"inputs_embeds": torch.stack(rows)}
        if _has_mrope(self.model):
            positions = [_mrope(self.model, row, prompt.features) for row, prompt in zip(ids, prompts, strict=True)]
            inputs["position_ids"] = torch.stack(positions, dim=1)[..., :length]
        if self.model._supports_logits_to_keep():
            inputs["logits_to_keep"] = 1
        cache = DynamicCache(config=self.model.config)
        with torch.no_grad():
            self.model(**inputs, past_key_values=cache, use_cache=True)
        return cache


def batch(model: PreTrainedModel, prompts: Sequence[Prompt], heads: Heads | None = None) -> dict[str, Any]:
    """Arguments of generate for these rows: ids or, where a row has features, embeddings; mask; mRoPE positions; and
    the cache of their heads, where there are any.
    """
    ids = [prompt.ids.to(model.device) for prompt in prompts]
    splits = [prompt.head if heads is not None and heads.row(prompt) is not None else 0 for prompt in prompts]
    head = heads.length if heads is not None and any(splits) else 0
    tail = max(len(row) - split for row, split in zip(ids, splits, strict=True))

    def laid(rows: Sequence[Tensor], axis: int) -> Tensor:
        """Rows (..., T) under each other, stacked at an axis."""
        pieces = [(row[..., :split], row[..., split:]) for row, split in zip(rows, splits, strict=True)]
        return torch.stack([torch.cat([_left(a, head), _left(b, tail)], dim=-1) for a, b in pieces], dim=axis)

    made: dict[str, Any] = {"attention_mask": laid([torch.ones_like(row) for row in ids], 0)}
    if all(prompt.features is None for prompt in prompts):
        return made | {"input_ids": laid(ids, 0)}
    rows = [_embedded(model, row, prompt.features).T for row, prompt in zip(ids, prompts, strict=True)]
    made["inputs_embeds"] = laid(rows, 0).transpose(1, 2)
    if _has_mrope(model):
        positions = [_mrope(model, row, prompt.features) for row, prompt in zip(ids, prompts, strict=True)]
        made["position_ids"] = laid(positions, 1)
    if head:
        made["past_key_values"] = heads.cache(prompts)
    return made


def _key(prompt: Prompt) -> _Key:
    return id(prompt.features), tuple(prompt.ids[: prompt.head].tolist())


def _left(row: Tensor, length: int) -> Tensor:
    return pad(row, (length - row.shape[-1], 0))


def _embedded(model: PreTrainedModel, ids: Tensor, features: Features | None) -> Tensor:
    """(T, H): token embeddings, the video's vectors in their places."""
    with torch.no_grad():
        found = model.get_input_embeddings()(ids)
        if features is not None:
            found[ids == placeholder(model)] = features.vectors.to(found.device, found.dtype)
    return found


def _has_mrope(model: PreTrainedModel) -> bool:
    return hasattr(model.base_model, "get_rope_index")


def _mrope(model: PreTrainedModel, ids: Tensor, features: Features | None) -> Tensor:
    """(4, T): positions in the text, then along time, height and width, as Qwen's models count them for one row."""
    text = torch.arange(len(ids), device=ids.device)
    if features is None:
        return text.expand(4, -1)
    merge = model.config.vision_config.spatial_merge_size
    rows, columns = features.grid
    vision, _ = model.base_model.get_rope_index(
        ids[None],
        mm_token_type_ids=(ids == placeholder(model)).int()[None] * 2,
        video_grid_thw=torch.tensor([[len(features.units), rows * merge, columns * merge]], device=ids.device),
        second_per_grid_ts=torch.tensor([features.seconds_per_unit], device=ids.device),
    )
    return torch.cat([text[None], vision[:, 0]])
