"""What a run tells about itself: metrics of pairs, and their means."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from torch import Tensor

from synpo_kernels import PreferenceOutput

from ..evaluate import Change, paired_bootstrap
from ..run_files import read_json_lines
from .config import SynPOConfig


def pair_metrics(output: PreferenceOutput, args: SynPOConfig) -> dict[str, Tensor]:
    """Metrics of the pairs of a pass, each (b,), on the device of the output.

    For synpo also, with u = alpha (r+ - r-) and s = rank'(u), in closed form (METHOD of arXiv 2506.00835; L1 norms
    over tokens of dL/dl): saturation = 1 - |s| / max |s| (0: full slope, 1: the pair moves nothing any more) and
    grad_share/*, the shares of |s| alpha r+ (chosen), |s| alpha r- (rejected) and beta q+ (language) in their sum.
    """
    chosen, rejected = output.chosen_rewards, output.rejected_rewards
    metrics = {
        "rewards/chosen": chosen,
        "rewards/rejected": rejected,
        "rewards/margins": chosen - rejected,
        "rewards/accuracies": (chosen > rejected).to(chosen.dtype),
        "logps/chosen": output.chosen_logps,
        "logps/rejected": output.rejected_logps,
        "probs/language": output.language,
    }
    if args.objective == "synpo":
        alpha, beta = float(args.hyperparameters["alpha"]), float(args.hyperparameters["beta"])
        rest = (-alpha * (chosen - rejected)).sigmoid()
        slope, steepest = (rest * (1 - rest), 0.25) if args.hyperparameters["form"] == "sigmoid" else (rest, 1.0)
        parts = {
            "chosen": slope * alpha * chosen,
            "rejected": slope * alpha * rejected,
            "language": beta * output.language,
        }
        total = torch.stack(list(parts.values())).sum(0).clamp(min=torch.finfo(chosen.dtype).tiny)
        metrics["saturation"] = 1 - slope / steepest
        metrics |= {f"grad_share/{name}": part / total for name, part in parts.items()}
    return metrics


class Displacement(NamedTuple):
    """What became of held-out pairs since the run's first evaluation."""

    since: int  # optimizer step of that evaluation
    share: float  # of the pairs: chosen answer less likely than then, margin larger
    chosen: Change  # of the chosen answers' mean log-prob per token
    margins: Change

    @property
    def alarming(self) -> bool:
        """The model widens margins by making good answers less likely, by more than chance."""
        return self.chosen.high < 0 < self.margins.low

    def __str__(self) -> str:
        return (
            f"likelihood displacement: since step {self.since} margins grew by {self.margins.mean:.3g} while chosen "
            f"answers lost {-self.chosen.mean:.3g} nats a token (95 % interval {-self.chosen.high:.3g} to "
            f"{-self.chosen.low:.3g}), {100 * self.share:.0f} % of the pairs both; a lower learning_rate or a larger "
            "beta of synpo's language term keeps good answers likely"
        )


def displacement(since: int, before: Sequence[Mapping[str, float]], after: Mapping[str, np.ndarray]) -> Displacement:
    """before: records of eval_pairs of the step ``since``; after: columns of a PairTable with the same pairs."""
    then = {name: np.array([record[name] for record in before]) for name in ("logps/chosen", "rewards/margins")}
    fell = (after["logps/chosen"] < then["logps/chosen"]) & (after["rewards/margins"] > then["rewards/margins"])
    changes = (paired_bootstrap(then[name].tolist(), after[name].tolist()) for name in then)
    return Displacement(since, float(fell.mean()), *changes)


def since_first(
    folder: Path, prefix: str, step: int, columns: Mapping[str, np.ndarray], accelerator: Accelerator
) -> Displacement | None:
    """Against the first evaluation of the same pairs that the folder has, where a resumed run finds it too; None where
    there is none before this step.
    """
    found: list[Displacement | None] = [None]
    if accelerator.is_main_process:
        steps = sorted(int(path.stem.rpartition("-")[2]) for path in folder.glob(f"{prefix}-*.jsonl"))
        if steps and steps[0] < step:
            before = read_json_lines(folder / f"{prefix}-{steps[0]}.jsonl")
            if [record["index"] for record in before] == columns["index"].astype(int).tolist():
                found = [displacement(steps[0], before, columns)]
    return broadcast_object_list(found)[0]


PAIR_COLUMNS = (
    "logps/chosen", "logps/rejected", "rewards/chosen", "rewards/rejected", "rewards/margins", "probs/language",
)  # fmt: skip


class PairTable:
    """Loss and metrics of single pairs, gathered over an evaluation."""

    def __init__(self) -> None:
        self._names: list[str] = []
        self._rows: list[Tensor] = []

    def add(self, indices: Sequence[int], loss: Tensor, metrics: Mapping[str, Tensor]) -> None:
        """Add a pass of b pairs: their rows in the dataset, their mean loss, and metrics (b,)."""
        index = torch.tensor(indices, device=loss.device)
        columns = {"index": index, "loss": loss.detach().expand(len(index)), **metrics}
        self._names = list(columns)
        self._rows.append(torch.stack([column.to("cpu", torch.float64) for column in columns.values()], 1))

    def add_none(self, metrics: Mapping[str, Tensor]) -> None:
        """Add a pass that counts for nothing, so that every process has something to gather."""
        self.add([], metrics["rewards/chosen"].new_zeros(()), {name: value[:0] for name, value in metrics.items()})

    def read(self, accelerator: Accelerator) -> dict[str, np.ndarray]:
        """Columns over the pairs of all processes, in the order of the dataset; a pair seen twice counts once.

        (With broken_media="skip" a pair may stand in for another.)
        """
        rows = torch.cat(self._rows)
        if accelerator.num_processes > 1:
            padded = accelerator.pad_across_processes(rows.to(accelerator.device), pad_index=-1)
            rows = accelerator.gather(padded).cpu()
            rows = rows[rows[:, 0] >= 0]
        _, first = np.unique(rows[:, 0].numpy(), return_index=True)
        return dict(zip(self._names, rows.numpy()[first].T, strict=True))


class RunningMeans:
    """Means of metrics over pairs, kept on the device; reading them is the only wait for it."""

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}
        self.pairs = 0

    def add(self, loss: Tensor, metrics: Mapping[str, Tensor]) -> None:
        """Add a pass of b pairs: its mean loss, and metrics (b,)."""
        pairs = len(metrics["rewards/chosen"])
        for name, value in {"loss": loss.detach() * pairs, **{k: v.sum() for k, v in metrics.items()}}.items():
            self.sums[name] = self.sums[name] + value if name in self.sums else value
        self.pairs += pairs

    def add_none(self, metrics: Mapping[str, Tensor]) -> None:
        """Add a pass that counts for nothing, so that every process has something to sum."""
        self.add(metrics["rewards/chosen"].new_zeros(()), {name: value[:0] for name, value in metrics.items()})

    def read(self, reduce: Callable[[Tensor], Tensor] | None = None) -> tuple[int, dict[str, float]]:
        """The number of pairs and their means since the last reading, after which both start anew.

        reduce: sums a tensor over processes.
        """
        if not self.sums:
            return 0, {}
        device = self.sums["loss"].device
        values = torch.stack([torch.tensor(float(self.pairs), device=device), *self.sums.values()])
        pairs, *sums = (values if reduce is None else reduce(values)).tolist()
        means = {name: value / pairs for name, value in zip(self.sums, sums, strict=True)} if pairs else {}
        self.sums, self.pairs = {}, 0
        return int(pairs), means
