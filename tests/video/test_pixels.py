"""Pixels are bit for bit those of transformers' image processors; what its video processors add is checked apart."""

import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil
from transformers.models.llava_onevision.image_processing_pil_llava_onevision import LlavaOnevisionImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil, smart_resize
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil
from transformers.models.smolvlm.image_processing_pil_smolvlm import SmolVLMImageProcessorPil
from transformers.models.video_llama_3.image_processing_pil_video_llama_3 import VideoLlama3ImageProcessorPil

from synpo.video import FramePolicy, PixelSpec, clip_bounds, decode, pixels
from tests.video.films import film, real

SHAPES = [(64, 96), (96, 64), (50, 50), (37, 131), (200, 30)]
AREA = {"shortest_edge": 40 * 40, "longest_edge": 90 * 90}


def frames(count: int, height: int, width: int) -> np.ndarray:
    rng = np.random.default_rng(height * 1000 + width)
    smooth = rng.integers(0, 256, (count, 1 + height // 8, 1 + width // 8, 3), np.uint8)
    images = [Image.fromarray(image).resize((width, height), Image.Resampling.BICUBIC) for image in smooth]
    noise = rng.integers(-20, 20, (count, height, width, 3))
    return np.clip(np.stack([np.asarray(image) for image in images]) + noise, 0, 255).astype(np.uint8)


def expected(processor, images, **options) -> torch.Tensor:
    return processor(images=[Image.fromarray(image) for image in images], return_tensors="pt", **options)[
        "pixel_values"
    ]


def settings_of(processor) -> dict:
    """As they stand in a preprocessor_config.json."""
    return json.loads(processor.to_json_string())


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(
    ("family", "processor", "options"),
    [
        ("llava", CLIPImageProcessorPil(size={"shortest_edge": 40}, crop_size={"height": 40, "width": 40}), {}),
        ("llava", CLIPImageProcessorPil(size={"shortest_edge": 33}, crop_size={"height": 40, "width": 36}), {}),
        ("llava", SiglipImageProcessorPil(size={"height": 42, "width": 30}), {}),
        ("llava", CLIPImageProcessorPil(size={"shortest_edge": 40}, do_center_crop=False, do_normalize=False), {}),
        ("internvl", GotOcr2ImageProcessorPil(size={"height": 44, "width": 44}), {"crop_to_patches": False}),
    ],
)
def test_towers_that_take_images(shape, family, processor, options):
    images = frames(3, *shape)
    found = pixels(images, PixelSpec.of(family, settings_of(processor)))
    assert set(found) == {"pixel_values"}
    torch.testing.assert_close(found["pixel_values"], expected(processor, images, **options), rtol=0, atol=0)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(
    ("family", "processor"),
    [
        ("llava_onevision", SiglipImageProcessorPil(size={"height": 48, "width": 48})),
        ("llava_next_video", CLIPImageProcessorPil(size={"shortest_edge": 40}, crop_size={"height": 40, "width": 40})),
        ("video_llava", CLIPImageProcessorPil(size={"shortest_edge": 40}, crop_size={"height": 40, "width": 40})),
    ],
)
def test_towers_that_take_videos(shape, family, processor):
    images = frames(3, *shape)
    found = pixels(images, PixelSpec.of(family, settings_of(processor)))
    assert set(found) == {"pixel_values_videos"}
    torch.testing.assert_close(found["pixel_values_videos"][0], expected(processor, images), rtol=0, atol=0)


@pytest.mark.parametrize("shape", SHAPES)
def test_smolvlm(shape):
    processor = SmolVLMImageProcessorPil(
        size={"longest_edge": 90}, max_image_size={"longest_edge": 32}, do_image_splitting=False
    )
    images = frames(3, *shape)
    found = pixels(images, PixelSpec.of("smolvlm", settings_of(processor)))
    whole = torch.cat([expected(processor, [image])[0] for image in images])
    torch.testing.assert_close(found["pixel_values"][0], whole, rtol=0, atol=0)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("count", [1, 2, 5])
@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl"])
def test_qwens_patches(family, count, shape):
    """The image processor repeats each image over the frames of a patch: every frame's share must be the image's."""
    processor = Qwen2VLImageProcessorPil(size=AREA, patch_size=7)
    images = frames(count, *shape)
    found = pixels(images, PixelSpec.of(family, settings_of(processor)))
    compare_patches(found, expected(processor, images), count, temporal=2, patch=7)


def compare_patches(found, images, count, temporal, patch):
    times, rows, columns = found["video_grid_thw"][0].tolist()
    assert times == -(-count // temporal)
    shares = found["pixel_values_videos"].view(times, rows * columns, 3, temporal, patch, patch)
    singles = images.view(count, rows * columns, 3, temporal, patch, patch)[:, :, :, 0]
    for slot in range(times * temporal):
        single = singles[min(slot, count - 1)]  # the last frame fills up
        torch.testing.assert_close(shares[slot // temporal, :, :, slot % temporal], single, rtol=0, atol=0)


@pytest.mark.parametrize("count", [1, 3, 4])
def test_qwen3s_patches(count):
    """Its bounds are for the video; at a size within them it cuts and normalises as the image processor does."""
    processor = Qwen2VLImageProcessorPil(
        size={"shortest_edge": 1, "longest_edge": 10**9}, patch_size=16, image_mean=[0.5] * 3, image_std=[0.5] * 3
    )
    images = frames(count, 64, 96)
    found = pixels(images, PixelSpec.of("qwen3_vl", settings_of(processor)))
    compare_patches(found, expected(processor, images), count, temporal=2, patch=16)


@pytest.mark.parametrize("shape", SHAPES)
def test_video_llama_3(shape):
    """Its video processor merges 2 x 2 patches where its image processor merges none, and shares out the pixels."""
    count = 3
    images = frames(count, *shape)
    processor = VideoLlama3ImageProcessorPil(size=AREA, patch_size=7, merge_size=2)
    shared = settings_of(processor) | {"size": AREA | {"longest_edge": AREA["longest_edge"] * count}}
    found = pixels(images, PixelSpec.of("video_llama_3", shared))
    assert found["video_merge_sizes"].tolist() == [2]
    compare_patches(found, expected(processor, images), count, temporal=1, patch=7)


@given(st.integers(1, 500), st.integers(1, 500), st.sampled_from([14, 28, 32]), st.integers(1, 300), st.integers(1, 16))
@settings(max_examples=300, deadline=None)
def test_qwens_sizes(height, width, factor, blocks, more):
    least, most = blocks * factor**2, blocks * more * factor**2
    spec = PixelSpec.of("qwen2_vl", {"size": {"shortest_edge": least, "longest_edge": most}, "patch_size": factor // 2})
    if max(height, width) > 200 * min(height, width):
        with pytest.raises(ValueError, match="too oblong"):
            spec.sizes(height, width, 8)
        return
    assert spec.sizes(height, width, 8) == [smart_resize(height, width, factor, least, most)]


@given(st.integers(1, 700), st.integers(1, 700), st.integers(1, 40), st.integers(8, 400))
@settings(max_examples=300, deadline=None)
def test_qwen3s_sizes_keep_the_video_within_its_bounds(height, width, count, blocks):
    """Its processor's own function is behind torchvision, so its promise is checked instead."""
    least, most = 4 * 32**2, 4 * blocks * 32**2
    spec = PixelSpec.of("qwen3_vl", {"size": {"shortest_edge": least, "longest_edge": most}})
    if max(height, width) > 150 * min(height, width):
        return
    ((rows, columns),) = spec.sizes(height, width, count)
    assert rows % 32 == columns % 32 == 0
    assert min(rows, columns) >= 32
    frames_counted = max(count, 2)
    if min(rows, columns) > 32:  # a side cannot be less than a block, whatever the bound
        assert frames_counted * rows * columns <= most or round(frames_counted / 2) * 2 * rows * columns <= most
    assert (frames_counted + 1) * rows * columns >= least


@pytest.mark.parametrize(
    ("height", "width", "count", "size"),
    [
        (720, 1280, 16, (160, 288)),  # 16 frames of 720p in 768 * 32^2 pixels: 1 / 4.33 of each side
        (720, 1280, 8, (224, 416)),
        (720, 1280, 1, (448, 832)),  # taken for two frames
        (64, 96, 16, (96, 128)),  # fewer than 128 * 32^2 pixels: 1.15 times each side, rounded up
        (64, 96, 4, (160, 224)),
        (64, 96, 64, (64, 96)),
        (20, 40, 64, (32, 64)),  # a side below a block
    ],
)
def test_qwen3s_sizes(height, width, count, size):
    assert PixelSpec.of("qwen3_vl").sizes(height, width, count) == [size]


def test_frames_resized_while_decoding_are_those_resized_after():
    for family in ("qwen3_vl", "smolvlm", "llava"):
        spec = PixelSpec.of(family)
        small = decode(real("bikes"), FramePolicy(num_frames=5), each=spec.resize)
        large = decode(real("bikes"), FramePolicy(num_frames=5))
        now, later = pixels(small.frames, spec, resized=True), pixels(large.frames, spec)
        assert now.keys() == later.keys()
        for name in now:
            torch.testing.assert_close(now[name], later[name], rtol=0, atol=0)


def test_views_of_several_sizes_are_each_resized_for_their_own():
    spec = PixelSpec.of("qwen3_vl", {"size": {"shortest_edge": 32**2, "longest_edge": 8 * 32**2}})
    video = decode(film(size=(128, 192)), FramePolicy(num_frames=8), clips=clip_bounds, each=spec.resize,
                   clip_policy=FramePolicy(num_frames=2))  # fmt: skip
    assert video.frames.shape[1:3] == spec.sizes(128, 192, 8)[0] == (32, 32)
    assert video.clips[0].frames.shape[1:3] == spec.sizes(128, 192, 2)[0] == (32, 64)


def test_a_models_own_settings_are_read_from_its_folder(tmp_path):
    def write(name, content):
        (tmp_path / name).write_text(json.dumps(content))

    write("config.json", {"model_type": "llava_onevision"})
    assert PixelSpec.read(tmp_path) == PixelSpec.of("llava_onevision")
    write("preprocessor_config.json", {"size": {"height": 10, "width": 20}, "do_center_crop": None})
    assert PixelSpec.read(tmp_path).bounds == (10, 20)
    write("processor_config.json", {"image_processor": {"size": {"height": 12, "width": 12}}})
    assert PixelSpec.read(tmp_path).bounds == (12, 12)
    write("video_preprocessor_config.json", {"size": {"height": 14, "width": 14}})
    assert PixelSpec.read(tmp_path).bounds == (14, 14)
    write("processor_config.json", {"video_processor": {"size": {"height": 16, "width": 16}}})
    assert PixelSpec.read(tmp_path).bounds == (16, 16)


def test_settings_for_images_serve_where_a_model_has_no_others():
    """Padding is for its cut-up images; a video's frames are resized to the square."""
    spec = PixelSpec.of(
        "llava_onevision", settings_of(LlavaOnevisionImageProcessorPil(size={"height": 30, "width": 30}))
    )
    assert (spec.rule, spec.bounds, spec.crop) == ("exact", (30, 30), None)


def test_older_names_of_settings():
    qwen = PixelSpec.of("qwen2_5_vl", {"min_pixels": 3136, "max_pixels": 12845056})
    assert qwen.bounds == (3136, 12845056)
    smol = PixelSpec.of(
        "smolvlm", {"video_sampling": {"video_size": {"longest_edge": 512}}, "max_image_size": {"longest_edge": 512}}
    )
    assert smol.bounds == (512, 512)
    assert PixelSpec.of("llava", {"size": 336, "crop_size": 336}).crop == (336, 336)


@pytest.mark.parametrize(
    ("family", "given", "message"),
    [
        ("bert", {}, "no pixels are known for a 'bert' model; known: .*internvl, llava"),
        ("llava", {"size": {"longest_edge": 9}}, "is not supported; it must be height and width, or shortest_edge"),
        ("llava", {"do_pad": True}, "do_pad=True is not supported"),
        ("qwen3_vl", {"cap_pixels_per_frame": True}, "cap_pixels_per_frame=True is not supported"),
    ],
)
def test_what_is_not_known_is_refused(family, given, message):
    with pytest.raises(ValueError, match=message):
        PixelSpec.of(family, given)


def test_frames_of_another_kind_are_refused():
    spec = PixelSpec.of("llava")
    with pytest.raises(TypeError, match="frames must be uint8, not float64"):
        pixels(np.zeros((2, 8, 8, 3)), spec)
    for shape in ((8, 8, 3), (2, 3, 8, 8), (0, 8, 8, 3)):
        with pytest.raises(ValueError, match="frames must have the shape"):
            pixels(np.zeros(shape, np.uint8), spec)
    with pytest.raises(ValueError, match="frames of 30x28 are not made of patches of 14 pixels in groups of 2x2"):
        pixels(np.zeros((2, 28, 30, 3), np.uint8), PixelSpec.of("qwen2_vl"), resized=True)
