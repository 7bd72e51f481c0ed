"""Loads the C++ CPU kernels (csrc) over the plain PyTorch ones. Without them everything works, more slowly."""

import ctypes
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from . import contrastive, vocab_passes  # noqa: F401  define the schemas that the library implements

_FORCING = threading.Lock()


def _load() -> tuple[ctypes.CDLL | None, Path | None, str]:
    """The loaded library, its path, and why there is none."""
    path = Path(__file__).with_name("_C.abi3.so")
    if not path.exists():
        return None, None, "not built: install with a C++17 compiler and `pip install --no-build-isolation -e .`"
    try:
        torch.ops.load_library(str(path))
        library = ctypes.CDLL(str(path))
        library.synpo_isa.restype = ctypes.c_char_p
        library.synpo_force_isa.argtypes = [ctypes.c_char_p]
    except (OSError, AttributeError) as error:
        return None, path, f"not loadable, rebuild it with `pip install --no-build-isolation -e .`: {error}"
    return library, path, ""


_LIBRARY, _PATH, _REASON = _load()


def status() -> dict[str, str | bool | None]:
    """What `synpo env` prints: built, path, the instruction set in use, and the reason when the kernels are missing."""
    isa = _LIBRARY.synpo_isa().decode() if _LIBRARY is not None else None
    return {"built": _LIBRARY is not None, "path": str(_PATH) if _PATH else None, "isa": isa, "reason": _REASON or None}


@contextmanager
def forced_isa(name: str) -> Iterator[None]:
    """Runs the kernels on one instruction set, for tests: avx512_bf16, avx512, avx2, portable, or avx2_pairs and
    portable_pairs, which emulate the bfloat16 dot product. It holds for the whole process.

    Raises RuntimeError where the kernels are not built, ValueError where this processor lacks the instruction set.
    """
    if _LIBRARY is None:
        raise RuntimeError(f"the C++ kernels are {_REASON}")
    with _FORCING:
        if _LIBRARY.synpo_force_isa(name.encode()):
            raise ValueError(f"no instruction set {name!r} on this processor; it chose {status()['isa']!r} by itself")
        try:
            yield
        finally:
            _LIBRARY.synpo_force_isa(b"")
