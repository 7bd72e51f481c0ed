"""PairLoss and AnswerScorer against the model's own logits: every thing a model does to them, and what is refused."""

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
    TrainingArguments,
)

from synpo.integrations import AnswerScorer, PairLoss, pair_batch
from synpo.train import lora_recipe
from synpo_kernels import reference
from tests.train import tiny

SIZES: dict[str, Any] = {
    "vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4,
    "num_key_value_heads": 2, "initializer_range": 0.2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip


def models() -> dict[str, nn.Module]:
    """Plain logits, capped ones, multiplied ones, divided ones."""
    torch.manual_seed(0)
    return {
        "llama": tiny.model(),
        "gemma2": Gemma2ForCausalLM(Gemma2Config(**SIZES, head_dim=8, final_logit_softcapping=3.0)),
        "cohere": CohereForCausalLM(CohereConfig(**SIZES, logit_scale=0.25)),
        "granite": GraniteForCausalLM(GraniteConfig(**SIZES, logits_scaling=4.0)),
    }


@pytest.fixture
def batch() -> dict[str, Tensor]:
    return pair_batch(tiny.tokenizer(), tiny.pairs(3))


def by_logits(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Log-probs (R, T-1) in float64 from whole logits."""
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    logits = model(**inputs, use_cache=False).logits[:, :-1].double()
    labels = batch["labels"][:, 1:]
    picked = logits.log_softmax(-1).gather(2, labels.clamp(min=0)[..., None])[..., 0]
    return picked * (labels != -100)


@pytest.mark.parametrize("name", ["llama", "gemma2", "cohere", "granite"])
def test_log_probs_are_those_of_the_logits(name: str, batch: dict[str, Tensor]) -> None:
    model = models()[name]
    model.eval()
    scorer = AnswerScorer(model)
    got = scorer.logps(model, **batch)
    expected = by_logits(model, batch)
    # float32 logits: 32 products of size up to 16, and a normaliser of 97.
    torch.testing.assert_close(got.double(), expected, rtol=0, atol=1.2e-7 * (97 + 32) ** 0.5 * 32)
    torch.testing.assert_close(scorer.sums(model, **batch), got.sum(1).detach())
    hidden = torch.randn(2, 5, 32)
    if name == "gemma2":
        with pytest.raises(ValueError, match="Gemma2ForCausalLM caps its logits"):
            scorer.mean_logits(hidden)
    else:
        logits = scorer.head.logit_scale * scorer.head.module(hidden)
        torch.testing.assert_close(scorer.mean_logits(hidden), logits.mean(-1), rtol=0, atol=1e-5)


@pytest.mark.parametrize("adapter", [False, True])
def test_the_loss_and_its_gradients(adapter: bool, batch: dict[str, Tensor]) -> None:
    """float64 throughout: the oracle on the same hidden states."""
    model = tiny.model().double()
    if adapter:
        from peft import get_peft_model

        model = get_peft_model(model, lora_recipe(r=4, alpha=8, dropout=0.0))
    pair_loss = PairLoss(model, "dpo", beta=0.3)
    refs = torch.linspace(-20, -10, 6, dtype=torch.float64)
    output = pair_loss(model, ref_logps=refs, **batch)
    output.loss.backward()
    got = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    base = model.get_base_model() if adapter else model
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    hidden = base.model(**inputs).last_hidden_state[:, :-1]
    labels = batch["labels"][:, 1:]
    expected = reference.preference_loss("dpo", hidden, base.lm_head.weight, labels, ref_logps=refs, beta=0.3)
    expected.backward()
    assert output.loss.item() == pytest.approx(expected.item(), abs=1e-12)
    wanted = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert got.keys() == wanted.keys()
    for name, gradient in wanted.items():
        torch.testing.assert_close(got[name], gradient, rtol=1e-9, atol=1e-12, msg=name)


def test_pair_batch_stands_beside_its_tokens() -> None:
    rows = tiny.pairs(2)
    made = pair_batch(tiny.tokenizer(), rows)
    assert made["input_ids"].shape == made["labels"].shape == made["attention_mask"].shape
    answers = made["labels"] != -100
    assert bool((made["labels"][answers] == made["input_ids"][answers]).all())
    assert bool((made["attention_mask"][answers] == 1).all())
    words = [tiny.tokenizer().decode(ids[kept]) for ids, kept in zip(made["labels"], answers, strict=True)]
    texts = [row[side][0]["content"] for side in ("chosen", "rejected") for row in rows]  # chosen first
    assert [word.replace("<|end|>", "").strip() for word in words] == texts


class Doubled(type(tiny.model())):
    """A model that does something of its own to its logits."""

    def forward(self, *args: Any, **options: Any) -> Any:
        output = super().forward(*args, **options)
        output.logits = 2 * output.logits
        return output


def test_what_cannot_be_scored_is_named(batch: dict[str, Tensor]) -> None:
    model = Doubled(tiny.config())
    with pytest.raises(ValueError, match="Doubled: log-probs from lm_head differ from those of the model's own logits"):
        AnswerScorer(model).logps(model, **batch)
    assert "forward" not in model.lm_head.__dict__
    small = T5Config(vocab_size=97, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    with pytest.raises(ValueError, match="T5ForConditionalGeneration is an encoder-decoder"):
        AnswerScorer(T5ForConditionalGeneration(small))
    model = tiny.model()
    with pytest.raises(ValueError, match=r"model is wrapped in nn\.DataParallel: start one process for each GPU"):
        PairLoss(model)(nn.DataParallel(model), **batch)
    with pytest.raises(ValueError, match="objective 'dpoo' is unknown"):
        PairLoss(model, "dpoo")
    with pytest.raises(ValueError, match="dpo needs ref_logps"):
        PairLoss(model, "dpo")(model, **batch)


def test_two_micro_batches_in_transformers_trainer_are_one_batch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What model_accepts_loss_kwargs=False is for: without it the gradients of two micro-batches add up to twice."""
    examples = Path(__file__).parents[2] / "examples"
    monkeypatch.syspath_prepend(str(examples))
    spec = importlib.util.spec_from_file_location("transformers_trainer", examples / "transformers_trainer.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    norms = []
    for batch_size, steps in ((4, 1), (2, 2)):
        arguments = TrainingArguments(
            output_dir=str(tmp_path), max_steps=1, per_device_train_batch_size=batch_size,
            gradient_accumulation_steps=steps, remove_unused_columns=False, logging_steps=1, save_strategy="no",
            report_to="none", use_cpu=True, dataloader_pin_memory=False, disable_tqdm=True,
        )  # fmt: skip
        trainer = module.PairTrainer(
            tiny.model(), arguments, train_dataset=tiny.pairs(4),
            data_collator=lambda rows: pair_batch(tiny.tokenizer(), rows),
        )  # fmt: skip
        trainer.train()
        norms.append(next(entry["grad_norm"] for entry in trainer.state.log_history if "grad_norm" in entry))
    assert norms[0] == pytest.approx(norms[1], rel=1e-4)
