"""Tolerances that are derived, not chosen: twice what plain PyTorch in the same dtype loses, plus what rounding must.

The two roundings that no implementation avoids: of the result to its own dtype, and of a sum of ``terms`` products in
the accumulator (float32, or float64 for float64 inputs), which grows with the root of their number.
"""

import torch
from torch import Tensor


def _eps(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).eps


def tolerance(
    exact: Tensor, naive: Tensor, result: torch.dtype, inputs: torch.dtype, terms: int, scale: float
) -> Tensor:
    """Allowed absolute error of each element.

    exact: float64; naive: plain PyTorch's result; result, inputs: dtypes of what is tested and of its inputs; terms:
    number of summands behind an element; scale: magnitude of the summands.
    """
    accumulator = torch.float64 if inputs == torch.float64 else torch.float32
    naive_error = (naive.double() - exact).abs()
    naive_error = naive_error[naive_error.isfinite()]
    own = 2 * naive_error.max() if naive_error.numel() else 0.0
    # float32's 2^-126 is the last number it holds in full; exp of less gives no bits to compare.
    return own + _eps(result) * exact.abs() + _eps(accumulator) * terms**0.5 * scale + torch.finfo(result).tiny


def assert_close(ours: Tensor, exact: Tensor, allowed: Tensor | float, what: str) -> None:
    """Every element of ours within its allowed error of exact; says where it is worst."""
    assert ours.shape == exact.shape, f"{what}: shape {tuple(ours.shape)}, expected {tuple(exact.shape)}"
    if not exact.numel():
        return
    assert ours.isfinite().all(), f"{what}: {int((~ours.isfinite()).sum())} of {ours.numel()} values are not finite"
    error = (ours.double() - exact).abs()
    excess = (error / allowed).flatten()
    worst = int(excess.argmax())
    position = tuple(int(i) for i in torch.unravel_index(torch.tensor(worst), exact.shape))
    assert excess[worst] <= 1, (
        f"{what}: at {position} {ours[position].item():.9g} is {error[position].item():.3g} off "
        f"{exact[position].item():.9g}, {excess[worst].item():.3g} times what is allowed"
    )
