"""From an instruction and a video's features to the ids of a prompt, in the model's own chat format."""

from dataclasses import dataclass
from typing import Any

import torch
from jinja2.exceptions import TemplateError
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .features import Features, Words, family_of

DESCRIBE = "Describe this video in detail: the setting, the people and objects in it, and what happens, in order."
# For clip captions that candidates are judged against (arXiv 2506.00835): what is not sure must not be in them.
CERTAIN = f"{DESCRIBE} Leave out whatever you are not certain of."
REVISE = (
    "{instruction}\nHere is a description of this video that you wrote before:\n{caption}\nLook at the video again. "
    "Correct what is wrong in it, add what is missing, and answer with the better description alone."
)


@dataclass(frozen=True)
class Prompt:
    """What one text is written after."""

    ids: Tensor  # (T,) int64, on the CPU
    features: Features | None = None  # a video whose vectors replace the placeholders among the ids, in their order
    head: int = 0  # ids up to the last placeholder; prompts about the same video begin alike


def make_prompt(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, instruction: str, features: Features | None = None
) -> Prompt:
    """The model's own chat format around a video, if any, and an instruction; without a chat template the two alone.

    Errors: ValueError for an empty instruction, a template without a place for videos, a tokenizer of another model.
    """
    if not instruction.strip():
        raise ValueError("the instruction is empty; say what is to be written")
    text = _render(model, tokenizer, instruction, features)
    special = tokenizer.chat_template is None
    ids = torch.tensor(tokenizer(text, add_special_tokens=special)["input_ids"], dtype=torch.int64)
    if special and len(ids) and ids[-1] == tokenizer.eos_token_id:
        ids = ids[:-1]
    if not len(ids):
        raise ValueError("the prompt has no tokens")
    entries = model.get_input_embeddings().num_embeddings
    if int(ids.max()) >= entries:
        raise ValueError(
            f"the tokenizer gives id {int(ids.max())}, the model's vocabulary has {entries} entries; they do not "
            "belong together"
        )
    head = 0
    if features is not None:
        places = (ids == placeholder(model)).nonzero()
        head = int(places[-1]) + 1 if len(places) else 0
        if len(places) != len(features.vectors):
            raise ValueError(
                f"the prompt has {len(places)} places for the video's {len(features.vectors)} vectors; the "
                "placeholder has to be a token of its own in this tokenizer, and must not be in the instruction"
            )
    return Prompt(ids, features, head)


def without_tokens(tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel, text: str) -> str:
    """A text that is to be quoted in a prompt, without anything that the tokenizer or template takes for a command."""
    commands = {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
    if hasattr(model.config, "vision_config"):
        commands |= {"<image>", "<video>"}
    while found := [command for command in commands if command and command in text]:
        for command in found:
            text = text.replace(command, "")
    return text


def _render(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, instruction: str, features: Features | None
) -> str:
    if features is None:
        if tokenizer.chat_template is None:
            return instruction
        return _chat(tokenizer, instruction, [])
    family = family_of(model)
    words = Words(tokenizer.convert_ids_to_tokens(placeholder(model)), tokenizer)
    marker = family.marker or words.place
    texts = family.expand(features, words)
    if tokenizer.chat_template is None:
        text = marker * len(texts) + "\n" + instruction
    else:
        text = _chat(tokenizer, instruction, [{"type": family.part}] * len(texts), marker)
    pieces = text.split(marker)
    if len(pieces) != len(texts) + 1:
        raise ValueError(
            f"the prompt has {marker!r} {len(pieces) - 1} times, {len(texts)} expected; the chat template has to "
            f"write it once for each {family.part} part, and the instruction must not hold it"
        )
    return pieces[0] + "".join(text + piece for text, piece in zip(texts, pieces[1:], strict=True))


def _chat(tokenizer: PreTrainedTokenizerBase, instruction: str, media: list[dict[str, str]], marker: str = "") -> str:
    """The chat template's text. A template that knows plain strings only gets the markers inside the string."""
    parts: Any = [*media, {"type": "text", "text": instruction}]
    if not takes_parts(tokenizer):
        parts = marker * len(media) + ("\n" if media else "") + instruction
    return tokenizer.apply_chat_template(
        [{"role": "user", "content": parts}], tokenize=False, add_generation_prompt=True
    )


def takes_parts(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether a chat template takes a message's content as a list of parts, not as a string alone."""
    probe = [{"role": "user", "content": [{"type": "text", "text": "probe"}]}]
    try:
        text = tokenizer.apply_chat_template(probe, tokenize=False)
    except (TemplateError, TypeError):
        return False
    return "'type'" not in text


def placeholder(model: PreTrainedModel) -> int:
    """The id that stands for one vector of features."""
    return int(getattr(model.config, family_of(model).token))
