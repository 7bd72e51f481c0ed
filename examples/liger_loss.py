"""liger-kernel's SimPO loss and the same from synpo, on the same tensors: python examples/liger_loss.py

Same hidden states, labels and order (the chosen answers first); weight and hidden change places, and a NamedTuple comes
back. FusedSynPOLoss() takes the same arguments.
"""

import torch
from liger_kernel.chunked_loss import LigerFusedLinearSimPOLoss

from synpo_kernels import FusedPreferenceLoss, FusedSynPOLoss


def main() -> list[float]:
    torch.manual_seed(0)
    hidden = torch.randn(8, 32, 64, requires_grad=True)  # 4 pairs: rows 0..3 chosen, 4..7 their rejected answers
    weight = torch.randn(1000, 64, requires_grad=True)  # lm_head
    labels = torch.randint(1000, (8, 32))
    labels[:, :10] = -100  # the prompt

    liger = LigerFusedLinearSimPOLoss(beta=2.0, gamma=0.5, compute_nll_loss=False, compiled=False)
    theirs, _ = liger(weight, hidden, labels)

    ours = FusedPreferenceLoss("simpo", beta=2.0, gamma=0.5)(hidden, weight, labels)
    synpo = FusedSynPOLoss(alpha=30.0, beta=0.2)(hidden, weight, labels)
    print(f"SimPO: liger {theirs.item():.6f}, synpo {ours.loss.item():.6f}; SynPO: {synpo.loss.item():.6f}")
    gradients = [torch.autograd.grad(loss, (hidden, weight)) for loss in (theirs, ours.loss)]
    furthest = max(float((a - b).abs().max()) for a, b in zip(*gradients, strict=True))
    print(f"gradients differ by at most {furthest:.1e}")
    return [theirs.item(), ours.loss.item(), furthest]


if __name__ == "__main__":
    main()
