"""What the documents' code takes as given, small: models, pairs, films, under the names that the pages use.

Each function is named after its page and gets the folder in which the page's code runs; it returns the names that the
code may use, and texts of the page that something local takes the place of (a hub name: a folder).
"""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from datasets import Dataset

from synpo import scenes
from synpo.caption import Sampling
from synpo.miniature import oracle
from synpo.miniature.captioner import WEIGHTS
from synpo.miniature.films import make_films
from synpo.pairs.local_captioner import LocalCaptioner
from synpo.train import load_model, load_tokenizer, lora_recipe
from tests.train import tiny
from tests.video.films import film


class Given(NamedTuple):
    """What stands in."""

    names: dict[str, Any]
    instead: dict[str, str] = {}  # noqa: RUF012  never changed


def save_model(folder: Path) -> str:
    """A tiny model and its tokenizer, for which most words are unknown."""
    tiny.model(max_position_embeddings=256).save_pretrained(folder)
    tokenizer = tiny.tokenizer()
    tokenizer.pad_token = "<unk>"
    tokenizer.save_pretrained(folder)
    return str(folder)


def save_pairs(file: Path, count: int) -> Path:
    """Scored pairs."""
    file.write_text("".join(json.dumps(row) + "\n" for row in scenes.make_pairs(count)))
    return file


def save_film(file: Path) -> Path:
    """A film of the miniature."""
    make_films(file.parent, 1, 0)
    return (file.parent / "film00000.mp4").rename(file)


def _tensors() -> dict[str, Any]:
    labels = torch.randint(50, (4, 6))
    labels[0, 3:] = -100
    head = torch.nn.Linear(16, 50, bias=False)
    hidden = torch.randn(4, 6, 16, requires_grad=True)
    return {"lm_head": head, "weight": head.weight, "bias": None, "hidden": hidden, "labels": labels}


def readme(folder: Path) -> Given:
    return Given(_tensors())


def train(folder: Path) -> Given:
    pairs = {"train_pairs": tiny.pairs(4), "held_out_pairs": tiny.pairs(2, seed=1)}
    instead = {"meta-llama/Llama-3.1-8B-Instruct": save_model(folder / "model"), "bf16=True": "bf16=True, use_cpu=True"}
    return Given(pairs, instead)


def data(folder: Path) -> Given:
    save_pairs(folder / "pairs.jsonl", 12)
    return Given({})


def integrations(folder: Path) -> Given:
    where = save_model(folder / "model")
    model = load_model(where)
    names = {
        "model": model,
        "wrapped_model": model,
        "tokenizer": load_tokenizer(where),
        "adapter": lora_recipe(r=4),
        "pairs": Dataset.from_list(tiny.pairs(4)),
        "rows": tiny.pairs(2),
    }
    instead = {
        'output_dir="runs/dpo"': 'output_dir="runs/dpo", use_cpu=True',
        "compute_nll_loss=False)": "compute_nll_loss=False, compiled=False)",
    }
    return Given(_tensors() | names, instead)


def video(folder: Path) -> Given:
    (folder / "film.mp4").write_bytes(film(frames=40, rate=1))  # long enough for four clips
    return Given({"model_folder": WEIGHTS})


def caption(folder: Path) -> Given:
    save_film(folder / "film.mp4")
    ids = torch.randint(3, 90, (4, 5))
    names = {"model": load_model(save_model(folder / "model")), "ids": ids, "mask": torch.ones_like(ids), "B": 2}
    return Given(names, {"llava-hf/llava-onevision-qwen2-0.5b-ov-hf": str(WEIGHTS)})


def pairs(folder: Path) -> Given:
    make_films(folder / "films", 1, 0)
    sampling = Sampling(temperature=0.9, max_new_tokens=48)
    return Given({"captioner": LocalCaptioner.load(str(WEIGHTS), None, sampling), "score": oracle.judge})


def contrastive(folder: Path) -> Given:
    logits = torch.randn(4, 3, 100)
    return Given({"model": lambda *_: SimpleNamespace(logits=logits), "seeds": torch.arange(2), "step": 0})
