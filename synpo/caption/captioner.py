"""Captioner: a model that writes captions, from frames to texts with their log-probs."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from ..video import View
from .decoding import Generated, OnTokens, contrastive_decode
from .features import Features, encode, family_of
from .prompts import DESCRIBE, REVISE, Prompt, make_prompt, without_tokens
from .rows import Heads, batch
from .sampling import Sampling, StopStrings
from .views import ContrastView, third

Pixels = Callable[[np.ndarray], dict[str, Tensor]]  # frames (F, H, W, 3) uint8 -> what the vision tower takes
PASS_STEPS = 1 << 32  # a retrospective pass draws from the same seed, at steps that no first pass reaches


class UnusableFrames(ValueError):
    """Frames that the model's pixels cannot be made of."""


@dataclass(frozen=True)
class Caption:
    """A text and how it came about."""

    text: str
    seed: int
    generated: Generated  # tokens and log-probs of the pass that wrote the text
    draft: "Caption | None" = None  # what a retrospective pass started from

    @property
    def failure(self) -> str | None:
        """Why there is no proper caption, in words; None where there is one."""
        return self.generated.failure or (None if self.text else "the model ended without a word")


class Captioner:
    """A causal language model or vision-language model with its tokenizer and, for frames, its pixels.

    model: in eval mode; the families of synpo.caption.features take frames, every other one text alone.
    pixels: makes the vision tower's inputs from frames; needed for frames only.
    batch_size: most rows that go through the model at once, both views counted; None: no bound.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        pixels: Pixels | None = None,
        *,
        batch_size: int | None = None,
    ) -> None:
        if batch_size is not None and batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}; it has to be at least 1")
        self.model = model.eval()
        self.tokenizer = tokenizer
        self.pixels = pixels
        self.batch_size = batch_size

    def captions(
        self,
        views: Sequence[View],
        instruction: str = DESCRIBE,
        *,
        sampling: Sampling = Sampling(),  # noqa: B008 - frozen
        candidates: int = 1,
        seeds: int | Sequence[int] = 0,
        contrast: ContrastView | None = third,
        retrospective: int = 1,
        on_tokens: OnTokens | None = None,
    ) -> list[list[Caption]]:
        """`candidates` captions of each video or clip.

        Every view goes through the vision tower and the language model once; candidates and passes go on from there.
        contrast: the view whose logits are contrasted; None switches contrastive decoding off. retrospective: how often
        the model sees the video again with its own caption and writes a better one; candidate by candidate. seeds: one
        for each caption, view by view, or an int s meaning s, s + 1, ... A caption depends on its view, its seed and
        the settings, not on what else is in the call. on_tokens gets {caption: newest token} after every step.

        Errors: ValueError for settings out of range, a model that takes no frames, an empty instruction; UnusableFrames
        for frames of a size that the model's pixels cannot be made of.
        """
        if retrospective < 0:
            raise ValueError(f"retrospective is {retrospective}; it has to be >= 0")
        pairs = [self.features(view, contrast) for view in views]
        fulls = [self.prompt(instruction, full) for full, _ in pairs]
        poors = [self.prompt(instruction, poor) for _, poor in pairs] if contrast else None
        heads = Heads(self.model, [*fulls, *(poors or ())], self.batch_size)
        found = self.generate(
            fulls, poors, sampling=sampling, candidates=candidates, seeds=seeds, on_tokens=on_tokens, heads=heads
        )
        for number in range(1, retrospective + 1):
            again = [at for at, caption in enumerate(found) if caption.failure is None]
            texts = [
                REVISE.format(
                    instruction=instruction, caption=without_tokens(self.tokenizer, self.model, found[at].text)
                )
                for at in again
            ]
            sources = [pairs[at // candidates] for at in again]
            fulls = [self.prompt(text, full) for text, (full, _) in zip(texts, sources, strict=True)]
            poors = [self.prompt(text, poor) for text, (_, poor) in zip(texts, sources, strict=True)]
            better = self.generate(
                fulls,
                poors if contrast else None,
                sampling=sampling,
                seeds=[found[at].seed for at in again],
                first_step=number * PASS_STEPS,
                on_tokens=_renamed(on_tokens, again),
                drafts=[found[at] for at in again],
                heads=heads,
            )
            for at, caption in zip(again, better, strict=True):
                found[at] = caption
        return [found[at : at + candidates] for at in range(0, len(found), candidates)]

    def features(self, view: View, contrast: ContrastView | None = None) -> tuple[Features, Features | None]:
        """A view's features and those of its contrast view (None: no video, or no contrast)."""
        family_of(self.model)
        if self.pixels is None:
            raise ValueError("pixels is None; a Captioner needs it to see frames")
        make_pixels = self.pixels
        times = view.times - view.start  # each clip is a video of its own

        def look(frames: np.ndarray, at: Sequence[float]) -> Features:
            try:
                pixels = make_pixels(frames)
            except ValueError as error:
                raise UnusableFrames(str(error)) from error
            return encode(self.model, pixels, at, view.end - view.start)

        full = look(view.frames, times)
        return full, None if contrast is None else contrast(view, full, look)

    def prompt(self, instruction: str, features: Features | None = None) -> Prompt:
        """A row for generate: the instruction in the model's chat format, after the video if there is one."""
        return make_prompt(self.model, self.tokenizer, instruction, features)

    def generate(
        self,
        prompts: Sequence[Prompt],
        contrasts: Sequence[Prompt] | None = None,
        *,
        sampling: Sampling = Sampling(),  # noqa: B008 - frozen
        candidates: int = 1,
        seeds: int | Sequence[int] = 0,
        first_step: int = 0,
        on_tokens: OnTokens | None = None,
        drafts: Sequence[Caption] | None = None,
        heads: Heads | None = None,
    ) -> list[Caption]:
        """Texts for prompts of any kind, a prompt's candidates side by side. contrasts: a row for each prompt. drafts:
        what each caption is a revision of. heads: caches that prompts about the same videos go on from.

        on_tokens gets {row: newest token} after every step, rows numbered as in the result.
        """
        views = 1 if contrasts is None else 2
        if contrasts is not None and len(contrasts) != len(prompts):
            raise ValueError(f"contrasts has {len(contrasts)} rows for {len(prompts)} prompts; give one for each")
        rows = len(prompts) * candidates
        listed = list(range(seeds, seeds + rows)) if isinstance(seeds, int) else list(seeds)
        if len(listed) != rows:
            raise ValueError(f"seeds has {len(listed)} entries for {rows} captions; give one for each")
        stop = StopStrings(self.tokenizer, sampling.stop)
        found: list[Generated] = []
        for first, last, count in _portions(len(prompts), candidates, views, self.batch_size):
            start = len(found)
            part = [*prompts[first:last], *(contrasts[first:last] if contrasts is not None else ())]
            found += self.model.generate(
                **batch(self.model, part, heads),
                generation_config=self._config(sampling),
                custom_generate=contrastive_decode,
                sampling=sampling,
                contrast=contrasts is not None,
                candidates=count,
                seeds=listed[start : start + (last - first) * count],
                first_step=first_step,
                stop=stop if sampling.stop else None,
                on_tokens=_renamed(on_tokens, range(start, rows)),
            )
        return [
            Caption(stop.text(row.tokens.tolist()), seed, row, draft)
            for row, seed, draft in zip(found, listed, drafts or [None] * rows, strict=True)
        ]

    def _config(self, sampling: Sampling) -> GenerationConfig:
        """Length and end tokens for generate; the model's own defaults for drawing tokens are switched off."""
        own = self.model.generation_config
        end = own.eos_token_id if own.eos_token_id is not None else self.tokenizer.eos_token_id
        return GenerationConfig(
            max_new_tokens=sampling.max_new_tokens,
            eos_token_id=end,
            bos_token_id=own.bos_token_id,
            pad_token_id=own.pad_token_id if own.pad_token_id is not None else self.tokenizer.eos_token_id,
            do_sample=False,
            num_beams=1,
            num_return_sequences=1,
            repetition_penalty=1.0,
            no_repeat_ngram_size=0,
            use_cache=True,
        )


def _portions(prompts: int, candidates: int, views: int, most: int | None) -> Iterator[tuple[int, int, int]]:
    """(first prompt, last prompt, candidates) of each call of the model, so that no more than `most` rows go at once.

    Candidates of a prompt are split only where they alone are more than that; each split fills the prompt in again.
    """
    room = prompts * candidates if most is None else max(1, most // views)
    if room >= candidates:
        step = room // candidates
        for first in range(0, prompts, step):
            yield first, min(first + step, prompts), candidates
        return
    for first in range(prompts):
        for done in range(0, candidates, room):
            yield first, first + 1, min(room, candidates - done)


def _renamed(on_tokens: OnTokens | None, names: Sequence[int]) -> OnTokens | None:
    """Rows of one call of the model, told by their number among all captions."""
    if on_tokens is None:
        return None
    return lambda newest: on_tokens({names[row]: token for row, token in newest.items()})
