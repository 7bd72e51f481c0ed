"""prefix_attention's ops on CUDA: its Triton kernels in the tiles that tiling.py chooses.

Every launcher is a plain function on tensors of one device: CUDA, or CPU under Triton's interpreter
(TRITON_INTERPRET=1). Nothing here waits for the device.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
import triton
from torch import Tensor

from . import prefix_attention_triton as kernels
from . import tiling
from .prefix_attention import Settings, _backward, _forward, check_pieces, covers
from .prefix_attention_tiles import tiles
from .tiling import AttentionTile

_LOG2E = math.log2(math.e)


def _opened(*rest: Any) -> Settings:
    """The settings without a window that is no narrower than the longest sequence: under one every block is masked."""
    settings = Settings(*rest)
    starts, stops, prompt_starts, prompt_stops = (settings.pieces[i::4] for i in range(4))
    lengths = [b - a + d - c for a, b, c, d in zip(starts, stops, prompt_starts, prompt_stops, strict=True)]
    return settings._replace(window=settings.window if settings.window < max(lengths, default=0) else 0)


def _launch(
    kernel: Any, tensors: Sequence[Tensor], strided: Sequence[Tensor], heads: int, of_keys: bool, settings: Settings,
    tile: AttentionTile,
) -> None:  # fmt: skip
    """Runs a kernel on its tensors; strided: query, key, value and contiguous ones, whose strides it takes."""
    query, key = strided[:2]
    T, h, d = query.shape
    block = tile.keys if of_keys else tile.queries
    work = tiles(tuple(settings.pieces), block, of_keys, query.device)
    kernel[(len(work.tiles) * heads,)](
        *tensors, *work, T, settings.window, settings.scale * _LOG2E, settings.softcap * _LOG2E,
        *(stride for x in strided for stride in x.stride()[:2]),
        HEADS=heads, GROUP=h // key.shape[1], SIZE=d, WIDTH=max(16, triton.next_power_of_2(d)),
        QUERIES=tile.queries, KEYS=tile.keys, WINDOW=settings.window > 0, SOFTCAP=settings.softcap > 0,
        PRECISION="ieee", num_warps=tile.warps, num_stages=tile.stages, enable_fp_fusion=True,
    )  # fmt: skip


def _new(settings: Settings, *like: Tensor) -> list[Tensor]:
    """Contiguous tensors to write into: zeros where padding stays unwritten."""
    make = torch.empty if covers(settings.pieces, len(like[0])) else torch.zeros
    return [make(x.shape, dtype=x.dtype, device=x.device) for x in like]


def _tiles(query: Tensor) -> tiling.AttentionTiles | None:
    return tiling.attention(query.device, query.dtype, query.shape[-1])


def prefix_attention(query: Tensor, key: Tensor, value: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    """The op of that name; what tiling.py has no tiles for runs the plain form."""
    check_pieces(tuple(rest[0]), len(query))
    settings, chosen = _opened(*rest), _tiles(query)
    if chosen is None:
        return _forward(query, key, value, *settings)
    T, h, _ = query.shape
    (out,) = _new(settings, query)
    lse = torch.empty((h, T), dtype=torch.float32, device=query.device)
    given = query, key, value
    _launch(kernels.forward_kernel, (*given, out, lse), (*given, out), h, False, settings, chosen.forward)
    return out, lse


def prefix_attention_backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """The op of that name."""
    settings, chosen = _opened(*rest), _tiles(query)
    if chosen is None:
        return _backward(grad, query, key, value, out, lse, *settings)
    grad, delta = grad.contiguous(), torch.empty_like(lse)
    dq, dk, dv = _new(settings, query, key, value)
    given = query, key, value
    _launch(
        kernels.grad_query_kernel, (*given, out, grad, lse, delta, dq), (*given, grad), query.shape[1], False, settings,
        chosen.grad_query,
    )  # fmt: skip
    _launch(
        kernels.grad_key_kernel, (*given, grad, lse, delta, dk, dv), (*given, grad, dk), key.shape[1], True, settings,
        chosen.grad_key,
    )  # fmt: skip
    return dq, dk, dv
