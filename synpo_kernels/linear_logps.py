"""Per-token log-probs of given tokens, straight from hidden states and lm_head, without (N, V) logits.

With z the logits and y the target of a token, the target's own logit is the softmax reference:

    s = sum_{v != y} exp(z_v - z_y)        log p = -log(1 + s)        p = 1 / (1 + s)

and the gradient of log p in the hidden state, which does not depend on the loss, comes out of the same pass over the vocabulary:

    g = d log p / d hidden = (s d_y W[y] - sum_{v != y} exp(z_v - z_y) d_v W[v]) / (1 + s),     d_v = dz_v / d(h . W[v])

so with a frozen head the forward pass makes g, and the backward pass is one multiply by the incoming gradient: two matrix products in
all. No difference of nearly equal numbers is taken, so a confident token (p near 1) keeps its relative accuracy. Where a logit passes z_y
by more than vocab_passes.GUARD, the row's reference is raised ("shift"); then with t = exp(z_y - shift) the denominator 1 + s becomes t + s
and log p = (z_y - shift) - log(t + s). docs/linear_logps.md derives all of it.

With a trainable head the backward pass computes the probabilities again: four products in all. pair_loss.py does whole pairs in three.
"""

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from . import vocab_passes
from .device import workspace_bytes
from .vocab_passes import accumulator

_ROWS = 1024  # rows of gathered target weights held at once in the accumulator dtype
_FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


class Head(NamedTuple):
    """The output layer as the passes need it."""

    weight: Tensor  # (V, H)
    bias: Tensor | None  # (V,)
    logit_scale: float
    softcap: float  # 0.0 = none
    group: dist.ProcessGroup | None  # of a vocab-parallel head: weight is this rank's slice
    workspace_mb: int

    def local(self, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Targets as columns of this rank's slice (outside [0, V) where another rank owns them), and which are owned."""
        if self.group is not None:
            sizes = torch.zeros(dist.get_world_size(self.group), dtype=torch.int64, device=targets.device)
            sizes[dist.get_rank(self.group)] = self.weight.shape[0]
            dist.all_reduce(sizes, group=self.group)
            targets = targets - sizes[: dist.get_rank(self.group)].sum()
        return targets, (targets >= 0) & (targets < self.weight.shape[0])

    def reduce(self, values: Tensor, op: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM) -> Tensor:
        """In-place reduction over the vocab-parallel ranks; nothing without a group."""
        if self.group is not None:
            dist.all_reduce(values, op=op, group=self.group)
        return values

    def slope(self, logits: Tensor) -> Tensor:
        """d = dz / d(h . W[v]) at given logits."""
        scale = torch.full_like(logits, self.logit_scale)
        return scale * (1 - (logits / self.softcap) ** 2) if self.softcap > 0 else scale


class Scores(NamedTuple):
    """What one pass over the vocabulary leaves of n tokens; every tensor (n,) in the accumulator dtype unless said otherwise."""

    columns: Tensor  # int64, the targets as columns of the local weight
    owned: Tensor  # bool, whether the local weight holds the target
    target_logits: Tensor
    sums: Tensor  # sum over the other tokens of exp(z - shift)
    norm: Tensor  # sums + exp(target_logits - shift)
    logps: Tensor
    local_scale: Tensor  # what this rank's products and tiles are to be multiplied with: exp(local shift - shift)


def target_logits(hidden: Tensor, columns: Tensor, owned: Tensor, head: Head) -> Tensor:
    """(n,) logits of the targets, accumulated in float32 (float64)."""
    acc = accumulator(hidden.dtype)
    raw = torch.empty(columns.shape, dtype=acc, device=hidden.device)
    safe = columns.clamp(0, head.weight.shape[0] - 1)
    for rows in _row_slices(len(columns)):
        raw[rows] = torch.linalg.vecdot(hidden[rows].to(acc), head.weight[safe[rows]].to(acc))
    if head.bias is not None:
        raw += head.bias[safe].to(acc)
    raw *= head.logit_scale
    if head.softcap > 0:
        raw = head.softcap * torch.tanh(raw / head.softcap)
    return head.reduce(raw.where(owned, raw.new_zeros(())))


def _row_slices(n: int) -> list[slice]:
    return [slice(start, min(start + _ROWS, n)) for start in range(0, n, _ROWS)]


def finish(columns: Tensor, owned: Tensor, z_y: Tensor, shift: Tensor, sums: Tensor, head: Head) -> Scores:
    """Log-probs from the sums of a pass, over all ranks where the head is vocab-parallel."""
    top = head.reduce(shift.clone(), dist.ReduceOp.MAX)
    local_scale = torch.exp(shift - top)
    sums = head.reduce(sums * local_scale)
    gap = z_y - top
    norm = sums + gap.exp()
    logps = torch.where(gap == 0, -torch.log1p(sums), gap - norm.log())
    return Scores(columns, owned, z_y, sums, norm, logps, local_scale)


def unit_gradient(product: Tensor, scores: Scores, head: Head) -> Tensor:
    """g (n, H) from ``product`` = sum over the other tokens of exp(z - shift) d W, in place."""
    target_part = (scores.sums * head.slope(scores.target_logits)).where(scores.owned, scores.sums.new_zeros(()))
    safe = scores.columns.clamp(0, head.weight.shape[0] - 1)
    for rows in _row_slices(len(product)):
        g = product[rows].mul_(-scores.local_scale[rows, None])
        g.addcmul_(head.weight[safe[rows]].to(g.dtype), target_part[rows, None]).div_(scores.norm[rows, None])
    return head.reduce(product)


def add_target_gradients(
    hidden: Tensor, scores: Scores, coef: Tensor, head: Head, grad_weight: Tensor | None, grad_bias: Tensor | None
) -> None:
    """The target's own column of the head's gradient: coef (1 - p) d_y hidden, added to row y."""
    coef = coef * (scores.sums / scores.norm) * head.slope(scores.target_logits)
    coef = coef.where(scores.owned, coef.new_zeros(()))
    safe = scores.columns.clamp(0, head.weight.shape[0] - 1)
    # index_put_ rather than index_add_: on a GPU the latter adds with atomics, in an order that differs from run to run.
    if grad_weight is not None:
        for rows in _row_slices(len(coef)):
            grad_weight.index_put_((safe[rows],), coef[rows, None] * hidden[rows].to(coef.dtype), accumulate=True)
    if grad_bias is not None:
        grad_bias.index_put_((safe,), coef, accumulate=True)


def score(hidden: Tensor, targets: Tensor, head: Head, want_gradient: bool) -> tuple[Scores, Tensor]:
    """One pass over the vocabulary for valid tokens: their Scores, and the unit gradient (n, H) or an empty (0, H)."""
    columns, owned = head.local(targets)
    z_y = target_logits(hidden, columns, owned, head)
    shift, sums, product = vocab_passes.softmax_sums(
        hidden, head.weight, head.bias, columns, z_y, head.logit_scale, head.softcap, want_gradient, head.workspace_mb
    )
    scores = finish(columns, owned, z_y, shift, sums, head)
    return scores, unit_gradient(product, scores, head) if want_gradient else product


def score_gradients(
    hidden: Tensor,
    scores: Scores,
    coef: Tensor,
    head: Head,
    grad_weight: Tensor | None,
    grad_bias: Tensor | None,
    want_hidden: bool,
) -> Tensor:
    """The recompute backward: adds coef . d log p to the head's gradients; gives d log p / d hidden (n, H), or an empty (0, H)."""
    log_norm = scores.target_logits - scores.logps
    if grad_weight is not None:
        product = vocab_passes.softmax_grads(
            hidden, head.weight, head.bias, scores.columns, log_norm, coef, head.logit_scale, head.softcap,
            grad_weight, grad_bias, want_hidden, head.workspace_mb,
        )  # fmt: skip
    else:  # a bias alone: its gradient needs the probabilities but no product with hidden
        product = hidden.new_empty((len(hidden) if want_hidden else 0, hidden.shape[1]), dtype=coef.dtype)
        workspace = workspace_bytes(head.workspace_mb, hidden.device, True)
        step = max(1, workspace // (head.weight.shape[0] * coef.element_size()))
        for start in range(0, len(hidden), step):
            rows = slice(start, start + step)
            tile = coef.new_empty((len(hidden[rows]), head.weight.shape[0]))
            vocab_passes.softmax_store(
                hidden[rows], head.weight, head.bias, scores.columns[rows], log_norm[rows], head.logit_scale, head.softcap, tile
            )
            part = vocab_passes.tile_grads(tile, hidden[rows], head.weight, coef[rows], None, grad_bias, want_hidden)
            if want_hidden:
                product[rows] = part
    add_target_gradients(hidden, scores, coef, head, grad_weight, grad_bias)
    if not want_hidden:
        return product
    # Probabilities are relative to the full denominator already, so this is unit_gradient with norm 1.
    one = torch.ones_like(scores.norm)
    return unit_gradient(product, scores._replace(sums=scores.sums / scores.norm, norm=one, local_scale=one), head)


class Door(NamedTuple):
    """Valid tokens, compacted: nothing behind the door sees an ignored one."""

    index: Tensor | None  # (n,) int64 positions of the valid tokens; None when all are
    hidden: Tensor  # (n, H)
    targets: Tensor  # (n,) int64
    bounds: list[int]  # boundaries of the sequences after compaction


def compact(hidden: Tensor, targets: Tensor, cu_seqlens: Tensor, ignore_index: int, vocabulary: int, check: bool) -> Door:
    """Drop ignored tokens, at the cost of the one host sync that counts them; the same transfer carries what the checks need.

    hidden (N, H), targets (N,), cu_seqlens (S+1,) over the N tokens. Errors: IndexError for a target outside [0, vocabulary), ValueError
    for boundaries that do not cover the tokens in order and, with check, for values of hidden that are not finite.
    """
    valid = targets != ignore_index
    wrong = valid & ((targets < 0) | (targets >= vocabulary))
    running = torch.nn.functional.pad(valid.cumsum(0), (1, 0))
    inside = cu_seqlens.clamp(0, len(targets)).to(torch.int64)
    facts = torch.cat([wrong.sum()[None], cu_seqlens.to(torch.int64), running[inside], running[-1:]]).tolist()
    boundaries, bounds, n = facts[1 : 1 + len(cu_seqlens)], facts[1 + len(cu_seqlens) : -1], facts[-1]
    if facts[0]:
        position = int(wrong.nonzero()[0])
        raise IndexError(
            f"targets: position {position} holds {int(targets[position])}, outside [0, {vocabulary}) and not ignore_index={ignore_index}"
        )
    if boundaries[0] != 0 or boundaries[-1] != len(targets) or boundaries != sorted(boundaries):
        raise ValueError(f"cu_seqlens must rise from 0 to the number of tokens, {len(targets)}; got {boundaries}")
    if check and not bool(hidden.isfinite().all()):
        row = int((~hidden.isfinite()).any(dim=1).nonzero()[0])
        raise ValueError(f"hidden: row {row} holds a value that is not finite")
    if n == len(targets):
        return Door(None, hidden, targets, bounds)
    index = valid.nonzero_static(size=n)[:, 0]
    return Door(index, hidden[index], targets[index], bounds)


def scatter(values: Tensor, index: Tensor | None, rows: int) -> Tensor:
    """Rows of valid tokens back among zeros for the ignored ones."""
    if index is None:
        return values
    return values.new_zeros((rows, *values.shape[1:])).index_copy_(0, index, values)


def check_inputs(hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None, softcap: float | None) -> None:
    """What can be told from shapes, dtypes and devices alone: TypeError or ValueError naming the argument."""
    if hidden.dtype not in _FLOATS:
        raise TypeError(f"hidden has dtype {hidden.dtype}; allowed: float64, float32, bfloat16, float16")
    if weight.dtype != hidden.dtype:
        raise TypeError(f"hidden is {hidden.dtype} but weight is {weight.dtype}: give both one dtype, or run under autocast")
    if bias is not None and bias.dtype != weight.dtype:
        raise TypeError(f"weight is {weight.dtype} but bias is {bias.dtype}: give both one dtype, or run under autocast")
    if targets.dtype != torch.int64:
        raise TypeError(f"targets have dtype {targets.dtype}; int64 is needed")
    if weight.ndim != 2 or weight.shape[0] == 0:
        raise ValueError(f"weight has shape {tuple(weight.shape)}; expected (V, H) with V >= 1")
    if hidden.ndim < 2 or hidden.shape[-1] != weight.shape[1]:
        raise ValueError(f"hidden has shape {tuple(hidden.shape)}; expected (..., H) with weight's H = {weight.shape[1]}")
    if targets.shape != hidden.shape[:-1]:
        raise ValueError(f"targets have shape {tuple(targets.shape)}; expected hidden's {tuple(hidden.shape[:-1])}")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias has shape {tuple(bias.shape)}; expected weight's ({weight.shape[0]},)")
    for name, tensor in (("weight", weight), ("targets", targets), ("bias", bias)):
        if tensor is not None and tensor.device != hidden.device:
            raise ValueError(f"hidden is on {hidden.device} but {name} on {tensor.device}")
    if softcap is not None and not softcap > 0:
        raise ValueError(f"softcap is {softcap}; it must be > 0, or None for none")


def autocast(*tensors: Tensor | None) -> list[Tensor | None]:
    """Tensors in autocast's dtype where it is on, as torch.nn.functional.linear would take them; float64 stays."""
    first = tensors[0]
    assert first is not None
    if not torch.is_autocast_enabled(first.device.type):
        return list(tensors)
    dtype = torch.get_autocast_dtype(first.device.type)
    return [t if t is None or t.dtype == torch.float64 else t.to(dtype) for t in tensors]


def gradients_needed(*tensors: Tensor | None) -> list[bool]:
    return [t is not None and t.requires_grad and torch.is_grad_enabled() for t in tensors]


def resolve_group(name: str | None) -> dist.ProcessGroup | None:
    return None if name is None else dist.distributed_c10d._resolve_process_group(name)


def group_name(tp_group: dist.ProcessGroup | None) -> str | None:
    return None if tp_group is None else tp_group.group_name


_LIBRARY = torch.library.Library("synpo", "FRAGMENT")
_OPTIONS = (
    "Tensor? bias, int ignore_index, float logit_scale, float softcap, str? tp_group, int? workspace_mb, bool check, bool[] needs"
)
_LIBRARY.define(f"linear_logps(Tensor hidden, Tensor weight, Tensor targets, {_OPTIONS}) -> (Tensor logps, Tensor unit_gradient)")
_LIBRARY.define(
    f"linear_logps_backward(Tensor grad, Tensor logps, Tensor hidden, Tensor weight, Tensor targets, {_OPTIONS})"
    " -> (Tensor, Tensor, Tensor)"
)


def open_head(
    weight: Tensor, bias: Tensor | None, logit_scale: float, softcap: float, tp_group: str | None, workspace_mb: int | None, trainable: bool
) -> Head:
    workspace = workspace_bytes(workspace_mb, weight.device, trainable) >> 20
    return Head(weight, bias, logit_scale, softcap, resolve_group(tp_group), workspace)


def vocabulary_size(head: Head) -> int:
    """V over all ranks."""
    if head.group is None:
        return head.weight.shape[0]
    total = torch.tensor(head.weight.shape[0], device=head.weight.device)
    return int(head.reduce(total))


def _forward(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    ignore_index: int,
    logit_scale: float,
    softcap: float,
    tp_group: str | None,
    workspace_mb: int | None,
    check: bool,
    needs: list[bool],
) -> tuple[Tensor, Tensor]:
    frozen = not (needs[1] or needs[2])
    head = open_head(weight, bias, logit_scale, softcap, tp_group, workspace_mb, not frozen)
    ends = torch.tensor([0, len(targets)], device=targets.device)
    door = compact(hidden, targets, ends, ignore_index, vocabulary_size(head), check)
    scores, gradient = score(door.hidden, door.targets, head, needs[0] and frozen)
    if len(gradient):
        gradient = scatter(gradient, door.index, len(targets))
    elif needs[0] and frozen:
        gradient = gradient.new_zeros(hidden.shape)
    return scatter(scores.logps, door.index, len(targets)), gradient


def _forward_fake(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    ignore_index: int,
    logit_scale: float,
    softcap: float,
    tp_group: str | None,
    workspace_mb: int | None,
    check: bool,
    needs: list[bool],
) -> tuple[Tensor, Tensor]:
    acc = accumulator(hidden.dtype)
    rows = hidden.shape[0] if needs[0] and not (needs[1] or needs[2]) else 0
    return targets.new_empty(targets.shape, dtype=acc), hidden.new_empty((rows, hidden.shape[1]), dtype=acc)


def _backward(
    grad: Tensor,
    logps: Tensor,
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    ignore_index: int,
    logit_scale: float,
    softcap: float,
    tp_group: str | None,
    workspace_mb: int | None,
    check: bool,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    head = open_head(weight, bias, logit_scale, softcap, tp_group, workspace_mb, True)
    ends = torch.tensor([0, len(targets)], device=targets.device)
    door = compact(hidden, targets, ends, ignore_index, vocabulary_size(head), False)
    logps, coef = (x if door.index is None else x[door.index] for x in (logps, grad))
    columns, owned = head.local(door.targets)
    z_y = target_logits(door.hidden, columns, owned, head)
    one = torch.ones_like(logps)
    scores = Scores(columns, owned, z_y, -torch.expm1(logps), one, logps, one)
    grad_weight = logps.new_zeros(weight.shape if needs[1] else 0)
    grad_bias = logps.new_zeros(len(weight) if needs[2] else 0)
    g = score_gradients(
        door.hidden, scores, coef, head, grad_weight if needs[1] else None, grad_bias if needs[2] else None, needs[0]
    )
    grad_hidden = scatter((g * coef[:, None]).to(hidden.dtype), door.index, len(targets)) if needs[0] else g.to(hidden.dtype)
    return grad_hidden, grad_weight.to(weight.dtype), grad_bias.to(weight.dtype)


def _backward_fake(
    grad: Tensor,
    logps: Tensor,
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    ignore_index: int,
    logit_scale: float,
    softcap: float,
    tp_group: str | None,
    workspace_mb: int | None,
    check: bool,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        hidden.new_empty((hidden.shape[0] if needs[0] else 0, hidden.shape[1])),
        weight.new_empty(weight.shape if needs[1] else 0),
        weight.new_empty(weight.shape[0] if needs[2] else 0),
    )


def _setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    hidden, weight, targets, bias, *ctx.options, needs = inputs
    ctx.needs = needs
    ctx.dtype = hidden.dtype
    ctx.mark_non_differentiable(output[1])
    if needs[1] or needs[2]:
        ctx.save_for_backward(output[0], hidden, weight, targets, bias)
    else:
        ctx.save_for_backward(output[1])


def _autograd(ctx, grad: Tensor, _):  # type: ignore[no-untyped-def]
    needs, nothing = ctx.needs, (None,) * len(ctx.options)
    if not (needs[1] or needs[2]):
        (unit,) = ctx.saved_tensors
        return (grad[:, None] * unit).to(ctx.dtype), None, None, None, *nothing, None
    logps, hidden, weight, targets, bias = ctx.saved_tensors
    grads = torch.ops.synpo.linear_logps_backward(grad, logps, hidden, weight, targets, bias, *ctx.options, needs)
    grad_hidden, grad_weight, grad_bias = (g if need else None for g, need in zip(grads, needs, strict=True))
    return grad_hidden, grad_weight, None, grad_bias, *nothing, None


_LIBRARY.impl("linear_logps", _forward, "CompositeExplicitAutograd")
_LIBRARY.impl("linear_logps_backward", _backward, "CompositeExplicitAutograd")
torch.library.register_fake("synpo::linear_logps", _forward_fake, lib=_LIBRARY)
torch.library.register_fake("synpo::linear_logps_backward", _backward_fake, lib=_LIBRARY)
torch.library.register_autograd("synpo::linear_logps", _autograd, setup_context=_setup_context, lib=_LIBRARY)


def linear_logps(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    ignore_index: int = -100,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    tp_group: dist.ProcessGroup | None = None,
    workspace_mb: int | None = None,
    check: bool = False,
) -> Tensor:
    """Log-probs (nats) of given tokens under softmax(z), z = logit_scale * (hidden @ weight.T + bias), then softcap * tanh(z / softcap).

    Equivalent to, without ever holding the (N, V) logits::

        logits = logit_scale * (hidden @ weight.T + bias)
        logits = softcap * torch.tanh(logits / softcap)
        logits.log_softmax(-1).gather(-1, targets[..., None])[..., 0]

    Shapes: hidden (..., H), weight (V, H), targets (...) int64, bias (V,). Already aligned: targets[t] is the token that hidden[t]
    predicts. hidden, weight and bias share one dtype: float64, float32, bfloat16 or float16 (or autocast is on).
    Returns: float32 (float64 for float64 inputs) in the shape of targets, 0.0 at positions that hold ignore_index. Differentiable once
    in hidden, weight and bias.

    tp_group: weight and bias are this rank's slice of the vocabulary, in rank order; targets are ids in the whole vocabulary; hidden is
    the same on every rank, and its gradient comes back summed over the ranks. workspace_mb bounds working memory (default 64 on a CPU; on a
    GPU 640 with a frozen head, 1300 with a trainable one). check=True also refuses values of hidden that are not finite, at the cost of a
    read of hidden.
    Errors: TypeError for dtypes, ValueError for shapes, devices and softcap <= 0, IndexError for a target outside [0, V).
    """
    hidden, weight, bias = autocast(hidden, weight, bias)  # type: ignore[assignment]
    check_inputs(hidden, weight, targets, bias, softcap)
    needs = gradients_needed(hidden, weight, bias)
    logps, _ = torch.ops.synpo.linear_logps(
        hidden.reshape(-1, hidden.shape[-1]), weight, targets.reshape(-1), bias, ignore_index, logit_scale, softcap or 0.0,
        group_name(tp_group), workspace_mb, check, needs,
    )  # fmt: skip
    return logps.view(targets.shape)
