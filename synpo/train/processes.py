"""A run over several processes: each makes the same number of passes, and each pair counts once.

Where weights are sharded (FSDP, ZeRO-3) every forward call is a meeting of all processes, so one with fewer passes than
the others would leave them waiting for ever. It goes through one of its passes again, for nothing: an idle pass. Pairs
that stand twice in an epoch, so that it divides evenly, are repeats: they are computed where there is nothing else to
compute and count nowhere.
"""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.data_loader import SeedableRandomSampler
from accelerate.utils import DistributedType
from torch import Tensor, nn
from torch.utils.data import Dataset, Sampler
from transformers import PreTrainedModel

from .config import SynPOConfig
from .model import language_part
from .vision import vision_parameters


class Evened(Sampler[int]):
    """A sampler's order and after it repeats from its start, until the length is a multiple of ``multiple``.

    The k-th pair of the dataset is k, and k + size as a repeat. Sampling that is random depends on seed and epoch
    alone, as it does with one process.
    """

    def __init__(self, sampler: Sampler[int], size: int, multiple: int) -> None:
        self.sampler, self.size, self.multiple = sampler, size, multiple

    def set_epoch(self, epoch: int) -> None:
        """Called by the data loader before every epoch."""
        if hasattr(self.sampler, "set_epoch"):
            self.sampler.set_epoch(epoch)

    def __len__(self) -> int:
        return -(-len(self.sampler) // self.multiple) * self.multiple

    def __iter__(self) -> Iterator[int]:
        order = list(self.sampler)
        yield from order
        for i in range(len(self) - len(order)):
            yield order[i % len(order)] + self.size


def seeded_order(dataset: Dataset, seed: int) -> SeedableRandomSampler:
    """The random order that accelerate gives a single process, the same in all of them."""
    return SeedableRandomSampler(dataset, data_seed=seed)


def add_idle_passes(batches: Sequence[dict[str, Any]], accelerator: Accelerator) -> None:
    """Give every process as many passes in each of these micro-batches as the one with most of them."""
    counts = torch.tensor([len(batch["passes"]) for batch in batches], device=accelerator.device)
    most = accelerator.gather(counts).view(accelerator.num_processes, -1).amax(0).tolist()
    for batch, wanted in zip(batches, most, strict=True):
        passes = batch["passes"]
        smallest = min(passes, key=lambda one: one["input_ids"].numel())
        batch["passes"] = [{**smallest, "idle": True}] * (wanted - len(passes)) + passes


@contextmanager
def synchronised(accelerator: Accelerator, model: nn.Module, last: bool) -> Iterator[None]:
    """Around a pass: gradients are summed over processes in the last of an optimizer step alone."""
    if last or not accelerator.sync_gradients:
        yield
    elif accelerator.distributed_type == DistributedType.DEEPSPEED:
        # Its engine takes a step in every backward pass that is not told otherwise.
        accelerator.gradient_state._set_sync_gradients(False)
        yield
        accelerator.gradient_state._set_sync_gradients(True)
    else:
        with accelerator.no_sync(model):
            yield


def stop_before_deepspeed(accelerator: Accelerator, loss: Tensor, step: int) -> None:
    """DeepSpeed takes its step inside backward, where none can be skipped any more. Errors: FloatingPointError for a
    loss that is not finite in any process.
    """
    if accelerator.distributed_type != DistributedType.DEEPSPEED:
        return
    if float(accelerator.reduce((~torch.isfinite(loss.detach())).float(), "sum")):
        raise FloatingPointError(
            f"the loss of step {step} is not finite, and DeepSpeed cannot skip a step; lower learning_rate, check the "
            "pairs, or train with FSDP2"
        )


def is_sharded(accelerator: Accelerator) -> bool:
    """Whether weights are whole during a forward call of all processes alone."""
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        return accelerator.state.deepspeed_plugin.zero_stage == 3
    return accelerator.distributed_type == DistributedType.FSDP


def plan_shards(accelerator: Accelerator, model: PreTrainedModel, whole_tower: bool) -> None:
    """Tell FSDP which layers to cut, where its configuration does not: those that transformers keeps whole. With
    whole_tower everything before the language model stays whole in every process.

    accelerate would take the same names, and stop at one that this model has no layer of, as models with a text
    encoder's name in their list have.
    """
    plugin = accelerator.state.fsdp_plugin
    cut = dict(model.named_modules())
    if whole_tower:
        tower = [parameter for _, parameter in vision_parameters(model)]
        for parameter in tower:
            parameter.data = parameter.data.to(accelerator.device)
        plugin.ignored_modules = [nn.ParameterList(tower)]  # all that is asked of them is their parameters
        cut = {name: module for name, module in cut.items() if language_part(name)}
    if plugin.transformer_cls_names_to_wrap is None:
        present = {type(module).__name__ for module in cut.values()}
        plugin.transformer_cls_names_to_wrap = sorted(present & set(model._no_split_modules or ()))


def check_processes(args: SynPOConfig, accelerator: Accelerator) -> None:
    """Refuse what accelerate would do by halves. Errors: ValueError naming the setting."""
    if accelerator.distributed_type == DistributedType.MULTI_CPU and _is_set("ACCELERATE_USE_FSDP"):
        raise ValueError("FSDP is asked for on CPUs, where accelerate shards nothing; use ddp.yaml, or GPUs")
    if is_sharded(accelerator):
        deepspeed = accelerator.distributed_type == DistributedType.DEEPSPEED  # which shares out the tower too
        for name in ("side_norms_every", "sample_captions", *(("vision_cache",) if deepspeed else ())):
            if getattr(args, name):
                raise ValueError(f"{name} is set, and the weights are shared out over the processes; leave it out")
    if accelerator.distributed_type != DistributedType.FSDP:
        return
    plugin = accelerator.state.fsdp_plugin
    if plugin.fsdp_version != 2:
        raise ValueError("fsdp_version is 1; adapters need FSDP2: set fsdp_version: 2")
    if "FULL_STATE_DICT" not in str(plugin.state_dict_type):
        raise ValueError(
            f"fsdp_state_dict_type is {plugin.state_dict_type.name}, with which no model is saved at the end; set "
            "FULL_STATE_DICT"
        )
    if plugin.cpu_ram_efficient_loading and args.vision_cache is not None:
        raise ValueError(
            "vision_cache is set, and with fsdp_cpu_ram_efficient_loading only one process holds the tower's weights "
            "that its entries are named by; set fsdp_cpu_ram_efficient_loading: false, or leave vision_cache out"
        )


def _is_set(name: str) -> bool:
    return os.environ.get(name, "false").lower() in ("1", "true", "yes")
