"""SynPOConfig: the options of a preference-training run, on top of transformers.TrainingArguments."""

import dataclasses
from dataclasses import dataclass, field

from transformers import TrainingArguments

from synpo_kernels import objectives

from ..options import option
from ..video import FramePolicy

TRUNCATIONS = ("cut", "drop", "error")
BROKEN_MEDIA = ("stop", "skip")
LIGER_LOSSES = ("cross_entropy", "fused_linear_cross_entropy")
SAMPLINGS = ("random", "sequential", "group_by_length")


@dataclass
class SynPOConfig(TrainingArguments):
    """Options of a run: those of TrainingArguments and the ones below.

    Some defaults of TrainingArguments are the SynPO release's recipe instead (arXiv 2506.00835): learning rate 5e-6
    with 10 % warm-up and linear decay, one pair per forward pass, 32 pairs per optimizer step, five epochs.

    Errors: ValueError naming the field, the value given and what is allowed.
    """

    objective: str = option("synpo", f"Loss on a pair: {', '.join(objectives.REGISTRY)}.")
    alpha: float | None = option(None, "synpo: sharpness of the ranking term (paper: alpha). Default 30.")
    beta: float | None = option(
        None, "Weight of synpo's language term or orpo's odds ratio, inverse temperature elsewhere (paper: beta). "
        "Default: synpo 0.2, simpo 2, others 0.1.",
    )  # fmt: skip
    form: str | None = option(None, 'synpo: ranking function, "sigmoid" or "logsigmoid". Default "sigmoid".')
    gamma: float | None = option(None, "simpo: target margin in units of the reward (paper: gamma). Default 0.5.")
    dpop_lambda: float | None = option(
        None, "dpop: penalty on a chosen answer less likely than under the reference (paper: lambda). Default 50."
    )
    max_length: int = option(2560, "Longest sequence in tokens, prompt and answer together.")
    truncation: str = option(
        "cut", "Pairs longer than max_length: cut (the prompt from the left down to a quarter of max_length, then the "
        "answer before its end token), drop, or error. Counted and logged in any case.",
    )  # fmt: skip
    min_score_gap: float | None = option(
        None, "Train only on pairs whose score_chosen - score_rejected is at least this (paper: 4). Default: all pairs."
    )
    precompute_ref_logps: bool = option(
        False, "dpo, dpop, ipo, kto: compute the reference's log-probs once, before training, and keep them on disk."
    )
    ref_cache_dir: str | None = option(
        None, "Directory of the precomputed reference log-probs. Default: output_dir/reference."
    )
    tokens_per_pass: int | None = option(
        None, "Most tokens, padding included, that go through the model at once; a larger micro-batch takes several "
        "passes with the same gradient, a pair is never split. Default: 1024 on a CPU, no bound elsewhere.",
    )  # fmt: skip
    prefix_sharing: bool | None = option(
        None, "Compute a pair's prompt once for both answers, in rows [prompt | chosen | rejected]. Checked against "
        "plain rows at the first pass. Default: where the model allows it.",
    )  # fmt: skip
    padding_free: bool | None = option(
        None, "Put the pairs of a pass end to end in one row, without padding. Default: with prefix sharing."
    )
    num_frames: int | None = option(None, "Frames of a video, evenly spaced in time. Default: by fps.")
    fps: float | None = option(
        None,
        "Frames of a video per second, at least 8 and at most 16 frames. Default: 0.5 where num_frames is not given.",
    )
    broken_media: str = option(
        "stop", "A video or image that cannot be read: stop, or skip (the next pair takes its place). Counted."
    )
    vision_cache: str | None = option(
        None,
        "Directory to keep the frozen vision tower's features in, for all epochs and runs. Default: none are kept.",
    )
    vision_cache_gb: float = option(50.0, "Most that vision_cache may hold, in GB (2^30 bytes); least used go first.")
    fused: bool = option(True, "False: full logits and plain PyTorch losses, for comparison only.")
    workspace_mb: int | None = option(
        None,
        "Working memory of the fused loss in MB (2^20 bytes). Default: 64 on a CPU and 640 on a GPU; 256 and 1300 with "
        "a trainable head.",
    )
    low_host_memory: bool = option(
        False,
        "On a CPU: freed tensors go back to the system at once. A third less memory, a tenth to a quarter slower.",
    )
    side_norms_every: int | None = option(
        None, "Every so many optimizer steps, norms of the real gradients of the chosen side, the rejected side and "
        "synpo's language term, of one pass; three more backward passes then. Default: never.",
    )  # fmt: skip
    sample_captions: int = option(
        0, "At every evaluation, greedy answers to the first so many held-out prompts, in eval_samples."
    )
    max_nonfinite_steps: int = option(
        10, "Stop when this many optimizer steps of the run were skipped for a NaN or infinite loss or gradient."
    )

    learning_rate: float = option(5e-6, "Initial learning rate of AdamW.")
    warmup_steps: float = option(0.1, "Warm-up: optimizer steps, or a share of them where below 1.")
    num_train_epochs: float = option(5.0, "Passes over the training pairs.")
    per_device_train_batch_size: int = option(1, "Pairs per micro-batch and device.")
    per_device_eval_batch_size: int = option(1, "Pairs per evaluation batch and device.")
    gradient_accumulation_steps: int = option(32, "Micro-batches per optimizer step.")
    logging_steps: float = option(1, "Optimizer steps between log lines, or a share of all where below 1.")
    logging_nan_inf_filter: bool = option(
        False, "Kept off: non-finite losses are counted and logged, never averaged out."
    )
    remove_unused_columns: bool = option(False, "Kept off: columns are chosen by name when pairs are tokenised.")
    report_to: None | str | list[str] = field(  # noqa: RUF036  HfArgumentParser takes the second type for the flag's
        default="none", metadata={"help": "Integrations that logs go to beside metrics.jsonl."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.device.type == "cpu":
            self.dataloader_pin_memory = False  # there is no device to pin for, and torch warns
        self._check_objective()
        if self.truncation not in TRUNCATIONS:
            raise ValueError(f"truncation is {self.truncation!r}; allowed: {', '.join(TRUNCATIONS)}")
        if self.max_length < 8:
            raise ValueError(f"max_length is {self.max_length}; a prompt and an answer need at least 8 tokens")
        if self.broken_media not in BROKEN_MEDIA:
            raise ValueError(f"broken_media is {self.broken_media!r}; allowed: {', '.join(BROKEN_MEDIA)}")
        if not self.vision_cache_gb > 0:
            raise ValueError(f"vision_cache_gb is {self.vision_cache_gb}; it has to be greater than 0")
        _ = self.frame_policy  # checks num_frames and fps
        if self.sample_captions < 0:
            raise ValueError(f"sample_captions is {self.sample_captions}; it has to be at least 0")
        for name in ("tokens_per_pass", "workspace_mb", "max_nonfinite_steps", "side_norms_every"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} is {value}; it has to be at least 1")
        if self.ref_cache_dir is not None and not self.precompute_ref_logps:
            raise ValueError("ref_cache_dir is set but precompute_ref_logps is off; set precompute_ref_logps=True")
        if self.tokens_per_pass is not None and objectives.REGISTRY[self.objective].coupled:
            raise ValueError(
                f"tokens_per_pass is set, but {self.objective} couples the pairs of a micro-batch; leave it out"
            )
        if self.train_sampling_strategy not in SAMPLINGS:
            raise ValueError(
                f"train_sampling_strategy is {self.train_sampling_strategy!r}; allowed: {', '.join(SAMPLINGS)}"
            )
        for name in ("logging_nan_inf_filter", "remove_unused_columns", "bf16_full_eval", "fp16_full_eval"):
            if getattr(self, name):
                raise ValueError(f"{name}=True is not supported by SynPOTrainer; leave it out")
        if self.label_smoothing_factor:
            raise ValueError(
                f"label_smoothing_factor is {self.label_smoothing_factor}; preference losses have none, leave it out"
            )
        if self.use_liger_kernel:
            self._check_liger()

    def _check_liger(self) -> None:
        # liger-kernel's layers are welcome; its losses would stand where SynPOTrainer's own takes the hidden states.
        given = self.liger_kernel_config or {}
        for name in LIGER_LOSSES:
            if given.get(name):
                raise ValueError(
                    f"liger_kernel_config has {name}: True, a loss of its own; SynPOTrainer has one, leave it out"
                )
        if self.device.type == "cpu":
            raise ValueError("use_liger_kernel=True: liger-kernel's kernels need a GPU; leave it out on a CPU")
        self.liger_kernel_config = {**given, **dict.fromkeys(LIGER_LOSSES, False)}

    def _check_objective(self) -> None:
        given = {
            name: getattr(self, name)
            for name in ("alpha", "beta", "form", "gamma", "dpop_lambda")
            if getattr(self, name) is not None
        }
        self.hyperparameters = objectives.resolve(self.objective, given)
        if self.precompute_ref_logps and not self.needs_reference:
            raise ValueError(
                f"precompute_ref_logps=True, but {self.objective} has no reference; set precompute_ref_logps=False"
            )

    @property
    def frame_policy(self) -> FramePolicy:
        """Which frames of a video are taken. Errors: ValueError for numbers out of range, or both given."""
        fps = 0.5 if self.num_frames is None and self.fps is None else self.fps
        return FramePolicy(num_frames=self.num_frames, fps=fps)

    @property
    def needs_reference(self) -> bool:
        """Whether the objective compares with a reference model."""
        return objectives.REGISTRY[self.objective].reference


def own_fields() -> list[str]:
    """Names of the fields that SynPOConfig adds to TrainingArguments."""
    inherited = {f.name for f in dataclasses.fields(TrainingArguments)}
    return [f.name for f in dataclasses.fields(SynPOConfig) if f.name not in inherited]
