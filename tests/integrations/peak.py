"""Peak memory of one training step of trl's trainers and their swaps, each in a process of its own.

    python -m tests.integrations.peak

The processes start from a server that has imported the libraries and done nothing else, so that each begins alike.
"""

import multiprocessing
import sys
import tempfile
import warnings
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

VOCABULARY = 32768
TRAINERS = ("trl-dpo", "synpo-dpo", "trl-simpo", "synpo-simpo")


def step_mb(name: str) -> float:
    """Memory that one step takes beyond what stood before it, MB of 2^20 bytes; a Llama of a large vocabulary."""
    warnings.simplefilter("ignore")
    import torch

    from bench.memory import Peak
    from tests.integrations import making
    from tests.train import tiny

    torch.set_num_threads(1)
    model = tiny.model(vocab_size=VOCABULARY, hidden_size=64, intermediate_size=64, num_hidden_layers=1)
    if name.endswith("dpo"):
        from trl import DPOConfig, DPOTrainer

        from synpo.integrations.trl_dpo import FusedDPOTrainer

        kind = DPOTrainer if name == "trl-dpo" else FusedDPOTrainer
        config, options = DPOConfig, {"ref_model": model}
    else:
        from trl.experimental.cpo import CPOConfig, CPOTrainer

        from synpo.integrations.trl_cpo import FusedCPOTrainer

        kind = CPOTrainer if name == "trl-simpo" else FusedCPOTrainer
        config, options = CPOConfig, {"loss_type": "simpo", "cpo_alpha": 0.0}
    with tempfile.TemporaryDirectory() as folder:
        made = making.trainer(kind, config, Path(folder), model, count=32, **options)
        peak = Peak(torch.device("cpu"))
        made.train()
        return peak.extra_mb()


def measure(names: tuple[str, ...] = TRAINERS) -> dict[str, float]:
    """The peaks of the trainers named."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["trl", "trl.trainer.dpo_trainer", "tests.integrations.making", "synpo_kernels"])
    found = {}
    for name in names:
        with ProcessPoolExecutor(1, context) as pool:
            found[name] = pool.submit(step_mb, name).result()
    return found


if __name__ == "__main__":
    for name, peak_mb in measure(tuple(sys.argv[1:]) or TRAINERS).items():
        print(f"{name}: {peak_mb:.0f} MB")
