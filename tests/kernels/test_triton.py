"""Runs the interpreted files in a process of their own: under Triton's interpreter, or on a GPU."""

import os
import subprocess
import sys
from pathlib import Path

import pytest


def test_the_launchers(request: pytest.FixtureRequest) -> None:
    # One BLAS thread: the problems are small. Deterministic cuBLAS needs its workspace named.
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUBLAS_WORKSPACE_CONFIG": ":4096:8"}
    device = request.config.getoption("--device")
    if device == "cpu":
        environment["TRITON_INTERPRET"] = "1"
    files = "interpreted.py", "interpreted_contrastive.py", "interpreted_attention.py"
    tests = [str(Path(__file__).with_name(name)) for name in files]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--device", device, *tests],
        env=environment,
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
