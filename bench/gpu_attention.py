"""Attention over [prompt | chosen | rejected] on a GPU, in the shapes of models: what `bench.gpu attention` does.

    kernels      prefix_attention: the prompt's keys read where they stand
    boundaries   PyTorch's variable-length flash attention, the prompt's keys gathered once for each answer
    pieces       scaled-dot-product attention, a call for each piece
    plain        [prompt | chosen] and [prompt | rejected], as without prefix sharing

Each is held to ``plain``, values and gradients, before it is timed. Then the kernels run in other tiles than those of
tiling.py, one kernel's at a time. From the times come the two choices that the code leaves open:
pieces.FLASH_IS_FASTER, and the rows of tiling.ATTENTION.
"""

import statistics
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from synpo.train import pieces
from synpo.train.pieces import Layout, Piece
from synpo_kernels import tiling
from synpo_kernels.tiling import AttentionTile

from .measure import Stopwatch
from .memory import Peak

COLUMNS = [
    "date", "commit", "device", "torch", "model", "prompt", "answer", "pairs", "implementation", "tile",
    "forward_ms", "both_ms", "extra_mb", "note",
]  # fmt: skip
NAMES = ("model", "prompt", "answer", "pairs", "implementation", "tile")
# Model -> heads, heads of keys, size of a head.
HEADS = {"llama3-8b": (32, 8, 128), "qwen2.5-0.5b": (14, 2, 64), "gemma2-2b": (8, 4, 256), "tiny": (4, 2, 8)}
# Model, prompt, answer, pairs in the row; prompt and answer 8 to 1 and 1 to 1.
SHAPES = [
    ("llama3-8b", 4096, 512, 1), ("llama3-8b", 1024, 128, 4), ("llama3-8b", 1024, 1024, 1), ("llama3-8b", 512, 512, 4),
    ("qwen2.5-0.5b", 4096, 512, 1), ("gemma2-2b", 4096, 512, 1),
]  # fmt: skip
IMPLEMENTATIONS = ("kernels", "boundaries", "plain", "pieces")
# Tried beside those in use, a kernel's at a time.
TILES = {
    "forward": ((128, 128, 2, 8), (128, 64, 3, 4), (128, 64, 3, 8), (64, 64, 3, 4), (128, 32, 3, 4)),
    "grad_query": ((128, 64, 2, 8), (128, 32, 2, 8), (64, 64, 3, 4), (64, 64, 2, 8), (64, 32, 2, 4)),
    "grad_key": ((64, 128, 2, 8), (32, 128, 3, 8), (64, 64, 2, 8), (32, 64, 3, 4), (32, 128, 2, 4)),
}
ROUNDS = 20
LIMIT = 60.0  # seconds of a row
ALLOWED = {torch.bfloat16: 2e-2, torch.float32: 1e-5}  # relative error in norm, against plain rows


def plan(device: str) -> list[dict[str, Any]]:
    """Jobs for the worker: every implementation on every shape, then the tiles on the first shape of each model."""
    shapes = SHAPES if device == "cuda" else [("tiny", 24, 3, 2)]
    named = [dict(zip(("model", "prompt", "answer", "pairs"), shape, strict=True)) for shape in shapes]
    names = [name for name in IMPLEMENTATIONS if device == "cuda" or name != "boundaries"]  # flash attention's
    rows = [shape | {"implementation": name, "tile": ""} for shape in named for name in names]
    first = {shape["model"]: shape for shape in reversed(named)}.values()
    tiles = [f"{kernel} {tile}" for kernel, tried in TILES.items() for tile in tried] if device == "cuda" else []
    rows += [shape | {"implementation": "kernels", "tile": tile} for tile in tiles for shape in first]
    return [row | {"arguments": row | {"device": device}} for row in rows]


def layout(prompt: int, answer: int, pairs: int) -> Layout:
    """Pairs end to end in one row, as collate lays them out."""
    own = (Piece(0, prompt + answer), Piece(prompt + answer, prompt + 2 * answer, 0, prompt))
    return Layout((tuple(piece.shifted(i * own[1].stop) for i in range(pairs) for piece in own),))


def _plain(query: Tensor, key: Tensor, value: Tensor, prompt: int, answer: int, pairs: int) -> Tensor:
    """(1, h, T, d) of pairs -> (1, T, h, d): a causal row for each of the 2 * pairs sequences."""
    q, k, v = (x.unflatten(2, (pairs, -1))[0].transpose(0, 1) for x in (query, key, value))  # (pairs, heads, T, d)
    rows = [torch.cat((x[:, :, : prompt + answer], x[:, :, :prompt], x[:, :, -answer:]), 2) for x in (q, k, v)]
    q, k, v = (x.unflatten(2, (2, -1)).transpose(1, 2).flatten(0, 1) for x in rows)
    out = scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2)
    out = out.unflatten(0, (pairs, 2))  # the prompt's second copy is left out
    return torch.cat((out[:, 0], out[:, 1, prompt:]), 1).flatten(0, 1)[None]


def _attention(implementation: str, shape: tuple[int, int, int]) -> Callable[..., Tensor]:
    """An implementation on query (1, h, T, d), key and value (1, g, T, d)."""
    made = layout(*shape)
    if implementation == "plain":
        return lambda *qkv: _plain(*qkv, *shape)
    if implementation == "boundaries":
        return lambda *qkv: pieces._by_boundaries(*qkv, made, None, None)
    if implementation == "kernels":
        return lambda *qkv: pieces._by_kernels(*qkv, made, None, None, None)

    def run(*qkv: Tensor) -> Tensor:
        with patch.multiple(pieces, _kernels_take=lambda *_: False, _flash_takes=lambda *_: False):
            return pieces.piecewise(nn.Module(), *qkv, made)

    return run


def measure_attention(
    model: str, prompt: int, answer: int, pairs: int, implementation: str, tile: str, device: str
) -> dict[str, Any]:
    """One row, checked and timed; runs in the worker."""
    where, (h, g, d), shape = torch.device(device), HEADS[model], (prompt, answer, pairs)
    dtype = torch.bfloat16 if where.type == "cuda" else torch.float32
    tokens = pairs * (prompt + 2 * answer)
    given = [
        torch.randn(1, tokens, heads, d, device=where).to(dtype).transpose(1, 2).requires_grad_() for heads in (h, g, g)
    ]
    grad = torch.randn(1, tokens, h, d, device=where).to(dtype)

    def both(attention: Callable[..., Tensor]) -> tuple[Tensor, ...]:
        out = attention(*given)
        return out.detach(), *torch.autograd.grad(out, given, grad)

    attention = _attention(implementation, shape)
    with ExitStack() as stack:
        if tile:
            kernel, _, numbers = tile.partition(" ")
            in_use = tiling.attention(where, dtype, d)
            assert in_use is not None
            changed = in_use._replace(**{kernel: AttentionTile(*map(int, numbers.strip("()").split(", ")))})
            stack.enter_context(patch.object(tiling, "attention", lambda *_: changed))
        got = both(attention)
        error = _error(got, both(_attention("plain", shape)))
        if not error <= ALLOWED[dtype]:
            return {"note": f"wrong: {error:.2g} off plain rows"}
        del got
        peak = Peak(where)
        both(attention)
        extra = peak.extra_mb()
        stopwatch = Stopwatch(where)
        forward = statistics.median(stopwatch(lambda: attention(*given)) for _ in range(ROUNDS))
        return {
            "forward_ms": forward,
            "both_ms": statistics.median(stopwatch(lambda: both(attention)) for _ in range(ROUNDS)),
            "extra_mb": extra,
            "note": f"{error:.1e} off plain rows",
        }


def line(row: dict[str, Any]) -> str:
    """A row in words."""
    shape = f"{row['model']}, {row['pairs']} pairs of {row['prompt']} + 2 x {row['answer']} tokens"
    name = f"{shape}, {row['implementation']} {row['tile']}".rstrip()
    if not row.get("both_ms"):
        return f"{name}: {row['note']}"
    return (
        f"{name}: {row['forward_ms']:.3f} ms, {row['both_ms']:.3f} ms with gradients, {row['extra_mb']:.0f} MB, "
        f"{row['note']}"
    )


def _error(got: tuple[Tensor, ...], want: tuple[Tensor, ...]) -> float:
    """The worst relative error in norm of the output and the three gradients."""
    return max(float((a.double() - b.double()).norm() / b.double().norm()) for a, b in zip(got, want, strict=True))


def advice(rows: list[dict[str, str]], capability: tuple[int, int]) -> str:
    """What the times say for pieces.py and tiling.py."""
    timed = {tuple(row[name] for name in NAMES): float(row["both_ms"]) for row in rows if row["both_ms"]}
    ratios = {
        shape: timed[*shape, "boundaries", ""] / ours
        for (*place, implementation, tile), ours in timed.items()
        if (implementation, tile) == ("kernels", "") and (*(shape := tuple(place)), "boundaries", "") in timed
    }
    lines = [f"# {' '.join(shape)}: boundaries {ratio:.2f} of the kernels' time" for shape, ratio in ratios.items()]
    mean = statistics.geometric_mean(ratios.values()) if ratios else 1.0
    lines.append(f"FLASH_IS_FASTER: {'with' if mean < 1 else 'without'} {capability}  # {mean:.2f} in geometric mean")
    for (model, *rest, implementation, tile), ms in sorted(timed.items(), key=lambda item: item[1]):
        in_use = timed.get((model, *rest, implementation, ""))
        if tile and in_use is not None and ms < in_use:
            lines.append(f"# tiling.ATTENTION, heads of {HEADS[model][2]}: {tile} {ms / in_use:.3f} of the time in use")
    return "\n".join(lines)
