"""What every test shares."""

import pytest
import torch


def pytest_addoption(parser: pytest.Parser) -> None:
    present = "cuda" if torch.cuda.is_available() else "cpu"
    parser.addoption("--device", choices=("cpu", "cuda"), default=present, help="of the kernel tests; a GPU if present")


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
