"""Large tensors that were freed leave the process on a CPU, whatever the process did before."""

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

from synpo.train.host_memory import return_freed_tensors
from tests.train import tiny

# 64 tensors of 4 MB each side by side, every second kept: the heap could not shrink over the kept ones.
PROGRAM = """
import sys, torch
from pathlib import Path
from synpo.train.host_memory import return_freed_tensors

def resident_mb():
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096 / 2**20

torch.zeros(7 << 20)  # freed: glibc now takes blocks below its size of 28 MB from the heap
if sys.argv[1] == "set":
    assert return_freed_tensors()
before = resident_mb()
blocks = [torch.ones(1 << 20) for _ in range(64)]
del blocks[::2]
print(resident_mb() - before)
"""


def _grown_mb(mode: str, **environment: str) -> float:
    clean = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, mode], env=clean | environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return float(done.stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="a setting of glibc")
def test_freed_tensors_leave_the_process() -> None:
    assert _grown_mb("unset") > 230  # 64 blocks of 4 MB, half of them holes
    assert _grown_mb("set") < 150


def test_the_environment_takes_precedence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", "2000000")
    assert not return_freed_tensors()


@pytest.mark.parametrize("asked", [False, True])
def test_the_trainer_sets_it_where_asked(
    asked: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", "2000000")  # so that this process stays as it is
    tiny.trainer(tmp_path, low_host_memory=asked)
    assert ("low_host_memory has no effect here" in caplog.text) == asked
