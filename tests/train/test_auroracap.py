"""AuroraCap: merging against ToMe's words written as loops, shapes of the released model, a release converted."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import CLIPVisionConfig, LlamaConfig

from synpo.auroracap import (
    AuroraCapConfig,
    AuroraCapForConditionalGeneration,
    match_tokens,
    merge_tokens,
    merging_layer,
)
from synpo.auroracap_release import PIXELS, convert, stretched
from synpo.pretrained import load_model, load_tokenizer
from tests.caption import tiny as captions
from tests.train import seeing


def tome(metric: Tensor, values: Tensor, patches: Tensor, r: int) -> tuple[Tensor, Tensor]:
    """One frame's tokens (T, C), merged as section 3 of arXiv 2210.09461 says it, token by token."""
    count = len(metric)
    a, b = list(range(0, count, 2)), list(range(1, count, 2))
    edges = []
    for i in a[1:]:  # the class token does not merge
        similar = [float(torch.cosine_similarity(metric[i], metric[j], dim=0)) for j in b]
        edges.append((max(similar), i, b[similar.index(max(similar))]))
    chosen = sorted(edges, reverse=True)[: min(r, (count - 1) // 2)]
    groups = {j: [j, *(i for _, i, partner in chosen if partner == j)] for j in b}
    alone = [[i] for i in a if i not in {i for _, i, _ in chosen}]
    members = [*alone, *groups.values()]
    sizes = torch.stack([patches[group].sum() for group in members])
    means = [(values[group] * patches[group, None]).sum(0) / patches[group].sum() for group in members]
    return torch.stack(means), sizes


@pytest.mark.parametrize("count", [2, 3, 10, 17])
@pytest.mark.parametrize("r", [0, 1, 4, 100])
def test_merging_is_tome(count: int, r: int) -> None:
    metric, values = (torch.randn(3, count, 6, dtype=torch.float64) for _ in range(2))
    patches = torch.randint(1, 9, (3, count)).double()
    matching = match_tokens(metric, r)
    expected = [tome(*frame, r) for frame in zip(metric, values, patches, strict=True)]
    if matching is None:
        assert min(r, (count - 1) // 2) == 0
        got, sizes = values[:, [*range(0, count, 2), *range(1, count, 2)]], None
    else:
        got, sizes = merge_tokens(values, patches, matching)
        torch.testing.assert_close(sizes, torch.stack([size for _, size in expected]))
        assert torch.equal(sizes.sum(1), patches.sum(1))  # no patch is lost
    torch.testing.assert_close(got, torch.stack([mean for mean, _ in expected]))
    torch.testing.assert_close(got[:, 0], values[:, 0])  # the class token stays first


def test_merged_tokens_pass_gradients_on() -> None:
    values = torch.randn(2, 9, 4, dtype=torch.float64, requires_grad=True)
    matching = match_tokens(torch.randn(2, 9, 4, dtype=torch.float64), 3)
    assert torch.autograd.gradcheck(lambda x: merge_tokens(x, torch.ones(2, 9).double(), matching)[0], (values,))


def test_without_merging_it_is_llava() -> None:
    llava = captions.model("llava")
    frames = torch.randn(3, 3, captions.SIZE, captions.SIZE)
    whole = seeing.model("auroracap")
    whole.config.token_kept_ratio = 1.0
    for mine, theirs in zip(
        whole.get_image_features(frames).pooler_output,
        llava.get_image_features(frames, return_dict=True).pooler_output,
        strict=True,
    ):
        torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_a_layer_merges_by_its_keys_between_attention_and_mlp() -> None:
    tower = seeing.model("auroracap").model.vision_tower
    layer = tower.encoder.layers[0]
    hidden, patches = torch.randn(1, 17, 32), torch.ones(1, 17)
    attended = hidden + layer.self_attn(layer.layer_norm1(hidden), None)[0]
    keys = layer.self_attn.k_proj(layer.layer_norm1(hidden)).unflatten(-1, (4, 8)).mean(2)
    merged, sizes = tome(keys[0], attended[0], patches[0], 5)
    expected = merged + layer.mlp(layer.layer_norm2(merged))
    got, found = merging_layer(layer, hidden, patches, 5)
    torch.testing.assert_close(got[0], expected, atol=1e-5, rtol=1e-5)
    assert torch.equal(found[0], sizes)


def test_shapes_of_the_released_model() -> None:
    """CLIP ViT-H/14 at 378 pixels and Vicuna 7B: 729 patches a frame, 20 merges in each of 31 layers, 109 left."""
    tower = CLIPVisionConfig(
        hidden_size=1280, intermediate_size=5120, num_hidden_layers=32, num_attention_heads=16, patch_size=14,
        image_size=378, projection_dim=1024,
    )  # fmt: skip
    with torch.device("meta"):
        model = AuroraCapForConditionalGeneration(AuroraCapConfig(vision_config=tower, text_config=LlamaConfig()))
        features = model.get_image_features(torch.empty(8, 3, 378, 378)).pooler_output
    assert [tuple(frame.shape) for frame in features] == [(109, 4096)] * 8
    assert 7.0e9 < sum(p.numel() for p in model.parameters()) < 7.5e9


def test_ratios_out_of_range_are_refused() -> None:
    with pytest.raises(ValueError, match="token_kept_ratio is 0"):
        AuroraCapConfig(token_kept_ratio=0.0)


def release(folder: Path) -> AuroraCapForConditionalGeneration:
    """A tiny model saved in the layout of the release, with a tower that was trained on smaller frames."""
    model = seeing.model("auroracap")
    weights = model.state_dict()
    rows = captions.IDS["<image>"]
    llm = {"lm_head.weight": weights["lm_head.weight"]}
    prefix = "model.language_model."
    llm |= {"model." + name.removeprefix(prefix): w for name, w in weights.items() if name.startswith(prefix)}
    prefix = "model.vision_tower."
    tower = {"vision_model." + name.removeprefix(prefix): w for name, w in weights.items() if name.startswith(prefix)}
    prefix = "model.multi_modal_projector.linear_"
    projector = {
        f"model.{2 * (int(name[len(prefix)]) - 1)}.{name[len(prefix) + 2 :]}": w
        for name, w in weights.items()
        if name.startswith(prefix)
    }
    for part, tensors in (("", llm), ("visual_encoder", tower), ("projector", projector)):
        (folder / part).mkdir(exist_ok=True)
        save_file({name: w.clone() for name, w in tensors.items()}, folder / part / "model.safetensors")
    model.config.text_config.save_pretrained(folder)
    model.config.vision_config.save_pretrained(folder / "visual_encoder")
    (folder / "projector" / "config.json").write_text("{}")
    told = captions.tokenizer()
    told.save_pretrained(folder)
    assert rows < len(told)
    return model


def test_a_release_is_converted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "release").mkdir()
    original = release(tmp_path / "release")
    side = captions.SIZE
    monkeypatch.setitem(PIXELS, "crop_size", {"height": side, "width": side})
    monkeypatch.setitem(PIXELS, "size", {"shortest_edge": side})
    config = convert(tmp_path / "release", tmp_path / "new", token_kept_ratio=0.5)
    assert config.vision_feature_layer == -2
    loaded = load_model(str(tmp_path / "new"))
    assert isinstance(loaded, AuroraCapForConditionalGeneration)
    assert loaded.config.token_kept_ratio == 0.5
    for name, weight in original.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], weight), name
    tokenizer = load_tokenizer(str(tmp_path / "new"))
    parts = [{"type": "image"}, {"type": "image"}, {"type": "text", "text": "w1"}]
    chat = [{"role": "user", "content": parts}, {"role": "assistant", "content": "w2"}]
    text = tokenizer.apply_chat_template(chat, tokenize=False)
    assert text == "<s>USER: <image> <image>\nw1 ASSISTANT: w2</s>"
    assert tokenizer.apply_chat_template(chat[:1], tokenize=False, add_generation_prompt=True) == text.split(" w2")[0]
    assert not (tmp_path / "new.partial").exists()


def test_a_smaller_position_embedding_is_stretched() -> None:
    positions = torch.randn(1 + 16, 5)
    assert stretched(positions, 4) is positions
    wider = stretched(positions, 7)
    assert wider.shape == (1 + 49, 5)
    assert torch.equal(wider[0], positions[0])
    level = stretched(torch.ones(1 + 16, 5), 7)
    torch.testing.assert_close(level, torch.ones(50, 5))


def test_what_a_release_lacks_is_named(tmp_path: Path) -> None:
    release(tmp_path)
    (tmp_path / "projector" / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"projector/config.json: no such file; is this a released AuroraCap"):
        convert(tmp_path, tmp_path / "new")
