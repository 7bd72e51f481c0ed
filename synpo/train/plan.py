"""Peak memory of a training step by parts, before any weight is loaded: `synpo train --plan`.

The run's own model, passes and optimizer go through two optimizer steps on fake tensors, which have shapes, dtypes and
lifetimes but no values; a tally adds up the storages that are alive. What a kernel takes and gives back inside one
operation does not show there. The fused loss is the one that takes much, and is added by what it promises: its
workspace, a float32 row for every answer token, and the head's float32 gradient where the head trains.

Not in it: the vision tower at work, buffers of libraries, a separate reference model, the allocator's fragments.
Weights that a run shares out over devices (FSDP, ZeRO-3) are counted whole.
"""

import contextlib
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple
from unittest import mock

import torch
from peft import PeftConfig
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import PreTrainedTokenizerBase, Trainer, masking_utils

from synpo_kernels.device import workspace_bytes

from ..pretrained import empty_model
from .collate import PairCollator
from .config import SynPOConfig
from .media import has_media
from .model import trainable
from .passes import PairScorer, choose_form, tokens_per_pass
from .tokenise import Pair, PairTokenizer

GB = 1 << 30
PARTS = {
    "weights": "frozen weights and buffers",
    "trained": "weights that train",
    "optimizer": "optimizer state",
    "gradients": "gradients",
    "activations": "activations, and gradients on their way",
    "head": "workspace of the fused loss",
}


class Plan(NamedTuple):
    """Bytes of every part at the moment when their sum is highest."""

    parts: dict[str, int]
    tokens: int  # that the largest pass computes
    rows: tuple[int, int]  # of that pass: rows, width
    pairs: int  # in it

    @property
    def total(self) -> int:
        """Bytes."""
        return sum(self.parts.values())

    def table(self) -> str:
        """For people."""
        lines = [f"peak memory of a training step: {self.total / GB:.2f} GB"]
        lines += [f"  {PARTS[name]:<42}{size / GB:>8.3f}" for name, size in self.parts.items()]
        height, width = self.rows
        lines.append(f"largest pass: {self.pairs} pairs, {self.tokens} tokens in {height} x {width}")
        return "\n".join(lines)


class Tally(TorchDispatchMode):
    """Bytes of the storages that are alive, by part; what an operation makes belongs to the part of that time."""

    def __init__(self) -> None:
        super().__init__()
        self.live: Counter[str] = Counter()
        self.peak: dict[str, int] = {}
        self._part = "activations"
        self._owner: dict[int, str] = {}  # address of a storage -> its part

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                self._see(leaf)
        return out

    def _see(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._owner:
            return
        self._owner[key] = self._part
        self.live[self._part] += storage.nbytes()
        weakref.finalize(storage, self._gone, key, storage.nbytes())
        self._mark()

    def _gone(self, key: int, size: int) -> None:
        self.live[self._owner.pop(key)] -= size

    def _mark(self, extra: int = 0) -> None:
        """Note the parts if they have never been more together; extra: bytes of the head for this moment."""
        if self.live.total() + extra > sum(self.peak.values()):
            self.peak = {name: self.live[name] + (extra if name == "head" else 0) for name in PARTS}

    def belongs(self, tensor: Tensor, part: str) -> None:
        """Give a tensor that is alive to a part."""
        self._see(tensor)
        storage = tensor.untyped_storage()
        self.live[self._owner[storage._cdata]] -= storage.nbytes()
        self._owner[storage._cdata] = part
        self.live[part] += storage.nbytes()

    def takes_for_a_moment(self, size: int) -> None:
        """Bytes of the head that come and go inside one operation."""
        self._mark(size)

    @contextlib.contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Inside, what is made belongs to a part."""
        former, self._part = self._part, name
        try:
            yield
        finally:
            self._part = former


def plan(
    args: SynPOConfig, model_name: str, dtype: str | None, peft_config: PeftConfig | None, pairs: Sequence[Pair]
) -> Plan:
    """The second optimizer step of a run whose micro-batches are these pairs, in one process.

    Errors: those of SynPOTrainer's construction.
    """
    tally, fake = Tally(), FakeTensorMode(allow_non_fake_inputs=True)
    with torch.device("meta"):
        model = trainable(empty_model(model_name, dtype), peft_config, args.seed)
    with fake:
        _onto_cpu(model)
    batch, passes, scorer = _largest_pass(args, model, pairs)
    _count_head(scorer, tally, args)
    if args.activation_checkpointing:
        model.activation_checkpointing_enable(args.activation_checkpointing_kwargs)
    with fake, tally, _without_masks():
        two_steps(args, model, tally, partial(_pass, args, scorer, model, batch), passes)
    sizes = tuple(batch["input_ids"].shape)
    return Plan(tally.peak, sizes[0] * sizes[1], sizes, len(batch["indices"]))


@contextlib.contextmanager
def _without_masks() -> Iterator[None]:
    """transformers looks at positions to find packed rows, and builds masks where it cannot; a plain run has none."""
    with mock.patch.object(masking_utils, "find_packed_sequence_indices", return_value=None):
        yield


def _onto_cpu(model: nn.Module) -> None:
    """Weights and buffers as fake tensors of a CPU, whose autocast and attention a meta tensor has not; tied ones stay
    tied.
    """
    made: dict[Tensor, Tensor] = {}
    for module in model.modules():
        for name, weight in module._parameters.items():
            if weight is not None:
                new = made.get(weight)
                if new is None:
                    new = nn.Parameter(torch.empty_like(weight, device="cpu"), weight.requires_grad)
                module._parameters[name] = made.setdefault(weight, new)
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = torch.empty_like(buffer, device="cpu")


def two_steps(args: SynPOConfig, model: nn.Module, tally: Tally, one_pass: Callable[[], None], passes: int) -> None:
    """Two optimizer steps of so many passes each, inside a tally, which has their peak afterwards."""
    for tensor in (*model.parameters(), *model.buffers()):
        tally.belongs(tensor, "trained" if tensor.requires_grad else "weights")
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    hooks = [p.register_post_accumulate_grad_hook(lambda p: tally.belongs(p.grad, "gradients")) for p in trained]
    kind, options = Trainer.get_optimizer_cls_and_kwargs(args, model)
    if issubclass(kind, torch.optim.AdamW):
        options["fused"] = True  # the form that looks at no values; its state is that of the others
    optimizer = kind(trained, **options)
    tally.peak = {}
    model.train()
    for _ in range(2):
        for _ in range(min(passes, 2)):  # the second finds gradients, and no further one finds more
            one_pass()
        with tally.part("optimizer"):
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    for hook in hooks:
        hook.remove()


def _largest_pass(args: SynPOConfig, model: nn.Module, pairs: Sequence[Pair]) -> tuple[dict[str, Any], int, PairScorer]:
    """The pass with most tokens that a micro-batch of these pairs takes, the passes of an optimizer step, and what
    scores them.
    """
    form = choose_form(args, model)
    scorer = PairScorer(args, model, form)
    scorer.verified = True  # there are no values to compare
    passes = PairCollator(0, tokens_per_pass(args), form)(pairs)["passes"]
    largest = max(passes, key=lambda one: one["input_ids"].numel())
    return largest, len(passes) * args.gradient_accumulation_steps, scorer


def _pass(args: SynPOConfig, scorer: PairScorer, model: nn.Module, batch: dict[str, Any]) -> None:
    batch = {name: value.clone() if isinstance(value, Tensor) else value for name, value in batch.items()}
    ref_sums = torch.zeros(2 * len(batch["indices"])) if args.needs_reference else None
    half = torch.bfloat16 if args.bf16 else torch.float16
    with torch.autocast("cpu", half, enabled=args.bf16 or args.fp16):
        output = scorer.loss(model, batch, ref_sums)
    output.loss.float().backward()


def _count_head(scorer: PairScorer, tally: Tally, args: SynPOConfig) -> None:
    """Let the fused loss say what it takes while it runs."""
    fused = scorer._fused
    if fused is None:
        return

    def loss(hidden: Tensor, weight: Tensor, labels: Tensor, *rest: Any) -> Any:
        trains = weight.requires_grad
        workspace = workspace_bytes(args.workspace_mb, args.device, trains)
        logits = 4 * len(labels) * len(weight)
        tally.takes_for_a_moment(min(workspace, logits) + 4 * hidden.numel() + (4 * weight.numel() if trains else 0))
        return fused(hidden, weight, labels, *rest)

    scorer._fused = loss


def longest_pairs(
    rows: Sequence[Mapping[str, Any]], tokenizer: PreTrainedTokenizerBase, args: SynPOConfig
) -> list[Pair]:
    """A micro-batch of the pairs that compute most. One with media counts as long as max_length allows, since its
    media are not read.
    """
    reader = PairTokenizer(tokenizer, args.max_length, args.truncation)
    found: list[Pair] = []
    for index, row in enumerate(rows):
        pair = _filled(row, index, tokenizer, args.max_length) if has_media(row) else reader(row, index)
        if pair is not None:
            found.append(pair)
    if not found:
        raise ValueError("no pair is left to plan with; see the counts above")
    found.sort(key=lambda pair: len(pair.prompt) + len(pair.chosen) + len(pair.rejected), reverse=True)
    return found[: args.per_device_train_batch_size]


def _filled(row: Mapping[str, Any], index: int, tokenizer: PreTrainedTokenizerBase, length: int) -> Pair:
    sides = [row[side] for side in ("chosen", "rejected")]
    texts = [side if isinstance(side, str) else str(side[0]["content"]) for side in sides]
    answers = [min(len(tokenizer(text)["input_ids"]) + 1, length * 3 // 4) for text in texts]
    prompt = length - max(answers)
    return Pair(index, *(torch.zeros(count, dtype=torch.int64) for count in (prompt, *answers)))
