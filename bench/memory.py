"""High-water marks of memory: of this process on a CPU, of the allocator on a GPU."""

import ctypes
import gc
from pathlib import Path

import torch

MB = 1 << 20


def _status_kb(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1])
    raise RuntimeError(f"/proc/self/status has no field {field}: memory of a CPU run is measured on Linux alone")


def resident_mb() -> float:
    """Resident memory of this process now, MB of 2^20 bytes."""
    return _status_kb("VmRSS") / 1024


def peak_resident_mb() -> float:
    """Highest resident memory of this process since it started or since ``Peak`` reset the mark."""
    return _status_kb("VmHWM") / 1024


class Peak:
    """Extra memory at its peak between construction and ``extra_mb()``, over what was held at construction.

    On a CPU it is the growth of the process's high-water mark, so it counts whatever the process touches: tensors,
    library buffers, workspaces. Freed heap is handed back to the system first, or reuse of it would hide growth.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        gc.collect()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(device)
            self.start = torch.cuda.memory_allocated(device) / MB
            return
        ctypes.CDLL(None).malloc_trim(0)
        self.start = resident_mb()
        try:
            Path("/proc/self/clear_refs").write_text("5")  # 5 = set VmHWM to VmRSS; proc(5)
        except OSError:
            # A mark that cannot be reset still serves while it is not above what is held now: then growth shows on
            # top of it.
            self.start = max(self.start, peak_resident_mb())

    def extra_mb(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            return torch.cuda.max_memory_allocated(self.device) / MB - self.start
        return peak_resident_mb() - self.start
