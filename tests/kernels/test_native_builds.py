"""csrc/cpu is C++17 for other compilers and processors too: checked, without making code, by those found here.

`make sanitize` builds and runs it; CXX and RUNNER of csrc/sanitize/run choose a compiler and what runs its program.
"""

import shutil
import subprocess
from pathlib import Path

import pytest

CSRC = Path(__file__).parents[2] / "csrc"


@pytest.mark.parametrize("compiler", ["clang++", "aarch64-linux-gnu-g++"])
def test_other_compilers_accept_it(compiler: str) -> None:
    if shutil.which(compiler) is None:
        pytest.skip(f"{compiler} is not installed")
    flags = ["-std=c++17", "-fsyntax-only", "-Wall", "-Wextra", "-Werror", "-Wno-psabi"]
    folders = [f"-I{CSRC}", f"-I{CSRC / 'sanitize' / 'stand_in'}"]
    sources = [*sorted(map(str, CSRC.glob("cpu/*.cpp"))), str(CSRC / "sanitize" / "main.cpp")]
    done = subprocess.run([compiler, *flags, *folders, *sources], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[:3000]
