"""Times the candidates of synpo_kernels/tiling.py on this GPU, and prints the lines to paste there.

Per (H, V) class and rows of a chunk: the fused product in every tile, the library's product and a pass in every block
and chunk, and the second product. Each is held to the plain passes before it is timed. Times are ratios to the plain
product of the same run.
"""

import statistics
from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import torch

from synpo_kernels import tiling, vocab_cuda, vocab_passes
from synpo_kernels.tiling import PassTile, Route, ScoreTile
from synpo_kernels.vocab_triton import Rows

from .cases import CASES, Inputs, make_inputs
from .measure import DTYPES, Stopwatch

# (case, rows of a chunk): every class of (H, V) at the usual chunk, one class at smaller and larger ones.
SHAPES = (
    ("llama3-8b", 2048), ("qwen3-8b", 2048), ("gemma2-2b", 2048), ("smollm2-135m", 2048), ("mistral-7b-v0.1", 2048),
    ("llama3-8b", 1024), ("llama3-8b", 4096),
)  # fmt: skip
COLUMNS = ["case", "H", "V", "n", "kind", "choice", "ms", "ratio_to_gemm", "note"]
ROUNDS = 15
LIMIT = 60.0  # seconds of a candidate: its compiler takes some

# Beside those of tiling.TILES; what does not fit says so.
MORE_TILES = (
    ScoreTile(128, 256, 64, 4, 8, 2, True),
    ScoreTile(128, 128, 64, 5, 8, 1, True),
    ScoreTile(128, 128, 128, 3, 8, 1, False),
    ScoreTile(64, 256, 64, 4, 4, 2, False),
    ScoreTile(256, 128, 64, 4, 8, 2, False),
)
BANDS = (4, 16, 32)  # tried on the tile in use
PASSES = (PassTile(4, 1024, 4), PassTile(2, 2048, 8), PassTile(1, 4096, 8), PassTile(8, 512, 4))
LOGIT_MB = (32, 16, 24, 64)
KINDS = ("store", "sums", "library store", "library sums", "second product")


def tiles(arch: int, kind: str) -> list[ScoreTile]:
    """Candidates of the fused product, those in use first; none where no table is."""
    if arch not in tiling.TILES:
        return []
    listed: tuple[ScoreTile, ...] = getattr(tiling.TILES[arch], kind)
    bands = [listed[0]._replace(band=band) for band in BANDS]
    return list(dict.fromkeys((*listed, *bands, *MORE_TILES)))


def blocks() -> list[tuple[PassTile, int]]:
    """Candidates of the pass over the library's logits, with the MB of logits made at once: each varied by itself."""
    return [*((block, LOGIT_MB[0]) for block in PASSES), *((PASSES[0], mb) for mb in LOGIT_MB[1:])]


def plan(device: str, arch: int) -> list[dict[str, Any]]:
    """Jobs for the worker, with what names their rows."""
    jobs = []
    for case, n in SHAPES:
        for kind in KINDS:
            if kind in ("store", "sums"):
                choices = [{"tile": list(tile)} for tile in tiles(arch, kind)]
            elif kind == "second product":
                choices = [{}]
            else:
                choices = [{"block": list(block), "mb": mb} for block, mb in blocks()]
            for choice in choices:
                arguments = {"case": case, "n": n, "kind": kind, "choice": choice, "device": device}
                jobs.append({"case": case, "n": n, "kind": kind, "choice": describe(choice), "arguments": arguments})
    return jobs


def describe(choice: dict[str, Any]) -> str:
    """The choice as it stands in tiling.py."""
    if "tile" in choice:
        return "ScoreTile({}, {}, {}, {}, {}, {}, {}, band={})".format(*choice["tile"])
    return "PassTile({}, {}, {}), {} MB of logits".format(*choice["block"], choice["mb"]) if choice else "library"


def time_candidate(case: str, n: int, kind: str, choice: dict[str, Any], device: str) -> dict[str, Any]:
    """One candidate on n rows of a case, checked and timed. Runs in the worker."""
    where = torch.device(device)
    inputs = make_inputs(CASES[case], n, DTYPES["bf16" if device == "cuda" else "fp32"], where)
    tile = None
    if not kind.endswith("sums"):
        tile = vocab_cuda._new_tile(n, len(inputs.weight), vocab_cuda._tile_dtype(inputs.hidden.dtype), where)
    if kind == "second product":
        assert tile is not None
        coef, e = torch.ones(n, device=where), tile.normal_()
        return _times(inputs, lambda: vocab_cuda.tile_grads(e, inputs.hidden, inputs.weight, coef, None, None, True))
    route, settings = tiling.LIBRARY, {}
    if "tile" in choice:
        descriptors = tiling.TILES[architecture(where)].descriptors
        programs = torch.cuda.get_device_properties(where).multi_processor_count
        route = Route(ScoreTile(*choice["tile"]), descriptors, programs)
    else:
        settings = {"PASS": PassTile(*choice["block"]), "LOGIT_BYTES": choice["mb"] << 20}
    z_y = torch.linalg.vecdot(inputs.hidden.float(), inputs.weight[inputs.labels].float())
    with patch.multiple(tiling, route=lambda *_: route, **settings):
        return _checked_and_timed(inputs, Rows(None, inputs.labels, z_y, 1.0, 0.0), tile)


def architecture(device: torch.device) -> int:
    """The key of tiling.TILES for this device; 0 for a CPU."""
    if device.type != "cuda":
        return 0
    major, minor = torch.cuda.get_device_capability(device)
    return major * 10 + minor


def _checked_and_timed(inputs: Inputs, rows: Rows, tile: torch.Tensor | None) -> dict[str, Any]:
    def run() -> tuple[torch.Tensor, torch.Tensor]:
        return vocab_cuda.store(inputs.hidden, inputs.weight, rows, tile)

    shift, sums = run()
    want_shift, want, _ = vocab_passes._softmax_sums(
        inputs.hidden, inputs.weight, None, inputs.labels, rows.reference, 1.0, 0.0, False, 1024
    )
    error = float((sums.log() + shift - want.log() - want_shift).abs().max())
    if not error <= 1e-3:  # float32 sums in another order: 1e-5
        return {"note": f"wrong: its log sums are {error:.2g} off"}
    return _times(inputs, run)


def _times(inputs: Inputs, run: Callable[[], object]) -> dict[str, Any]:
    stopwatch = Stopwatch(inputs.hidden.device)
    times, gemms = [], []
    for _ in range(ROUNDS):
        gemms.append(stopwatch(lambda: inputs.hidden @ inputs.weight.T))
        times.append(stopwatch(run))
    ratio = statistics.median(ours / gemm for ours, gemm in zip(times, gemms, strict=True))
    return {"ms": statistics.median(times), "ratio_to_gemm": ratio, "note": ""}


def advice(rows: list[dict[str, str]]) -> str:
    """What these timings say for tiling.py: its lists in order of speed, and the widest H at which fused is faster."""
    timed = [(row, float(row["ratio_to_gemm"])) for row in rows if row["ratio_to_gemm"]]
    lines = []
    for kind in ("store", "sums"):
        ratios: dict[str, list[float]] = {}
        for row, ratio in timed:
            if row["kind"] == kind:
                ratios.setdefault(row["choice"], []).append(ratio)
        most = max(map(len, ratios.values()), default=0)
        means = {choice: statistics.mean(found) for choice, found in ratios.items() if len(found) == most}
        best = sorted(means, key=lambda choice: means[choice])[:4]
        lines += [f"        {kind}=(  # mean over {most} shapes, of GEMM: {', '.join(f'{means[c]:.3f}' for c in best)}"]
        lines += [f"            {choice}," for choice in best] + ["        ),"]
    fastest: dict[tuple[int, str], float] = {}
    for row, ratio in timed:
        key = int(row["H"]), row["kind"]
        fastest[key] = min(ratio, fastest.get(key, ratio))
    fused = [H for (H, kind), ratio in fastest.items()
             if kind == "store" and ratio < fastest.get((H, "library store"), float("inf"))]  # fmt: skip
    lines.append(f"        fused_store_until={max(fused, default=0)},")
    lines += [f"# H {H}, {kind}: best {ratio:.3f} of GEMM" for (H, kind), ratio in sorted(fastest.items())]
    library = sorted((ratio, row["choice"]) for row, ratio in timed if row["kind"] == "library store")
    lines += [f"# library store: {choice}: {ratio:.3f} of GEMM" for ratio, choice in library[:3]]
    return "\n".join(lines)
