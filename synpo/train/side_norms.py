"""How hard each side of a pair pulls at the weights: norms of the real gradients, at the cost of more backward passes.

The loss of a pass depends on the weights through the answers' log-probs l_t alone, so its gradient is the sum over
tokens of (dL/dl_t) dl_t/dw. Summed over the chosen answers' tokens, over the rejected ones', and for synpo over the
share of the language term, these are three vectors; the paper's figure of F-norms (arXiv 2506.00835) shows their
lengths. The plain shares in the metrics grad_share/* are of dL/dl_t itself and cost nothing.
"""

from typing import Any

import torch
from torch import Tensor, nn

from synpo_kernels import objectives

from .config import SynPOConfig
from .passes import PairScorer


def side_norms(
    args: SynPOConfig, scorer: PairScorer, model: nn.Module, batch: dict[str, Any], ref_sums: Tensor | None
) -> dict[str, float]:
    """grad_norm/chosen, grad_norm/rejected and for synpo grad_norm/language: L2 norms over all weights that train, of
    the gradient of a pass's mean loss. Weights, their gradients and the random state are left as they were.
    """
    weights = [parameter for parameter in model.parameters() if parameter.requires_grad]
    devices = [] if args.device.type == "cpu" else [args.device]
    with torch.random.fork_rng(devices):
        logps = scorer.logps(model, batch)
    cu_seqlens = batch["cu_seqlens"]
    answers = len(cu_seqlens) // 2
    first_rejected = int(cu_seqlens[answers])
    options = dict(args.hyperparameters)
    parts = {"chosen": _pull(args, logps, cu_seqlens, ref_sums, options)}
    parts["rejected"] = parts["chosen"].clone()
    if args.objective == "synpo":
        ranking = _pull(args, logps, cu_seqlens, ref_sums, options | {"beta": 0.0})
        parts["language"] = parts["chosen"] - ranking
        parts["chosen"], parts["rejected"] = ranking, ranking.clone()
    parts["chosen"][first_rejected:] = 0
    parts["rejected"][:first_rejected] = 0
    norms = {}
    for name, pull in parts.items():
        gradients = torch.autograd.grad(logps, weights, pull, retain_graph=True, allow_unused=True)
        squares = [gradient.double().square().sum() for gradient in gradients if gradient is not None]
        norms[f"grad_norm/{name}"] = float(torch.stack(squares).sum().sqrt())
    return norms


def _pull(
    args: SynPOConfig, logps: Tensor, cu_seqlens: Tensor, ref_sums: Tensor | None, options: dict[str, Any]
) -> Tensor:
    """dL/dl (n,) of the mean loss over pairs."""
    leaf = logps.detach().requires_grad_()
    objective = objectives.REGISTRY[args.objective].function
    losses = objective(leaf, cu_seqlens, ref_logps=ref_sums, **options)
    return torch.autograd.grad(losses.mean(), leaf)[0]
