"""Captions of videos: encoded once, prompts as each family's processor writes them, passes, seeds, batches."""

from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from synpo.caption import (
    CANDIDATES,
    DESCRIBE,
    GREEDY,
    REVISE,
    VIEWS,
    Captioner,
    Features,
    Sampling,
    UnusableFrames,
    contrast_view,
)
from synpo.caption.prompts import without_tokens
from synpo.caption.rows import Heads, batch
from synpo.pairs import VIDEO_PROMPT
from tests.caption import tiny

SHORT = Sampling(temperature=0.9, max_new_tokens=6)


def captioner(family: str = "llava", **options: Any) -> Captioner:
    return Captioner(tiny.model(family), tiny.tokenizer(), lambda frames: tiny.pixels(family, frames), **options)


def texts(captions: list[list[Any]]) -> list[list[str]]:
    return [[caption.text for caption in of_view] for of_view in captions]


def placed(family: str, units: int, vectors: int) -> str:
    """The prompt of a made-up video, with each placeholder as one letter."""
    maker = captioner(family)
    features = Features(
        torch.zeros(units, vectors, 32),
        torch.zeros(int(family == "llava_onevision"), 32),
        (1, vectors),
        tuple(4.0 * unit + 0.26 for unit in range(units)),
        4.0 * units + 58,
    )
    prompt = maker.prompt("w1", features)
    text = " ".join(tiny.tokenizer().convert_ids_to_tokens(prompt.ids))
    place = {"llava": "<image>", "internvl": "<ctx>", "smolvlm": "<image>"}.get(family, "<video>")
    return text.replace(place, "x").replace("x x", "xx").replace("x x", "xx")


@pytest.mark.parametrize(
    ("family", "video"),
    [
        ("llava", "xxxxxx"),
        ("llava_onevision", "xxxxxxx"),
        ("llava_next_video", "xxxxxx"),
        ("qwen2_vl", "xxxxxx"),
        ("qwen2_5_vl", "xxxxxx"),
        ("internvl", "<unk> <img> xxx </img> <unk> <img> xxx </img>"),
        (
            "smolvlm",
            "<unk> " * 14 + "<unk> <unk> <unk> <fake_token_around_image> <global-img> xxx <fake_token_around_image> "
            "<unk> <unk> <unk> <fake_token_around_image> <global-img> xxx <fake_token_around_image>",
        ),
        ("video_llama_3", "<unk> <unk> xxx <unk> <unk> xxx"),
    ],
)
def test_where_the_vectors_go(family: str, video: str) -> None:
    assert placed(family, units=2, vectors=3) == f"<|user|> {video} w1 <|end|> <|assistant|>"


def test_words_around_the_frames() -> None:
    """Letter by letter what the processors of transformers write (processing_internvl, _smolvlm, _video_llama_3)."""
    from synpo.caption.features import FAMILIES, Words

    features = Features(torch.zeros(2, 1, 4), torch.zeros(0, 4), (1, 1), (0.26, 64.26), 66.5)
    words = Words("x", tiny.tokenizer())
    assert FAMILIES["internvl"].expand(features, words) == ["Frame1: <img>x</img>\nFrame2: <img>x</img>"]
    assert FAMILIES["video_llama_3"].expand(features, words) == ["Time 0.3s:x,Time 64.3s:x"]
    frame = "<fake_token_around_image><global-img>x<fake_token_around_image>"
    assert FAMILIES["smolvlm"].expand(features, words) == [
        "You are provided the following series of two frames from a 0:01:06 [H:MM:SS] video.\n"
        f"\nFrame from 00:00:{frame}\nFrame from 01:04:{frame}\n\n"
    ]


@pytest.mark.parametrize(("number", "words"), [(8, "eight"), (16, "sixteen"), (32, "thirty-two"), (40, "forty")])
def test_numbers_in_words(number: int, words: str) -> None:
    from synpo.caption.features import _spelled

    assert _spelled(number) == words


def test_a_video_is_encoded_once_for_contrast_view_candidates_and_passes() -> None:
    made = captioner()
    calls: list[Tensor] = []
    hook = made.model.model.vision_tower.register_forward_hook(lambda _, args, output: calls.append(args[0]))
    try:
        made.captions([tiny.view(), tiny.view(seed=1)], sampling=SHORT, candidates=2, contrast=VIEWS["third"])
        assert [len(pixels) for pixels in calls] == [6, 6]
        calls.clear()
        made.captions([tiny.view()], sampling=SHORT, contrast=VIEWS["blank"])
        assert [len(pixels) for pixels in calls] == [6, 1]
    finally:
        hook.remove()


@pytest.mark.parametrize("family", tiny.VIDEO_FAMILIES)
def test_passes_go_on_from_the_cache_of_their_video(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As if every prompt were computed whole; and the language model sees each view of a video once."""
    made = captioner(family)
    views = [tiny.view(frames=6), tiny.view(frames=4, seed=1)]
    settings = {"sampling": SHORT, "candidates": 2, "seeds": range(4)}
    seen: list[tuple[int, int]] = []
    hook = made.model.get_decoder().register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(tuple(kwargs["inputs_embeds"].shape[:2])), with_kwargs=True
    )
    try:
        shared = [caption for of_view in made.captions(views, "w1", **settings) for caption in of_view]
    finally:
        hook.remove()
    pairs = [made.features(view, VIEWS["third"]) for view in views]
    heads = Counter(made.prompt("w1", features).head for pair in pairs for features in pair)
    assert {width: rows for rows, width in seen[: len(heads)]} == heads
    revised = REVISE.format(instruction="w1", caption="")
    again = made.prompt(revised, pairs[0][0])
    longest = len(again.ids) - again.head + SHORT.max_new_tokens
    assert max(width for _, width in seen[len(heads) :]) <= longest
    monkeypatch.setattr(Heads, "row", lambda *_: None)
    whole = [caption for of_view in made.captions(views, "w1", **settings) for caption in of_view]
    for a, b in zip(shared, whole, strict=True):
        assert a.generated.tokens.tolist() == b.generated.tokens.tolist()
        assert a.text == b.text
        assert (a.draft is None) == (b.draft is None)  # a random model may end without a word
        assert a.draft is None or a.draft.text == b.draft.text
        torch.testing.assert_close(a.generated.logps, b.generated.logps, atol=1e-4, rtol=0)


def test_a_caption_depends_on_its_view_seed_and_settings_alone() -> None:
    views = [tiny.view(frames=6), tiny.view(frames=3, seed=1)]
    together = captioner().captions(views, sampling=SHORT, candidates=3, seeds=range(6))
    assert len({text for of_view in texts(together) for text in of_view}) == 6
    for number, view in enumerate(views):
        for candidate in range(3):
            seed = 3 * number + candidate
            [[alone]] = captioner().captions([view], sampling=SHORT, seeds=[seed])
            found = together[number][candidate]
            assert found.seed == seed
            assert found.text == alone.text
            assert found.draft.text == alone.draft.text
    for size in (1, 2, 4, 5, 8):
        assert texts(captioner(batch_size=size).captions(views, sampling=SHORT, candidates=3, seeds=range(6))) == texts(
            together
        )


def test_batch_size_bounds_the_rows() -> None:
    made = captioner(batch_size=4)
    rows: list[int] = []
    hook = made.model.model.language_model.register_forward_pre_hook(
        lambda _, args, kwargs: rows.append(len(kwargs["inputs_embeds"])), with_kwargs=True
    )
    try:
        made.captions([tiny.view(), tiny.view(seed=1)], sampling=SHORT, candidates=3)
    finally:
        hook.remove()
    assert max(rows) == 4


def test_a_retrospective_pass_sees_the_caption_and_draws_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    made = captioner()
    asked: list[str] = []
    prompt = made.prompt
    monkeypatch.setattr(made, "prompt", lambda text, features=None: asked.append(text) or prompt(text, features))
    [[caption]] = made.captions([tiny.view()], "w1 w2", sampling=SHORT, seeds=[7], retrospective=2)
    draft = caption.draft
    first = draft.draft
    assert first.draft is None
    assert asked == ["w1 w2"] * 2 + [
        REVISE.format(instruction="w1 w2", caption=text.text) for text in (first, draft) for _ in range(2)
    ]
    # A pass with the same words draws other tokens: its steps are others.
    prompts = [prompt("w1 w2", features) for features in made.features(tiny.view(), VIEWS["third"])]
    again = made.generate(prompts[:1], prompts[1:], sampling=SHORT, seeds=[7])
    later = made.generate(prompts[:1], prompts[1:], sampling=SHORT, seeds=[7], first_step=1 << 32)
    assert again[0].text == first.text != later[0].text


def test_a_caption_that_failed_is_not_looked_at_again_and_streaming_keeps_the_names() -> None:
    made = captioner()
    for seed in range(20):  # until the second caption begins with a token that no other has
        settings = {"sampling": SHORT, "candidates": 3, "contrast": None, "seeds": seed}
        [plain] = made.captions([tiny.view()], **settings)
        first = [caption.draft.generated.tokens.tolist() if caption.draft else [] for caption in plain]
        others = [*first[0], *first[2], *plain[0].generated.tokens.tolist(), *plain[2].generated.tokens.tolist()]
        if all(first) and first[1][0] not in others:
            break
    own = made.model.generation_config
    told: list[dict[int, int]] = []
    try:
        own.eos_token_id = first[1][0]
        [captions] = made.captions([tiny.view()], on_tokens=told.append, **settings)
    finally:
        own.eos_token_id = None
    assert captions[1].failure == "the model ended without a word"
    assert [caption.draft is None for caption in captions] == [False, True, False]
    assert [set(newest) for newest in told[:2]] == [{0, 1, 2}, {0, 2}]
    later = [newest for newest in told[SHORT.max_new_tokens :] if 2 in newest]
    assert [newest[2] for newest in later] == captions[2].generated.tokens.tolist()
    assert all(1 not in newest for newest in told[1:])


def test_contrast_views() -> None:
    """No video: the instruction alone. Any callable: its frames are encoded. Off: one row a prompt."""
    made, view = captioner(), tiny.view()
    full, none = made.features(view, contrast_view("no_video"))
    assert none is None
    assert (made.prompt("w1").ids != tiny.IDS["<image>"]).all()
    _, flipped = made.features(view, lambda view, features, encode: encode(view.frames[::-1].copy(), view.times))
    torch.testing.assert_close(flipped.units, full.units.flip(0))
    different = {
        name: texts(made.captions([view], sampling=SHORT, contrast=contrast_view(name), retrospective=0))[0][0]
        for name in ("off", *VIEWS)
    }
    assert len(set(different.values())) > 3
    assert contrast_view("off") is None
    with pytest.raises(ValueError, match="contrast is 'half'; allowed: off, third, blank, shuffled, no_video"):
        contrast_view("half")


def test_clips_are_videos_of_their_own() -> None:
    view = tiny.view(frames=4)
    clip = type(view)(10.0, 13.0, view.times + 10, view.images)
    assert captioner().features(clip)[0].times == captioner().features(view)[0].times


def test_text_alone_with_two_texts_as_views() -> None:
    made = Captioner(tiny.model("llama"), tiny.tokenizer())
    prompts = [made.prompt("w1 w2 w3"), made.prompt("w3")]
    told: list[dict[int, int]] = []
    found = made.generate(prompts[:1], prompts[1:], sampling=SHORT, candidates=2, seeds=[4, 5], on_tokens=told.append)
    assert [caption.seed for caption in found] == [4, 5]
    assert [newest[0] for newest in told] == found[0].generated.tokens.tolist()
    assert tiny.tokenizer().decode([newest[1] for newest in told], skip_special_tokens=True).strip() == found[1].text


def test_a_model_of_its_own_defaults_is_not_followed_by_accident() -> None:
    """repetition_penalty and sampling of a generation_config.json change nothing; its end tokens hold."""
    made = Captioner(tiny.model("llama"), tiny.tokenizer())
    prompts = [made.prompt("w1 w2 w3")]
    [plain] = made.generate(prompts, sampling=GREEDY.__class__(temperature=0, max_new_tokens=8))
    own = made.model.generation_config
    try:
        own.repetition_penalty, own.do_sample, own.top_k = 1.8, True, 3
        [same] = made.generate(prompts, sampling=GREEDY.__class__(temperature=0, max_new_tokens=8))
        own.eos_token_id = int(plain.generated.tokens[3])
        [ended] = made.generate(prompts, sampling=GREEDY.__class__(temperature=0, max_new_tokens=8))
    finally:
        own.repetition_penalty, own.do_sample, own.top_k, own.eos_token_id = None, None, None, None
    assert same.text == plain.text
    assert (ended.generated.finish, len(ended.generated.tokens)) == ("eos", 4)


def test_an_empty_answer_and_a_broken_model_are_failures(monkeypatch: pytest.MonkeyPatch) -> None:
    made = captioner()
    stop = made._config(SHORT)
    stop.eos_token_id = list(range(len(tiny.IDS)))
    monkeypatch.setattr(made, "_config", lambda _: stop)
    monkeypatch.setattr(made.tokenizer, "decode", lambda *_, **__: "", raising=False)
    [[caption]] = made.captions([tiny.view()], sampling=SHORT)
    assert caption.failure == "the model ended without a word"
    assert caption.draft is None
    monkeypatch.undo()
    weight = made.model.lm_head.weight
    kept = weight[5].clone()
    try:
        with torch.no_grad():
            weight[5] = float("nan")
        [[caption]] = made.captions([tiny.view()], sampling=SHORT)
    finally:
        with torch.no_grad():
            weight[5] = kept
    assert caption.text == ""
    assert caption.generated.finish == "nan"
    assert "NaN or infinite logits at token 0" in caption.failure


def test_a_quoted_caption_cannot_give_commands() -> None:
    quoted = without_tokens(tiny.tokenizer(), tiny.model("llava"), "w1 <image> <|e<|end|>nd|> </s> <<video>video> w2")
    assert quoted.split() == ["w1", "w2"]


def test_one_instruction_in_captions_and_pairs() -> None:
    assert DESCRIBE == VIDEO_PROMPT
    assert (CANDIDATES.temperature, CANDIDATES.top_p, CANDIDATES.top_k) == (0.9, 0.95, 32)


def test_a_template_of_plain_strings_and_none_at_all() -> None:
    tokenizer = tiny.tokenizer()
    features = captioner().features(tiny.view(frames=2))[0]
    kept = tokenizer.chat_template
    try:
        tokenizer.chat_template = "{% for m in messages %}{{ '<|user|> ' + m.content + ' <|end|>' }}{% endfor %}"
        strings = captioner().prompt("w1", features).ids
        tokenizer.chat_template = None
        plain = captioner().prompt("w1", features).ids
    finally:
        tokenizer.chat_template = kept
    image, word, user, end = (tiny.IDS[name] for name in ("<image>", "w1", "<|user|>", "<|end|>"))
    assert strings.tolist() == [user, *[image] * 32, word, end]
    assert plain.tolist() == [*[image] * 32, word]


def test_positions_of_a_padded_row_are_those_of_the_row_alone() -> None:
    made = captioner("qwen2_5_vl")
    full, poor = (made.prompt("w1 w2", features) for features in made.features(tiny.view(), VIEWS["third"]))
    both, alone = batch(made.model, [full, poor]), batch(made.model, [poor])
    length = len(poor.ids)
    assert (both["position_ids"][:, 1, -length:] == alone["position_ids"][:, 0]).all()
    assert (both["position_ids"][:, 1, :-length] == 0).all()
    assert both["attention_mask"][1].sum() == length


@pytest.mark.parametrize(
    ("family", "instruction", "message"),
    [
        ("llama", "w1", "a llama model takes no frames here; models that do: .*internvl, llava, "),
        ("llava", "  ", "the instruction is empty"),
        ("llava", "w1 <image>", "the prompt has '<image>' 7 times, 6 expected"),
        ("qwen2_5_vl", "<video>", "the prompt has '<video>' 2 times, 1 expected"),
    ],
)
def test_bad_input(family: str, instruction: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        captioner(family).captions([tiny.view()], instruction, sampling=SHORT)


def test_what_does_not_belong_together() -> None:
    view = tiny.view()
    with pytest.raises(ValueError, match="pixels is None"):
        Captioner(tiny.model("llava"), tiny.tokenizer()).captions([view])
    with pytest.raises(ValueError, match="batch_size is 0"):
        captioner(batch_size=0)
    with pytest.raises(ValueError, match="retrospective is -1"):
        captioner().captions([view], retrospective=-1)
    with pytest.raises(ValueError, match="seeds has 2 entries for 3 captions"):
        captioner().captions([view], candidates=3, seeds=[1, 2])
    made = captioner()
    prompt = made.prompt("w1")
    with pytest.raises(ValueError, match="contrasts has 1 rows for 2 prompts"):
        made.generate([prompt, prompt], [prompt])
    with pytest.raises(ValueError, match="the tokenizer gives id 220, the model's vocabulary has 97 entries"):
        Captioner(tiny.model("llama"), tiny.byte_tokenizer()).prompt("ozone ¶")


def test_frames_that_no_pixels_can_be_made_of() -> None:
    def refuse(frames: np.ndarray) -> dict[str, Tensor]:
        raise ValueError("too oblong")

    with pytest.raises(UnusableFrames, match="too oblong"):
        Captioner(tiny.model("llava"), tiny.tokenizer(), refuse).captions([tiny.view()])
