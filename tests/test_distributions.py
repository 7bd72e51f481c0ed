"""The wheel and the sdist hold what they must; a wheel compiled from the sdist works where nothing else of it is."""

import email
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest

from synpo_kernels import native

ROOT = Path(__file__).parents[1]
BUILD = """
import sys, warnings
sys.modules["torch"] = None  # as on a machine without it: no C++ kernels
warnings.simplefilter("ignore")
from setuptools import build_meta
print(build_meta.build_sdist("dist"), build_meta.build_wheel("dist"))
"""


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of an sdist and a wheel, made from a copy of this tree."""
    tree = tmp_path_factory.mktemp("tree")
    leave = shutil.ignore_patterns("*.so", "__pycache__", "*.egg-info", ".*", "runs", "build", "dist", "models")
    for path in ROOT.iterdir():
        if path.is_dir() and path.name in ("synpo", "synpo_kernels", "csrc", "bench", "docs", "examples", "tests"):
            shutil.copytree(path, tree / path.name, ignore=leave)
        elif path.is_file() and not path.name.startswith("."):
            shutil.copy2(path, tree)
    done = subprocess.run([sys.executable, "-c", BUILD], cwd=tree, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return tree / "dist"


def test_the_wheel(built: Path) -> None:
    (path,) = built.glob("*.whl")
    with zipfile.ZipFile(path) as wheel:
        names = set(wheel.namelist())
        info = next(name for name in names if name.endswith(".dist-info/METADATA"))
        metadata = email.message_from_bytes(wheel.read(info))
        entry_points = wheel.read(info.replace("METADATA", "entry_points.txt")).decode()
    for folder in ("synpo", "synpo_kernels"):
        sources = {f"{p.relative_to(ROOT)}" for p in (ROOT / folder).rglob("*.py")}
        assert sources <= names
    assert "synpo_kernels/py.typed" in names
    weights = {f"{p.relative_to(ROOT)}" for p in (ROOT / "synpo/miniature/weights").iterdir()}
    assert "synpo/miniature/weights/model.safetensors" in weights <= names
    assert {name.split("/")[0] for name in names} == {"synpo", "synpo_kernels", info.split("/")[0]}
    assert "synpo = synpo.cli:main" in entry_points
    assert metadata["Name"] == "synpo"
    assert metadata["Requires-Python"] == ">=3.11"
    assert metadata["License-Expression"] == "Apache-2.0"
    assert "torch>=2.11" in metadata.get_all("Requires-Dist")
    assert metadata.get_payload().startswith("# synpo")


def test_the_sdist_builds_the_kernels(built: Path) -> None:
    (path,) = built.glob("*.tar.gz")
    with tarfile.open(path) as sdist:
        names = {name.partition("/")[2] for name in sdist.getnames()}
    for folder in ("csrc", "synpo_kernels", "tests", "examples"):
        files = {str(p.relative_to(ROOT)) for p in (ROOT / folder).rglob("*") if p.suffix in (".cpp", ".h", ".py")}
        assert files <= names, files - names
    assert {"setup.py", "pyproject.toml", "LICENSE", "constraints.txt", "Makefile", "README.md"} <= names
    assert not {name for name in names if name.endswith((".so", ".pyc"))}


def test_the_library_holds_for_every_python_and_torch() -> None:
    """What the wheel's tag promises: nothing of Python's, and of torch's only the stable C interface."""
    path = native.status()["path"]
    if path is None or shutil.which("nm") is None:
        pytest.skip("needs the C++ kernels and nm")
    done = subprocess.run(["nm", "-D", "--undefined-only", str(path)], check=True, capture_output=True, text=True)
    wanted = {line.split()[-1].partition("@")[0] for line in done.stdout.splitlines()}
    assert {"torch_call_dispatcher", "torch_library_impl"} <= wanted
    python = re.compile(r"_?Py[A-Z_]")
    torch_classes = re.compile(r"_ZNK?(2at|3c10|5torch|8caffe2)")
    assert not [name for name in wanted if python.match(name) or torch_classes.match(name)]


def test_the_wheel_works_in_an_environment_of_its_own(built: Path, tmp_path: Path) -> None:
    """Compiled from the sdist, installed where nothing of this tree is; what it depends on is lent by this one."""
    if not native.status()["built"]:
        pytest.skip("needs the compiler that built the C++ kernels here")
    (sdist,) = built.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path, filter="data")
    (tree,) = (path for path in tmp_path.iterdir() if path.is_dir())
    build = "from setuptools import build_meta; build_meta.build_wheel('dist')"
    _run(sys.executable, "-c", build, cwd=tree)
    (wheel,) = (tree / "dist").glob("*.whl")
    assert "-cp311-abi3-" in wheel.name
    _run(sys.executable, "-m", "venv", "--without-pip", str(tmp_path / "own"), cwd=tmp_path)
    python = tmp_path / "own" / "bin" / "python"
    install = ("install", "--no-deps", "--no-index", "-q", "--disable-pip-version-check", str(wheel))
    _run(sys.executable, "-m", "pip", "--python", str(python), *install, cwd=tmp_path)
    (packages,) = (tmp_path / "own").glob("lib/python*/site-packages")
    # A folder named in a .pth file is searched, but its own .pth files are not read: this tree stays out of sight.
    (packages / "lent.pth").write_text(sysconfig.get_path("purelib") + "\n")
    where = _run(
        str(python), "-c", "import synpo, synpo_kernels; print(synpo.__file__, synpo_kernels.__file__)", cwd=tmp_path
    )
    assert where.count(str(packages)) == 2
    library = str(packages / "synpo_kernels" / "_C.abi3.so")
    assert library in _run(str(tmp_path / "own" / "bin" / "synpo"), "env", cwd=tmp_path)
    _run(str(python), "-m", "synpo_kernels.selftest", cwd=tmp_path)


def _run(*command: str, cwd: Path) -> str:
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    return done.stdout
