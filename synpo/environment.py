"""What `synpo env` prints: versions, devices, which kernels run, and which optional libraries are there."""

import argparse
import importlib.metadata
import os
import platform

import torch

import synpo_kernels

REQUIRED = ("torch", "triton", "transformers", "peft", "accelerate", "datasets", "safetensors", "numpy")
OPTIONAL = (
    "flash-attn", "liger-kernel", "cut-cross-entropy", "bitsandbytes", "deepspeed", "pycocoevalcap", "ray", "trl",
)  # fmt: skip


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _native_kernels() -> str:
    native = getattr(synpo_kernels, "native", None)
    if native is None:
        return "missing, plain PyTorch is used"
    status = native.status()
    if status["built"]:
        return f"{status['path']} ({status['isa']})"
    return f"plain PyTorch is used: {status['reason']}"


def _devices() -> list[str]:
    if not torch.cuda.is_available():
        return []
    found = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        found.append(f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB")
    return found


def report() -> dict[str, str]:
    """Name -> value of everything worth knowing when a run behaves unexpectedly."""
    threads = f"{torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}"
    lines = {
        "synpo": _version("synpo") or "not installed, run from a checkout",
        "python": f"{platform.python_version()} on {platform.platform()}",
        "processor": f"{os.cpu_count()} cores, {threads}",
    }
    lines |= {f"gpu {index}": device for index, device in enumerate(_devices())} or {"gpu": "none"}
    lines["cpu kernels"] = _native_kernels()
    lines |= {name: _version(name) or "MISSING, reinstall synpo" for name in REQUIRED}
    lines |= {name: _version(name) or "not installed (optional)" for name in OPTIONAL}
    return lines


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """`synpo env` takes none."""


def main(args: argparse.Namespace) -> int:
    """Print the report."""
    lines = report()
    width = max(map(len, lines))
    for name, value in lines.items():
        print(f"{name:<{width}}  {value}")
    return 0
