"""Pairs with videos: every form gives what a model gives that is called in the usual way, one tower pass for a video,
features kept on disk change nothing, and what cannot be read is named.

float32, relative to the size of what is compared: 1e-5, as in test_prefix.
"""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from synpo.train import SynPOTrainer, vision_cache
from synpo.train import media as media_module
from synpo.train.collate import PLAIN, Form, assemble
from synpo.train.media import MediaError
from synpo.train.tokenise import Pair
from synpo.train.vision import vision_parameters
from synpo.train.vision_cache import VisionCache
from synpo.video import FramePolicy
from tests.train import seeing, tiny

FORMS = [PLAIN, Form(shared=True), Form(packed=True), Form(shared=True, packed=True)]


def alive(model: nn.Module) -> nn.Module:
    """An adapter that already does something, so that no gradient is zero."""
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    return model.train()


def usual_logps(model: nn.Module, pair: Pair, answer: Tensor, family: str) -> Tensor:
    """Log-probs of one answer's tokens, from the model called with pixels and nothing prepared."""
    ids = torch.cat((pair.prompt, answer))[None]
    options = dict(pair.media.inputs)
    if family.startswith("qwen"):
        place = seeing.tokenizer(family).convert_tokens_to_ids("<|video_pad|>" if family == "qwen3_vl" else "<video>")
        options["mm_token_type_ids"] = (ids == place).int() * 2
    if family == "qwen2_5_vl":
        options["second_per_grid_ts"] = torch.tensor([pair.media.skeleton.seconds_per_unit])
    logits = model(input_ids=ids, attention_mask=torch.ones_like(ids), **options).logits[0, len(pair.prompt) - 1 : -1]
    return logits.log_softmax(-1).gather(-1, answer[:, None])[:, 0]


def step(trainer: SynPOTrainer, form: Form, pairs: Sequence[Pair]) -> tuple[Tensor, dict[str, Tensor]]:
    trainer.scorer.form, trainer.scorer.verified = form, False
    trainer.model.zero_grad()
    output = trainer.scorer.loss(trainer.model, assemble(pairs, 0, form))
    output.loss.backward()
    assert (trainer.scorer.fallbacks, trainer.scorer.form) == (0, form)
    gradients = {name: p.grad.clone() for name, p in trainer.model.named_parameters() if p.grad is not None}
    return torch.cat([output.loss.detach()[None], *output[1:]]), gradients


def assert_close(got: tuple[Tensor, dict[str, Tensor]], expected: tuple[Tensor, dict[str, Tensor]]) -> None:
    torch.testing.assert_close(got[0], expected[0], rtol=1e-5, atol=1e-6)
    assert got[1].keys() == expected[1].keys()
    for name, gradient in expected[1].items():
        assert gradient.norm() > 0
        assert (got[1][name] - gradient).norm() <= 1e-5 * gradient.norm(), name


@pytest.mark.parametrize("family", seeing.FAMILIES)
def test_every_form_is_the_usual_call(tmp_path: Path, family: str) -> None:
    trainer = seeing.trainer(tmp_path, family, 2)
    model = alive(trainer.model)
    pairs = [trainer.train_dataset[i] for i in range(2)]
    with torch.no_grad():
        answers = [(p, p.chosen) for p in pairs] + [(p, p.rejected) for p in pairs]
        means = [usual_logps(model, p, answer, family).mean() for p, answer in answers]
        blind = usual_logps(model, pairs[0], pairs[0].chosen, family).mean()
        other = Pair(0, *(getattr(pairs[0], n) for n in ("prompt", "chosen", "rejected")), media=pairs[1].media)
        if family not in ("qwen2_5_vl", "qwen3_vl", "video_llama_3"):  # those have other grids
            assert abs(usual_logps(model, other, other.chosen, family).mean() - blind) > 1e-4  # the film matters
    expected = step(trainer, PLAIN, pairs)
    torch.testing.assert_close(expected[0][1:5], torch.stack(means), rtol=1e-5, atol=1e-5)
    for form in FORMS[1:]:
        assert_close(step(trainer, form, pairs), expected)


@pytest.mark.parametrize("family", ["llava_onevision", "qwen3_vl", "smolvlm"])
def test_a_tower_that_trains_gets_its_gradient(tmp_path: Path, family: str) -> None:
    trainer = seeing.trainer(tmp_path, family, 2, peft_config=None)
    assert trainer.scorer.vision.trains
    pairs = [trainer.train_dataset[i] for i in range(2)]
    expected = step(trainer, PLAIN, pairs)
    tower = {name for name, _ in vision_parameters(trainer.model)}
    assert any(expected[1][name].norm() > 0 for name in tower & expected[1].keys())
    got = step(trainer, Form(shared=True, packed=True), pairs)
    largest = max(gradient.norm() for gradient in expected[1].values())
    for name, gradient in expected[1].items():
        assert (got[1][name] - gradient).norm() <= 1e-5 * max(gradient.norm(), 1e-2 * largest), name


def test_the_tower_runs_once_for_a_video(tmp_path: Path) -> None:
    trainer = seeing.trainer(tmp_path, count=2)
    pairs = [trainer.train_dataset[i] for i in range(2)]
    calls: list[int] = []
    tower = trainer.model.get_base_model().model.vision_tower
    tower.register_forward_hook(lambda _, inputs, __: calls.append(1))
    for form in FORMS:
        trainer.scorer.vision._recent = {}
        calls.clear()
        step(trainer, form, pairs)
        assert len(calls) == len(pairs), form


def test_the_adapter_stays_off_the_tower(tmp_path: Path) -> None:
    trainer = seeing.trainer(tmp_path, "llava")
    names = [name for name, p in trainer.model.named_parameters() if p.requires_grad]
    assert names
    assert not any("vision_tower" in name or "projector" in name for name in names)
    tower = [name for name, _ in trainer.model.named_modules() if name.endswith("q_proj") and "vision_tower" in name]
    assert tower  # whose names are among the targets


def losses(trainer: SynPOTrainer) -> list[float]:
    trainer.train()
    return [line["loss"] for line in trainer.state.log_history if "loss" in line]


def test_a_run_with_videos_is_the_plain_run(tmp_path: Path) -> None:
    options = {"num_train_epochs": 2, "gradient_accumulation_steps": 2}
    shared = losses(seeing.trainer(tmp_path / "shared", **options))
    plain = losses(seeing.trainer(tmp_path / "plain", prefix_sharing=False, **options))
    batched = losses(seeing.trainer(tmp_path / "batched", per_device_train_batch_size=2, num_train_epochs=2))
    assert shared == pytest.approx(plain, rel=1e-5)
    assert shared == pytest.approx(batched, rel=1e-5)
    assert len(set(shared)) == 4


def test_text_and_video_in_one_dataset(tmp_path: Path) -> None:
    rows = seeing.pairs(2) + tiny.pairs(2)
    for family in ("llava_onevision", "qwen2_5_vl"):
        options = {"train_dataset": rows, "per_device_train_batch_size": 4, "max_steps": 2}
        shared = losses(seeing.trainer(tmp_path / family, family, **options))
        plain = losses(seeing.trainer(tmp_path / f"{family}-plain", family, prefix_sharing=False, **options))
        assert shared == pytest.approx(plain, rel=1e-5)


# References


def test_references_tell_videos_apart(tmp_path: Path) -> None:
    rows = seeing.pairs(3)
    for row in rows:
        row |= {name: rows[0][name] for name in ("prompt", "chosen", "rejected")}
    options = {"train_dataset": rows, "objective": "dpo", "num_train_epochs": 1}
    online = losses(seeing.trainer(tmp_path / "online", **options))
    precomputed = seeing.trainer(tmp_path / "kept", precompute_ref_logps=True, **options)
    assert losses(precomputed) == pytest.approx(online, rel=1e-5)
    assert len(precomputed.data_collator.references) == 3
    separate = losses(seeing.trainer(tmp_path / "model", ref_model=seeing.model("llava_onevision"), **options))
    assert separate == pytest.approx(online, rel=1e-5)


# The cache


def test_the_cache_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    decoded: list[Any] = []
    decode = media_module.decode
    monkeypatch.setattr(media_module, "decode", lambda *a, **k: decoded.append(a) or decode(*a, **k))
    for family in ("llava_onevision", "qwen3_vl"):
        rows = seeing.pairs(3, tmp_path)
        options = {"train_dataset": rows, "num_train_epochs": 2}
        off = losses(seeing.trainer(tmp_path / f"{family}-off", family, **options))
        cache = {"vision_cache": str(tmp_path / f"{family}-cache")}
        decoded.clear()
        on = losses(seeing.trainer(tmp_path / f"{family}-on", family, **options, **cache))
        assert on == off  # to the last bit
        assert len(decoded) == 3  # in the first epoch only
        again = losses(seeing.trainer(tmp_path / f"{family}-again", family, **options, **cache))
        assert again == off
        assert len(decoded) == 3
        assert len(list(Path(cache["vision_cache"]).glob("*.safetensors"))) == 3


def test_the_key_is_content_frames_pixels_and_tower(tmp_path: Path) -> None:
    cache = str(tmp_path / "cache")

    def entries(**changes: Any) -> int:
        rows = seeing.pairs(1, tmp_path)
        losses(seeing.trainer(tmp_path / "run", train_dataset=rows, vision_cache=cache, max_steps=1, **changes))
        return len(list(Path(cache).iterdir()))

    assert entries() == entries() == 1
    assert entries(num_frames=3) == 2
    other = seeing.model("llava_onevision")
    with torch.no_grad():
        other.model.multi_modal_projector.linear_1.weight[0, 0] += 1
    assert entries(model=other) == 3
    (tmp_path / "copy").mkdir()
    (tmp_path / "copy" / "renamed.mp4").write_bytes(seeing.film(0))
    rows = seeing.pairs(1)
    rows[0]["videos"] = [str(tmp_path / "copy" / "renamed.mp4")]
    losses(seeing.trainer(tmp_path / "run", train_dataset=rows, vision_cache=cache, max_steps=1))
    assert len(list(Path(cache).iterdir())) == 3  # the same content under another name


def test_damaged_entries_are_made_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    options = {"train_dataset": seeing.pairs(1, tmp_path), "vision_cache": str(tmp_path / "cache"), "max_steps": 1}
    first = losses(seeing.trainer(tmp_path / "a", **options))
    (entry,) = (tmp_path / "cache").iterdir()
    content = bytearray(entry.read_bytes())
    content[-1] ^= 1  # one bit of a feature
    entry.write_bytes(content)
    with caplog.at_level(logging.WARNING):
        trainer = seeing.trainer(tmp_path / "b", **options)
        assert losses(trainer) == first
    assert "is damaged (its checksum does not match); it is made again" in caplog.text
    assert trainer.train_dataset.tokenizer.media.cache.damaged == 1
    entry.write_bytes(b"cut off")
    assert losses(seeing.trainer(tmp_path / "c", **options)) == first


def test_the_cache_is_bounded(tmp_path: Path) -> None:
    size = 4 * 1000 * 4
    cache = VisionCache(tmp_path, b"tower", 2.5 * size / vision_cache.GB)
    skeleton = media_module.Features(torch.empty(4, 10, 0), torch.empty(0, 0), (1, 10), (0.0, 1.0, 2.0, 3.0), 4.0)
    for number in range(3):
        cache.put(bytes([number]), vision_cache.Encoded(torch.full((4, 1000), float(number))), skeleton)
    found = [cache.get(bytes([number])) for number in range(3)]
    assert found[0] is None
    assert torch.equal(found[2].encoded.pooled, torch.full((4, 1000), 2.0))
    assert found[2].skeleton.times == (0.0, 1.0, 2.0, 3.0)


def test_the_cache_is_listed_rarely(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Far from full never after the first entry; full, once for many entries."""
    encoded = vision_cache.Encoded(torch.zeros(4, 10))
    skeleton = media_module.Features(torch.empty(4, 10, 0), torch.empty(0, 0), (1, 10), (0.0, 1.0, 2.0, 3.0), 4.0)
    listed: list[int] = []
    shrink = VisionCache._shrink
    monkeypatch.setattr(VisionCache, "_shrink", lambda self: (listed.append(1), shrink(self)))
    roomy = VisionCache(tmp_path / "roomy", b"tower", 1)
    for number in range(20):
        roomy.put(bytes([number]), encoded, skeleton)
    assert len(listed) == 1
    entry = next((tmp_path / "roomy").iterdir()).stat().st_size
    tight = VisionCache(tmp_path / "tight", b"tower", 320 * entry / vision_cache.GB)
    listed.clear()
    for number in range(400):
        tight.put(number.to_bytes(2, "big"), encoded, skeleton)
    assert len(listed) < 400 / 4
    assert len(list((tmp_path / "tight").iterdir())) <= 320


def test_the_cache_is_refused_while_the_tower_trains(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"vision_cache is set, but the vision tower or projector trains \(model\."):
        seeing.trainer(tmp_path, peft_config=None, vision_cache=str(tmp_path / "cache"))
    with pytest.raises(ValueError, match="vision_cache is set, but a llama model has no tower known here"):
        tiny.trainer(tmp_path, vision_cache=str(tmp_path / "cache"))


# Truncation


def test_truncation_spares_media_and_end(tmp_path: Path) -> None:
    rows = seeing.pairs(1)
    words = " ".join(tiny.WORDS[:40])
    rows[0]["prompt"][0]["content"] = [
        {"type": "text", "text": words}, {"type": "video"}, {"type": "text", "text": words}
    ]  # fmt: skip
    rows[0]["chosen"][0]["content"] = " ".join(tiny.WORDS[40:70])
    whole = seeing.trainer(tmp_path, train_dataset=rows, max_length=1000)
    place = whole.train_dataset.tokenizer.media.place
    pair = whole.train_dataset[0]
    media = int((pair.prompt == place).sum())
    assert media == FRAMES_PLACES
    for length in (media + 80, media + 40, media + 12):
        short = seeing.trainer(tmp_path, train_dataset=rows, max_length=length).train_dataset[0]
        assert short.length() <= length
        assert int((short.prompt == place).sum()) == media
        assert short.chosen[-1] == pair.chosen[-1]
        assert short.rejected[-1] == pair.rejected[-1]
        before = short.prompt.tolist().index(place)
        assert torch.equal(short.prompt[before : before + media], pair.prompt[pair.prompt == place])
    assert short.cut
    with pytest.raises(MediaError, match=r"its media take \d+ of max_length=\d+ tokens and leave no room"):
        _ = seeing.trainer(tmp_path, train_dataset=rows, max_length=media - 2).train_dataset[0]


FRAMES_PLACES = seeing.FRAMES * 4 + 1  # OneVision pools 4x4 patches to 2x2, and ends in a new line


# What cannot be used


def test_broken_films_stop_or_are_skipped(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows = seeing.pairs(4)
    rows[1]["videos"] = [{"bytes": seeing.film(1)[:100]}]
    with pytest.raises(MediaError, match=r"row 1: .*bytes"):
        losses(seeing.trainer(tmp_path, train_dataset=rows))
    with caplog.at_level(logging.WARNING):
        trainer = seeing.trainer(tmp_path, train_dataset=rows, broken_media="skip", num_train_epochs=2)
        trainer.train()
    counts = [line["skipped_media"] for line in trainer.state.log_history if "loss" in line]
    assert counts[-1] == 2  # once an epoch
    assert trainer.state.global_step == 8
    assert "row 1: " in caplog.text
    assert "the next pair takes its place" in caplog.text


def test_missing_files_are_found_before_training(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows = seeing.pairs(3)
    rows[2]["videos"] = [str(tmp_path / "absent.mp4")]
    with pytest.raises(MediaError, match=r"row 2: .*absent\.mp4: no such file"):
        seeing.trainer(tmp_path, train_dataset=rows)
    trainer = seeing.trainer(tmp_path, train_dataset=rows, broken_media="skip")
    assert len(trainer.train_dataset) == 2
    assert trainer.train_dataset.counts == {"dropped, media missing or not supported": 1}


def test_a_model_of_text_is_refused_videos_by_name(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="row 0: has images or videos, but LlamaForCausalLM takes text alone"):
        tiny.trainer(tmp_path, train_dataset=seeing.pairs(1))


def test_what_a_pair_must_not_have(tmp_path: Path) -> None:
    def refused(message: str, family: str = "llava_onevision", **changes: Any) -> None:
        rows = seeing.pairs(1)
        rows[0] |= changes
        with pytest.raises(ValueError, match=message):
            losses(seeing.trainer(tmp_path, family, train_dataset=rows))

    words = [{"role": "user", "content": "w1"}]
    two = [{"type": "video"}, {"type": "video"}, {"type": "text", "text": "w1"}]
    refused(
        "row 0: 2 videos and 0 images; a pair has one video",
        videos=[{"bytes": seeing.film(0)}] * 2,
        prompt=[{"role": "user", "content": two}],
    )
    refused("row 0: an answer holds '<video>'", chosen=[{"role": "assistant", "content": "w1 <video> w2"}])
    refused("videos.*1 given, but the prompt has 2", prompt=[{"role": "user", "content": two}])
    spoken = [{"type": "video"}, {"type": "text", "text": "w1 <ctx>"}]
    refused(
        r"row 0: the prompt has 17 places for 16 vision vectors",
        "internvl",
        prompt=[{"role": "user", "content": spoken}],
    )
    spoken[1]["text"] = "w1 <video>"
    refused(
        "row 0: the rendered prompt has '<video>' 2 times, 1 expected", prompt=[{"role": "user", "content": spoken}]
    )
    same = [{"role": "assistant", "content": f"w1 {space}w2"} for space in ("", "\n")]
    refused("row 0: columns 'chosen' and 'rejected' are alike but for white space", chosen=same[:1], rejected=same[1:])
    refused("images.*trained on videos here", videos=[], images=[{"bytes": b"x"}], prompt=words)


def test_frame_lists_and_images(tmp_path: Path) -> None:
    for number in range(3):
        Image.fromarray(np.full((40, 40, 3), 60 * number, np.uint8)).save(tmp_path / f"{number}.png")
    paths = [str(tmp_path / f"{number}.png") for number in range(3)]
    rows = tiny.pairs(2)
    rows[0]["videos"] = [{"frames": paths}]
    rows[1]["images"] = paths[:2]
    trainer = seeing.trainer(tmp_path, "llava", train_dataset=rows)
    places = [
        int((trainer.train_dataset[i].prompt == trainer.train_dataset.tokenizer.media.place).sum()) for i in (0, 1)
    ]
    assert places == [3 * 16, 2 * 16]
    assert len(losses(trainer)) == 2


def test_a_template_without_parts_gets_markers(tmp_path: Path) -> None:
    plain = tiny.tokenizer(tiny.TEMPLATE.replace("{{ m.content }}", "{{ m.content + '' }}"))
    bare = tiny.tokenizer(None)
    for made in (plain, bare):
        made.add_special_tokens(
            {"additional_special_tokens": ["<video>", "<image>"]}, replace_extra_special_tokens=False
        )
        model = seeing.model("llava_onevision")
        model.resize_token_embeddings(len(made))
        model.config.video_token_id = made.convert_tokens_to_ids("<video>")
        trainer = seeing.trainer(tmp_path, model=model, processing_class=made, count=1)
        assert int((trainer.train_dataset[0].prompt == model.config.video_token_id).sum()) == FRAMES_PLACES


def test_a_resumed_run_with_videos(tmp_path: Path) -> None:
    options = {"num_train_epochs": 2, "save_strategy": "steps", "save_steps": 3}
    whole = losses(seeing.trainer(tmp_path, **options))
    resumed = seeing.trainer(tmp_path, **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert [line["loss"] for line in resumed.state.log_history if "loss" in line] == whole


def test_frames_are_chosen_by_the_release_s_rule(tmp_path: Path) -> None:
    assert tiny.arguments(tmp_path).frame_policy == FramePolicy(fps=0.5)
    assert tiny.arguments(tmp_path, num_frames=6).frame_policy == FramePolicy(num_frames=6)
    with pytest.raises(ValueError, match="give one of them"):
        tiny.arguments(tmp_path, num_frames=6, fps=1.0)
    with pytest.raises(ValueError, match="broken_media is 'ignore'; allowed: stop, skip"):
        tiny.arguments(tmp_path, broken_media="ignore")
