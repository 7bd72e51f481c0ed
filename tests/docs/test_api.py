"""The reference pages name what exists, and all that is public."""

import importlib
import inspect
import re
import sys
from typing import Any

import pytest

from tests.docs.pages import ROOT

NAMED = [
    name
    for page in ("api_kernels.md", "api_synpo.md")
    for name in re.findall(r"^::: (\S+)$", (ROOT / "docs" / page).read_text(encoding="utf-8"), re.M)
]


def find(name: str) -> Any:
    """What a reference names: a module, or what stands in one (synpo_kernels.linear_logps is both)."""
    module, _, last = name.rpartition(".")
    importlib.import_module(module)
    return getattr(sys.modules[module], last, None)


def test_every_name_exists_and_says_what_it_is() -> None:
    for name in NAMED:
        assert find(name) is not None, name
        assert inspect.getdoc(find(name)), f"{name} has no docstring"


@pytest.mark.parametrize("package", ["synpo", "synpo_kernels", "synpo.train", "synpo.integrations", "synpo.evaluate"])
def test_what_a_package_offers_is_there(package: str) -> None:
    module = importlib.import_module(package)
    there = {id(find(name)) for name in NAMED} | {id(importlib.import_module("synpo_kernels.native"))}
    assert [name for name in module.__all__ if id(getattr(module, name)) not in there] == []
