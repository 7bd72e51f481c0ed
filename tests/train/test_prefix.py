"""Rows of several sequences give what plain rows give: losses, gradients of the adapter, whole runs.

float32, relative to the size of what is compared: 1e-5. Measured differences are near 1e-6, rounding of sums in another
order.
"""

import inspect
import itertools
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PromptTuningConfig, get_peft_model
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GptOssConfig,
    MambaConfig,
    MistralConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
    Qwen3NextConfig,
)

from synpo.train import SynPOTrainer, lora_recipe, pieces, prefix
from synpo.train.collate import PLAIN, Form, PairCollator, assemble
from synpo.train.passes import PairScorer
from synpo.train.pieces import Layout, Piece, UnsupportedAttention, piecewise
from synpo.train.tokenise import Pair
from tests.train import tiny

FORMS = {
    "shared": Form(shared=True),
    "packed": Form(packed=True),
    "shared and packed": Form(shared=True, packed=True),
}
SIZES = {
    name: getattr(tiny.config(), name)
    for name in (
        "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
        "num_key_value_heads", "initializer_range", "bos_token_id", "eos_token_id", "pad_token_id",
    )
}  # fmt: skip
# Windows of 6 and 7: shorter than prompts of 9 to 20, and than answers of up to 11, so a rejected answer's window ends
# inside itself, inside the prompt, and beyond the whole sequence.
CONFIGS: dict[str, Callable[[], Any]] = {
    "llama": tiny.config,
    "mistral": lambda: MistralConfig(**SIZES, head_dim=8, sliding_window=6),
    "qwen2": lambda: Qwen2Config(**SIZES, use_sliding_window=True, sliding_window=7, max_window_layers=1),
    "qwen3": lambda: Qwen3Config(**SIZES, head_dim=8),
    "gemma2 softcap": lambda: Gemma2Config(
        **SIZES, head_dim=8, query_pre_attn_scalar=8, sliding_window=6, attn_logit_softcapping=2.0,
        final_logit_softcapping=3.0,
    ),
    "gemma3": lambda: Gemma3TextConfig(
        **SIZES, head_dim=8, query_pre_attn_scalar=8, sliding_window=6,
        layer_types=["sliding_attention", "full_attention"],
    ),
}  # fmt: skip


def pair(index: int, prompt: int, chosen: int, rejected: int) -> Pair:
    generator = torch.Generator().manual_seed(index)
    ids = torch.randint(7, 97, (prompt + chosen + rejected,), generator=generator)
    return Pair(index, *ids.split([prompt, chosen, rejected]))


# One-token answers and a one-token prompt; either answer the longer one.
PAIRS = [pair(0, 20, 5, 11), pair(1, 9, 8, 1), pair(2, 1, 3, 4), pair(3, 13, 1, 2)]


def adapted(config: Any, checkpointing: bool = False) -> nn.Module:
    """A model whose adapter already does something, so that no gradient is zero."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    if checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    model = get_peft_model(model, lora_recipe(r=4, alpha=8, dropout=0.0))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    return model.train()


def step(
    model: nn.Module, folder: Path, form: Form, pairs: Sequence[Pair] = PAIRS, **options: Any
) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss and gradients of one pass."""
    scorer = PairScorer(tiny.arguments(folder, **options), model, form)
    model.zero_grad()
    output = scorer.loss(model, assemble(pairs, 0, form))
    output.loss.backward()
    assert scorer.fallbacks == 0
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return torch.cat([output.loss.detach()[None], *output[1:]]), gradients


def assert_close(got: tuple[Tensor, dict[str, Tensor]], expected: tuple[Tensor, dict[str, Tensor]]) -> None:
    torch.testing.assert_close(got[0], expected[0], rtol=1e-5, atol=1e-6)
    assert got[1].keys() == expected[1].keys()
    assert expected[1]
    for name, gradient in expected[1].items():
        assert gradient.norm() > 0
        assert (got[1][name] - gradient).norm() <= 1e-5 * gradient.norm(), name


@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "checkpointing"])
@pytest.mark.parametrize("name", CONFIGS)
def test_every_form_is_the_plain_one(tmp_path: Path, name: str, checkpointing: bool) -> None:
    model = adapted(CONFIGS[name](), checkpointing)
    expected = step(model, tmp_path, PLAIN)
    for form in FORMS.values():
        assert_close(step(model, tmp_path, form), expected)


@pytest.mark.parametrize("objective", ["dpo", "kto", "orpo"])
def test_other_objectives_and_references(tmp_path: Path, objective: str) -> None:
    options = {"objective": objective, "max_steps": 6, "per_device_train_batch_size": 4, "optim": "sgd"}
    options["learning_rate"] = 0.05 if objective == "orpo" else 0.3
    plain = tiny.trainer(tmp_path / "plain", 8, prefix_sharing=False, **options)
    shared = tiny.trainer(tmp_path / "shared", 8, **options)
    assert plain.data_collator.form == PLAIN
    assert shared.data_collator.form == Form(shared=True, packed=True)
    assert_same_run(shared, plain)


@pytest.mark.parametrize(
    "options",
    [
        {"prefix_sharing": True, "padding_free": False},
        {"prefix_sharing": False, "padding_free": True},
        {"prefix_sharing": True, "tokens_per_pass": 60},
        {"fused": False, "prefix_sharing": True},
        {"activation_checkpointing": True},
        {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4},
    ],
    ids=["padded", "packed alone", "several passes", "eager", "checkpointing", "accumulation"],
)
def test_a_run_is_the_plain_run(tmp_path: Path, options: dict[str, Any]) -> None:
    common = {"max_steps": 6, "per_device_train_batch_size": 4, "optim": "sgd", "learning_rate": 0.3}
    plain = tiny.trainer(tmp_path / "plain", 12, prefix_sharing=False, tokens_per_pass=4096, **common)
    assert_same_run(tiny.trainer(tmp_path / "other", 12, **common | options), plain)


def test_evaluation_is_the_plain_one(tmp_path: Path) -> None:
    options = {"eval_dataset": tiny.pairs(7, 1), "per_device_eval_batch_size": 3}
    shared = tiny.trainer(tmp_path / "shared", 2, **options).evaluate()
    plain = tiny.trainer(tmp_path / "plain", 2, prefix_sharing=False, **options).evaluate()
    for name in ("eval_loss", "eval_logps/rejected", "eval_rewards/margins", "eval_num_tokens"):
        assert shared[name] == pytest.approx(plain[name], rel=1e-5)


def assert_same_run(a: SynPOTrainer, b: SynPOTrainer) -> None:
    """Losses and gradient norms of every step agree."""
    curves = []
    for trainer in (a, b):
        trainer.train()
        lines = [line for line in trainer.state.log_history if "loss" in line]
        assert {line["form_fallbacks"] for line in lines} == {0}
        curves.append(torch.tensor([[line["loss"], line["grad_norm"], line["num_tokens"]] for line in lines]))
    torch.testing.assert_close(*curves, rtol=1e-5, atol=1e-5)
    assert len(curves[0].unique()) > len(curves[0])


def test_dropout_draws_once_for_a_shared_prompt(tmp_path: Path) -> None:
    """Adapter dropout falls on each computed token once, and the run resumes bit for bit all the same (test_resume)."""
    torch.manual_seed(0)
    model = get_peft_model(tiny.model(), lora_recipe(r=4, alpha=8, dropout=0.5)).train()
    seen: list[int] = []
    for name, module in model.named_modules():
        if name.endswith("layers.0.self_attn.q_proj.lora_dropout.default"):
            module.register_forward_hook(lambda _, __, output: seen.append(output.shape[0] * output.shape[1]))
    step(model, tmp_path, Form(shared=True, packed=True))
    computed = sum(len(p.prompt) + len(p.chosen) + len(p.rejected) for p in PAIRS)
    assert seen[-1] == computed


# Rows


def test_rows_hold_the_prompt_once() -> None:
    a, b = pair(1, 3, 2, 4), pair(2, 2, 5, 1)
    batch = assemble([a, b], 9, Form(shared=True, packed=True))
    assert batch["input_ids"].tolist() == [
        [t for p in (a, b) for ids in (p.prompt, p.chosen, p.rejected) for t in ids.tolist()]
    ]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 3, 4, 3, 4, 5, 6, 0, 1, 2, 3, 4, 5, 6, 2]]
    expected = ((0, 5, 0, 0), (5, 9, 0, 3), (9, 16, 9, 9), (16, 17, 9, 11))
    assert batch["layout"].rows == (tuple(Piece(*piece) for piece in expected),)
    # Tokens are predicted by the one before them, the first of an answer by the last of its prompt.
    assert batch["positions"].tolist() == [2, 3, 10, 11, 12, 13, 14, 2, 5, 6, 7, 10]
    assert batch["labels"].tolist() == [
        *a.chosen.tolist(), *b.chosen.tolist(), *a.rejected.tolist(), *b.rejected.tolist()
    ]  # fmt: skip
    assert batch["tokens"] == 5 + 7 + 7 + 3  # of the four sequences, however they are computed


def test_padded_rows_hold_a_pair_each() -> None:
    batch = assemble([pair(1, 3, 2, 4), pair(2, 2, 2, 1)], 9, Form(shared=True))
    assert batch["input_ids"].shape == (2, 9)
    assert batch["input_ids"][1, 5:].tolist() == [9] * 4
    assert batch["layout"].rows[1] == (Piece(0, 4), Piece(4, 5, 0, 2))
    assert batch["positions"].tolist() == [2, 3, 10, 11, 2, 5, 6, 7, 10]


@pytest.mark.parametrize(
    ("form", "bound", "groups"),
    [
        (Form(shared=True, packed=True), 15, [[0, 1], [2], [3]]),  # 7 + 5, then 16 and 3 tokens
        (Form(shared=True, packed=True), 19, [[0, 1], [2, 3]]),
        (Form(packed=True), 16, [[0, 1], [2], [3]]),  # 9 + 7, then 20 and 4
        (Form(shared=True), 14, [[0, 1], [2], [3]]),  # 2 rows of 7
        (Form(shared=True), 31, [[0, 1], [2], [3]]),
        (Form(shared=True), 32, [[0, 1], [2, 3]]),
    ],
)
def test_a_pass_counts_what_is_computed(form: Form, bound: int, groups: list[list[int]]) -> None:
    pairs = [pair(0, 2, 4, 1), pair(1, 2, 1, 2), pair(2, 4, 6, 6), pair(3, 1, 1, 1)]
    batch = PairCollator(0, bound, form)(pairs)
    assert [p["indices"] for p in batch["passes"]] == groups


@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_boundaries_describe_the_pieces(monkeypatch: pytest.MonkeyPatch, form: Form, window: int | None) -> None:
    """What flash attention on a GPU is given, against the piece by piece function: its kernel is written out here."""

    def varlen(q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, *longest: int, **options: Any) -> Tensor:
        assert (cu_q.dtype, cu_k.dtype) == (torch.int32, torch.int32)
        assert longest == (int(cu_q.diff().max()), int(cu_k.diff().max()))
        left, right = options["window_size"]
        assert right == 0
        out = []
        for (a, b), (c, d) in zip(cu_q.unfold(0, 2, 1).tolist(), cu_k.unfold(0, 2, 1).tolist(), strict=True):
            back = torch.arange(d - c - (b - a), d - c)[:, None] - torch.arange(d - c)
            seen = (back >= 0) & ((back <= left) | (left < 0))
            keys, values = (x[c:d].repeat_interleave(2, 1) for x in (k, v))
            scores = torch.einsum("qhd,khd->hqk", q[a:b], keys) * options["scale"]
            out.append(torch.einsum("hqk,khd->qhd", scores.masked_fill(~seen, -torch.inf).softmax(-1), values))
        return torch.cat(out)

    batch = assemble(PAIRS, 0, form)
    rows, width = batch["input_ids"].shape
    query = torch.randn(rows, 4, width, 8, dtype=torch.float64)
    key, value = torch.randn(2, rows, 2, width, 8, dtype=torch.float64)
    expected = piecewise(nn.Module(), query, key, value, batch["layout"], scaling=0.3, sliding_window=window)
    monkeypatch.setattr(pieces, "varlen_attn", varlen)
    got = pieces._by_boundaries(query, key, value, batch["layout"], 0.3, window)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


def random_layout(rows: int, width: int) -> Layout:
    """Rows of pieces of any length, half of which go on from tokens before them; padding at the end of some rows."""
    made = []
    for _ in range(rows):
        cuts = sorted({0, *torch.randint(1, width + 1, (4,)).tolist()})
        row = []
        for start, stop in itertools.pairwise(cuts):
            prompt = sorted(torch.randint(start + 1, (2,)).tolist()) if torch.rand(()) < 0.5 else (0, 0)
            row.append(Piece(start, stop, *prompt))
        made.append(tuple(row))
    return Layout(tuple(made))


@pytest.mark.parametrize("options", [{}, {"sliding_window": 5}, {"softcap": 2.0}], ids=str)
@pytest.mark.parametrize("seed", range(4))
def test_one_call_of_prefix_attention_is_the_piece_by_piece_function(seed: int, options: dict[str, Any]) -> None:
    """Values and gradients of queries, keys and values as a model's projections lie, on any layout."""
    torch.manual_seed(seed)
    layout = random_layout(3, 24)
    given = [torch.randn(3, 24, heads, 8, dtype=torch.float64).transpose(1, 2).requires_grad_() for heads in (4, 2, 2)]
    expected = piecewise(nn.Module(), *given, layout, scaling=0.3, **options)
    got = pieces._by_kernels(*given, layout, 0.3, options.get("sliding_window"), options.get("softcap"))
    upstream = torch.randn_like(expected)
    results = ((out, *torch.autograd.grad(out, given, upstream)) for out in (got, expected))
    allowed = 1e-6 if "softcap" in options else 1e-12  # under a soft cap pieces take their softmax in float32
    for ours, want in zip(*results, strict=True):
        torch.testing.assert_close(ours, want, rtol=allowed, atol=allowed)


@pytest.mark.parametrize(
    ("kernels", "flash", "faster", "dropout", "chosen"),
    [
        (True, True, False, 0.0, "_by_kernels"),
        (True, True, True, 0.0, "_by_boundaries"),
        (True, False, True, 0.0, "_by_kernels"),  # a soft cap
        (False, True, False, 0.0, "_by_boundaries"),  # a GPU without tiles
        (False, False, False, 0.0, "_windowed"),
        (True, True, True, 0.1, "_windowed"),
    ],
)
def test_which_attention_runs(
    monkeypatch: pytest.MonkeyPatch, kernels: bool, flash: bool, faster: bool, dropout: float, chosen: str
) -> None:
    class Chosen(Exception):
        pass

    def choose(name: str) -> Callable[..., Any]:
        def run(*_: Any) -> Any:
            raise Chosen(name)

        return run

    for name in ("_by_kernels", "_by_boundaries", "_windowed"):
        monkeypatch.setattr(pieces, name, choose(name))
    monkeypatch.setattr(pieces, "_kernels_take", lambda *_: kernels)
    monkeypatch.setattr(pieces, "_flash_takes", lambda *_: flash)
    monkeypatch.setattr(pieces, "_flash_is_faster", lambda *_: faster)
    x = torch.zeros(1, 1, 2, 4)
    with pytest.raises(Chosen, match=chosen):
        piecewise(nn.Module(), x, x, x, Layout(((Piece(0, 2),),)), dropout=dropout)


# Models that cannot, and what happens then


def build(config: Any) -> PreTrainedModel:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config)


def mamba() -> PreTrainedModel:
    return build(MambaConfig(vocab_size=97, hidden_size=16, num_hidden_layers=1, state_size=4))


class Stateful(tiny.LlamaForCausalLM):
    _is_stateful = True


def qwen3_next() -> PreTrainedModel:
    return build(
        Qwen3NextConfig(
            **SIZES, head_dim=8, linear_num_key_heads=2, linear_num_value_heads=2, linear_key_head_dim=8,
            linear_value_head_dim=8, num_experts=2, num_experts_per_tok=1, moe_intermediate_size=16,
            shared_expert_intermediate_size=16, layer_types=["linear_attention", "full_attention"],
        )
    )  # fmt: skip


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (mamba, "MambaForCausalLM has layers of type linear_attention"),
        (lambda: Stateful(tiny.config()), "Stateful carries a recurrent state"),
        (qwen3_next, "Qwen3NextForCausalLM has layers of type linear_attention"),
    ],
)
def test_recurrent_models_are_refused_by_name(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, make: Callable[[], PreTrainedModel], reason: str
) -> None:
    for option in ("prefix_sharing", "padding_free"):
        with pytest.raises(ValueError, match=f"{option}=True, but {reason}.*; leave it out"):
            tiny.trainer(tmp_path, model=make(), lora=False, **{option: True})
    with caplog.at_level(logging.WARNING):
        trainer = tiny.trainer(tmp_path, model=make(), lora=False)
    assert trainer.data_collator.form == PLAIN
    assert f"no prefix sharing: {reason}" in caplog.text


def test_prompt_learning_is_refused() -> None:
    model = get_peft_model(tiny.model(), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))
    assert prefix.refusal(model) == "a prompt-learning adapter puts tokens of its own before every row"


def test_attention_with_sinks_falls_back(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    config = GptOssConfig(**SIZES, head_dim=8, num_local_experts=2, num_experts_per_tok=1, sliding_window=6)
    with caplog.at_level(logging.WARNING):
        trainer = tiny.trainer(tmp_path, 4, model=build(config), lora=False, max_steps=2)
        trainer.train()
    assert "switched off for this run: GptOssAttention has attention with s_aux" in caplog.text
    assert trainer.scorer.form == trainer.data_collator.form == PLAIN


class Restless(tiny.LlamaForCausalLM):
    """A model that ignores the positions it is given."""

    def forward(self, *args: Any, **options: Any) -> Any:
        options.pop("position_ids", None)
        return super().forward(*args, **options)

    forward.__signature__ = inspect.signature(tiny.LlamaForCausalLM.forward)


def test_a_model_that_differs_falls_back_and_trains_plainly(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def build(folder: str, **options: Any) -> SynPOTrainer:
        torch.manual_seed(0)
        return tiny.trainer(tmp_path / folder, 6, model=Restless(tiny.config()), max_steps=4, **options)

    plain, wrong = build("plain", prefix_sharing=False), build("wrong", prefix_sharing=True)
    plain.train()
    with caplog.at_level(logging.WARNING):
        wrong.train()
    assert "Restless: mean log-probs of the first pass's answers differ from those of plain rows by" in caplog.text
    lines = [line for line in wrong.state.log_history if "loss" in line]
    assert [line["form_fallbacks"] for line in lines] == [1, 1, 1, 1]
    assert [line["loss"] for line in lines] == [line["loss"] for line in plain.state.log_history if "loss" in line]


def test_a_window_that_attention_never_hears_of_falls_back(tmp_path: Path) -> None:
    model = tiny.model()
    model.config.sliding_window = 6
    scorer = PairScorer(tiny.arguments(tmp_path), model, Form(shared=True))
    scorer.sums(model, assemble(PAIRS, 0, Form(shared=True)))
    assert (scorer.form, scorer.fallbacks) == (PLAIN, 1)


def test_calls_without_a_layout_run_as_before() -> None:
    """Left-padded generation through a model whose attention was replaced, SDPA and eager."""
    for implementation in ("sdpa", "eager"):
        model = tiny.model(attn_implementation=implementation).eval()
        ids = torch.randint(7, 97, (2, 6))
        mask = torch.tensor([[0, 0, 1, 1, 1, 1], [1] * 6])
        expected = model(input_ids=ids, attention_mask=mask).logits
        prefix.use_layouts(model)
        prefix.use_layouts(model)
        assert model.config._attn_implementation == f"synpo_layout_{implementation}"
        assert torch.equal(model(input_ids=ids, attention_mask=mask).logits, expected)
        assert "synpo" not in model.config.to_json_string()


def test_attention_that_is_not_causal_is_refused() -> None:
    module = nn.Module()
    module.is_causal = False
    x = torch.zeros(1, 1, 2, 4)
    with pytest.raises(UnsupportedAttention, match="Module has attention that is not causal"):
        piecewise(module, x, x, x, Layout(((Piece(0, 2),),)))
