"""Rows as token ids: templates, ends of turns, boundaries, truncation, and errors that name row and column."""

from typing import Any

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from synpo.train.tokenise import PairTokenizer
from tests.train import tiny


def row(prompt: str = "w1 w2", chosen: str = "w3", rejected: str = "w4 w5") -> dict[str, Any]:
    return {
        "prompt": [{"role": "user", "content": prompt}],
        "chosen": [{"role": "assistant", "content": chosen}],
        "rejected": [{"role": "assistant", "content": rejected}],
    }


def words(tokenizer: PairTokenizer, ids: Any) -> str:
    return tokenizer.tokenizer.decode(ids)


def make(max_length: int = 64, truncation: str = "cut", template: str | None = tiny.TEMPLATE) -> PairTokenizer:
    return PairTokenizer(tiny.tokenizer(template), max_length, truncation)


def test_conversation_ends_in_the_template_s_own_end_of_turn() -> None:
    tokenize = make()
    pair = tokenize(row(), 7)
    assert pair.index == 7
    assert words(tokenize, pair.prompt) == "<|user|> w1 w2 <|end|> <|assistant|>"
    assert words(tokenize, pair.chosen) == "w3 <|end|>"
    assert words(tokenize, pair.rejected) == "w4 w5 <|end|>"


def test_text_parts_are_joined() -> None:
    tokenize = make()
    parts = row()
    parts["prompt"][0]["content"] = [{"type": "text", "text": "w1 "}, {"type": "text", "text": "w2"}]
    assert words(tokenize, tokenize(parts, 0).prompt) == "<|user|> w1 w2 <|end|> <|assistant|>"


def test_a_template_without_an_end_of_turn_gets_eos() -> None:
    tokenize = make(template="{% for m in messages %}{{ m.content }} {% endfor %}")
    assert words(tokenize, tokenize(row(), 0).chosen) == "w3 </s>"


def test_strings_are_concatenated_and_end_in_eos() -> None:
    tokenize = make()
    pair = tokenize({"prompt": "w1 w2", "chosen": "w3", "rejected": "w4 w5"}, 0)
    assert words(tokenize, pair.prompt) == "w1 w2"
    assert words(tokenize, pair.chosen) == "w3 </s>"


def test_conversation_without_a_template_is_joined_and_counted() -> None:
    tokenize = make(template=None)
    assert words(tokenize, tokenize(row(), 0).prompt) == "<s> w1 w2"
    assert tokenize.counts == {"joined without a chat template": 1}


def test_no_token_reaches_across_the_boundary() -> None:
    # A tokenizer that would merge "a" + "b" into one token: tokenised together, the prompt would not be a prefix.
    inner = Tokenizer(models.BPE({"</s>": 0, "a": 1, "b": 2, "ab": 3}, [("a", "b")]))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="</s>")
    assert tokenizer("ab")["input_ids"] == [3]
    pair = PairTokenizer(tokenizer, 64, "cut")({"prompt": "a", "chosen": "b", "rejected": "ab"}, 0)
    assert pair.prompt.tolist() == [1]
    assert pair.chosen.tolist() == [2, 0]
    assert pair.rejected.tolist() == [3, 0]


LONG = " ".join(f"w{i}" for i in range(40))


def test_cutting_takes_the_prompt_s_left_first() -> None:
    tokenize = make(max_length=16)
    pair = tokenize(row(prompt=LONG), 0)
    assert len(pair.prompt) + len(pair.rejected) == 16
    assert words(tokenize, pair.prompt).endswith("w38 w39 <|end|> <|assistant|>")
    assert words(tokenize, pair.rejected) == "w4 w5 <|end|>"
    assert tokenize.counts == {"prompts cut": 1}


def test_cutting_keeps_the_start_token() -> None:
    tokenize = make(max_length=16, template=None)
    assert words(tokenize, tokenize(row(prompt=LONG), 0).prompt).startswith("<s> w2")


def test_cutting_an_answer_keeps_its_end_token_and_a_quarter_for_the_prompt() -> None:
    tokenize = make(max_length=16)
    pair = tokenize(row(prompt=LONG, chosen=LONG), 0)
    assert len(pair.prompt) == 4
    assert len(pair.chosen) == 12
    assert words(tokenize, pair.chosen).startswith("w0 w1 ")
    assert words(tokenize, pair.chosen).endswith(" <|end|>")
    assert words(tokenize, pair.rejected) == "w4 w5 <|end|>"
    assert tokenize.counts == {"prompts cut": 1, "answers cut": 1}


def test_a_short_prompt_is_not_cut_for_a_long_answer() -> None:
    tokenize = make(max_length=24)
    pair = tokenize(row(chosen=LONG), 0)
    assert words(tokenize, pair.prompt) == "<|user|> w1 w2 <|end|> <|assistant|>"
    assert len(pair.prompt) + len(pair.chosen) == 24


def test_dropping_is_counted() -> None:
    tokenize = make(max_length=16, truncation="drop")
    assert tokenize(row(prompt=LONG), 0) is None
    assert tokenize(row(), 1) is not None
    assert tokenize.counts == {"dropped, longer than max_length": 1}


def test_too_long_is_an_error_where_asked() -> None:
    with pytest.raises(ValueError, match=r"row 3: 46 tokens, max_length is 16"):
        make(max_length=16, truncation="error")(row(prompt=LONG), 3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"chosen": None}, "row 5: column 'chosen' is missing"),
        ({"source": "a.jsonl:12", "rejected": None}, "a.jsonl:12: column 'rejected' is missing"),
        ({"chosen": "w3"}, "row 5: prompt is a conversation but chosen is a string"),
        ({"prompt": "w1"}, "row 5: prompt is a string but chosen is a list"),
        ({"chosen": [{"role": "assistant", "content": "  "}]}, "row 5: column 'chosen' is an empty answer"),
        ({"rejected": [{"role": "assistant", "content": "w1"}] * 2}, "row 5: column 'rejected' has 2 messages"),
        ({"prompt": "w1", "chosen": "w1", "rejected": " "}, "row 5: column 'rejected' is an empty answer"),
        ({"rejected": [{"role": "assistant", "content": " w3\n"}]}, "row 5: columns 'chosen' and 'rejected' are alike"),
        ({"prompt": "w1", "chosen": "w1 w2", "rejected": "w1  w2"}, "row 5: columns 'chosen' and 'rejected' are alike"),
        ({"images": [{"path": "a.png"}]}, "row 5: has images or videos"),
        (
            {"prompt": [{"role": "user", "content": [{"type": "video"}]}]},
            "row 5: has images or videos, but the model takes text alone",
        ),
        ({"prompt": "", "chosen": "w1", "rejected": "w2"}, "row 5: column 'prompt' has no tokens"),
    ],
)
def test_bad_rows_are_named(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()(row() | change, 5)


def test_a_template_that_rewrites_the_prompt_is_refused() -> None:
    template = "{% if messages|length > 1 %}w9 {% endif %}{% for m in messages %}{{ m.content }} {% endfor %}"
    with pytest.raises(ValueError, match="row 0: the chat template renders the prompt differently once the chosen"):
        make(template=template)(row(), 0)


def test_several_messages_need_a_template() -> None:
    several = row()
    several["prompt"] = several["prompt"] * 2
    with pytest.raises(ValueError, match="row 0: the prompt has 2 messages but the tokenizer no chat template"):
        make(template=None)(several, 0)


def test_a_tokenizer_without_eos_is_refused() -> None:
    tokenizer = tiny.tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match="no eos_token"):
        PairTokenizer(tokenizer, 64, "cut")
