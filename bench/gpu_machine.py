"""The machine with the GPU made ready: wheels unpacked, C++ kernels built, and what is installed there."""

import importlib.metadata
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any, TextIO

ROOT = Path(__file__).parent.parent
BUILD = ROOT / "build"


def unpack(wheels: Path | None) -> list[str]:
    """Folders for PYTHONPATH: this project, and the given wheels unpacked once. SystemExit where pip refuses them."""
    paths = [str(ROOT)]
    if wheels is None:
        return paths
    found = sorted(wheels.glob("*.whl"))
    if not found:
        raise SystemExit(f"--wheels: {wheels} holds no .whl file")
    site = BUILD / "gpu-site"
    listing = site / "wheels.txt"
    names = "\n".join(wheel.name for wheel in found)
    if not listing.exists() or listing.read_text() != names:
        shutil.rmtree(site, ignore_errors=True)
        done = subprocess.run(
            [
                *(sys.executable, "-m", "pip", "install", "-q", "--no-index", "--no-deps", "--no-compile"),
                *("--no-cache-dir", "--target", str(site), *map(str, found)),
            ],
            capture_output=True,
            text=True,
        )
        if done.returncode:
            raise SystemExit(f"--wheels: {done.stderr.strip()}")
        listing.write_text(names)
    return [*paths, str(site)]


def build_native(log: TextIO) -> "subprocess.Popen[bytes]":
    """Starts building csrc; install_native puts the result in its place."""
    command = [sys.executable, "setup.py", "-q", "build_ext", "--build-lib", str(BUILD / "gpu-native")]
    return subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log)


def install_native(building: "subprocess.Popen[bytes]", seconds: float) -> str:
    """Waits for the build and moves the library into synpo_kernels, whole; what came of it."""
    try:
        status = building.wait(max(seconds, 0.0))
    except subprocess.TimeoutExpired:
        building.kill()
        building.wait()
        return "not built: its time was up; PyTorch does the CPU's work"
    found = next((BUILD / "gpu-native" / "synpo_kernels").glob("_C*.so"), None)
    if status or found is None:
        return "not built, native.log says why; PyTorch does the CPU's work"
    os.replace(found, ROOT / "synpo_kernels" / found.name)
    return f"built: {found.name}"


def world() -> dict[str, Any]:
    """Versions of what the measurements depend on; "" for what is not installed."""
    import torch

    names = ("torch", "triton", "transformers", "peft", "liger-kernel", "cut-cross-entropy", "quack-kernels", "trl")
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    versions = {name: _version(name) for name in names}
    return {"python": platform.python_version(), "gpu": gpu, "cuda": torch.version.cuda, **versions}


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return ""
