"""The captioner that ships: whole, small, and as good and as bad as it is meant to be, on real films."""

from pathlib import Path
from random import Random

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForImageTextToText, AutoProcessor, AutoTokenizer

from synpo.caption import CANDIDATES, GREEDY, Captioner, Sampling
from synpo.caption.load import load_captioner
from synpo.miniature.base import frames_of
from synpo.miniature.captioner import WEIGHTS, make_model, make_tokenizer
from synpo.miniature.films import make_films
from synpo.miniature.grammar import read
from synpo.miniature.oracle import accuracy
from synpo.miniature.world import BEATS, make_scene, render
from synpo.video import FramePolicy, View, decode


def test_the_files_are_small_and_whole() -> None:
    assert sum(file.stat().st_size for file in WEIGHTS.iterdir()) <= 3_000_000
    with safe_open(WEIGHTS / "model.safetensors", "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is no dict
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float16}
    assert all(tensor.isfinite().all() for tensor in tensors.values())
    assert 500_000 < sum(tensor.numel() for tensor in tensors.values()) < 700_000


def test_it_loads_as_any_model_does_and_is_what_the_code_makes() -> None:
    model = AutoModelForImageTextToText.from_pretrained(WEIGHTS, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(WEIGHTS)
    processor = AutoProcessor.from_pretrained(WEIGHTS)
    assert tokenizer.get_vocab() == make_tokenizer().get_vocab()
    assert tokenizer.chat_template == make_tokenizer().chat_template
    made = make_model(tokenizer)
    assert {n: t.shape for n, t in model.state_dict().items()} == {n: t.shape for n, t in made.state_dict().items()}
    # transformers' own processor and ours see the same
    frames = render([make_scene(Random(0))], range(BEATS))[0]
    theirs = processor.image_processor(list(frames), return_tensors="pt")["pixel_values"]
    ours = load_captioner(str(WEIGHTS)).pixels(frames)["pixel_values"]
    assert torch.equal(theirs, ours)


def test_words_in_and_out_are_the_same() -> None:
    tokenizer = make_tokenizer()
    text = "Early on, the shape swells for a moment. A red ring slides upwards over a navy background."
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert tokenizer.unk_token_id not in ids
    assert tokenizer.decode(ids) == text


def test_the_template_writes_its_own_instruction() -> None:
    tokenizer = make_tokenizer()
    user = [{"type": "image"}, {"type": "image"}, {"type": "text", "text": "Anything <image> at all"}]
    messages = [{"role": "user", "content": user}, {"role": "assistant", "content": "A red ring."}]
    text = "<s><user><1><image><2><image>Describe the video.<assistant>"
    assert tokenizer.apply_chat_template(messages[:1], tokenize=False, add_generation_prompt=True) == text
    assert tokenizer.apply_chat_template(messages, tokenize=False) == f"{text}A red ring.</s>"


def test_training_sees_the_pixels_that_films_give() -> None:
    scene = make_scene(Random(1))
    given = load_captioner(str(WEIGHTS)).pixels(render([scene], range(BEATS))[0])["pixel_values"]
    assert torch.allclose(frames_of([scene], range(BEATS)), given, atol=1e-6)


class Shown:
    """Test films, decoded, with the captioner."""

    def __init__(self, folder: Path) -> None:
        self.scenes = list(make_films(folder, 60, seed=11).items())
        self.views = [decode(str(folder / f"{name}.mp4"), FramePolicy(fps=0.5)).whole for name, _ in self.scenes]
        self.captioner: Captioner = load_captioner(str(WEIGHTS))

    def right(self, views: list[View], sampling: Sampling, fact: str = "") -> tuple[float, float]:
        """Share of the facts told right (or of one), and of grammatical captions."""
        found = self.captioner.captions(views, sampling=sampling, contrast=None, retrospective=0)
        texts = [captions[0].text for captions in found]
        facts = [scene.facts for _, scene in self.scenes]
        rights = [
            float(read(text).facts.get(fact) == truth[fact]) if fact else accuracy(text, truth)
            for text, truth in zip(texts, facts, strict=True)
        ]
        return sum(rights) / len(rights), sum(read(text).grammatical for text in texts) / len(texts)


@pytest.fixture(scope="module")
def shown(tmp_path_factory: pytest.TempPathFactory) -> Shown:
    return Shown(tmp_path_factory.mktemp("films"))


def test_it_is_mostly_right_greedily_and_less_when_sampled(shown: Shown) -> None:
    # 480 facts: a standard error of .015 greedily and .022 sampled around what docs/miniature.md states
    greedy, grammatical = shown.right(shown.views, GREEDY)
    sampled, _ = shown.right(shown.views, CANDIDATES)
    assert 0.82 <= greedy <= 0.95
    assert 0.55 <= sampled <= 0.72
    assert grammatical >= 0.98


def test_a_third_of_the_frames_does_not_tell_the_event(shown: Shown) -> None:
    few = [
        View(view.start, view.end, view.times[[0, 3, 7]], tuple(view.images[i] for i in (0, 3, 7)))
        for view in shown.views
    ]
    assert shown.right(shown.views, GREEDY, "event")[0] > 0.7
    assert shown.right(few, GREEDY, "event")[0] < 0.45
    assert shown.right(few, GREEDY, "background")[0] > 0.9
