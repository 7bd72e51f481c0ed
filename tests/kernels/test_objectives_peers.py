"""The objectives against liger-kernel's fused losses, end to end, and trl's IPO, under the conventions they share.

liger's NLL terms are means over the batch's tokens, ours over sequences: they agree where the chosen answers have one
length. Its accumulators are float32, which leaves differences of 1e-7 in the loss.
"""

from types import SimpleNamespace

import torch
from torch import Tensor

from synpo_kernels import FusedPreferenceLoss, linear_logps, objectives

TOLERANCE = {"rtol": 1e-5, "atol": 2e-7}
H, V = 12, 40


def problem(rows: int = 6, length: int = 7) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Three pairs, prompts of one length (so that the NLL means agree), random bias."""
    labels = torch.randint(0, V, (rows, length))
    labels[:, :2] = -100
    labels[rows // 2 :, 5:] = -100
    return torch.randn(rows, length, H), torch.randn(V, H), labels, torch.randn(V)


def gradients(loss: Tensor, leaves: list[Tensor]) -> tuple[Tensor, ...]:
    return loss.detach(), *torch.autograd.grad(loss, leaves)


def compare(ours: FusedPreferenceLoss, peer: object, reference: bool = False) -> None:
    hidden, weight, labels, bias = problem()
    leaves = [t.requires_grad_() for t in (hidden, weight, bias)]
    ref_hidden, ref_weight = torch.randn_like(hidden), torch.randn_like(weight)
    refs = linear_logps(ref_hidden, ref_weight, labels).sum(1) if reference else None
    options = {"ref_input": ref_hidden, "ref_weight": ref_weight} if reference else {}
    want, *_ = peer(weight, hidden, labels, bias=bias, **options)  # type: ignore[operator]
    got = ours(hidden, weight, labels, bias, ref_logps=refs).loss
    for a, b in zip(gradients(got, leaves), gradients(want, leaves), strict=True):
        torch.testing.assert_close(a, b, **TOLERANCE)


def test_dpo() -> None:
    from liger_kernel.chunked_loss import LigerFusedLinearDPOLoss

    peer = LigerFusedLinearDPOLoss(beta=0.3, compute_nll_loss=False, compiled=False, average_log_prob=False)
    compare(FusedPreferenceLoss("dpo", beta=0.3), peer, reference=True)


def test_simpo() -> None:
    from liger_kernel.chunked_loss import LigerFusedLinearSimPOLoss

    peer = LigerFusedLinearSimPOLoss(beta=1.5, gamma=0.8, compute_nll_loss=False, compiled=False)
    compare(FusedPreferenceLoss("simpo", beta=1.5, gamma=0.8), peer)


def test_cpo() -> None:
    from liger_kernel.chunked_loss import LigerFusedLinearCPOLoss

    peer = LigerFusedLinearCPOLoss(beta=0.3, alpha=1.0, compiled=False, average_log_prob=False)
    compare(FusedPreferenceLoss("cpo", beta=0.3), peer)


def test_orpo() -> None:
    from liger_kernel.chunked_loss import LigerFusedLinearORPOLoss

    compare(FusedPreferenceLoss("orpo", beta=0.4), LigerFusedLinearORPOLoss(beta=0.4, compiled=False))


def test_kto() -> None:
    """liger takes single answers and the KL estimates as given: the chosen are held to z-, the rejected to z+."""
    from liger_kernel.chunked_loss import LigerFusedLinearKTOLoss

    hidden, weight, labels, bias = problem()
    leaves = [t.requires_grad_() for t in (hidden, weight, bias)]
    policy = linear_logps(hidden, weight, labels, bias=bias).sum(1).detach()
    ref_hidden = torch.randn_like(hidden)
    ref_weight = 1.5 * torch.randn_like(weight)
    refs = linear_logps(ref_hidden, ref_weight, labels).sum(1)
    kl_chosen, kl_rejected = (policy - refs).view(2, 3).mean(1).clamp(min=0)
    assert max(kl_chosen, kl_rejected) > 0
    # One chunk: it does not split the KL estimates into chunks with the rest.
    peer = LigerFusedLinearKTOLoss(beta=0.1, use_ref_model=True, compiled=False, chunk_size=6)
    want, *_ = peer(
        hidden, weight, labels, bias, torch.arange(6) < 3, ref_input=ref_hidden, ref_weight=ref_weight,
        kl=torch.stack([kl_rejected, kl_chosen]).repeat_interleave(3),
    )  # fmt: skip
    got = FusedPreferenceLoss("kto")(hidden, weight, labels, bias, ref_logps=refs).loss
    for a, b in zip(gradients(got, leaves), gradients(want, leaves), strict=True):
        torch.testing.assert_close(a, b, **TOLERANCE)


def test_ipo() -> None:
    """trl's IPO takes length-averaged log-probs; without a reference in it, ours is handed zeros."""
    from trl.experimental.cpo import CPOTrainer

    lengths = torch.tensor([3, 2, 4, 1])
    logps = -torch.rand(int(lengths.sum()))
    cu_seqlens = torch.nn.functional.pad(lengths.cumsum(0), (1, 0))
    means = objectives.segment_sums(logps, cu_seqlens) / lengths
    trainer = SimpleNamespace(
        accelerator=SimpleNamespace(device=torch.device("cpu")), loss_type="ipo", beta=0.2, alpha=0.0
    )
    want, *_ = CPOTrainer.cpo_loss(trainer, *means.chunk(2))
    torch.testing.assert_close(objectives.ipo(logps, cu_seqlens, ref_logps=torch.zeros(4), beta=0.2), want)
