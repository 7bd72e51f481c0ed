"""The captioner of the small world: a native transformers LLaVA of 0.6 M parameters, its tokenizer and its pixels.

CLIP's tower sees each frame as four patches, Llama writes. The vocabulary is the grammar's words; the chat template
writes the one instruction the model knows, whatever the user's text says, after every frame.
"""

from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

from .grammar import words
from .world import BEATS, SIZE

WEIGHTS = Path(__file__).parent / "weights"
PATCH = 16
TOKENS_PER_FRAME = (SIZE // PATCH) ** 2
IMAGE = "<image>"
INSTRUCTION = "Describe the video."
_USER, _ASSISTANT = "<user>", "<assistant>"
_NUMBERS = tuple(f"<{number}>" for number in range(1, BEATS + 1))  # before each frame; time is read off them
_SPECIAL = ("<pad>", "<s>", "</s>", "<unk>", IMAGE, _USER, _ASSISTANT, *_NUMBERS)

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message.role == 'assistant' %}<assistant>"
    "{% if message.content is string %}{{ message.content }}{% else %}"
    "{% for part in message.content if part.type == 'text' %}{{ part.text }}{% endfor %}{% endif %}{{ eos_token }}"
    "{% elif message.role == 'user' %}<user>"
    "{% if message.content is not string %}"
    "{% for part in message.content if part.type == 'image' %}"
    f"<{{{{ [loop.index, {BEATS}] | min }}}}><image>"
    "{% endfor %}{% endif %}"
    "Describe the video.{% endif %}{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)


def make_tokenizer() -> PreTrainedTokenizerFast:
    """One token a word, with the space before it inside, and one for each mark; decoding gives the text back."""
    vocabulary = [*_SPECIAL]
    for word in [*words(), *INSTRUCTION.rstrip(".").split()]:
        entry = word if word in ",." else f"▁{word}"
        if entry not in vocabulary:
            vocabulary.append(entry)
    core = Tokenizer(models.WordLevel({token: index for index, token in enumerate(vocabulary)}, unk_token="<unk>"))
    core.normalizer = normalizers.Replace(Regex(r"\s+"), " ")
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Metaspace(), pre_tokenizers.Split(Regex("[,.]"), "isolated")]
    )
    core.decoder = decoders.Metaspace()
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        unk_token="<unk>",
        additional_special_tokens=list(_SPECIAL[4:]),
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
        model_max_length=512,
    )


def make_model(tokenizer: PreTrainedTokenizerFast) -> LlavaForConditionalGeneration:
    """The untrained captioner; torch's global seed decides its weights."""
    vision = CLIPVisionConfig(
        image_size=SIZE,
        patch_size=PATCH,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        projection_dim=64,
        initializer_factor=1.0,
    )
    text = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=96,
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=512,
        initializer_range=0.1,  # about 1 / sqrt(hidden_size)
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        tie_word_embeddings=False,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_id=tokenizer.convert_tokens_to_ids(IMAGE),
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",  # the patches, without CLIP's class token
        image_seq_length=TOKENS_PER_FRAME,
        tie_word_embeddings=False,
    )
    return LlavaForConditionalGeneration(config)


def make_processor(tokenizer: PreTrainedTokenizerFast) -> LlavaProcessor:
    """Frames to pixels in -1..1, and the tokenizer, as LLaVA's users expect them. Needs no torchvision."""
    images = CLIPImageProcessorPil(
        size={"shortest_edge": SIZE},
        crop_size={"height": SIZE, "width": SIZE},
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
    )
    return LlavaProcessor(
        images,
        tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        image_token=IMAGE,
        chat_template=CHAT_TEMPLATE,
    )


def save(model: LlavaForConditionalGeneration, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Writes model (float16 safetensors), tokenizer and processor for from_pretrained; the model becomes float16."""
    model.to(torch.float16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    make_processor(tokenizer).save_pretrained(folder)
