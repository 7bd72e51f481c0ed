"""How tokens are drawn, how many, and what ends a text."""

import math
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Sampling:
    """One law to draw tokens from. Defaults: what the SynPO release captions with (arXiv 2506.00835).

    Errors: ValueError naming the field, the value and what is allowed.
    """

    temperature: float = 0.5  # 0: greedy
    top_p: float = 0.9  # keep the likeliest tokens up to this mass, the one that crosses it included; 1: all
    top_k: int = 32  # keep so many of the likeliest tokens, before top_p; 0: all
    alpha: float = 0.5  # weight a of the contrast view: (1 + a) logits - a contrast logits
    plausibility: float = 0.0  # tokens less likely than this share of the likeliest are out, by the full view; 0: off
    max_new_tokens: int = 512
    stop: tuple[str, ...] = ()  # a text ends before the first of these

    def __post_init__(self) -> None:
        checks = (
            ("temperature", 0 <= self.temperature < math.inf, "finite and >= 0; 0 is greedy"),
            ("top_p", 0 < self.top_p <= 1, "above 0 and at most 1; 1 keeps every token"),
            ("top_k", self.top_k >= 0, ">= 0; 0 keeps every token"),
            ("alpha", 0 <= self.alpha < math.inf, "finite and >= 0"),
            ("plausibility", 0 <= self.plausibility <= 1, "between 0 and 1; 0 switches the constraint off"),
            ("max_new_tokens", self.max_new_tokens >= 1, ">= 1"),
        )
        for name, fine, allowed in checks:
            if not fine:
                raise ValueError(f"{name} is {getattr(self, name)}; it has to be {allowed}")
        object.__setattr__(self, "stop", tuple(self.stop))
        if "" in self.stop:
            raise ValueError("stop holds an empty string; a text would end before it begins")


GREEDY = Sampling(temperature=0.0, top_p=1.0, top_k=0)
CANDIDATES = Sampling(temperature=0.9, top_p=0.95, top_k=32)  # the release's, for captions to choose pairs from


class StopStrings:
    """Whether generated tokens have come to a stop string, and the text before it.

    A stop string may begin and end inside tokens. Special tokens count with their text, so that "<|end|>" can stop a
    text of a model that does not end in it by itself.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, strings: tuple[str, ...]) -> None:
        self.tokenizer = tokenizer
        self.strings = strings
        # A character takes four tokens at most (UTF-8 bytes); the rest leaves room for tokens without text.
        self._tail = 4 * max(map(len, strings), default=0) + 16

    def __call__(self, tokens: list[int]) -> bool:
        """Whether the newest tokens hold a stop string. tokens: all of one row, the newest last."""
        if not self.strings:
            return False
        text = self.tokenizer.decode(tokens[-self._tail :], skip_special_tokens=False)
        return any(string in text for string in self.strings)

    def text(self, tokens: list[int]) -> str:
        """The text of a row's tokens up to the first stop string, special tokens left out, blanks at its ends too."""
        if self.strings:
            whole = self.tokenizer.decode(tokens, skip_special_tokens=False)
            found = [at for at in map(whole.find, self.strings) if at >= 0]
            if found:
                kept = next(n for n in range(len(tokens), -1, -1) if len(self._raw(tokens[:n])) <= min(found))
                rest = whole[len(self._raw(tokens[:kept])) : min(found)]
                return (self.tokenizer.decode(tokens[:kept], skip_special_tokens=True) + rest).strip()
        return self.tokenizer.decode(tokens, skip_special_tokens=True).strip()

    def _raw(self, tokens: list[int]) -> str:
        return self.tokenizer.decode(tokens, skip_special_tokens=False)
