"""`make docs` builds: every link and anchor of the site leads somewhere, every name of the reference is found."""

import os
import subprocess
import sys
from pathlib import Path

from tests.docs.pages import ROOT


def test_the_site_builds(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(command, cwd=ROOT, env=os.environ, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]
    reference = (tmp_path / "site" / "api_kernels" / "index.html").read_text(encoding="utf-8")
    assert "Loss and metrics of B pairs" in reference
    assert "Your code today" in (tmp_path / "site" / "source" / "index.html").read_text(encoding="utf-8")  # README
