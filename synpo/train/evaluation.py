"""Held-out pairs: the values of each, and the files that an evaluation leaves in output_dir."""

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor

from synpo_kernels import PreferenceOutput

from ..run_files import write_json_lines
from .diagnostics import PAIR_COLUMNS, PairTable
from .processes import add_idle_passes

PAIRS_FOLDER = "eval_pairs"
SAMPLES_FOLDER = "eval_samples"


@torch.no_grad()
def score_pairs(
    batches: Iterable[dict[str, Any]],
    loss: Callable[[dict[str, Any]], tuple[PreferenceOutput, dict[str, Any]]],
    metrics_of: Callable[[PreferenceOutput], dict[str, Tensor]],
    accelerator: Accelerator,
) -> tuple[dict[str, np.ndarray], int]:
    """Columns index, loss and metrics over all pairs, in the order of the dataset, and the tokens of their sequences.

    batches: this process's micro-batches (see PairCollator). loss: of a pass, and the pass on its device.
    """
    table, tokens = PairTable(), 0
    for inputs in batches:
        if accelerator.num_processes > 1:
            add_idle_passes([inputs], accelerator)
        for batch in inputs["passes"]:
            output, batch = loss(batch)
            metrics = metrics_of(output)
            if batch["idle"]:
                table.add_none(metrics)
            else:
                table.add(batch["indices"], output.loss, metrics)
                tokens += batch["tokens"]
    total = accelerator.reduce(torch.tensor(tokens, device=accelerator.device), "sum")
    return table.read(accelerator), int(total)


def pairs_file(output_dir: str, prefix: str, step: int) -> Path:
    """Where an evaluation keeps the values of its pairs."""
    return Path(output_dir, PAIRS_FOLDER, f"{prefix}-{step}.jsonl")


def write_pairs(path: Path, columns: Mapping[str, np.ndarray]) -> None:
    """A line of JSON for each pair: index and PAIR_COLUMNS."""
    indices = columns["index"].astype(int).tolist()
    rows = zip(indices, *(columns[name].tolist() for name in PAIR_COLUMNS), strict=True)
    write_json_lines(path, [dict(zip(("index", *PAIR_COLUMNS), row, strict=True)) for row in rows])


def samples_file(output_dir: str, prefix: str, step: int) -> Path:
    """Where an evaluation keeps what the model answers."""
    return Path(output_dir, SAMPLES_FOLDER, f"{prefix}-{step}.jsonl")
