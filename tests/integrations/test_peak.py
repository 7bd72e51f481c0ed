"""The swaps' steps take less memory than trl's own, in fresh processes."""

import sys

import pytest

from tests.integrations import peak


@pytest.mark.skipif(sys.platform != "linux", reason="a process's high-water mark is read from /proc")
def test_the_swaps_take_less_memory() -> None:
    found = peak.measure()
    # Logits of 32 pairs x 2 x 22 tokens x 32768 x 4 bytes are 180 MB; the kernel's workspace is bounded by 64.
    assert found["synpo-simpo"] < 0.6 * found["trl-simpo"], found
    assert found["synpo-dpo"] < 0.8 * found["trl-dpo"], found
