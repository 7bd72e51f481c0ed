"""What the swaps for trl's trainers share: SynPO's own options there, and its metrics under trl's names."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from synpo_kernels import PreferenceOutput

from ..options import option


@dataclass
class SynPOOptions:
    """Options of loss_type="synpo", beside trl's own."""

    synpo_alpha: float = option(30.0, "synpo: sharpness of the ranking term (paper: alpha).")
    synpo_beta: float = option(0.2, "synpo: weight of the language term (paper: beta).")
    synpo_form: str = option("sigmoid", 'synpo: ranking function, "sigmoid" or "logsigmoid".')

    def synpo_hyperparameters(self) -> dict[str, Any]:
        """For PairLoss."""
        return {"alpha": self.synpo_alpha, "beta": self.synpo_beta, "form": self.synpo_form}


def refuse_options(args: Any, wanted: dict[str, Any], why: str) -> None:
    """ValueError for an option of ``args`` that is not what ``wanted`` says, naming it, its value and what to set."""
    for name, value in wanted.items():
        if getattr(args, name) != value:
            raise ValueError(f"{name} is {getattr(args, name)!r}, but {why}; set {name}={value!r}")


def pair_metrics(output: PreferenceOutput, gather: Callable[[Tensor], Tensor]) -> dict[str, float]:
    """trl's metrics of a batch, over all processes; log-probs are means per token, as SynPO takes them."""
    columns = torch.stack(
        [
            output.chosen_rewards,
            output.rejected_rewards,
            (output.chosen_rewards > output.rejected_rewards).float(),
            output.chosen_rewards - output.rejected_rewards,
            output.chosen_logps,
            output.rejected_logps,
            output.language,
        ],
        dim=1,
    )
    names = (
        "rewards/chosen", "rewards/rejected", "rewards/accuracies", "rewards/margins", "logps/chosen",
        "logps/rejected", "probs/language",
    )  # fmt: skip
    return dict(zip(names, gather(columns).mean(0).tolist(), strict=True))
