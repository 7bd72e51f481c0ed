"""The memory of a training step on a CPU: what the C library does with tensors that were freed."""

import ctypes
import os

M_MMAP_THRESHOLD = -3  # malloc.h of glibc
LARGE_BYTES = 1 << 20


def return_freed_tensors() -> bool:
    """Have glibc give tensors of a megabyte and more back to the system when they are freed; whether it will.

    By default glibc raises its limit to 32 MB as such blocks come and go, and from then on activations live in its
    heap, where those that are kept pin the holes between them: a third of a step's peak (docs/log.md).
    The cost is fresh pages for every large tensor. The setting is the process's. MALLOC_MMAP_THRESHOLD_ in the
    environment takes precedence; other C libraries than glibc are left as they are.
    """
    if "MALLOC_MMAP_THRESHOLD_" in os.environ:
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return mallopt is not None and mallopt(M_MMAP_THRESHOLD, LARGE_BYTES) == 1
