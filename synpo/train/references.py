"""Reference log-probs for dpo, dpop, ipo and kto: adapter switched off, a separate model, or computed once and kept
on disk.
"""

import hashlib
import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from peft import PeftModel
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm import tqdm

from .collate import PLAIN, Form, PairCollator, PairDataset, pair_keys
from .config import SynPOConfig
from .passes import PairScorer
from .vision import Vision

logger = logging.getLogger(__name__)


class References:
    """The frozen model that an objective compares with."""

    def __init__(
        self,
        args: SynPOConfig,
        model: nn.Module,
        ref_model: nn.Module | None,
        accelerator: Accelerator,
        form: Form = PLAIN,
        vision: Vision | None = None,
    ) -> None:
        """Errors: ValueError where there is nothing to take as the reference."""
        if ref_model is None and not isinstance(model, PeftModel) and not args.precompute_ref_logps:
            raise ValueError(
                f"{args.objective} needs a reference and the whole model is trained: pass ref_model, set "
                "precompute_ref_logps=True, or train an adapter (peft_config)"
            )
        if ref_model is model:
            raise ValueError(
                "ref_model is the model that is trained; load a second one, or set precompute_ref_logps=True"
            )
        self.args = args
        self.accelerator = accelerator
        self.ref_model = ref_model
        if ref_model is not None:
            ref_model.requires_grad_(False).to(args.device).eval()
            self.scorer = PairScorer(args, ref_model, form, vision)

    def sums(self, scorer: PairScorer, model: nn.Module, batch: dict[str, Any]) -> Tensor:
        """(2b,) summed log-probs of a pass's sequences under the reference; dropout is off, no random number is
        drawn.
        """
        if self.ref_model is not None:
            with self.accelerator.autocast():
                return self.scorer.sums(self.ref_model, batch)
        with _without_adapter(self.accelerator.unwrap_model(model)):
            return scorer.sums(model, batch)

    def precompute(
        self, scorer: PairScorer, model: nn.Module, collator: PairCollator, datasets: Sequence[PairDataset]
    ) -> dict[bytes, float]:
        """Sequence key -> summed log-prob for every sequence of the datasets, from the file of this reference where it
        has them.

        The file is named by a hash of the reference's weights and precision; a key is a hash of the token ids, so a
        changed pair, template, tokenizer or truncation is computed anew.
        """
        reference = model if self.ref_model is None else self.ref_model
        path = self._path(reference)
        known = _read(path)
        missing: dict[tuple[bytes, bytes], tuple[PairDataset, int]] = {}
        # Pairs with media are read here for their keys, and again where they are computed: all of them at once would
        # not fit in memory.
        for dataset in datasets:
            for i in range(len(dataset)):
                keys = pair_keys(dataset[i])
                if not all(key in known for key in keys):
                    missing[keys] = (dataset, i)
        logger.info("reference log-probs: %d pairs to compute, %d sequences in %s", len(missing), len(known), path)
        if missing:
            sums = self._compute(scorer, model, collator, list(missing.values()))
            for keys, values in zip(missing, sums.tolist(), strict=True):
                known.update(zip(keys, values, strict=True))
            if self.accelerator.is_main_process:
                _write(path, known)
        return known

    def _compute(
        self,
        scorer: PairScorer,
        model: nn.Module,
        collator: PairCollator,
        pairs: Sequence[tuple[PairDataset, int]],
    ) -> Tensor:
        rank, world = self.accelerator.process_index, self.accelerator.num_processes
        share = -(-len(pairs) // world)
        mine = list(pairs[rank * share : (rank + 1) * share])
        rows = []
        for dataset, i in tqdm(mine, desc="reference log-probs", unit=" pairs", disable=None if rank == 0 else True):
            (batch,) = collator([dataset[i]])["passes"]
            batch = {k: v.to(self.args.device) if isinstance(v, Tensor) else v for k, v in batch.items()}
            rows.append(self.sums(scorer, model, batch))
        sums = torch.stack(rows) if rows else torch.zeros(0, 2, device=self.args.device)
        if world > 1:
            sums = torch.nn.functional.pad(sums, (0, 0, 0, share - len(sums)))
            sums = self.accelerator.gather(sums)[: len(pairs)]
        return sums

    def _path(self, reference: nn.Module) -> Path:
        digest = hashlib.blake2b(str(self.accelerator.mixed_precision).encode(), digest_size=16)
        for name, parameter in reference.named_parameters():
            if isinstance(reference, PeftModel) and parameter.requires_grad:
                continue
            digest.update(f"{name} {parameter.dtype} {tuple(parameter.shape)}".encode())
            digest.update(parameter.detach().contiguous().reshape(-1).view(torch.uint8).cpu().numpy())
        folder = self.args.ref_cache_dir or os.path.join(self.args.output_dir, "reference")
        return Path(folder, f"{digest.hexdigest()}.safetensors")


@contextmanager
def _without_adapter(model: nn.Module) -> Iterator[None]:
    training = model.training
    model.eval()
    try:
        if isinstance(model, PeftModel):
            with model.disable_adapter():
                yield
        else:
            yield
    finally:
        model.train(training)


def _read(path: Path) -> dict[bytes, float]:
    if not path.exists():
        return {}
    try:
        tensors = load_file(path)
        keys, sums = tensors["keys"], tensors["sums"]
    except (SafetensorError, KeyError) as error:
        raise ValueError(
            f"{path} is not a file of reference log-probs ({error}); delete it, it will be made again"
        ) from None
    return {bytes(key): value for key, value in zip(keys.numpy(), sums.tolist(), strict=True)}


def _write(path: Path, known: dict[bytes, float]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    keys = torch.frombuffer(bytearray(b"".join(known)), dtype=torch.uint8).reshape(len(known), -1)
    partial = path.with_name(path.name + ".partial")
    save_file({"keys": keys, "sums": torch.tensor(list(known.values()))}, partial)
    os.replace(partial, path)
