"""A head split over two processes (gloo) gives what the whole head gives: values, and all three gradients."""

import os
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

from synpo_kernels import FusedPreferenceLoss, linear_logps, pair_loss_op

V, H = 37, 8
# The column where rank 1's slice begins: equal halves, unequal ones, and a slice of a single token.
SPLITS = {"halves": 18, "unequal": 30, "one token": 1}
CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "bias and softcap": {"softcap": 4.0, "logit_scale": 0.7, "bias": True},
    # Rows whose best token passes the target by more than the guard, with both on one rank or on different ones.
    "guard": {"factor": 25.0},
}
LABELS = torch.tensor(
    [[-100, 0, 36, 5, 7, 31], [17, 18, 1, 30, -100, -100], [2, 2, 35, 19, 18, 0], [3, -100, 29, 9, 0, 36]]
)


def inputs(case: str, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor | None, dict[str, Any]]:
    torch.manual_seed(3)
    options = dict(CASES[case])
    hidden = (torch.randn(4, 6, H, dtype=torch.float64) * options.pop("factor", 1.0)).to(dtype)
    weight, bias = torch.randn(V, H, dtype=torch.float64).to(dtype), torch.randn(V, dtype=torch.float64).to(dtype)
    return hidden, weight, bias if options.pop("bias", False) else None, options


def results(case: str, dtype: torch.dtype, trainable: bool, columns: slice, group: dist.ProcessGroup | None) -> list:
    """Log-probs, losses and gradients of a rank that holds ``columns`` of the head."""
    hidden, weight, bias, options = inputs(case, dtype)
    hidden.requires_grad_()
    leaves = [hidden]
    weight = weight[columns].clone().requires_grad_(trainable)
    bias = None if bias is None else bias[columns].clone().requires_grad_(trainable)
    leaves += [x for x in (weight, bias) if x is not None and trainable]
    logps = linear_logps(hidden, weight, LABELS, bias=bias, tp_group=group, **options)
    out = [logps.detach(), *torch.autograd.grad(logps, leaves, torch.linspace(-1, 2, 24).view(4, 6).to(logps.dtype))]
    refs = torch.tensor([-9.0, -8.0, -12.0, -11.0])
    for objective in ("synpo", "dpo", "kto"):
        loss_fn = FusedPreferenceLoss(objective, tp_group=group, **options)
        loss = loss_fn(hidden, weight, LABELS, bias, ref_logps=refs).loss
        out += [loss.detach(), *torch.autograd.grad(loss, leaves)]
    return out


# (case, split, dtype, trainable, bound on the workspace). Under the bound there is room for one pair of these tokens,
# not for two: with slices of unequal width each rank by itself would chunk the pairs in its own way, and their
# messages would not meet.
RUNS = [
    *(
        (case, split, torch.float64, trainable, None)
        for case in CASES
        for split in SPLITS
        for trainable in (False, True)
    ),
    *(("guard", "halves", torch.float32, trainable, None) for trainable in (False, True)),
    ("bias and softcap", "unequal", torch.float64, True, 12 * 30 * 8),
]


def _rank(rank: int, folder: str) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    torch.set_num_threads(1)
    everything = {}
    for run in RUNS:
        case, split, dtype, trainable, bound = run
        if bound is not None:
            pair_loss_op.workspace_bytes = lambda *_, bound=bound: bound
        columns = slice(0, SPLITS[split]) if rank == 0 else slice(SPLITS[split], V)
        everything[run] = results(case, dtype, trainable, columns, dist.group.WORLD)
    try:
        linear_logps(torch.randn(2, H), torch.randn(18, H), torch.tensor([0, 36]), tp_group=dist.group.WORLD)
    except IndexError as error:
        everything["error"] = str(error)
    torch.save(everything, Path(folder) / f"{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


def test_two_ranks_are_one(tmp_path: Path) -> None:
    context = mp.spawn(_rank, args=(str(tmp_path),), nprocs=2, join=False)
    deadline = time.monotonic() + 240
    while not context.join(timeout=5):
        if time.monotonic() > deadline:
            for process in context.processes:
                process.kill()
            pytest.fail("the ranks wait for each other: their collective calls differ")
    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    for rank in ranks:
        assert "position 1 holds 36, outside [0, 36)" in rank.pop("error")
    for key, first in ranks[0].items():
        (case, _, dtype, trainable, _), second = key, ranks[1][key]
        whole = results(case, dtype, trainable, slice(0, V), None)
        has_bias = "bias" in CASES[case]
        width = 2 + trainable * (1 + has_bias)  # of one group: a value, the gradient of hidden, then the head's
        # Both make the same sums in another order; a logit's rounding error grows with it.
        rtol = 1e-11 if dtype == torch.float64 else 2e-4
        for i, want in enumerate(whole):
            got = torch.cat([first[i], second[i]]) if i % width >= 2 else first[i]
            if i % width < 2:
                assert torch.equal(first[i], second[i]), "the ranks disagree"
            what = f"{key}: result {i}"
            scale = float(want.abs().max()) or 1.0
            torch.testing.assert_close(got, want, rtol=0, atol=rtol * scale, msg=lambda m, what=what: f"{what}: {m}")
