"""From passes over the vocabulary to log-probs and gradients of valid tokens, with a head that may be split over ranks.

The equations are those of linear_logps.py: s ("sums"), the raised reference ("shift"), g ("unit gradient").
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import _resolve_process_group

from . import vocab_passes
from .device import workspace_bytes
from .door import Options
from .vocab_passes import accumulator

_ROWS = 1024  # rows of gathered target weights held at once in the accumulator dtype


class Head(NamedTuple):
    """The output layer as the passes need it."""

    weight: Tensor  # (V, H)
    bias: Tensor | None  # (V,)
    logit_scale: float
    softcap: float  # 0.0 = none
    group: dist.ProcessGroup | None  # of a vocab-parallel head: weight is this rank's slice
    workspace_mb: int

    def local(self, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Targets as columns of this rank's slice (outside [0, V) where another rank owns them); which are owned."""
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


class Gradients(NamedTuple):
    """Where gradients of a sum of coef . log p go; None where one is not needed."""

    hidden: Tensor | None  # (n, H) accumulator dtype
    weight: Tensor | None  # (V, H)
    bias: Tensor | None  # (V,)


class Scores(NamedTuple):
    """What one pass over the vocabulary leaves of n tokens: (n,) tensors, in the accumulator dtype unless said."""

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
    if grad_weight is not None:
        for rows in _row_slices(len(coef)):
            _add_rows(grad_weight, safe[rows], coef[rows, None] * hidden[rows].to(coef.dtype))
    if grad_bias is not None:
        _add_rows(grad_bias, safe, coef)


def _add_rows(total: Tensor, rows: Tensor, values: Tensor) -> None:
    """total[rows] += values in the same order in every run, though rows may repeat.

    Of index_add_ and index_put_, the first adds with atomics on a GPU and the second on a CPU with float32.
    """
    if total.device.type == "cpu":
        total.index_add_(0, rows, values)
    else:
        total.index_put_((rows,), values, accumulate=True)


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
    """Adds coef . d log p to the head's gradients, all recomputed; gives d log p / d hidden (n, H) or (0, H)."""
    log_norm = scores.target_logits - scores.logps
    if grad_weight is not None:
        product: Tensor = vocab_passes.softmax_grads(
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
                hidden[rows],
                head.weight,
                head.bias,
                scores.columns[rows],
                log_norm[rows],
                head.logit_scale,
                head.softcap,
                tile,
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


def open_head(weight: Tensor, bias: Tensor | None, options: Options) -> Head:
    workspace = workspace_bytes(options.workspace_mb, weight.device, options.trainable) >> 20
    group = None if options.tp_group is None else _resolve_process_group(options.tp_group)  # type: ignore[arg-type]
    return Head(weight, bias, options.logit_scale, options.softcap, group, workspace)


def widest_slice(head: Head) -> int:
    """The most columns any rank's weight holds: what all ranks must agree on to take the same steps."""
    if head.group is None:
        return head.weight.shape[0]
    widest = torch.tensor(head.weight.shape[0], device=head.weight.device)
    return int(head.reduce(widest, dist.ReduceOp.MAX))


def vocabulary_size(head: Head) -> int:
    """V over all ranks."""
    if head.group is None:
        return head.weight.shape[0]
    total = torch.tensor(head.weight.shape[0], device=head.weight.device)
    return int(head.reduce(total))


def stored_gradients(
    hidden: Tensor, targets: Tensor, head: Head, coefficients: Callable[[Tensor], Tensor], out: Gradients
) -> Tensor:
    """Score tokens into a tile of exp(z - z_y) and make both gradients from it: three products. Gives the log-probs."""
    columns, owned = head.local(targets)
    z_y = target_logits(hidden, columns, owned, head)
    tile = hidden.new_empty((len(hidden), len(head.weight)), dtype=tile_dtype(hidden))
    shift, sums = vocab_passes.softmax_store(
        hidden, head.weight, head.bias, columns, z_y, head.logit_scale, head.softcap, tile
    )
    scores = finish(columns, owned, z_y, shift, sums, head)
    coef = coefficients(scores.logps)
    product = vocab_passes.tile_grads(
        tile, hidden, head.weight, coef * scores.local_scale / scores.norm, out.weight, out.bias, out.hidden is not None
    )
    add_target_gradients(hidden, scores, coef, head, out.weight, out.bias)
    if out.hidden is not None:
        out.hidden.copy_(unit_gradient(product, scores, head).mul_(coef[:, None]))
    return scores.logps


def tile_dtype(hidden: Tensor) -> torch.dtype:
    """bf16 keeps float32's exponents, so a bf16 tile holds exp(z - shift) at any shift; fp16 does not."""
    return hidden.dtype if hidden.is_cuda and hidden.dtype == torch.bfloat16 else accumulator(hidden.dtype)


def recomputed_gradients(
    hidden: Tensor, targets: Tensor, head: Head, coefficients: Callable[[Tensor], Tensor], out: Gradients
) -> Tensor:
    """Score, then compute the probabilities again for the gradients: four products, any size. Gives the log-probs."""
    scores, _ = score(hidden, targets, head, False)
    coef = coefficients(scores.logps)
    g = score_gradients(hidden, scores, coef, head, out.weight, out.bias, out.hidden is not None)
    if out.hidden is not None:
        out.hidden.copy_(g.mul_(coef[:, None]))
    return scores.logps
