"""Two processes give what one gives: DDP, and FSDP2 as accelerate sets it up from the shipped configurations."""

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env
from safetensors.torch import load_file

from synpo.run_files import read_json_lines
from synpo.train.processes import Evened, check_processes
from tests.train import ranks, tiny

ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "examples" / "accelerate"
KINDS = ("ddp", "fsdp2")


def environment(name: str) -> dict[str, str]:
    """The variables that `accelerate launch` sets for a shipped configuration, but for its bf16."""
    words = ["--config_file", str(CONFIGS / f"{name}.yaml"), "--num_processes", "2", "--mixed_precision", "no", "x.py"]
    args, _, _ = _validate_launch_command(launch_command_parser().parse_args(words))
    made = prepare_multi_gpu_env(args)
    return {k: v for k, v in made.items() if k.startswith(("ACCELERATE_", "FSDP_")) and os.environ.get(k) != v}


def run_two(folder: Path, kinds: dict[str, dict[str, str]], **more: str) -> Path:
    """Two processes of tests.train.ranks; the folder with what they left behind.

    Hung, they are started once more: CPython 3.11 takes a lock in a forked child before it renews it
    (PyOS_AfterFork_Child), so a loader's worker never starts if a thread of gloo held that lock as it was forked.
    """
    for attempt in ("first", "second"):
        (folder / attempt).mkdir()
        try:
            return _run_two(folder / attempt, kinds, **more)
        except subprocess.TimeoutExpired:
            if attempt == "second":
                raise
    raise AssertionError


def _run_two(folder: Path, kinds: dict[str, dict[str, str]], **more: str) -> Path:
    (folder / "kinds.json").write_text(json.dumps(kinds))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    common = os.environ | more | {
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2",
        "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    started = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.train.ranks", str(folder)], cwd=ROOT, text=True,
            env=common | {"RANK": str(rank), "LOCAL_RANK": str(rank)}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        for rank in range(2)
    ]  # fmt: skip
    try:
        outputs = [process.communicate(timeout=300)[0] for process in started]
    finally:
        for process in started:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # its loaders' workers too
    assert [process.returncode for process in started] == [0, 0], "\n".join(output[-3000:] for output in outputs)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run_two(tmp_path_factory.mktemp("two"), {kind: environment(kind) for kind in KINDS})


@pytest.fixture(scope="module")
def found(folder: Path) -> dict[tuple[str, str], Any]:
    return torch.load(folder / "found.pt")


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Any]:
    """The same runs in this process, in plain rows and without checkpointing, made when first asked for."""
    plain = {"prefix_sharing": False, "activation_checkpointing": False}
    known: dict[str, Any] = {}

    def run(name: str) -> Any:
        options = ranks.RUNS[name] | plain
        if str(options) not in known:
            known[str(options)] = ranks.trained(tmp_path_factory.mktemp("one"), 1, **options)
        return known[str(options)]

    return run


def assert_same_run(two: Any, one: Any) -> None:
    """Losses, gradient norms, token counts and weights of every step, and held-out losses."""
    assert len(one["steps"]) == len(two["steps"]) > 1
    torch.testing.assert_close(two["steps"], one["steps"], atol=1e-6, rtol=1e-5)
    assert two["weights"].keys() == one["weights"].keys()
    for name, weight in one["weights"].items():
        torch.testing.assert_close(two["weights"][name], weight, atol=1e-5, rtol=1e-4, msg=name)
    if one["eval"][1] is not None:
        assert two["eval"][1] == pytest.approx(one["eval"][1], abs=1e-5)
        assert abs(one["eval"][1] - one["eval"][0]) > 1e-4


@pytest.mark.parametrize(("kind", "name"), [(kind, name) for kind in KINDS for name in ranks.runs_of(kind)])
def test_gradients_are_those_of_one_process(
    found: dict[tuple[str, str], Any], alone: Callable[[str], Any], kind: str, name: str
) -> None:
    two, one = found[kind, name], alone(name)
    assert_same_run(two, one)
    assert two["eval"][0] == pytest.approx(one["eval"][0], abs=1e-5)


def zero3_environment() -> dict[str, str]:
    """The variables that `accelerate launch` sets for zero3.yaml, for 2 micro-batches a step and without bf16."""
    words = ["--config_file", str(CONFIGS / "zero3.yaml"), "--num_processes", "2", "--mixed_precision", "no", "x.py"]
    args, defaults, _ = _validate_launch_command(launch_command_parser().parse_args(words))
    args.deepspeed_fields_from_accelerate_config = ",".join(defaults.deepspeed_config)
    _, made = prepare_deepspeed_cmd_env(args)
    kept = {name: value for name, value in made.items() if name.startswith("ACCELERATE_")}
    return kept | {"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "2", "DS_ACCELERATOR": "cpu"}


@pytest.mark.skipif(find_spec("deepspeed") is None, reason="deepspeed is not installed")
def test_zero3_gives_what_one_process_gives_and_resumes(
    tmp_path_factory: pytest.TempPathFactory, alone: Callable[[str], Any]
) -> None:
    made = zero3_environment()
    folder = run_two(tmp_path_factory.mktemp("zero3"), {"zero3": {}}, **made)
    found = torch.load(folder / "found.pt")
    for name in ranks.ZERO3:
        assert_same_run(found["zero3", name], alone(name))
    for name, step in ranks.STOPS:
        assert_uninterrupted(found["zero3", name], step)
    saved = load_file(folder / "zero3" / "shared" / "adapter_model.safetensors")
    weights = found["zero3", "shared"]["weights"]
    assert len(saved) == len(weights)
    for name, weight in saved.items():
        torch.testing.assert_close(weight, weights[name.replace(".weight", ".default.weight")])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("name", "step"), ranks.STOPS)
def test_resumed_is_uninterrupted(
    folder: Path, found: dict[tuple[str, str], Any], kind: str, name: str, step: int
) -> None:
    """Bit for bit, losses, gradient norms, counts and weights, from the middle of epoch 1 and of epoch 2."""
    assert_uninterrupted(found[kind, name], step)
    if name == "resumed videos":
        assert found[kind, name]["whole"]["counts"]["skipped_media"] > 0
        assert len(list((folder / kind / name / "whole" / "features").iterdir())) == 8  # the ninth cannot be read


def assert_uninterrupted(run: dict[Any, Any], step: int) -> None:
    whole, again = run["whole"], run[step]
    assert len(whole["steps"]) == 4
    assert torch.equal(again["steps"], whole["steps"])
    assert again["counts"] == whole["counts"]
    for name, weight in whole["weights"].items():
        assert torch.equal(again["weights"][name], weight), name


@pytest.mark.parametrize("kind", KINDS)
def test_the_saved_adapter_is_whole(folder: Path, found: dict[tuple[str, str], Any], kind: str) -> None:
    saved = load_file(folder / kind / "shared" / "adapter_model.safetensors")
    weights = found[kind, "shared"]["weights"]
    assert len(saved) == len(weights)
    for name, weight in saved.items():
        assert torch.equal(weight, weights[name.replace(".weight", ".default.weight")]), name


def test_the_command_in_two_processes(folder: Path, found: dict[tuple[str, str], Any]) -> None:
    assert found["ddp", "command"]["status"] == 0
    run = folder / "ddp" / "command" / "run"
    assert {path.name for path in run.iterdir()} >= {"adapter_model.safetensors", "config.yaml", "metrics.jsonl"}
    assert sorted(path.name for path in (run / "eval_pairs").iterdir()) == ["eval-0.jsonl", "eval-2.jsonl"]
    steps = [line for line in read_json_lines(run / "metrics.jsonl") if "loss" in line]
    assert [line["step"] for line in steps] == [1, 2]
    assert not list(run.rglob("*.partial"))


def test_processes_needed_different_numbers_of_passes(tmp_path: Path) -> None:
    """What the runs above rely on to reach idle passes: uneven passes, and a batch of repeats alone."""
    trainer = ranks.build(tmp_path, 1)
    order = list(Evened(trainer._get_train_sampler(), 9, 4))
    assert len(order) == 12
    assert order[9:] == [i + 9 for i in order[:3]]
    batches = [trainer.data_collator([trainer.train_dataset[i] for i in order[k : k + 2]]) for k in range(0, 12, 2)]
    counts = [len(batch["passes"]) for batch in batches]
    assert any(a != b for a, b in zip(counts[::2], counts[1::2], strict=True))
    assert [batch["pairs"] for batch in batches] == [2, 2, 2, 2, 1, 0]
    assert [batch["passes"][0]["idle"] for batch in batches] == [False] * 5 + [True]
    videos = ranks.build(tmp_path / "videos", 1, **ranks.RESUMED["resumed videos"])
    batches = list(videos.get_train_dataloader())
    assert any(len(one["indices"]) > 1 for batch in batches for one in batch["passes"])  # packed


@pytest.mark.parametrize(
    ("kind", "plugin", "cache", "message"),
    [
        (DistributedType.MULTI_CPU, None, None, "FSDP is asked for on CPUs, where accelerate shards nothing"),
        (DistributedType.FSDP, {"fsdp_version": 1}, None, "fsdp_version is 1; adapters need FSDP2"),
        (
            DistributedType.FSDP,
            {"state_dict_type": "SHARDED_STATE_DICT"},
            None,
            "fsdp_state_dict_type is SHARDED_STATE_DICT, with which no model is saved at the end",
        ),
        (DistributedType.FSDP, {"cpu_ram_efficient_loading": True}, "cache", "vision_cache is set, and with fsdp_cpu"),
        (DistributedType.DEEPSPEED, None, "cache", "vision_cache is set, and the weights are shared out over the proc"),
    ],
)
def test_refusals(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    kind: DistributedType,
    plugin: dict[str, Any] | None,
    cache: str | None,
    message: str,
) -> None:
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    options = {"fsdp_version": 2, "state_dict_type": "FULL_STATE_DICT"} | (plugin or {})
    deepspeed = SimpleNamespace(zero_stage=3)
    state = SimpleNamespace(fsdp_plugin=FullyShardedDataParallelPlugin(**options), deepspeed_plugin=deepspeed)
    args = tiny.arguments(tmp_path, vision_cache=cache)
    with pytest.raises(ValueError, match=message):
        check_processes(args, SimpleNamespace(distributed_type=kind, state=state))
