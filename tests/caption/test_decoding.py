"""The loop against a plain one that runs each view by itself, with a cache of its own."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList, PreTrainedModel, StoppingCriteria, StoppingCriteriaList

from synpo.assets import smollm2
from synpo.caption import GREEDY, Captioner, Generated, Sampling, StopStrings, contrastive_decode, views
from synpo.caption.prompts import Prompt
from synpo.caption.rows import batch
from synpo.pretrained import load_model, load_tokenizer
from synpo_kernels import contrastive_sample
from tests.caption import tiny

STEPS = 12


def generate(model: PreTrainedModel, rows: dict[str, Tensor], **options: Any) -> list[Generated]:
    settings = {"sampling": GREEDY, "do_sample": False, "max_new_tokens": STEPS}
    return model.generate(**rows, custom_generate=contrastive_decode, **settings | options)


def text_rows(*texts: Sequence[int]) -> dict[str, Tensor]:
    return batch(tiny.model("llama"), [Prompt(torch.tensor(text)) for text in texts])


def two_caches(
    model: PreTrainedModel,
    full: dict[str, Any],
    poor: dict[str, Any],
    sampling: Sampling,
    seed: int = 0,
    steps: int = STEPS,
) -> list[int]:
    """Each view has a cache of its own. Positions, where the inputs have them, go on by one a token."""
    sides, logits, tokens = [dict(full), dict(poor)], [None, None], []
    with torch.no_grad():
        for _ in range(steps):
            for side, inputs in enumerate(sides):
                if tokens:
                    inputs["input_ids"] = torch.tensor([tokens[-1:]])
                out = model(**inputs, use_cache=True)
                logits[side] = out.logits[:, -1]
                sides[side] = {"past_key_values": out.past_key_values}
                if "position_ids" in inputs:
                    sides[side]["position_ids"] = inputs["position_ids"][..., -1:] + 1
            if sampling.temperature == 0:
                combined = (1 + sampling.alpha) * logits[0] - sampling.alpha * logits[1]
                tokens.append(int(combined.argmax()))
            else:
                drawn = contrastive_sample(
                    *logits,
                    alpha=sampling.alpha,
                    temperature=sampling.temperature,
                    top_k=sampling.top_k,
                    top_p=sampling.top_p,
                    seed=seed,
                    step=len(tokens),
                )
                tokens.append(int(drawn.tokens))
    return tokens


@pytest.mark.parametrize("sampling", [GREEDY, Sampling(temperature=0.9)], ids=["greedy", "sampled"])
def test_text_as_both_views(sampling: Sampling) -> None:
    full, poor = list(range(20, 33)), list(range(26, 33))
    expected = two_caches(
        tiny.model("llama"), {"input_ids": torch.tensor([full])}, {"input_ids": torch.tensor([poor])}, sampling, seed=5
    )
    assert len(set(expected)) > 4
    (found,) = generate(tiny.model("llama"), text_rows(full, poor), contrast=True, sampling=sampling, seeds=[5])
    assert found.tokens.tolist() == expected
    assert found.finish == "length"


MODELS = os.environ.get("SYNPO_TEST_MODELS")  # where synpo.assets keeps or puts SmolLM2-135M, 540 MB
SCENES = (
    ("A red cube moves to the left while a blue ball rolls behind the green cone. What happens?", "What happens?"),
    ("Frame 1: a dog sleeps. Frame 2: it wakes. Frame 3: it runs to the door.", "Frame 1: a dog sleeps."),
    ("Name three colours.", "Name three animals that live in the sea, and say for each what it eats."),
)


@pytest.mark.skipif(MODELS is None, reason="SYNPO_TEST_MODELS names no folder for a real model")
@pytest.mark.parametrize("sampling", [GREEDY, Sampling(temperature=0.9)], ids=["greedy", "sampled"])
def test_a_real_model(sampling: Sampling) -> None:
    """SmolLM2-135M, float32, three prompts of different lengths at once: 64 tokens each, or up to its end token."""
    assert MODELS is not None
    name = str(smollm2(Path(MODELS)))
    model, tokenizer = load_model(name), load_tokenizer(name)
    assert sampling.plausibility == 0
    texts = [*(full for full, _ in SCENES), *(poor for _, poor in SCENES)]
    prompts = [Prompt(torch.tensor(tokenizer(text)["input_ids"])) for text in texts]
    found = generate(
        model, batch(model, prompts), contrast=True, sampling=sampling, seeds=range(5, 8), max_new_tokens=64
    )
    for row, one in enumerate(found):
        full, poor = ({"input_ids": prompts[at].ids[None]} for at in (row, row + len(SCENES)))
        expected = two_caches(model, full, poor, sampling, seed=5 + row, steps=64)
        assert one.tokens.tolist() == expected[: len(one.tokens)]
        assert len(one.tokens) == 64 or one.finish == "eos"
    assert max(len(one.tokens) for one in found) > 32


@pytest.mark.parametrize("contrast", ["third", "blank", "shuffled"])
@pytest.mark.parametrize("family", tiny.VIDEO_FAMILIES)
def test_video_and_its_contrast_view(family: str, contrast: str) -> None:
    """The plain loop encodes the contrast view's frames anew, and lets each model count its positions itself."""
    model, video = tiny.model(family), tiny.view(frames=7)
    captioner = Captioner(model, tiny.tokenizer(), lambda frames: tiny.pixels(family, frames))
    full, poor = captioner.features(video, views.VIEWS[contrast])
    prompts = [captioner.prompt("w1 w2 w3", features) for features in (full, poor)]
    frames = video.frames[[0, 1, 2, 3, 4, 5, 6, 6]] if family.startswith("qwen") else video.frames
    per_unit = len(frames) // len(full.units)
    order = {
        "third": views.contrast_subset(len(full.units)),
        "blank": range(len(full.units)),
        "shuffled": torch.randperm(len(full.units), generator=torch.Generator().manual_seed(0)),
    }[contrast]
    chosen = [int(unit) * per_unit + at for unit in order for at in range(per_unit)]
    shown = frames[chosen] * (contrast != "blank")

    def inputs(prompt: Prompt, seen: Any) -> dict[str, Any]:
        made = {"input_ids": prompt.ids[None], **tiny.pixels(family, seen)}
        if family.startswith("qwen"):
            made["mm_token_type_ids"] = (made["input_ids"] == tiny.IDS["<video>"]).int() * 2
            if family == "qwen2_5_vl":  # the other counts frames, not seconds
                made["second_per_grid_ts"] = [prompt.features.seconds_per_unit]
            made["position_ids"] = model._prepare_position_ids_for_generation(made["input_ids"], made)
        return made

    expected = two_caches(model, inputs(prompts[0], video.frames), inputs(prompts[1], shown), GREEDY)
    (found,) = generate(model, batch(model, prompts), contrast=True)
    assert found.tokens.tolist() == expected
    assert len(set(expected)) > 2
    if contrast == "third":  # and each row by itself is what transformers' own loop makes of the raw pixels
        for prompt, seen in zip(prompts, (video.frames, shown), strict=True):
            own = model.generate(**inputs(prompt, seen), do_sample=False, max_new_tokens=STEPS)[0, -STEPS:]
            assert generate(model, batch(model, [prompt]))[0].tokens.tolist() == own.tolist()


@pytest.mark.parametrize("family", ["llama", "qwen2_5_vl"])
def test_candidates_are_separate_generations(family: str) -> None:
    """Eight from one prefill, and rows that end at different times: each as if it were alone."""
    sampling = Sampling(temperature=0.9, top_k=0, top_p=1.0)
    model = tiny.model(family)
    if family == "llama":
        rows = text_rows(range(20, 33), range(26, 33))
    else:
        captioner = Captioner(model, tiny.tokenizer(), lambda frames: tiny.pixels(family, frames))
        pair = captioner.features(tiny.view(), views.third)
        rows = batch(model, [captioner.prompt("w1 w2", features) for features in pair])
    options = {"contrast": True, "sampling": sampling, "eos_token_id": list(range(20, 40))}
    together = generate(model, rows, candidates=8, seeds=range(100, 108), **options)
    assert len({len(found.tokens) for found in together}) > 2
    assert {found.finish for found in together} >= {"eos"}
    for seed, found in zip(range(100, 108), together, strict=True):
        (alone,) = generate(model, rows, seeds=[seed], **options)
        assert found.tokens.tolist() == alone.tokens.tolist()
        assert found.finish == alone.finish
        torch.testing.assert_close(found.logps, alone.logps, atol=1e-4, rtol=0)


def test_finished_rows_leave_the_batch() -> None:
    """The model never sees more rows than are unfinished, nor a token after the last row has ended."""
    model = tiny.model("llama")
    seen: list[int] = []
    hook = model.model.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    try:
        found = generate(
            model,
            text_rows(range(20, 33), range(26, 33)),
            contrast=True,
            candidates=8,
            seeds=range(100, 108),
            sampling=Sampling(temperature=0.9, top_k=0, top_p=1.0),
            eos_token_id=list(range(20, 40)),
        )
    finally:
        hook.remove()
    lengths = [len(row.tokens) for row in found]
    assert seen == [2] + [2 * sum(length > step for length in lengths) for step in range(1, max(lengths))]
    assert len(set(seen)) > 2


def test_log_probs_are_those_of_the_law_and_of_the_plain_model() -> None:
    model, full, poor = tiny.model("llama"), list(range(20, 33)), list(range(26, 33))
    sampling = Sampling(temperature=0.7, top_k=0, top_p=1.0)
    (found,) = generate(model, text_rows(full, poor), contrast=True, sampling=sampling, seeds=[3])
    with torch.no_grad():
        l, c = (
            model(input_ids=torch.tensor([[*view, *found.tokens[:-1]]])).logits[0, len(view) - 1 :]
            for view in (full, poor)
        )
    at = found.tokens[:, None]
    drawn_from = ((1.5 * l - 0.5 * c) / 0.7).log_softmax(-1).gather(1, at)[:, 0]
    torch.testing.assert_close(found.logps, drawn_from, atol=1e-4, rtol=0)
    torch.testing.assert_close(found.model_logps, l.log_softmax(-1).gather(1, at)[:, 0], atol=1e-4, rtol=0)


def test_without_contrast_it_is_generate() -> None:
    model = tiny.model("llama")
    prompts = text_rows(range(20, 33), range(26, 33))
    plain = model.generate(**prompts, do_sample=False, max_new_tokens=STEPS)[:, -STEPS:]
    assert [row.tokens.tolist() for row in generate(model, prompts)] == plain.tolist()


class _Poison(LogitsProcessor):
    """NaN in one row's logits from its third token on, or -inf everywhere."""

    def __init__(self, value: float) -> None:
        self.value = value

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        scores = scores.clone()
        if input_ids.shape[1] >= 13 + 2:
            scores[input_ids[:, 0] == 50] = self.value
        return scores


@pytest.mark.parametrize(
    ("value", "finish", "words"),
    [(float("nan"), "nan", "NaN or infinite logits at token 2"), (float("-inf"), "masked", "every token is masked")],
)
def test_a_row_without_a_law_ends_with_a_reason_and_no_other_is_touched(value: float, finish: str, words: str) -> None:
    model = tiny.model("llama")
    rows = text_rows(range(20, 33), range(50, 63))
    clean = generate(model, rows)
    first, second = generate(model, rows, logits_processor=LogitsProcessorList([_Poison(value)]))
    assert first.tokens.tolist() == clean[0].tokens.tolist()
    assert first.failure is None
    assert second.tokens.tolist() == clean[1].tokens[:2].tolist()
    assert second.finish == finish
    assert words in second.failure
    assert len(second.logps) == len(second.model_logps) == 2


class _Lookup(StoppingCriteria):
    """Looks every token up, as transformers' stop strings do; ends nothing."""

    def __call__(self, input_ids: Tensor, scores: Tensor, **_: Any) -> Tensor:
        return torch.nn.functional.embedding(input_ids, torch.zeros(1000, 1)).sum(dim=(1, 2)) > 0


def test_a_row_without_a_law_leaves_criteria_no_token_that_is_none() -> None:
    rows = text_rows(range(20, 33), range(50, 63))
    poison = LogitsProcessorList([_Poison(float("nan"))])
    lookup = StoppingCriteriaList([_Lookup()])
    first, second = generate(tiny.model("llama"), rows, logits_processor=poison, stopping_criteria=lookup)
    assert (first.finish, second.finish) == ("length", "nan")


class _FirstRowAfter(StoppingCriteria):
    def __call__(self, input_ids: Tensor, scores: Tensor, **_: Any) -> Tensor:
        return (input_ids[:, 0] == 20) & (input_ids.shape[1] >= 13 + 5)


def test_stopping_criteria_and_streaming() -> None:
    told: list[dict[int, int]] = []
    first, second = generate(
        tiny.model("llama"),
        text_rows(range(20, 33), range(50, 63)),
        stopping_criteria=StoppingCriteriaList([_FirstRowAfter()]),
        on_tokens=told.append,
    )
    assert (first.finish, len(first.tokens)) == ("criteria", 5)
    assert (second.finish, len(second.tokens)) == ("length", STEPS)
    assert [newest[1] for newest in told] == second.tokens.tolist()
    assert [newest[0] for newest in told if 0 in newest] == first.tokens.tolist()


@pytest.mark.parametrize(
    ("text", "stops", "kept"),
    [
        ("one two. Three", (". ",), "one two"),
        ("one two. Three", ("Three", "two"), "one"),
        ("naïve ☂ rain\n\nmore", ("\n\n",), "naïve ☂ rain"),
        ("no stop here", ("!",), None),
        ("☂☂", ("☂",), ""),
    ],
)
def test_stop_strings_cut_between_and_inside_tokens(text: str, stops: tuple[str, ...], kept: str | None) -> None:
    tokenizer = tiny.byte_tokenizer()
    stop = StopStrings(tokenizer, stops)
    tokens = tokenizer(text)["input_ids"]
    met = next((n for n in range(1, len(tokens) + 1) if stop(tokens[:n])), None)
    if kept is None:
        assert met is None
        assert stop.text(tokens) == text
        return
    end = min(text.find(string) + len(string) for string in stops if string in text)
    assert tokenizer.decode(tokens[:met]) == text[:end]
    assert stop.text(tokens[:met]) == kept


def test_stop_strings_may_be_special_tokens_and_others_are_left_out_of_the_text() -> None:
    tokenizer = tiny.tokenizer()
    stop = StopStrings(tokenizer, ("<|end|>",))
    tokens = tokenizer("w1 <|user|> w2 <|end|> w3")["input_ids"]
    assert [stop(tokens[:n]) for n in range(1, 6)] == [False, False, False, True, True]
    assert stop.text(tokens[:4]).split() == ["w1", "w2"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"do_sample": True}, "pass do_sample=False"),
        ({"contrast": True, "rows": 3}, "the batch has 3 rows; with contrast=True every row needs its contrast row"),
        ({"candidates": 0}, "candidates is 0"),
        ({"candidates": 2}, "2 greedy candidates would all be the same"),
        ({"seeds": [1, 2, 3]}, "seeds has 3 entries for 2 rows"),
        ({"seeds": 2**63 - 1}, f"seeds holds {2**63}; each must fit a signed 64-bit integer"),
        ({"use_cache": False}, "use_cache is False"),
    ],
)
def test_arguments_that_contradict_each_other(options: dict[str, Any], message: str) -> None:
    ids = torch.full((options.pop("rows", 2), 4), 30)
    with pytest.raises(ValueError, match=message):
        generate(tiny.model("llama"), {"input_ids": ids, "attention_mask": torch.ones_like(ids)}, **options)


def test_an_empty_prompt() -> None:
    nothing = torch.empty(1, 0, dtype=torch.int64)
    with pytest.raises(ValueError, match="the prompt is empty"):
        generate(tiny.model("llama"), {"input_ids": nothing, "attention_mask": nothing})


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", -1.0), ("temperature", float("nan")), ("top_p", 0.0), ("top_p", 1.1), ("top_k", -1),
        ("alpha", -0.1), ("plausibility", 1.5), ("plausibility", -0.1), ("max_new_tokens", 0),
    ],
)  # fmt: skip
def test_settings_out_of_range(field: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"{field} is {value}; it has to be"):
        Sampling(**{field: value})


def test_an_empty_stop_string_is_refused() -> None:
    with pytest.raises(ValueError, match="stop holds an empty string"):
        Sampling(stop=("",))
