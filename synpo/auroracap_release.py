"""AuroraCap's released folders, made into one that transformers and this package load:

    python -m synpo.auroracap_release RELEASED_FOLDER NEW_FOLDER

A release (xtuner's layout) has a Llama with its tokenizer at the top, CLIP's vision tower in visual_encoder/ and an
MLP of two layers in projector/. Names change; values stay, but for the tower's position embedding, which the release
stretches to the frame's size at every call and which is stretched once here, and a new row for the token <image>.
"""

import argparse
import json
import shutil
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.functional import interpolate
from transformers import AutoTokenizer, CLIPVisionConfig, LlamaConfig

from .auroracap import AuroraCapConfig, AuroraCapForConditionalGeneration

PLACE = "<image>"
# What the release puts around a question (xtuner's "vicuna"), frames before it with blanks between them.
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}USER: {% if m.content is string %}{{ m.content }}"
    "{% else %}{% for part in m.content %}{% if part.type == 'text' %}{{ part.text }}{% else %}<image>"
    "{{ ' ' if not loop.last and loop.nextitem.type != 'text' else '\\n' }}{% endif %}{% endfor %}{% endif %} "
    "{% elif m.role == 'assistant' %}ASSISTANT: {{ m.content }}{{ eos_token }}{% else %}{{ m.content }} {% endif %}"
    "{% endfor %}{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)
PIXELS = {
    "image_processor_type": "CLIPImageProcessor", "size": {"shortest_edge": 378},
    "crop_size": {"height": 378, "width": 378}, "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
}  # fmt: skip
POSITIONS = "model.vision_tower.embeddings.position_embedding.weight"


def convert(released: Path, folder: Path, token_kept_ratio: float = 0.1) -> AuroraCapConfig:
    """Write the new folder and return its config. Errors: FileNotFoundError naming what the release lacks, ValueError
    for weights that do not fit the config.
    """
    settings = released / "visual_encoder" / "preprocessor_config.json"
    pixels = json.loads(settings.read_text(encoding="utf-8")) if settings.exists() else PIXELS
    tokenizer = AutoTokenizer.from_pretrained(released)
    tokenizer.add_special_tokens({"additional_special_tokens": [PLACE]}, replace_extra_special_tokens=False)
    tokenizer.chat_template = TEMPLATE
    config = merged_config(released, pixels["crop_size"]["height"], tokenizer.convert_tokens_to_ids(PLACE))
    config.token_kept_ratio = token_kept_ratio
    weights = renamed(
        {
            part: read_weights(released / where)
            for part, where in (("llm", "."), ("tower", "visual_encoder"), ("projector", "projector"))
        }
    )
    weights[POSITIONS] = stretched(
        weights[POSITIONS], config.vision_config.image_size // config.vision_config.patch_size
    )
    for name in ("model.language_model.embed_tokens.weight", "lm_head.weight"):
        missing = config.text_config.vocab_size - len(weights[name])
        mean = weights[name].float().mean(0, keepdim=True).to(weights[name].dtype)
        weights[name] = torch.cat([weights[name], mean.expand(missing, -1)])
    _check(config, weights)
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    save_file(
        {name: weight.contiguous() for name, weight in weights.items()}, partial / "model.safetensors", {"format": "pt"}
    )
    config.dtype = weights["lm_head.weight"].dtype
    config.architectures = [AuroraCapForConditionalGeneration.__name__]
    config.save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    (partial / "preprocessor_config.json").write_text(json.dumps(pixels, indent=2), encoding="utf-8")
    partial.rename(folder)
    return config


def merged_config(released: Path, image_size: int, place: int) -> AuroraCapConfig:
    """The parts' configs in one, for frames of image_size pixels a side and the token <image> at ``place``."""
    for part in ("config.json", "visual_encoder/config.json", "projector/config.json"):
        if not (released / part).is_file():
            raise FileNotFoundError(
                f"{released / part}: no such file; is this a released AuroraCap in xtuner's layout?"
            )
    tower = CLIPVisionConfig.from_pretrained(released / "visual_encoder")
    tower.image_size = image_size
    text = LlamaConfig.from_pretrained(released)
    text.vocab_size = max(text.vocab_size, place + 1)
    return AuroraCapConfig(
        vision_config=tower, text_config=text, image_token_id=place, projector_hidden_act="gelu",
        vision_feature_layer=-2, vision_feature_select_strategy="default", tie_word_embeddings=False,
    )  # fmt: skip


def read_weights(folder: Path) -> dict[str, Tensor]:
    """All tensors of a folder's safetensors files, or of its .bin files, which are read without running code."""
    files = sorted(folder.glob("*.safetensors")) or sorted(folder.glob("pytorch_model*.bin"))
    if not files:
        raise FileNotFoundError(f"{folder}: neither *.safetensors nor pytorch_model*.bin")
    found: dict[str, Tensor] = {}
    for file in files:
        found |= load_file(file) if file.suffix == ".safetensors" else torch.load(file, "cpu", weights_only=True)
    return found


def renamed(parts: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """The weights of llm, tower and projector under the names that AuroraCapForConditionalGeneration has."""
    layers = {"model.0.": "linear_1.", "model.2.": "linear_2."}
    found = {}
    for name, weight in parts["llm"].items():
        if not name.endswith("inv_freq"):
            found[name if name.startswith("lm_head") else "model.language_model." + name.removeprefix("model.")] = (
                weight
            )
    for name, weight in parts["tower"].items():
        if not name.endswith("position_ids"):
            found["model.vision_tower." + name.removeprefix("vision_model.")] = weight
    for name, weight in parts["projector"].items():
        prefix = next((old for old in layers if name.startswith(old)), None)
        if prefix is None:
            raise ValueError(f"projector: {name!r} is not of an MLP of two layers (model.0, model.2)")
        found["model.multi_modal_projector." + layers[prefix] + name.removeprefix(prefix)] = weight
    return found


def stretched(positions: Tensor, side: int) -> Tensor:
    """A position embedding (1 + n n, C) for side x side patches, by the release's bicubic rule."""
    own = round((len(positions) - 1) ** 0.5)
    if own == side:
        return positions
    grid = positions[1:].float().T.unflatten(1, (own, own))[None]
    # The tenth of a patch keeps rounding from losing a row; the samples lie where it puts them.
    grid = interpolate(grid, scale_factor=(side + 0.1) / own, mode="bicubic")[0]
    return torch.cat([positions[:1], grid.flatten(1).T.to(positions.dtype)])


def _check(config: AuroraCapConfig, weights: Mapping[str, Tensor]) -> None:
    with torch.device("meta"):
        expected = {k: tuple(v.shape) for k, v in AuroraCapForConditionalGeneration(config).state_dict().items()}
    found = {name: tuple(weight.shape) for name, weight in weights.items()}
    wrong = sorted(name for name in {*expected, *found} if expected.get(name) != found.get(name))
    if wrong:
        name = wrong[0]
        raise ValueError(
            f"{len(wrong)} weights do not fit the config, the first: {name} is {found.get(name, 'missing')}, "
            f"{expected.get(name, 'nothing')} expected"
        )


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m synpo.auroracap_release", description=__doc__)
    parser.add_argument("released", type=Path, help="folder of the release")
    parser.add_argument("folder", type=Path, help="new folder")
    parser.add_argument("--token_kept_ratio", type=float, default=0.1, help="share of a frame's tokens to keep (.1)")
    args = parser.parse_args()
    if args.folder.exists():
        parser.error(f"{args.folder} exists; give a new folder")
    convert(args.released, args.folder, args.token_kept_ratio)


if __name__ == "__main__":
    main()
