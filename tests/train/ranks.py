"""One of two processes that train together over gloo: python -m tests.train.ranks FOLDER [RUN ...].

FOLDER holds kinds.json, {"ddp" or "fsdp2": environment}. All runs share a pair of processes, since their imports take
longest. Rank 0 leaves {(kind, run): result} in FOLDER/found.pt.
"""

import json
import os
import shutil
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType
from torch import Tensor
from torch.distributed.tensor import DTensor

from synpo import cli
from synpo.run_files import write_json_lines
from synpo.train import SynPOTrainer, lora_recipe
from tests.train import seeing, tiny

WINDOW = 8  # pairs in an optimizer step
Result = dict[str, Any]

# Pairs of very different lengths and few tokens in a pass: the two processes need different numbers of passes. 9 pairs:
# the last step of an epoch has one pair, which one process has and the other has not.
UNEVEN: dict[str, Any] = {"optim": "sgd", "learning_rate": 0.3, "num_train_epochs": 2, "data_seed": 3}
RUNS: dict[str, dict[str, Any]] = {
    "shared": {},
    "plain": {"prefix_sharing": False},
    "group_by_length": {"train_sampling_strategy": "group_by_length"},
    "full tied": {"lora": False, "learning_rate": 0.1},
    "full untied": {"lora": False, "learning_rate": 0.1, "tie": False},
    "dpo adapter off": {"objective": "dpo"},
    "dpo precomputed": {"objective": "dpo", "precompute_ref_logps": True},
    "checkpointing": {"activation_checkpointing": True},
    "sliding window": {"window": 6},
    **{family: {"family": family, "activation_checkpointing": True} for family in seeing.FAMILIES},
    "tower trains": {"family": "llava_onevision", "lora": False, "learning_rate": 0.1},
}
ALONE = {  # runs of one kind
    "ddp": {"plain", "group_by_length", "dpo adapter off", *seeing.FAMILIES} - {"llava_onevision", "qwen3_vl"},
    "fsdp2": {"full untied"},
}
ZERO3 = (
    "shared", "plain", "full untied", "full tied", "checkpointing", "llava_onevision", "qwen2_5_vl", "tower trains",
)  # fmt: skip
_ADAM = {"save_strategy": "steps", "save_steps": 1, "dropout": 0.2, "optim": "adamw_torch"}
# Videos read by workers, one of them not readable, features kept on disk, pairs packed into passes, in changing order.
_VIDEOS = {
    "family": "qwen2_5_vl", "dataloader_num_workers": 1, "vision_cache": True, "tokens_per_pass": 150, "broken": 2,
    "broken_media": "skip", "train_sampling_strategy": "group_by_length", "save_steps": 3,
}  # fmt: skip
RESUMED = {"resumed": _ADAM, "resumed videos": _ADAM | _VIDEOS}
# Two steps an epoch: in the middle of the first, and of the second.
STOPS = [("resumed", 1), ("resumed", 3), ("resumed videos", 3)]


def runs_of(kind: str) -> list[str]:
    """Names of the runs that a kind makes."""
    if kind == "zero3":
        return list(ZERO3)
    others = set().union(*(names for other, names in ALONE.items() if other != kind))
    return [name for name in RUNS if name not in others]


def build(folder: Path, processes: int, **changes: Any) -> SynPOTrainer:
    """A trainer whose optimizer steps see the same WINDOW pairs with any number of processes."""
    most = None if "family" in changes else 40
    options = UNEVEN | {"per_device_train_batch_size": 2, "tokens_per_pass": most} | changes
    options["gradient_accumulation_steps"] = WINDOW // (2 * processes)
    if os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true":
        options["use_cpu"] = False  # which would leave DeepSpeed out
        options.pop("vision_cache", None)
    if "family" in options:
        return _seeing(folder, **options)
    window, tie = options.pop("window", None), options.pop("tie", True)
    model = tiny.model(tie_word_embeddings=tie) if window is None else tiny.windowed(window)
    return tiny.trainer(folder, 9, model=model, eval_dataset=tiny.pairs(3, 1), **options)


def _seeing(folder: Path, *, lora: bool = True, dropout: float = 0.0, broken: int | None = None, **options: Any) -> Any:
    """A trainer of a video model; broken: the row of a film that cannot be read."""
    rows = seeing.pairs(5 if broken is None else 9)
    if broken is not None:
        rows[broken]["videos"] = [{"bytes": seeing.film(broken)[:100]}]
    if options.pop("vision_cache", False):
        options["vision_cache"] = str(folder / "features")
    adapter = lora_recipe(r=4, alpha=8, dropout=dropout) if lora else None
    return seeing.trainer(folder, train_dataset=rows, peft_config=adapter, **options)


def outcome(trainer: SynPOTrainer) -> Result:
    """Losses and gradient norms of all steps, counts, and the trained weights, whole."""
    lines = [line for line in trainer.state.log_history if "loss" in line]
    weights = {n: _whole(p).clone() for n, p in trainer.model.named_parameters() if p.requires_grad}
    return {
        "steps": torch.tensor([[line["loss"], line["grad_norm"], line["num_tokens"]] for line in lines]).double(),
        "weights": {name.removeprefix("module."): weight for name, weight in weights.items()},
        "counts": trainer.total_counts(),
    }


def trained(folder: Path, processes: int, **changes: Any) -> Result:
    """Evaluation, training, evaluation."""
    torch.manual_seed(0)
    trainer = build(folder, processes, **changes)
    early = trainer.eval_dataset is not None and not trainer.is_deepspeed_enabled
    before = trainer.evaluate()["eval_loss"] if early else None
    trainer.train()
    after = None if trainer.eval_dataset is None else trainer.evaluate()["eval_loss"]
    trainer.save_model()
    return outcome(trainer) | {"eval": (before, after)}


def resumed(folder: Path, processes: int, name: str) -> dict[Any, Result]:
    """A run, and for each of its STOPS one that goes on from its checkpoint there."""
    whole = build(folder / "whole", processes, **RESUMED[name])
    whole.train()
    found = {"whole": outcome(whole)}
    for step in (step for run, step in STOPS if run == name):
        if whole.is_world_process_zero():
            shutil.copytree(folder / "whole" / f"checkpoint-{step}", folder / str(step) / f"checkpoint-{step}")
            shutil.copy(folder / "whole" / "metrics.jsonl", folder / str(step))
        whole.accelerator.wait_for_everyone()
        again = build(folder / str(step), processes, **RESUMED[name])
        torch.rand(5 + whole.args.process_index)  # the state of random numbers comes from the checkpoint
        again.train(resume_from_checkpoint=True)
        found[step] = outcome(again)
    return found


def commanded(folder: Path) -> int:
    """`synpo train` in every process: its exit status."""
    folder.mkdir(parents=True, exist_ok=True)
    model, data = folder / "model", folder / "pairs.jsonl"
    tiny.model().save_pretrained(model)  # of several processes the first one writes
    if os.environ["RANK"] == "0":
        tiny.tokenizer().save_pretrained(model)
        write_json_lines(data, tiny.pairs(9))
    torch.distributed.barrier()
    words = {
        "model": model, "data": data, "output_dir": folder / "run", "max_steps": 2, "eval_fraction": 0.3,
        "gradient_accumulation_steps": 1, "save_strategy": "no", "disable_tqdm": True,
    }  # fmt: skip
    given = (word for name, value in words.items() for word in (f"--{name}", str(value)))
    return cli.main(["train", "--use_cpu", *given])


def _whole(parameter: Tensor) -> Tensor:
    found = parameter.detach()
    if hasattr(parameter, "ds_id"):
        import deepspeed

        with deepspeed.zero.GatheredParameters([parameter]):
            return parameter.detach().clone()
    return found.full_tensor() if isinstance(found, DTensor) else found


def _let_cpus_shard() -> None:
    """accelerate leaves FSDP out where the processes are CPUs; FSDP2 itself runs there. The rest is accelerate's."""
    former: Callable[..., None] = AcceleratorState.__init__

    def start(self: AcceleratorState, *arguments: Any, **options: Any) -> None:
        if not AcceleratorState._shared_state:
            PartialState(cpu=True)
            if os.environ.get("ACCELERATE_USE_FSDP") == "true":
                PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
        former(self, *arguments, **options)

    AcceleratorState.__init__ = start


def _let_deepspeed_start() -> None:
    """accelerate sets DeepSpeed up for GPUs alone; on CPUs it is told of gloo and of the device."""
    PartialState._prepare_backend = lambda self, *_, **__: ("gloo", DistributedType.MULTI_GPU)

    def device(self: PartialState) -> None:
        self.device = torch.device("cpu")

    PartialState.set_device = device


def main(folder: Path, names: list[str]) -> None:
    warnings.simplefilter("ignore")
    if os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true":
        _let_deepspeed_start()
        for name in ZERO3:  # made and kept now: transformers cuts models that are made after DeepSpeed's start
            if "family" in RUNS[name]:
                seeing.model(RUNS[name]["family"])
    else:
        _let_cpus_shard()
    found: dict[tuple[str, str], Result] = {}
    for kind, environment in json.loads((folder / "kinds.json").read_text()).items():
        os.environ.update(environment)
        for name in runs_of(kind):
            if not names or name in names:
                found[kind, name] = trained(folder / kind / name, 2, **RUNS[name])
        for name in RESUMED:
            if not names or name in names:
                found[kind, name] = resumed(folder / kind / name, 2, name)
        if kind == "ddp" and not names:
            found[kind, "command"] = {"status": commanded(folder / kind / "command")}
    if int(os.environ["RANK"]) == 0:
        torch.save(found, folder / "found.pt")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
