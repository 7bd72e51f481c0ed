"""Metrics in closed form against autograd, and means over pairs."""

from pathlib import Path

import pytest
import torch

from synpo.train.diagnostics import RunningMeans, pair_metrics
from synpo_kernels import PreferenceOutput, objectives
from tests.train import tiny


def output(logps: list[torch.Tensor]) -> PreferenceOutput:
    """What the losses report for log-probs of sequences, chosen first."""
    pairs = len(logps) // 2
    means = torch.stack([l.mean() for l in logps])
    language = torch.stack([l.exp().mean() for l in logps[:pairs]])
    return PreferenceOutput(torch.zeros(()), *means.chunk(2), *means.exp().chunk(2), language)


@pytest.mark.parametrize("form", ["sigmoid", "logsigmoid"])
def test_shares_and_saturation_are_those_of_the_gradient(tmp_path: Path, form: str) -> None:
    # Gaps small, large of either sign, and answers of different lengths: all parts and both tails of the slope.
    torch.manual_seed(0)
    centres = [-0.3, -1.0, -0.05, -2.0, -0.4, -1.1, -3.0, -0.1]
    logps = [
        c + 0.02 * torch.randn(n, dtype=torch.float64) for c, n in zip(centres, (3, 7, 1, 5, 4, 2, 6, 8), strict=True)
    ]
    args = tiny.arguments(tmp_path, alpha=10.0, beta=0.3, form=form)
    metrics = pair_metrics(output([l.detach() for l in logps]), args)

    def norms(beta: float) -> torch.Tensor:
        """L1 norm over tokens of the gradient of every sequence, by autograd."""
        leaves = [l.clone().requires_grad_() for l in logps]
        bounds = torch.tensor([0, *(len(l) for l in leaves)]).cumsum(0)
        objectives.synpo(torch.cat(leaves), bounds, alpha=10.0, beta=beta, form=form).sum().backward()
        return torch.stack([leaf.grad.abs().sum() for leaf in leaves])

    ranking = norms(beta=0.0)
    language = norms(beta=0.3)[:4] - ranking[:4]  # both push a chosen token the same way
    total = ranking[:4] + ranking[4:] + language
    torch.testing.assert_close(metrics["grad_share/chosen"], ranking[:4] / total)
    torch.testing.assert_close(metrics["grad_share/rejected"], ranking[4:] / total)
    torch.testing.assert_close(metrics["grad_share/language"], language / total)
    steepest = 0.25 if form == "sigmoid" else 1.0
    slope = ranking[:4] / (10.0 * torch.stack([l.mean().exp() for l in logps[:4]]))
    torch.testing.assert_close(metrics["saturation"], 1 - slope / steepest)


def test_other_objectives_have_no_shares(tmp_path: Path) -> None:
    metrics = pair_metrics(
        output([torch.tensor([-1.0]), torch.tensor([-2.0])]), tiny.arguments(tmp_path, objective="dpo")
    )
    assert "saturation" not in metrics
    assert metrics["rewards/accuracies"].tolist() == [1.0]


def test_means_weigh_every_pair_alike() -> None:
    means = RunningMeans()
    means.add(torch.tensor(1.0), {"rewards/chosen": torch.tensor([1.0, 2.0, 6.0])})
    means.add(torch.tensor(5.0), {"rewards/chosen": torch.tensor([7.0])})
    assert means.read() == (4, {"loss": 2.0, "rewards/chosen": 4.0})
    assert means.read() == (0, {})
