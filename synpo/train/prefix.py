"""Rows that hold more than one sequence: [prompt | chosen | rejected] with the prompt computed once, pairs end to end.

Tokens meet only in attention, so one registered attention function keeps the sequences of a row apart. A row is cut
into pieces. The tokens of a piece attend to each other causally and, before that, to a prompt that stands earlier in
the row; this is exactly what each sequence by itself would compute:

    [prompt | chosen | rejected]:  piece (prompt, chosen);  piece (rejected), after the prompt
    [sequence | sequence | ...]:   a piece each

Positions restart with every sequence, those of the rejected answer after the prompt. transformers would read such
positions as sequences without a common prompt and build a mask of its own from them; a 4D placeholder in the place of
the mask stops that, and the layout travels to the attention function as a keyword of the forward call, so it is there
again when activation checkpointing calls a layer a second time.
"""

import inspect
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedConfig
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .model import base_model
from .pieces import Layout, UnsupportedAttention, piecewise

NAME = "synpo_layout"  # the keyword of the forward call, and how the attention function's name begins
KNOWN_LAYERS = {"full_attention", "sliding_attention"}


def refusal(model: nn.Module) -> str | None:
    """Why a model cannot take rows of several sequences; None where nothing speaks against it."""
    base = base_model(model)
    config, name = base.config.get_text_config(), type(base).__name__
    strange = sorted(set(getattr(config, "layer_types", None) or ()) - KNOWN_LAYERS)
    if strange:
        return f"{name} has layers of type {', '.join(strange)}, whose tokens do not meet in causal attention alone"
    if getattr(base, "_is_stateful", False):
        return f"{name} carries a recurrent state from token to token"
    if not getattr(base, "_supports_attention_backend", False):
        return f"{name} does not take its attention from transformers' AttentionInterface"
    if "position_ids" not in inspect.signature(base.forward).parameters:
        return f"{name} takes no position_ids"
    if isinstance(model, PeftModel) and model.active_peft_config.is_prompt_learning:
        return "a prompt-learning adapter puts tokens of its own before every row"
    return None


def expects_window(model: nn.Module) -> bool:
    """Whether a model's configuration has layers with a sliding window."""
    config = base_model(model).config.get_text_config()
    types = getattr(config, "layer_types", None)
    if types:
        return "sliding_attention" in types
    return bool(getattr(config, "sliding_window", None)) and getattr(config, "use_sliding_window", True)


def use_layouts(model: nn.Module) -> None:
    """Make a model's decoder understand layouts; calls without one run as before."""
    config = base_model(model).config.get_text_config()
    former = config._attn_implementation or "eager"
    if former.startswith(NAME):
        return
    name = f"{NAME}_{former}"
    AttentionInterface.register(name, _attention(former))
    AttentionMaskInterface.register(name, ALL_MASK_ATTENTION_FUNCTIONS[former])
    config._attn_implementation = name


def forward_options(layout: Layout, position_ids: Tensor) -> dict[str, Any]:
    """Keywords of the forward call of a model with ``use_layouts``."""
    placeholder = torch.ones((1, 1, 1, 1), dtype=torch.bool, device=position_ids.device)
    return {"position_ids": position_ids, "attention_mask": placeholder, NAME: layout}


def _attention(former: str) -> Callable[..., tuple[Tensor, Tensor | None]]:
    def attention(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
    ) -> tuple[Tensor, Tensor | None]:
        """transformers' attention: query (R, h, T, d), key, value (R, g, T, d) -> (R, T, h, d), None."""
        layout = options.pop(NAME, None)
        if layout is None:
            plain = ALL_ATTENTION_FUNCTIONS.get(former) or _eager_of(module)
            with _named(module.config, former):
                return plain(module, query, key, value, attention_mask, **options)
        return piecewise(module, query, key, value, layout, **options), None

    return attention


@contextmanager
def _named(config: PreTrainedConfig, name: str) -> Iterator[None]:
    """Inside, the configuration names that attention: flash attention looks there for the library it is to call."""
    own = config._attn_implementation
    config._attn_implementation = name
    try:
        yield
    finally:
        config._attn_implementation = own


def _eager_of(module: nn.Module) -> Callable[..., tuple[Tensor, Tensor | None]]:
    for kind in type(module).__mro__:
        found = getattr(sys.modules[kind.__module__], "eager_attention_forward", None)
        if found is not None:
            return found
    raise UnsupportedAttention(f"{type(module).__name__} has no eager_attention_forward beside it")
