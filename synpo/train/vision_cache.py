"""What a frozen vision tower made of videos, kept on disk between epochs and runs.

A file per video, named by a hash of the content, the frames chosen, how pixels are made, and the tower's weights, so an
entry can be absent but not wrong. Entries carry a checksum; one that does not match is deleted, counted and made again.
The least recently used go when the folder is over its size.
"""

import hashlib
import json
import logging
import os
import uuid
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from ..caption.features import Features

logger = logging.getLogger(__name__)

GB = 1 << 30
UNSEEN = 1 / 64  # share of the size that may be written before the folder is listed again; other processes write too


class Encoded(NamedTuple):
    """A tower's result for one video or the images of one pair, as the model's forward call takes it."""

    pooled: Tensor | list[Tensor]
    levels: list[list[Tensor]] | None = None  # further results that enter deeper layers (Qwen3-VL)


class Entry(NamedTuple):
    encoded: Encoded
    skeleton: Features


class VisionCache:
    """A folder of entries for one tower."""

    def __init__(self, folder: str | os.PathLike[str], tower: bytes, max_gb: float) -> None:
        """tower: a hash of the weights, see ``tower_digest``."""
        self.folder = Path(folder)
        self.tower = tower
        self.max_bytes = int(max_gb * GB)
        self.damaged = 0
        self._room = 0  # bytes that may be written before the folder is listed

    def _path(self, key: bytes) -> Path:
        return self.folder / f"{hashlib.blake2b(key + self.tower, digest_size=24).hexdigest()}.safetensors"

    def get(self, key: bytes) -> Entry | None:
        """The entry of some content, None where there is none; one that is damaged is removed."""
        path = self._path(key)
        try:
            with safe_open(path, "pt") as file:
                facts = json.loads(file.metadata()["facts"])
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  not a dict
            if _checksum(tensors) != facts["checksum"]:
                raise ValueError("its checksum does not match")
        except FileNotFoundError:
            return None
        except (SafetensorError, ValueError, KeyError, TypeError, OSError) as error:
            self.damaged += 1
            logger.warning("vision cache: %s is damaged (%s); it is made again", path, error)
            path.unlink(missing_ok=True)
            return None
        os.utime(path)  # it was used now
        return Entry(_unflatten(tensors, facts["lists"]), _skeleton(facts))

    def put(self, key: bytes, encoded: Encoded, skeleton: Features) -> None:
        """Keep an entry: whole or not at all, whoever else writes it at the same time."""
        self.folder.mkdir(parents=True, exist_ok=True)
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in _flatten(encoded)}
        facts = {
            "checksum": _checksum(tensors),
            "lists": isinstance(encoded.pooled, list),
            "units": list(skeleton.units.shape[:2]),
            "tail": len(skeleton.tail),
            "grid": skeleton.grid,
            "times": skeleton.times,
            "duration": skeleton.duration,
        }
        partial = self.folder / f".{uuid.uuid4().hex}.partial"
        save_file(tensors, partial, {"facts": json.dumps(facts)})
        self._room -= partial.stat().st_size
        os.replace(partial, self._path(key))
        if self._room < 0:
            self._shrink()

    def _shrink(self) -> None:
        """Listing costs a call of the system for each entry, so it comes rarely: over its size, the folder is brought
        somewhat below it.
        """
        entries = []
        for path in self.folder.glob("*.safetensors"):
            try:
                state = path.stat()
            except FileNotFoundError:  # removed by another process
                continue
            entries.append((state.st_mtime_ns, state.st_size, path))
        total = sum(size for _, size, _ in entries)
        most = self.max_bytes * (1 - UNSEEN) if total > self.max_bytes else self.max_bytes
        for _, size, path in sorted(entries):
            if total <= most:
                break
            path.unlink(missing_ok=True)
            total -= size
        self._room = min(self.max_bytes - total, self.max_bytes * UNSEEN)


def tower_digest(parameters: Iterable[tuple[str, nn.Parameter]]) -> bytes:
    """A hash of a tower's weights, names and dtypes, and of the versions whose arithmetic they meet."""
    digest = hashlib.blake2b(torch.__version__.encode(), digest_size=32)
    for name, parameter in parameters:
        digest.update(f"{name} {parameter.dtype} {tuple(parameter.shape)}".encode())
        digest.update(parameter.detach().contiguous().reshape(-1).view(torch.uint8).cpu().numpy())
    return digest.digest()


def _flatten(encoded: Encoded) -> list[tuple[str, Tensor]]:
    pooled = encoded.pooled if isinstance(encoded.pooled, list) else [encoded.pooled]
    named = [(f"pooled.{i}", tensor) for i, tensor in enumerate(pooled)]
    for level, tensors in enumerate(encoded.levels or ()):
        named += [(f"level.{level}.{i}", tensor) for i, tensor in enumerate(tensors)]
    return named


def _unflatten(tensors: dict[str, Tensor], lists: bool) -> Encoded:
    pooled = [tensors[f"pooled.{i}"] for i in range(sum(name.startswith("pooled.") for name in tensors))]
    numbers = sorted(tuple(map(int, name.split(".")[1:])) for name in tensors if name.startswith("level."))
    levels: list[list[Tensor]] = [[] for _ in {level for level, _ in numbers}]
    for level, i in numbers:
        levels[level].append(tensors[f"level.{level}.{i}"])
    return Encoded(pooled if lists else pooled[0], levels or None)


def _skeleton(facts: dict) -> Features:
    return Features(
        torch.empty(*facts["units"], 0),
        torch.empty(facts["tail"], 0),
        tuple(facts["grid"]),
        tuple(facts["times"]),
        facts["duration"],
    )


def _checksum(tensors: dict[str, Tensor]) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for name in sorted(tensors):
        digest.update(f"{name} {tensors[name].dtype} {tuple(tensors[name].shape)}".encode())
        digest.update(tensors[name].contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()
