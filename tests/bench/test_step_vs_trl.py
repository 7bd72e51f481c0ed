"""The comparison with trl feeds every trainer the same tokens."""

import json

import pytest
import torch

from bench import step_vs_trl


class Words:
    """A tokenizer of one id a word, with a chat template that adds two tokens a turn."""

    def __call__(self, text, add_special_tokens=False):
        return {"input_ids": text.split()}

    def apply_chat_template(self, turns, add_generation_prompt):
        return {"input_ids": [w for t in turns for w in ["<", t["role"], *t["content"].split()]] + ["<"]}

    def decode(self, ids):
        return " ".join(ids)


def _record(prompt_words, chosen_words, rejected_words):
    return {
        "conversations": [{"from": "human", "value": "p " * prompt_words}],
        "chosen": {"from": "gpt", "value": "c " * chosen_words},
        "rejected": {"from": "gpt", "value": "r " * rejected_words},
    }


def test_pairs_are_cut_to_one_length_and_short_ones_left_out(tmp_path):
    path = tmp_path / "pairs.json"
    path.write_text(json.dumps([_record(10, 100, 90), _record(10, 100, 20), _record(70, 100, 100)]))
    (pair,) = step_vs_trl.equal_pairs(path, Words(), max_length=64, count=1)
    lengths = {len(pair[side][0]["content"].split()) for side in ("chosen", "rejected")}
    assert lengths == {64 - 13 - step_vs_trl.MARGIN}
    with pytest.raises(SystemExit, match="in 1 pairs; 2 are needed"):
        step_vs_trl.equal_pairs(path, Words(), max_length=64, count=2)


def test_tokens_are_counted_in_every_layout_of_a_batch():
    ones = torch.ones(4, 6, dtype=torch.long)
    trl_dpo = {"attention_mask": ones, "completion_mask": ones.tril()}
    labels = torch.where(ones.tril() == 1, 5, -100)
    trl_cpo = {
        "chosen_attention_mask": ones[:2], "rejected_attention_mask": ones[2:], "prompt_attention_mask": ones,
        "chosen_labels": labels[:2], "rejected_labels": labels[2:],
    }  # fmt: skip
    ours = {"passes": [{"attention_mask": ones[at], "labels": labels[at]} for at in (slice(2), slice(2, 4))]}
    assert step_vs_trl._count_tokens(ours) == (24, 10)
    assert step_vs_trl._count_tokens(trl_dpo) == step_vs_trl._count_tokens(trl_cpo) == (24, 10)
