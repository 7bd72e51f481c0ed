"""Models: adapters, and the hand-over of lm_head to a loss that needs no logits."""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from accelerate.utils import extract_model_from_parallel
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import PreTrainedModel, set_seed

# Modules of vision-language models that are not vision.
LANGUAGE = ("language_model", "text_model", "lm_head")
LORA_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def lora_recipe(
    r: int = 128,
    alpha: float = 64,
    dropout: float = 0.05,
    targets: tuple[str, ...] | str = LORA_TARGETS,
    dora: bool = False,
) -> LoraConfig:
    """The SynPO release's LoRA: rank 128, alpha 64, dropout 0.05 on all projections of attention and MLP. dora: with
    trained lengths of the weights' columns (arXiv 2402.09353).
    """
    targets = targets if isinstance(targets, str) else list(targets)
    return LoraConfig(
        r=r, lora_alpha=alpha, lora_dropout=dropout, target_modules=targets, use_dora=dora, task_type="CAUSAL_LM"
    )


def language_part(name: str) -> bool:
    """Whether a parameter or module of a vision-language model, by its name, belongs to the language model."""
    return any(part in LANGUAGE for part in name.split("."))


def spare_vision(config: PeftConfig, model: nn.Module) -> PeftConfig:
    """An adapter's configuration whose target names also occur in a vision tower, kept off the tower and its projector.

    A pattern as target_modules, or exclude_modules of the caller's own, is taken as it is.
    """
    wanted = getattr(config, "target_modules", None)
    if (
        wanted is None
        or isinstance(wanted, str)
        or config.exclude_modules
        or not hasattr(model.config, "vision_config")
    ):
        return config
    targets = set(wanted)
    outside = [n for n, _ in model.named_modules() if n.rsplit(".", 1)[-1] in targets and not language_part(n)]
    spared = copy.copy(config)
    spared.exclude_modules = outside or None
    return spared


def trainable(model: nn.Module, config: PeftConfig | None, seed: int) -> nn.Module:
    """The model with a new adapter, or as it is. Errors: ValueError for a second adapter, or nothing to train."""
    if config is not None:
        if isinstance(model, PeftModel):
            raise ValueError("peft_config is given but model already has an adapter; leave one of them out")
        set_seed(seed)  # the adapter's first values are part of the run
        model = get_peft_model(model, spare_vision(config, model))
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ValueError(
            "the model has no trainable parameter; pass peft_config, or load the adapter with is_trainable=True"
        )
    return model


def check_float16(model: nn.Module, autocast: bool, scaled: bool) -> None:
    """Refuse float16 where small gradients would become zero: without a loss scaler, or in the weights that train.

    autocast: whether passes run in float16. scaled: whether the loss is scaled. Errors: ValueError.
    """
    half = {name: p.requires_grad for name, p in model.named_parameters() if p.dtype == torch.float16}
    if any(half.values()):
        name = next(name for name, trains in half.items() if trains)
        raise ValueError(
            f"{name} would be trained in float16, where small steps are lost; load the model in float32 or bfloat16"
        )
    if (half or autocast) and not scaled:
        what = "fp16=True" if autocast else "the model's weights are float16"
        raise ValueError(
            f"{what}, and no loss scaler is on: small gradients would become zero. Use bf16=True and a model loaded in "
            "bfloat16 or float32, or fp16=True on a GPU, which has the scaler"
        )


class Head(NamedTuple):
    """lm_head, and what the model does to its logits afterwards."""

    module: nn.Linear
    logit_scale: float
    softcap: float | None
    owners: tuple[tuple[Any, str, float | None], ...]  # (object, attribute, value that switches it off)


def base_model(model: nn.Module) -> PreTrainedModel:
    """The transformers model inside a peft model, and inside DDP's or DeepSpeed's wrapper around that."""
    model = extract_model_from_parallel(model)
    return model.get_base_model() if isinstance(model, PeftModel) else model


def find_head(model: nn.Module) -> Head:
    """The output layer of a causal language model.

    Errors: ValueError where there is none, or where an adapter or a trainable copy sits on it: the loss reads
    lm_head's own weight.
    """
    base = base_model(model)
    if not hasattr(base, "get_output_embeddings") or (module := base.get_output_embeddings()) is None:
        raise ValueError(f"{type(base).__name__} has no output embeddings; a causal language model is needed")
    name = next((name for name, m in base.named_modules() if m is module), "lm_head")
    if type(module) is not nn.Linear:
        raise ValueError(
            f"{name} is a {type(module).__module__}.{type(module).__qualname__}: an adapter, a modules_to_save copy or "
            f"a quantised layer on the output layer is not supported; take {name} out of target_modules and "
            "modules_to_save, or set fused=False"
        )
    config = base.config.get_text_config()
    owners: list[tuple[Any, str, float | None]] = []
    scale, softcap = 1.0, None
    if getattr(config, "final_logit_softcapping", None) is not None:
        softcap = float(config.final_logit_softcapping)
        owners.append((config, "final_logit_softcapping", None))
    if isinstance(getattr(base, "logit_scale", None), float | int):
        scale = float(base.logit_scale)
        owners.append((base, "logit_scale", 1.0))
    if getattr(config, "logits_scaling", None) is not None:
        scale /= float(config.logits_scaling)
        owners.append((config, "logits_scaling", 1.0))
    return Head(module, scale, softcap, tuple(owners))


@contextmanager
def head_replaced(head: Head, compute: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Inside, the model's forward returns compute(hidden (R, T, H)) as its logits, unscaled.

    The model is still called through whatever wraps it, so the hooks of DDP, FSDP and ZeRO run, and the result reaches
    the loss through the model's own output, where they expect it.
    """
    saved = [(owner, name, getattr(owner, name)) for owner, name, _ in head.owners]
    module = head.module
    previous = module.__dict__.get("forward")
    module.forward = compute
    for owner, name, neutral in head.owners:
        setattr(owner, name, neutral)
    try:
        yield
    finally:
        for owner, name, value in saved:
            setattr(owner, name, value)
        if previous is None:
            del module.forward
        else:
            module.forward = previous
