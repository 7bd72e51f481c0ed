"""SynPOConfig: every own option is a decision, and a bad value is named at construction."""

import dataclasses
from pathlib import Path

import pytest

from synpo.train.config import SynPOConfig, own_fields
from tests.train import tiny


def test_every_own_option_is_listed() -> None:
    assert own_fields() == [
        "objective",
        "alpha",
        "beta",
        "form",
        "gamma",
        "dpop_lambda",
        "max_length",
        "truncation",
        "min_score_gap",
        "precompute_ref_logps",
        "ref_cache_dir",
        "tokens_per_pass",
        "prefix_sharing",
        "padding_free",
        "num_frames",
        "fps",
        "broken_media",
        "vision_cache",
        "vision_cache_gb",
        "fused",
        "workspace_mb",
        "low_host_memory",
        "side_norms_every",
        "sample_captions",
        "max_nonfinite_steps",
    ]


def test_every_own_option_says_what_it_means() -> None:
    meanings = {f.name: f.metadata.get("help", "") for f in dataclasses.fields(SynPOConfig)}
    assert all(meanings[name].endswith(".") for name in own_fields())


def test_hyperparameters_are_the_objective_s_own(tmp_path: Path) -> None:
    assert tiny.arguments(tmp_path).hyperparameters == {"alpha": 30.0, "beta": 0.2, "form": "sigmoid"}
    assert tiny.arguments(tmp_path, objective="simpo", gamma=1.0).hyperparameters == {"beta": 2.0, "gamma": 1.0}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"objective": "ppo"}, "objective 'ppo' is unknown; known: synpo"),
        ({"alpha": 0.0}, r"alpha is 0.0; synpo needs alpha > 0"),
        ({"beta": -1.0}, r"beta is -1.0; synpo needs beta >= 0"),
        ({"form": "tanh"}, "form is 'tanh'; allowed: sigmoid, logsigmoid"),
        ({"objective": "dpo", "alpha": 1.0}, "dpo has no hyperparameter 'alpha'"),
        ({"gamma": 1.0}, "synpo has no hyperparameter 'gamma'"),
        ({"truncation": "left"}, "truncation is 'left'; allowed: cut, drop, error"),
        ({"max_length": 4}, "max_length is 4"),
        ({"workspace_mb": 0}, "workspace_mb is 0; it has to be at least 1"),
        ({"max_nonfinite_steps": 0}, "max_nonfinite_steps is 0"),
        ({"tokens_per_pass": 0}, "tokens_per_pass is 0"),
        ({"objective": "kto", "tokens_per_pass": 64}, "kto couples the pairs of a micro-batch"),
        ({"precompute_ref_logps": True}, "synpo has no reference; set precompute_ref_logps=False"),
        ({"objective": "dpo", "ref_cache_dir": "x"}, "ref_cache_dir is set but precompute_ref_logps is off"),
        ({"logging_nan_inf_filter": True}, "logging_nan_inf_filter=True is not supported"),
        ({"remove_unused_columns": True}, "remove_unused_columns=True is not supported"),
        (
            {"train_sampling_strategy": "batch_rebalance"},
            "train_sampling_strategy is 'batch_rebalance'; allowed: random",
        ),
        ({"label_smoothing_factor": 0.1}, "label_smoothing_factor is 0.1"),
        ({"use_liger_kernel": True}, "use_liger_kernel=True: liger-kernel's kernels need a GPU"),
    ],
)
def test_bad_values_are_named(tmp_path: Path, options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny.arguments(tmp_path, **options)


def test_the_guide_names_every_own_option() -> None:
    guide = (Path(__file__).parents[2] / "docs" / "train.md").read_text(encoding="utf-8")
    assert [name for name in own_fields() if f"`{name}`" not in guide] == []
