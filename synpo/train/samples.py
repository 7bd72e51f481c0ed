"""What the model answers by now: greedy answers to the first held-out prompts, beside the pairs' own."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from .collate import PairDataset
from .tokenise import Pair
from .vision import Vision

MOST_TOKENS = 128  # of an answer


@torch.no_grad()
def sample_answers(model: nn.Module, dataset: PairDataset, count: int, vision: Vision | None) -> list[dict[str, Any]]:
    """A record for each of the first pairs: index, prompt, answer (the model's), chosen, rejected; texts without
    special tokens.
    """
    tokenizer = dataset.tokenizer.tokenizer
    pairs = [dataset[i] for i in range(min(count, len(dataset)))]
    training = model.training
    model.eval()
    try:
        return [
            {
                "index": pair.index,
                "prompt": tokenizer.decode(pair.prompt, skip_special_tokens=True),
                "answer": tokenizer.decode(_greedy(model, pair, vision, tokenizer), skip_special_tokens=True),
                "chosen": tokenizer.decode(pair.chosen, skip_special_tokens=True),
                "rejected": tokenizer.decode(pair.rejected, skip_special_tokens=True),
            }
            for pair in pairs
        ]
    finally:
        model.train(training)


def _greedy(model: nn.Module, pair: Pair, vision: Vision | None, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    device = next(model.parameters()).device
    ends = {tokenizer.eos_token_id, int(pair.chosen[-1])}
    places: Tensor = torch.arange(len(pair.prompt)) if pair.places is None else pair.places
    following = int(places.max()) + 1  # as collate gives the answers their positions
    options = {} if vision is None or pair.media is None else vision.options(model, [pair.media])
    inputs, cache = pair.prompt[None], None
    found: list[int] = []
    while len(found) < MOST_TOKENS:
        output = model(
            input_ids=inputs.to(device),
            position_ids=places.unsqueeze(-2).to(device),
            past_key_values=cache,
            use_cache=True,
            **options,
        )
        token = int(output.logits[0, -1].argmax())
        if token in ends:
            break
        found.append(token)
        inputs, cache, options = torch.tensor([[token]]), output.past_key_values, {}
        places = torch.full((*places.shape[:-1], 1), following + len(found) - 1)
    return found
