"""AuroraCap (arXiv 2410.03051): LLaVA whose vision tower merges alike tokens layer by layer, as ToMe does
(arXiv 2210.09461, section 3), so that a frame becomes a tenth of its tokens or so.

After the attention of every layer the tokens are dealt in turn into sets A and B. Each token of A finds the token of B
whose key (mean over the heads) is most similar by cosine; the r most similar pairs merge into averages, weighted by the
number of patches behind each token. The class token, the first of A, is left alone. r is the same in all layers:

    r = floor(patches (1 - token_kept_ratio) / layers),   at most half of the tokens that may merge

The features are those of the layer that LLaVA takes, usually the second last, so somewhat more than token_kept_ratio
are left: 109 of 729 in the released model at .1.

The release adds log(patches) of a query to all of its attention scores, which softmax does not notice; ToMe adds those
of the keys. Its weights have learnt without, so nothing is added here.
"""

from typing import Any, NamedTuple

import torch
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaModel,
)
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.llava.modeling_llava import LlavaPreTrainedModel


@strict
class AuroraCapConfig(LlavaConfig):
    """LlavaConfig and token_kept_ratio: the share of a frame's tokens that all layers together would keep."""

    model_type = "auroracap"

    token_kept_ratio: float = 0.1

    def __post_init__(self, **options: Any) -> None:
        super().__post_init__(**options)
        if not 0 < self.token_kept_ratio <= 1:
            raise ValueError(f"token_kept_ratio is {self.token_kept_ratio}; allowed: above 0 up to 1, which keeps all")


class Matching(NamedTuple):
    """Which tokens of A merge into which of B, for each of F frames; indices within A (the even tokens) and B."""

    kept: Tensor  # (F, |A| - r) of A, in order
    merged: Tensor  # (F, r) of A
    into: Tensor  # (F, r) of B


def match_tokens(metric: Tensor, r: int) -> Matching | None:
    """Bipartite soft matching of tokens with features (F, T, C), the first of them the class token; None: r is 0."""
    r = min(r, (metric.shape[1] - 1) // 2)
    if r <= 0:
        return None
    unit = metric / metric.norm(dim=-1, keepdim=True)
    scores = unit[:, ::2] @ unit[:, 1::2].transpose(1, 2)
    scores[:, 0] = -torch.inf
    best, partner = scores.max(-1)
    order = best.argsort(-1, descending=True)
    merged = order[:, :r]
    return Matching(order[:, r:].sort(-1).values, merged, partner.gather(1, merged))


def merge_tokens(values: Tensor, patches: Tensor, matching: Matching) -> tuple[Tensor, Tensor]:
    """Weighted averages of tokens (F, T, C) that stand for so many patches (F, T): (F, T - r, C), (F, T - r)."""
    both = torch.cat([values * patches[..., None], patches[..., None]], -1)
    a, b = both[:, ::2], both[:, 1::2]
    kept, merged, into = (index[..., None].expand(-1, -1, both.shape[-1]) for index in matching)
    sums = torch.cat([a.gather(1, kept), b.scatter_add(1, into, a.gather(1, merged))], 1)
    return sums[..., :-1] / sums[..., -1:], sums[..., -1]


def merging_layer(layer: nn.Module, hidden: Tensor, patches: Tensor, r: int) -> tuple[Tensor, Tensor]:
    """A layer of CLIP's encoder on tokens (F, T, C) that stand for so many patches (F, T), with r merges between its
    attention and its MLP.
    """
    attention = layer.self_attn
    normed = layer.layer_norm1(hidden)
    query, key, value = (
        project(normed).unflatten(-1, (-1, attention.head_dim)).transpose(1, 2)
        for project in (attention.q_proj, attention.k_proj, attention.v_proj)
    )
    attended = scaled_dot_product_attention(query, key, value, scale=attention.scale)
    hidden = hidden + attention.out_proj(attended.transpose(1, 2).flatten(2))
    with torch.no_grad():
        matching = match_tokens(key.mean(1), r)
    if matching is not None:
        hidden, patches = merge_tokens(hidden, patches, matching)
    return hidden + layer.mlp(layer.layer_norm2(hidden)), patches


class AuroraCapModel(LlavaModel):
    """LlavaModel with merging in its tower."""

    config: AuroraCapConfig

    def get_image_features(self, pixel_values: Tensor, **_: Any) -> BaseModelOutputWithPooling:
        """Frames (F, 3, height, width) -> last_hidden_state (F, 1 + N, C) of the tower's layer, its class token first;
        pooler_output: F tensors (N, H) for the language model.
        """
        tower = self.vision_tower
        layers = tower.encoder.layers
        hidden = tower.pre_layrnorm(tower.embeddings(pixel_values))
        patches = hidden.new_ones(hidden.shape[:2])
        r = int((hidden.shape[1] - 1) * (1 - self.config.token_kept_ratio) / len(layers))
        # hidden_states[0] of a tower is what enters its first layer.
        for layer in layers[: range(len(layers) + 1)[self.config.vision_feature_layer]]:
            hidden, patches = merging_layer(layer, hidden, patches, r)
        features = self.multi_modal_projector(hidden[:, 1:])
        return BaseModelOutputWithPooling(last_hidden_state=hidden, pooler_output=list(features))


class AuroraCapForConditionalGeneration(LlavaForConditionalGeneration):
    """LLaVA with merging in its tower; everything else is LlavaForConditionalGeneration's."""

    config: AuroraCapConfig

    def __init__(self, config: AuroraCapConfig) -> None:
        LlavaPreTrainedModel.__init__(self, config)
        self.model = AuroraCapModel(config)
        self.lm_head = nn.Linear(config.text_config.hidden_size, config.text_config.vocab_size, bias=False)
        self.post_init()

    def get_image_features(self, pixel_values: Tensor, **options: Any) -> BaseModelOutputWithPooling:
        """See AuroraCapModel."""
        return self.model.get_image_features(pixel_values, **options)


AutoConfig.register("auroracap", AuroraCapConfig)
AutoModelForImageTextToText.register(AuroraCapConfig, AuroraCapForConditionalGeneration)
