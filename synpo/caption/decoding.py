"""The generation loop: full view and contrast view as rows of one batch with one cache, one forward pass a token.

It plugs into transformers, which prepares inputs, masks, positions and cache as for any other way to generate:

    found = model.generate(
        input_ids=ids, attention_mask=mask,  # left-padded; rows 0..B-1 the full views, B..2B-1 their contrast views
        custom_generate=contrastive_decode, contrast=True, sampling=Sampling(), candidates=8, seeds=0, do_sample=False,
    )

Both rows of a pair are extended by the token drawn from their combined logits (synpo_kernels.contrastive_sample). N
candidates of a prompt share its prefill: the cache is repeated, not computed again. A row that has ended leaves the
batch, its contrast row and its part of the cache with it. The method: visual contrastive decoding (Leng et al., arXiv
2311.16922), with fewer frames as the contrast (SynPO, arXiv 2506.00835).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessorList, PreTrainedModel, StoppingCriteriaList
from transformers.generation.utils import MULTIMODAL_INPUTS_TO_DROP_OUTSIDE_PREFILL

from synpo_kernels import contrastive_sample

from .sampling import Sampling

OnTokens = Callable[[dict[int, int]], None]  # row -> its newest token; rows that have ended are not in it
FAILED = {1: "nan", 2: "masked"}  # by contrastive_sample's status


@dataclass(frozen=True)
class Generated:
    """What one row came to; tensors are on the CPU."""

    tokens: Tensor  # (L,) int64, an end token included
    logps: Tensor  # (L,) float32, nats: under the law they were drawn from; 0 when greedy
    model_logps: Tensor  # (L,) float32, nats: under the plain model on the full view, at temperature 1
    finish: str  # eos, stop, length, criteria; nan or masked: the next token had no law to be drawn from

    @property
    def failure(self) -> str | None:
        """Why the row ended early, in words; None for a row that ended as it should."""
        at = f"at token {len(self.tokens)}"
        return {
            "nan": f"NaN or infinite logits {at}; check the weights, or load the model in bfloat16 or float32",
            "masked": f"every token is masked {at}; relax the logits processors",
        }.get(self.finish)


def contrastive_decode(
    model: PreTrainedModel,
    input_ids: Tensor,
    logits_processor: LogitsProcessorList,
    stopping_criteria: StoppingCriteriaList,
    generation_config: GenerationConfig,
    sampling: Sampling,
    contrast: bool = False,
    candidates: int = 1,
    seeds: int | Sequence[int] | None = None,
    first_step: int = 0,
    stop: Callable[[list[int]], bool] | None = None,
    on_tokens: OnTokens | None = None,
    **model_kwargs: Any,
) -> list[Generated]:
    """Pass it to generate(custom_generate=...), with everything from `sampling` on as keywords.

    contrast: the second half of the batch holds the contrast views of the first half. candidates: rows to draw for each
    prompt; the result has B * candidates entries, a prompt's candidates side by side. seeds: one for every entry, or an
    int s meaning s, s + 1, ..., or None for fresh ones. A row's tokens depend on its prompt, its seed and first_step +
    position alone, not on the rest of the batch (to the last bits in which a matrix product may depend on it).

    Length, end tokens and stopping criteria come from generate's own arguments; logits processors are applied to both
    views' logits. `sampling` holds temperature, top-k and top-p, so do_sample stays False. stop(tokens of a row so
    far) ends that row. on_tokens is called after every step.

    Errors: ValueError for arguments that contradict each other, each by its name.
    """
    views = 2 if contrast else 1
    _check(model, input_ids, generation_config, sampling, views, candidates, model_kwargs)
    rows = len(input_ids) // views * candidates
    row_seeds = _row_seeds(seeds, rows, input_ids.device)
    most = generation_config.max_length - input_ids.shape[1]
    ends = set(_ids(generation_config.eos_token_id))

    outputs = model._prefill(input_ids, generation_config, model_kwargs)
    for name in ("inputs_embeds", *MULTIMODAL_INPUTS_TO_DROP_OUTSIDE_PREFILL):
        model_kwargs.pop(name, None)
    state = _State(model, input_ids, model_kwargs)
    state.advance(outputs)
    if candidates > 1:
        state.take(torch.arange(len(input_ids), device=input_ids.device).repeat_interleave(candidates))

    record = _Record(rows, most, input_ids.device)
    live = torch.arange(rows, device=input_ids.device)
    for step in range(most):
        logits = logits_processor(state.ids, state.logits.float()) if logits_processor else state.logits
        drawn = contrastive_sample(
            logits[: len(live)],
            logits[len(live) :] if contrast else None,
            alpha=sampling.alpha,
            plausibility=sampling.plausibility,
            temperature=sampling.temperature,
            top_k=sampling.top_k,
            top_p=sampling.top_p,
            seed=row_seeds[live],
            step=first_step + step,
        )
        # The one transfer a step: the host has to know which rows have ended.
        names, tokens, status = torch.stack([live, drawn.tokens, drawn.status.long()]).tolist()
        record.add(step, live, drawn, names, tokens, status)
        # A row without a law drew -1. It ends below, but stopping criteria may look its tokens up before.
        state.ids = torch.cat([state.ids, drawn.tokens.clamp(min=0).repeat(views)[:, None]], dim=1)
        met = stopping_criteria(state.ids[: len(live)], None).tolist()
        for at, row in enumerate(names):
            if row in record.finish:
                continue
            if tokens[at] in ends:
                record.finish[row] = "eos"
            elif stop is not None and stop(record.tokens[row]):
                record.finish[row] = "stop"
            elif step + 1 == most:
                record.finish[row] = "length"
            elif met[at]:
                record.finish[row] = "criteria"
        if on_tokens is not None:
            on_tokens({row: token for row, token, code in zip(names, tokens, status, strict=True) if not code})
        kept = [at for at, row in enumerate(names) if row not in record.finish]
        if not kept:
            break
        if len(kept) < len(names):
            index = torch.tensor(kept, device=live.device)
            state.take(torch.cat([index + view * len(names) for view in range(views)]))
            live = live[index]
        inputs = model.prepare_inputs_for_generation(state.ids, next_sequence_length=1, **state.kwargs)
        state.advance(model(**inputs, return_dict=True))
    return record.result()


class _State:
    """What the next forward pass needs, a row of each tensor per row of the batch."""

    def __init__(self, model: PreTrainedModel, ids: Tensor, kwargs: dict[str, Any]) -> None:
        self.model, self.ids, self.kwargs = model, ids, kwargs
        self.logits = ids.new_empty(0)

    def advance(self, outputs: Any) -> None:
        """Takes a forward pass's cache and logits, and one position more of masks and positions."""
        self.kwargs = self.model._update_model_kwargs_for_generation(outputs, self.kwargs)
        self.logits = outputs.logits[:, -1]

    def take(self, index: Tensor) -> None:
        """Keeps these rows, in this order; a row may come several times."""
        rows = len(self.ids)
        for name, value in self.kwargs.items():
            if isinstance(value, Tensor):
                axis = 1 if name == "position_ids" and value.ndim == 3 else 0  # (4, rows, T) with mRoPE
                if value.shape[axis] == rows:
                    self.kwargs[name] = value.index_select(axis, index)
        self.kwargs["past_key_values"].reorder_cache(index)  # the one selection that every kind of layer offers
        self.ids, self.logits = self.ids[index], self.logits[index]


class _Record:
    """Tokens and log-probs of all rows. Log-probs stay on the device until the end."""

    def __init__(self, rows: int, most: int, device: torch.device) -> None:
        self.tokens: list[list[int]] = [[] for _ in range(rows)]
        self.finish: dict[int, str] = {}
        self._logps = torch.zeros(2, rows, most, device=device)

    def add(self, step: int, live: Tensor, drawn: Any, names: list[int], tokens: list[int], status: list[int]) -> None:
        self._logps[:, live, step] = torch.stack([drawn.logps, drawn.model_logps])
        for row, token, code in zip(names, tokens, status, strict=True):
            if code:
                self.finish[row] = FAILED[code]
            else:
                self.tokens[row].append(token)

    def result(self) -> list[Generated]:
        logps, model_logps = self._logps.cpu()
        return [
            Generated(torch.tensor(ids, dtype=torch.int64), ours[: len(ids)], plain[: len(ids)], self.finish[row])
            for row, (ids, ours, plain) in enumerate(zip(self.tokens, logps, model_logps, strict=True))
        ]


def _ids(ids: int | list[int] | None) -> list[int]:
    return [] if ids is None else [ids] if isinstance(ids, int) else list(ids)


def _row_seeds(seeds: int | Sequence[int] | None, rows: int, device: torch.device) -> Tensor:
    if seeds is None:
        return torch.randint(2**63 - 1, (rows,), dtype=torch.int64).to(device)
    if isinstance(seeds, int):
        seeds = range(seeds, seeds + rows)
    if len(seeds) != rows:
        raise ValueError(f"seeds has {len(seeds)} entries for {rows} rows; give one for each candidate of each prompt")
    outside = next((seed for seed in seeds if not -(2**63) <= seed < 2**63), None)
    if outside is not None:
        raise ValueError(f"seeds holds {outside}; each must fit a signed 64-bit integer")
    return torch.tensor(list(seeds), dtype=torch.int64, device=device)


def _check(
    model: PreTrainedModel,
    input_ids: Tensor,
    config: GenerationConfig,
    sampling: Sampling,
    views: int,
    candidates: int,
    kwargs: dict[str, Any],
) -> None:
    if model.config.is_encoder_decoder:
        raise ValueError(f"{type(model).__name__} is an encoder-decoder; a decoder-only model is needed")
    if config.do_sample or (config.num_beams or 1) > 1 or (config.num_return_sequences or 1) > 1:
        raise ValueError(
            "do_sample, num_beams and num_return_sequences are set by `sampling` and `candidates` here; "
            "pass do_sample=False and leave the others out"
        )
    if config.use_cache is False:
        raise ValueError("use_cache is False; contrastive_decode needs the cache")
    if candidates < 1:
        raise ValueError(f"candidates is {candidates}; it has to be at least 1")
    if candidates > 1 and sampling.temperature == 0:
        raise ValueError(f"{candidates} greedy candidates would all be the same; set a temperature above 0")
    if len(input_ids) % views:
        raise ValueError(f"the batch has {len(input_ids)} rows; with contrast=True every row needs its contrast row")
    embeds = kwargs.get("inputs_embeds")
    if (input_ids if embeds is None else embeds).shape[1] == 0:
        raise ValueError("the prompt is empty; the first token needs one before it")
