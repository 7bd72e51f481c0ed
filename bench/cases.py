"""Named shapes: the output layers of real models, and the shapes the CPU kernel's goals are set on. N tokens, H
hidden size, V vocabulary.
"""

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

# op -> its objective on pairs; linear_logps has none, cross_entropy is minus the mean of all log-probs.
OPS = {"synpo_loss": "synpo", "simpo_loss": "simpo", "linear_logps": None, "cross_entropy": None}


@dataclass(frozen=True)
class Case:
    name: str
    H: int
    V: int
    cpu_n: tuple[int, ...]  # token counts of a default CPU run
    gpu_n: tuple[int, ...]  # of a default GPU run
    softcap: float | None = None
    pair_tokens: int = 1024  # positions of the two rows of a pair, at most
    masked: float = 0.0  # share of a row that is prompt, and ignored
    rejected: float = 1.0  # length of a rejected answer over its chosen one's; what is left of its row is padding

    def pairs(self, n: int) -> int:
        """B for n tokens: 2B answers of equal length, which is what suits losses that want padded input best."""
        b = max(1, n // self.pair_tokens)
        if n % (2 * b):
            raise ValueError(
                f"--n {n}: {self.name} splits it into {2 * b} answers of equal length; give a multiple of {2 * b}"
            )
        return b


_GPU = (2048, 8192, 32768)
CASES = {
    case.name: case
    for case in (
        Case("512x1024x49152", 1024, 49152, (512,), (512,)),
        Case("512x2048x128256", 2048, 128256, (512,), (512,)),
        Case("2048x576x49152", 576, 49152, (2048,), (2048,)),
        Case("smollm2-135m", 576, 49152, (64, 1024), _GPU),
        Case("llama3-8b", 4096, 128256, (1024,), _GPU),
        Case("qwen2.5-7b", 3584, 152064, (1024,), _GPU),
        Case("qwen3-8b", 4096, 151936, (1024,), _GPU),
        Case("mistral-7b", 4096, 32768, (1024,), _GPU),
        Case("mistral-7b-v0.1", 4096, 32000, (1024,), _GPU),
        Case("gemma2-2b", 2304, 256000, (1024,), _GPU, softcap=30.0),
    )
}


def _sweeps() -> dict[str, dict[str, tuple[tuple[Case, int], ...]]]:
    """Axis -> device -> cases and token counts along it. 512 positions on a CPU, 8192 on a GPU; what is not on
    the axis stays as it is in the middle.
    """
    axes: dict[str, dict[str, tuple[tuple[Case, int], ...]]] = {}
    for device, base, n, counts in (
        ("cpu", Case("1024x49152", 1024, 49152, (512,), (512,)), 512, (32, 128, 512, 1024)),
        ("cuda", CASES["llama3-8b"], 8192, (512, 2048, 8192, 32768)),
    ):
        points = {
            "tokens": [(base, count) for count in counts],
            "vocabulary": [(replace(base, name=f"{base.H}x{v}", V=v), n) for v in (8192, 32000, 49152, 128256)],
            "masked": [(replace(base, name=f"{base.name}-masked-{x:g}", masked=x), n) for x in (0.25, 0.5, 0.75)],
            "lengths": [(replace(base, name=f"{base.name}-rejected-{x:g}", rejected=x), n) for x in (0.5, 0.25, 0.125)],
        }
        for axis, along in points.items():
            middle = [(base, n)] if axis in ("masked", "lengths") else []
            axes.setdefault(axis, {})[device] = tuple(middle + along)
    return axes


SWEEPS = _sweeps()
CASES |= {case.name: case for axis in SWEEPS.values() for points in axis.values() for case, _ in points
          if case.name not in CASES}  # fmt: skip

# What runs when no --case is given: minutes on two cores, and every model's head on a GPU.
DEFAULT = {
    "cpu": ("512x1024x49152", "512x2048x128256", "2048x576x49152"),
    "cuda": ("smollm2-135m", "llama3-8b", "qwen2.5-7b", "mistral-7b", "gemma2-2b"),
}


class Inputs(NamedTuple):
    hidden: Tensor  # (N, H)
    weight: Tensor  # (V, H)
    labels: Tensor  # (N,) int64, -100 where nothing is scored
    cu_seqlens: Tensor  # (2B+1,) int32
    grad: Tensor  # (N,) float32, the incoming gradient of linear_logps
    softcap: float | None


def make_inputs(case: Case, n: int, dtype: torch.dtype, device: torch.device) -> Inputs:
    """Logits of unit spread, plus a push of 4 to 16 towards the target: target log-probs from about -8 to -0.01, as
    in a trained model.
    """
    generator = torch.Generator(device).manual_seed(n * 1_000_003 + case.V)
    weight = torch.empty(case.V, case.H, dtype=dtype, device=device)
    for block in weight.split(16384):
        block.copy_(torch.randn(block.shape, generator=generator, device=device) / case.H**0.5)
    labels = torch.randint(case.V, (n,), generator=generator, device=device)
    push = torch.empty(n, 1, device=device).uniform_(4, 16, generator=generator)
    hidden = torch.randn(n, case.H, generator=generator, device=device) + push * weight[labels].float()
    grad = torch.randn(n, generator=generator, device=device) / n
    sequences = 2 * case.pairs(n) if n % 2 == 0 else 1
    if case.masked or case.rejected < 1:
        ends = torch.full((sequences,), n // sequences, device=device)
        start = int(case.masked * (n // sequences))
        ends[sequences // 2 :] = start + max(1, round(case.rejected * (n // sequences - start)))
        position = torch.arange(n // sequences, device=device)
        answer = (position >= start) & (position < ends[:, None])
        labels = labels.where(answer.flatten(), -100)
    cu_seqlens = torch.arange(sequences + 1, device=device, dtype=torch.int32) * (n // sequences)
    return Inputs(hidden.to(dtype), weight, labels, cu_seqlens, grad, case.softcap)
