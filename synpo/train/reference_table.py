"""Reference log-probs on disk: parquet, a row for a pair under one model and one chat template.

    pair      SHA-256 of the pair's token ids, of where the answers start, and of the content of its media
    model     hash of the reference's weights and the precision they ran in
    template  hash of the chat template that made the pair's text
    chosen, rejected   summed log-probs of the answers, nats, float32

A table can be taken elsewhere and tables may lie side by side in a folder: a row that says anything else about pair,
model or template is never used.
"""

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
from peft import PeftModel
from torch import Tensor, nn, uint8
from torch.distributed.tensor import DTensor
from transformers import PreTrainedTokenizerBase

from .tokenise import Pair

SCHEMA = pa.schema(
    [("pair", pa.string()), ("model", pa.string()), ("template", pa.string()),
     ("chosen", pa.float32()), ("rejected", pa.float32())]
)  # fmt: skip
Sums = tuple[float, float]  # of the chosen and of the rejected answer


class Identity(NamedTuple):
    """What a row's values depend on beside its pair."""

    model: str
    template: str


def pair_key(pair: Pair) -> str:
    """The name of a pair in tables."""
    digest = hashlib.sha256()
    for ids in (pair.prompt, pair.chosen, pair.rejected):
        digest.update(len(ids).to_bytes(8, "little"))
        digest.update(ids.numpy().tobytes())
    if pair.media is not None:
        digest.update(pair.media.key)
    return digest.hexdigest()


def identity(reference: nn.Module, precision: str, tokenizer: PreTrainedTokenizerBase) -> Identity:
    """Of a model without its trainable adapter; all processes have to call it where weights are sharded.

    Names do not count what peft puts around them, so one table serves adapters of all kinds, and none.
    """
    digest = hashlib.blake2b(precision.encode(), digest_size=16)
    for name, parameter in reference.named_parameters():
        if isinstance(reference, PeftModel):
            if parameter.requires_grad:
                continue
            name = name.removeprefix("base_model.model.").replace(".base_layer.", ".")
        digest.update(f"{name} {parameter.dtype} {tuple(parameter.shape)}".encode())
        digest.update(_whole(parameter).contiguous().reshape(-1).view(uint8).cpu().numpy())
    template = hashlib.blake2b(str(tokenizer.chat_template).encode(), digest_size=16)
    return Identity(digest.hexdigest(), template.hexdigest())


def read_tables(folder: Path, wanted: Identity) -> dict[str, Sums]:
    """Pair -> log-probs, from all tables in a folder. Errors: ValueError naming a file that is no such table."""
    found: dict[str, Sums] = {}
    filters = [(name, "=", value) for name, value in wanted._asdict().items()]
    for path in sorted(folder.glob("*.parquet")):
        try:
            rows = pq.read_table(path, schema=SCHEMA, filters=filters)
        except (pa.ArrowException, OSError) as error:
            raise ValueError(
                f"{path} is not a table of reference log-probs ({' '.join(str(error).split())}); delete it, it will be "
                "made again"
            ) from None
        columns = (rows.column(name).to_pylist() for name in ("pair", "chosen", "rejected"))
        found.update((pair, sums) for pair, *sums in zip(*columns, strict=True))
    return found


def write_table(folder: Path, whose: Identity, known: Mapping[str, Sums]) -> Path:
    """Write all rows of one identity, whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{whose.model[:12]}-{whose.template[:4]}.parquet"
    chosen, rejected = zip(*known.values(), strict=True)
    fixed = ([value] * len(known) for value in whose)
    columns = [list(known), *fixed, list(chosen), list(rejected)]
    partial = path.with_name(path.name + ".partial")
    pq.write_table(pa.table(columns, schema=SCHEMA), partial, compression="zstd")
    os.replace(partial, path)
    return path


def _whole(parameter: Tensor) -> Tensor:
    weight = parameter.detach()
    return weight.full_tensor() if isinstance(weight, DTensor) else weight
