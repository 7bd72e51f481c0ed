"""What a pair's video or images become: pixels for the vision tower, and placeholders in the prompt.

A pair has one video, or images where the model takes them one by one. It is decoded when the pair is asked for, in the
data loader's workers, and once: both answers share what comes of it.
"""

import hashlib
import io
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from ..caption.features import FAMILIES, Family, Features, Words, encode
from ..caption.load import settings_folder
from ..caption.prompts import takes_parts
from ..video import FramePolicy, PixelSpec, VideoError, decode, pixels
from .model import base_model
from .vision_cache import Encoded, VisionCache

MEDIA_COLUMNS = ("images", "videos")


class MediaError(ValueError):
    """A video or image that cannot be used: the message names the pair, the file and the cause."""


@dataclass(frozen=True)
class Media:
    """What the vision tower gets for a pair, or what it gave before."""

    key: bytes  # identifies the content: files, chosen frames, how pixels are made
    skeleton: Features  # of the right shape, times and grid, without values
    inputs: dict[str, Tensor] | None  # the tower's arguments
    encoded: Encoded | None  # its results, from the cache


def _qwen3(features: Features, words: Words) -> list[str]:
    start, end = words.named("vision_bos_token", "<|vision_start|>"), words.named("vision_eos_token", "<|vision_end|>")
    frame = words.place * features.units.shape[1]
    return ["".join(f"<{time:.1f} seconds>{start}{frame}{end}" for time in features.times)]


TRAINABLE = FAMILIES | {"qwen3_vl": Family(None, _qwen3, marker="<|vision_start|><|video_pad|><|vision_end|>")}


def has_media(row: Mapping[str, Any]) -> bool:
    """Whether a pair has images or videos, in their columns or as parts of the prompt."""
    if any(row.get(column) for column in MEDIA_COLUMNS):
        return True
    messages = row["prompt"] if isinstance(row.get("prompt"), list) else []
    contents = [message.get("content") for message in messages if isinstance(message, Mapping)]
    return any(
        isinstance(part, Mapping) and part.get("type") in ("image", "video")
        for content in contents
        if isinstance(content, list)
        for part in content
    )


class MediaReader:
    """Reads the media of pairs for one model, and writes their placeholders into its prompts."""

    def __init__(
        self,
        model: nn.Module,
        tokenizer: PreTrainedTokenizerBase,
        policy: FramePolicy,
        spec: PixelSpec | None = None,
        cache: VisionCache | None = None,
    ) -> None:
        """spec None: from the files beside the model's weights, or its family's default where it has none.

        Errors: ValueError for pixel settings that are not supported, or a tokenizer without the placeholder.
        """
        base = base_model(model)
        self.name = base.config.model_type
        self.family = TRAINABLE[self.name]
        self.tokenizer, self.policy, self.cache = tokenizer, policy, cache
        self.spec = _spec(base) if spec is None else spec
        self.place = int(getattr(base.config, self.family.token))
        self.words = Words(tokenizer.convert_ids_to_tokens(self.place), tokenizer)
        if self.words.place is None or self.words.place == tokenizer.unk_token:
            raise ValueError(
                f"the tokenizer has no token {self.place}, the place of a {self.name} model's vision vectors"
            )
        self.marker = self.family.marker or self.words.place
        self._unit, self._tail = (0, 0) if self.spec.layout == "patches" else self._vectors(base)
        self._merge = self.spec.merge
        inner = base.base_model
        self._rope: Callable[..., Any] | None = getattr(inner, "get_rope_index", None)
        self._digests: dict[tuple[str, int, int], bytes] = {}

    def _vectors(self, base: Any) -> tuple[int, int]:
        """Vectors for a frame, and after the last: from what the tower makes of a black one."""
        black = pixels(np.zeros((1, 64, 64, 3), np.uint8), self.spec)
        features = encode(base, black, [0.0], 1.0)
        return features.units.shape[1], len(features.tail)

    # Files

    def check(self, record: Mapping[str, Any], where: str) -> None:
        """Refuse what needs no decoding to be refused. Errors: MediaError."""
        videos, images = record["videos"], record["images"]
        if images and self.family.part != "image":
            raise MediaError(
                f"{where}: column 'images': a {self.name} model is trained on videos here; remove the pair"
            )
        if len(videos) > 1 or (videos and images):
            raise MediaError(
                f"{where}: {len(videos)} videos and {len(images)} images; a pair has one video, or images alone"
            )
        for path in (path for medium in (*videos, *images) for path in _paths(medium)):
            if not Path(path).is_file():
                raise MediaError(f"{where}: {path}: no such file")

    def read(self, record: Mapping[str, Any], where: str) -> Media:
        """The media of a normalised pair (see synpo.pairs). Errors: MediaError."""
        self.check(record, where)
        try:
            key = self._key(record)
            if self.cache is not None and (found := self.cache.get(key)) is not None:
                return Media(key, found.skeleton, None, found.encoded)
            inputs, times, duration = self._pixels(record)
        except (VideoError, OSError, UnidentifiedImageError, ValueError) as error:
            raise MediaError(f"{where}: {error}") from None
        return Media(key, self._skeleton(inputs, times, duration), inputs, None)

    def _key(self, record: Mapping[str, Any]) -> bytes:
        digest = hashlib.blake2b(repr((self.policy, self.spec)).encode(), digest_size=32)
        for column in MEDIA_COLUMNS:
            for medium in record[column]:
                digest.update(column.encode())
                if medium.get("bytes"):
                    digest.update(hashlib.blake2b(medium["bytes"]).digest())
                for path in _paths(medium):
                    digest.update(self._content(Path(path)))
        return digest.digest()

    def _content(self, path: Path) -> bytes:
        """A hash of a file's content, taken again when its size or time of change differs."""
        state = path.stat()
        known = (str(path), state.st_size, state.st_mtime_ns)
        if known not in self._digests:
            with path.open("rb") as file:
                self._digests[known] = hashlib.file_digest(file, "blake2b").digest()
        return self._digests[known]

    def _pixels(self, record: Mapping[str, Any]) -> tuple[dict[str, Tensor], list[float], float]:
        """The tower's inputs, the seconds of the frames, and of the whole."""
        if record["images"]:
            parts = [
                pixels(_picture(medium.get("bytes") or medium["path"])[None], self.spec) for medium in record["images"]
            ]
            joined = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
            return joined, [0.0] * len(parts), 0.0
        (video,) = record["videos"]
        if video.get("frames"):
            frames = [_picture(path) for path in video["frames"]]
            if len({frame.shape for frame in frames}) > 1:
                raise ValueError("the frames of a video must have one size")
            # A list of frames has no clock; one a second is what the prompts of timed families then say.
            return pixels(np.stack(frames), self.spec), [float(i) for i in range(len(frames))], float(len(frames))
        found = decode(video.get("bytes") or video["path"], self.policy, each=self.spec.resize)
        return pixels(found.frames, self.spec, resized=True), found.times.tolist(), found.duration

    def _skeleton(self, inputs: dict[str, Tensor], times: Sequence[float], duration: float) -> Features:
        if self.spec.layout == "patches":
            units, height, width = inputs["video_grid_thw"][0].tolist()
            grid = (height // self._merge, width // self._merge)
            vectors = grid[0] * grid[1]
        else:
            units, vectors = len(times), self._unit
            grid = (1, vectors)
        step = -(-len(times) // units)
        starts = [times[i * step] for i in range(units)]
        if self.name == "qwen3_vl":  # its prompts name the middle of what a unit shows
            starts = [(start + times[min((i + 1) * step, len(times)) - 1]) / 2 for i, start in enumerate(starts)]
        return Features(torch.empty(units, vectors, 0), torch.empty(self._tail, 0), grid, tuple(starts), duration)

    # Prompts

    def messages(self, prompt: Sequence[Mapping[str, Any]], media: Media) -> list[dict[str, Any]]:
        """The conversation as the chat template takes it, media parts in the family's way."""
        pieces = len(self.family.expand(media.skeleton, self.words))
        parts_known = self.tokenizer.chat_template is not None and takes_parts(self.tokenizer)
        made = []
        for message in prompt:
            content = message["content"]
            parts: list[dict[str, Any]] = []
            for part in [{"type": "text", "text": content}] if isinstance(content, str) else content:
                count = pieces if part["type"] == "video" else 1
                parts += [part] if part["type"] == "text" else [{"type": self.family.part}] * count
            if not parts_known:
                shown = [self.marker if part["type"] != "text" else part["text"] for part in parts]
                after = [p["type"] != "text" and q["type"] == "text" for p, q in itertools.pairwise(parts)]
                parts = "".join(text + "\n" * gap for text, gap in zip(shown, [*after, False], strict=True))
            made.append({"role": message["role"], "content": parts})
        return made

    def expand(self, text: str, media: Media, where: str) -> str:
        """A rendered prompt with placeholders where the template left its markers. Errors: MediaError."""
        texts = self.family.expand(media.skeleton, self.words)
        pieces = text.split(self.marker)
        if len(pieces) != len(texts) + 1:
            raise MediaError(
                f"{where}: the rendered prompt has {self.marker!r} {len(pieces) - 1} times, {len(texts)} expected; the "
                f"chat template has to write it once for each {self.family.part} part, and the texts must not hold it"
            )
        return pieces[0] + "".join(text + piece for text, piece in zip(texts, pieces[1:], strict=True))

    def span(self, ids: Sequence[int], media: Media, where: str) -> tuple[int, int]:
        """[start, stop) of a prompt's placeholders, one token around them included: what truncation leaves alone.

        Errors: MediaError where their number is not that of the tower's vectors.
        """
        at = [i for i, token in enumerate(ids) if token == self.place]
        wanted = media.skeleton.units.shape[0] * media.skeleton.units.shape[1] + len(media.skeleton.tail)
        if len(at) != wanted:
            raise MediaError(
                f"{where}: the prompt has {len(at)} places for {wanted} vision vectors; is {self.words.place!r} a "
                "token of its own in this tokenizer?"
            )
        return max(at[0] - 1, 0), min(at[-1] + 2, len(ids))

    def places(self, ids: Tensor, media: Media) -> Tensor | None:
        """(3, P) positions along time, height and width, for families whose rotary embedding has these; else None."""
        if self._rope is None:
            return None
        rows, columns = media.skeleton.grid
        grid = [len(media.skeleton.units), rows * self._merge, columns * self._merge]
        found, _ = self._rope(
            ids[None],
            mm_token_type_ids=(ids == self.place).int()[None] * 2,
            video_grid_thw=torch.tensor([grid]),
            second_per_grid_ts=torch.tensor([media.skeleton.seconds_per_unit]),
        )
        return found[:, 0]


def _spec(base: Any) -> PixelSpec:
    name = base.config._name_or_path
    return PixelSpec.read(settings_folder(name)) if name else PixelSpec.of(base.config.model_type)


def _paths(medium: Mapping[str, Any]) -> list[str]:
    return [medium["path"]] if medium.get("path") else list(medium.get("frames") or ())


def _picture(source: str | bytes) -> np.ndarray:
    """(H, W, 3) uint8."""
    with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as image:
        return np.asarray(image.convert("RGB"))
