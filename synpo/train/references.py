"""Reference log-probs for dpo, dpop, ipo and kto: adapter switched off, a separate model, or computed once and kept
on disk.
"""

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from peft import PeftModel
from torch import Tensor, nn
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from .collate import PLAIN, Form, PairCollator, PairDataset
from .config import SynPOConfig
from .passes import PairScorer
from .reference_table import Sums, identity, pair_key, read_tables, write_table
from .vision import Vision

logger = logging.getLogger(__name__)

CHUNK = 512  # pairs of a process between two writes of the table: what an interrupted run loses


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
        self,
        scorer: PairScorer,
        model: nn.Module,
        collator: PairCollator,
        datasets: Sequence[PairDataset],
        tokenizer: PreTrainedTokenizerBase,
    ) -> dict[str, Sums]:
        """pair_key -> the reference's summed log-probs for every pair of the datasets, from the tables in
        ref_cache_dir where they have them (see reference_table); the others are added there as they are made.
        """
        reference = model if self.ref_model is None else self.ref_model
        folder = Path(self.args.ref_cache_dir or Path(self.args.output_dir, "reference"))
        whose = identity(reference, str(self.accelerator.mixed_precision), tokenizer)
        known = read_tables(folder, whose)
        self.accelerator.wait_for_everyone()  # nobody writes before everybody has read
        missing: dict[str, tuple[PairDataset, int]] = {}
        # Pairs with media are read here for their keys, and again where they are computed: all of them at once would
        # not fit in memory.
        for dataset in datasets:
            for i in range(len(dataset)):
                key = pair_key(dataset[i])
                if key not in known:
                    missing[key] = (dataset, i)
        logger.info("reference log-probs: %d pairs to compute, %d in %s", len(missing), len(known), folder)
        if missing and self.accelerator.distributed_type == DistributedType.DEEPSPEED:
            raise ValueError(
                f"{len(missing)} pairs have no precomputed reference log-probs, and under DeepSpeed none can be made "
                f"before training; make them in one process or with FSDP2, in ref_cache_dir {str(folder)!r}"
            )
        keys, places = list(missing), list(missing.values())
        chunk = CHUNK * self.accelerator.num_processes
        for start in tqdm(range(0, len(keys), chunk), desc="reference log-probs", disable=None if keys else True):
            sums = self._compute(scorer, model, collator, places[start : start + chunk])
            known.update(zip(keys[start : start + chunk], map(tuple, sums.tolist()), strict=True))
            if self.accelerator.is_main_process:
                write_table(folder, whose, known)
        return known

    def _compute(
        self,
        scorer: PairScorer,
        model: nn.Module,
        collator: PairCollator,
        pairs: Sequence[tuple[PairDataset, int]],
    ) -> Tensor:
        """(len(pairs), 2), each process a share of it; all make the same number of passes (see processes)."""
        rank, world = self.accelerator.process_index, self.accelerator.num_processes
        share = -(-len(pairs) // world)
        rows = []
        for place in range(rank * share, (rank + 1) * share):
            dataset, i = pairs[min(place, len(pairs) - 1)]
            (batch,) = collator([dataset[i]])["passes"]
            batch = {k: v.to(self.args.device) if isinstance(v, Tensor) else v for k, v in batch.items()}
            rows.append(self.sums(scorer, model, batch))
        return self.accelerator.gather(torch.stack(rows))[: len(pairs)]


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
