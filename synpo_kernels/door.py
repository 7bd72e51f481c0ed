"""The door of the ops: inputs checked and cast as autocast asks, ignored tokens dropped, once, before any product."""

from collections.abc import Callable
from functools import wraps
from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

_FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)

_Result = TypeVar("_Result")

OPTIONS_SCHEMA = (
    "int ignore_index, float logit_scale, float softcap, str? tp_group, int? workspace_mb, bool check, bool[] needs"
)


class Options(NamedTuple):
    """The options every public op takes, as they stand in its schema."""

    ignore_index: int
    logit_scale: float
    softcap: float  # 0.0 = none
    tp_group: str | None
    workspace_mb: int | None
    check: bool
    needs: list[bool]  # which of hidden, weight and bias get a gradient

    @property
    def trainable(self) -> bool:
        return self.needs[1] or self.needs[2]


def open_options(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *,
    softcap: float | None,
    tp_group: dist.ProcessGroup | None,
    **rest: Any,
) -> Options:
    """Options from the public functions' arguments; the tensors tell which gradients are needed."""
    needs = [t is not None and t.requires_grad and torch.is_grad_enabled() for t in (hidden, weight, bias)]
    name = None if tp_group is None else tp_group.group_name
    return Options(softcap=softcap or 0.0, tp_group=name, needs=needs, **rest)


class Door(NamedTuple):
    """Valid tokens, compacted: nothing behind the door sees an ignored one."""

    kept: Tensor | None  # (n,) int64 positions of the valid tokens; None when all are
    hidden: Tensor  # (n, H)
    targets: Tensor  # (n,) int64
    bounds: list[int]  # boundaries of the sequences after compaction
    cu_seqlens: Tensor  # (S+1,) int64, the same on the device: copying them back would make the host wait for it


def own_precision(kernel: Callable[..., _Result]) -> Callable[..., _Result]:
    """An op's kernel with autocast off inside: its inputs are cast already, and its float32 products must stay so."""

    @wraps(kernel)
    def run(first: Tensor, *rest: Any) -> _Result:
        with torch.autocast(first.device.type, enabled=False):
            return kernel(first, *rest)

    return run


def refuse_second_order(name: str) -> None:
    """RuntimeError in a backward pass that is to be differentiated itself, which would silently lack terms."""
    if torch.is_grad_enabled():
        raise RuntimeError(f"{name} is differentiable once: create_graph=True is not supported")


def compact(
    hidden: Tensor, labels: Tensor, cu_seqlens: Tensor, options: Options, vocabulary: int, name: str = "targets"
) -> Door:
    """Drop ignored tokens. Counting them is the one host sync; the same transfer carries what the checks need.

    hidden (N, H), labels (N,) or (rows, N / rows), cu_seqlens (S+1,) over the N tokens; name: what the caller calls
    the labels. Errors: IndexError for a label outside [0, vocabulary), ValueError for boundaries that do not cover
    the tokens in order and, with options.check, for values of hidden that are not finite.
    """
    targets = labels.reshape(-1)
    valid = targets != options.ignore_index
    wrong = valid & ((targets < 0) | (targets >= vocabulary))
    running = torch.nn.functional.pad(valid.cumsum(0), (1, 0))
    inside = cu_seqlens.clamp(0, len(targets)).to(torch.int64)
    compacted = running[inside]
    facts = torch.cat([wrong.sum()[None], cu_seqlens.to(torch.int64), compacted, running[-1:]]).tolist()
    boundaries, bounds, n = facts[1 : 1 + len(cu_seqlens)], facts[1 + len(cu_seqlens) : -1], facts[-1]
    if facts[0]:
        flat = int(wrong.nonzero()[0])
        position = flat if labels.ndim == 1 else divmod(flat, labels.shape[1])
        raise IndexError(
            f"{name}: position {position} holds {int(targets[flat])}, outside [0, {vocabulary}) and not "
            f"ignore_index={options.ignore_index}"
        )
    if boundaries[0] != 0 or boundaries[-1] != len(targets) or boundaries != sorted(boundaries):
        raise ValueError(f"cu_seqlens must rise from 0 to the number of tokens, {len(targets)}; got {boundaries}")
    if options.check and not bool(hidden.isfinite().all()):
        row = int((~hidden.isfinite()).any(dim=1).nonzero()[0])
        raise ValueError(f"hidden: row {row} holds a value that is not finite")
    if n == len(targets):
        return Door(None, hidden, targets, bounds, compacted)
    index = valid.nonzero_static(size=n)[:, 0]
    return Door(index, hidden[index], targets[index], bounds, compacted)


def scatter(values: Tensor, index: Tensor | None, rows: int) -> Tensor:
    """Rows of valid tokens back among zeros for the ignored ones."""
    if index is None:
        return values
    return values.new_zeros((rows, *values.shape[1:])).index_copy_(0, index, values)


def check_inputs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    softcap: float | None,
    workspace_mb: int | None,
    name: str = "targets",
) -> None:
    """What can be told from shapes, dtypes and devices alone: TypeError or ValueError naming the argument.

    name: what the caller calls the targets.
    """
    if hidden.dtype not in _FLOATS:
        raise TypeError(f"hidden has dtype {hidden.dtype}; allowed: float64, float32, bfloat16, float16")
    if weight.dtype != hidden.dtype:
        raise TypeError(
            f"hidden is {hidden.dtype} but weight is {weight.dtype}: give both one dtype, or run under autocast"
        )
    if bias is not None and bias.dtype != weight.dtype:
        raise TypeError(
            f"weight is {weight.dtype} but bias is {bias.dtype}: give both one dtype, or run under autocast"
        )
    if targets.dtype != torch.int64:
        raise TypeError(f"{name} have dtype {targets.dtype}; int64 is needed")
    if weight.ndim != 2 or weight.shape[0] == 0:
        raise ValueError(f"weight has shape {tuple(weight.shape)}; expected (V, H) with V >= 1")
    if hidden.ndim < 2 or hidden.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"hidden has shape {tuple(hidden.shape)}; expected (..., H) with weight's H = {weight.shape[1]}"
        )
    if targets.shape != hidden.shape[:-1]:
        raise ValueError(f"{name} have shape {tuple(targets.shape)}; expected hidden's {tuple(hidden.shape[:-1])}")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias has shape {tuple(bias.shape)}; expected weight's ({weight.shape[0]},)")
    check_devices(hidden, {"weight": weight, name: targets, "bias": bias})
    if softcap is not None and not softcap > 0:
        raise ValueError(f"softcap is {softcap}; it must be > 0, or None for none")
    if workspace_mb is not None and workspace_mb < 1:
        raise ValueError(f"workspace_mb is {workspace_mb}; it must be at least 1, or None for the default")


def check_devices(hidden: Tensor, others: dict[str, Tensor | None]) -> None:
    """ValueError for a tensor that is not where hidden is."""
    for name, tensor in others.items():
        if tensor is not None and tensor.device != hidden.device:
            raise ValueError(f"hidden is on {hidden.device} but {name} on {tensor.device}")


def autocast(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """The tensors in autocast's dtype where it is on, as torch.nn.functional.linear would take them; float64 stays."""
    if not torch.is_autocast_enabled(hidden.device.type) or hidden.dtype == torch.float64:
        return hidden, weight, bias
    dtype = torch.get_autocast_dtype(hidden.device.type)
    return hidden.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
