"""The scripts of examples/ run as they are, on a tiny model: every loop goes down the same way, or at least moves."""

import importlib
import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.train import tiny

EXAMPLES = Path(__file__).parents[2] / "examples"
LOOPS = ("pytorch_loop", "accelerate_loop", "transformers_trainer", "trl_dpo", "trl_simpo")

pytestmark = [
    pytest.mark.filterwarnings(f"ignore:{message}")
    for message in (
        # peft 0.21 and trl 1.16 use names of transformers 5.23 that are about to go.
        "`gradient_checkpointing(_.+)?` is deprecated:FutureWarning",
        "'pin_memory' argument is set as true:UserWarning",
    )
]


@pytest.fixture
def inputs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Options of a script; examples/ is on the path as when a script there is run."""
    tiny.model().save_pretrained(tmp_path / "model")
    made = tiny.tokenizer()
    made.pad_token = "<unk>"
    made.save_pretrained(tmp_path / "model")
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text("".join(json.dumps(row) + "\n" for row in tiny.pairs(6)))
    monkeypatch.syspath_prepend(str(EXAMPLES))
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    yield [
        "--model", str(tmp_path / "model"), "--pairs", str(pairs), "--steps", "2", "--output_dir", str(tmp_path / "out")
    ]  # fmt: skip
    for name in (*LOOPS, "inputs"):
        sys.modules.pop(name, None)


def script(name: str) -> Any:
    return importlib.import_module(name)


@pytest.mark.parametrize("name", LOOPS)
def test_loops_run(name: str, inputs: list[str]) -> None:
    losses = script(name).main(inputs)
    assert len(losses) >= 2
    assert all(math.isfinite(loss) for loss in losses)
    assert len(set(losses)) > 1


def test_liger_and_synpo_agree(inputs: list[str]) -> None:
    theirs, ours, furthest = script("liger_loss").main()
    # float32: liger sums a chunk of a pair at a time; log-probs of 1000 tokens from 64 products of size up to 8.
    assert ours == pytest.approx(theirs, abs=2e-5)
    assert furthest < 1e-5


def test_every_script_is_run_here_or_beside() -> None:
    others = {"make_pairs", "inputs", "liger_loss", "llama_factory", "ms_swift"}
    assert {path.stem for path in EXAMPLES.glob("*.py")} == {*LOOPS, *others}
