"""Work lists of prefix_attention's kernels: which queries and keys meet, cut into tiles of queries or of keys.

A piece is one or two spans, rectangles of queries x keys in which one number, ``gap``, tells how far apart they stand:

    its own keys       [start, stop) x [start, stop)                  gap 0
    its prompt's keys  [start, stop) x [prompt_start, prompt_stop)    gap start - prompt_stop

Query i sees key j of a span where 0 <= i - j - gap < window. A tile of queries has the spans that cross it, at most the
two of its piece; a tile of keys has its piece's own, and one for each piece whose prompt reaches into it: a kernel that
walks a key tile's spans in their order adds up the prompt's gradient without atomics, in an order that never changes.
"""

import functools
from typing import NamedTuple

import torch
from torch import Tensor


class Span(NamedTuple):
    """Queries x keys that may see each other; its numbers in this order are what kernels read."""

    query_start: int
    query_stop: int
    key_start: int
    key_stop: int
    gap: int

    def reaches(self, start: int, stop: int, of_keys: bool) -> bool:
        """Whether it crosses these queries, or keys."""
        low, high = (self.key_start, self.key_stop) if of_keys else (self.query_start, self.query_stop)
        return low < stop and start < high

    def work(self, start: int, stop: int, of_keys: bool) -> int:
        """How many keys the last of these queries sees, or how many queries see the first of these keys."""
        if of_keys:
            return self.query_stop - max(self.query_start, start + self.gap)
        return min(self.key_stop, stop - self.gap) - self.key_start


class Tiles(NamedTuple):
    """A work list on a device."""

    tiles: Tensor  # (n, 4) int32: first and last + 1 of its queries or keys, of its spans; the longest work first
    spans: Tensor  # (m, 5) int32, Span's numbers


SPAN_NUMBERS = len(Span._fields)
TILE_NUMBERS = 4


def spans_of(start: int, stop: int, prompt_start: int, prompt_stop: int) -> list[Span]:
    """A piece's spans, the prompt's first."""
    own = Span(start, stop, start, stop, 0)
    if prompt_start == prompt_stop:
        return [own]
    return [Span(start, stop, prompt_start, prompt_stop, start - prompt_stop), own]


@functools.lru_cache(maxsize=64)  # made once for a row, whatever the number of layers
def tiles(pieces: tuple[int, ...], block: int, of_keys: bool, device: torch.device) -> Tiles:
    """Pieces (four numbers each) in tiles of up to ``block`` queries or keys, none of which crosses a piece's edge."""
    bounds = list(zip(*[iter(pieces)] * 4, strict=True))
    spans = [span for piece in bounds for span in spans_of(*piece)]
    found: list[tuple[int, int, list[Span]]] = []
    for start, stop, _, _ in bounds:
        near = [span for span in spans if span.reaches(start, stop, of_keys)]
        for first in range(start, stop, block):
            last = min(first + block, stop)
            found.append((first, last, [span for span in near if span.reaches(first, last, of_keys)]))
    found.sort(key=lambda tile: -sum(span.work(*tile[:2], of_keys) for span in tile[2]))
    rows: list[tuple[int, int, int, int]] = []
    listed: list[Span] = []
    for first, last, crossing in found:
        rows.append((first, last, len(listed), len(listed) + len(crossing)))
        listed += crossing
    # Not blocking: the host does not wait for the device's earlier work.
    return Tiles(
        *(
            torch.tensor(numbers, dtype=torch.int32).view(len(numbers), width).to(device, non_blocking=True)
            for numbers, width in ((rows, TILE_NUMBERS), (listed, SPAN_NUMBERS))
        )
    )
