"""Warnings of other libraries that the swaps cannot avoid; everything else stays an error."""

from pathlib import Path

import pytest

THIRD_PARTY = (
    "ignore:You are importing from 'trl.experimental'",
    # peft 0.21 asks transformers 5.23 by a name that is about to go.
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            for warning in THIRD_PARTY:
                item.add_marker(pytest.mark.filterwarnings(warning))
