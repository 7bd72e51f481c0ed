"""The C++ kernels under every kind of caller: several threads, a forked worker, Ctrl-C, the same call again."""

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from synpo_kernels import linear_logps, native
from tests.kernels.problems import ordinary, upstream

if not native.status()["built"]:
    pytest.skip(f"the C++ kernels are {native.status()['reason']}", allow_module_level=True)


@pytest.fixture(autouse=True)
def _thread_count() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def step(seed: int, workers: int) -> tuple[Tensor, ...]:
    """Log-probs and all gradients of a problem of several spans. The thread count is the calling thread's own."""
    torch.set_num_threads(workers)
    generator = torch.Generator().manual_seed(seed)
    hidden, weight = torch.randn(150, 48, generator=generator), torch.randn(1500, 48, generator=generator)
    targets = torch.randint(0, 1500, (150,), generator=generator)
    leaves = hidden.requires_grad_(), weight.requires_grad_()
    logps = linear_logps(*leaves, targets, workspace_mb=1)
    return logps.detach(), *torch.autograd.grad(logps, leaves, upstream(150))


@pytest.mark.parametrize("workers", [1, 2, 3, 4])
def test_the_same_call_gives_the_same_bits(workers: int) -> None:
    first = step(0, workers)
    for _ in range(5):
        assert all(map(torch.equal, first, step(0, workers)))


def test_two_threads_at_once() -> None:
    seeds = [0, 1] * 8
    alone = {seed: step(seed, 2) for seed in (0, 1)}
    with ThreadPoolExecutor(2) as pool:
        for seed, together in zip(seeds, pool.map(step, seeds, [2] * len(seeds)), strict=True):
            assert all(map(torch.equal, alone[seed], together))


class Scored(Dataset):
    """Log-probs made in the worker."""

    def __init__(self) -> None:
        self.head = ordinary(n=120, V=1203)

    def __len__(self) -> int:
        return 4

    def __getitem__(self, i: int) -> Tensor:
        rows = slice(30 * i, 30 * (i + 1))
        return linear_logps(self.head.hidden[rows], self.head.weight, self.head.targets[rows])


# Python 3.12 warns of any fork of a process with threads, which a training process always is.
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_a_forked_worker_of_a_data_loader() -> None:
    dataset = Scored()
    torch.set_num_threads(2)
    dataset[0]  # the parent's threads exist before the fork
    torch.set_num_threads(1)  # as in a worker
    want = [dataset[i] for i in range(len(dataset))]
    torch.set_num_threads(2)
    loader = DataLoader(dataset, batch_size=None, num_workers=1, multiprocessing_context="fork", timeout=60)
    for got, right in zip(loader, want, strict=True):
        assert torch.equal(got, right)
    assert torch.equal(dataset[0].isnan(), want[0].isnan())  # and the parent goes on


def long_call() -> Tensor:
    """Some twenty seconds of work on two cores, in little memory: one row of weight stands for all."""
    weight = torch.randn(1, 1024).expand(500_000, -1)
    return linear_logps(torch.randn(2048, 1024), weight, torch.zeros(2048, dtype=torch.int64))


@contextmanager
def signalled_after(seconds: float, handler: Callable[[int, object], None]) -> Iterator[list[float]]:
    """Sends this process SIGINT; gives the list that will hold when."""
    sent: list[float] = []

    def send() -> None:
        sent.append(time.monotonic())
        os.kill(os.getpid(), signal.SIGINT)

    before = signal.signal(signal.SIGINT, handler)
    timer = threading.Timer(seconds, send)
    timer.start()
    try:
        yield sent
    finally:
        timer.join()
        signal.signal(signal.SIGINT, before)


def test_ctrl_c_ends_a_long_call() -> None:
    want = step(0, 2)
    with signalled_after(0.3, signal.default_int_handler) as sent, pytest.raises(KeyboardInterrupt):
        long_call()
    assert time.monotonic() - sent[0] < 3
    assert all(map(torch.equal, step(0, 2), want))


def test_whatever_a_handler_raises_ends_a_long_call() -> None:
    class Stop(Exception):
        pass

    def handler(number: int, _: object) -> None:
        raise Stop(f"signal {number}")

    with signalled_after(0.3, handler) as sent, pytest.raises(Stop, match="signal 2"):
        long_call()
    assert time.monotonic() - sent[0] < 3


def test_a_handler_that_returns_interrupts_nothing() -> None:
    head = ordinary(n=600, H=256, V=20_000)
    torch.set_num_threads(1)
    want = linear_logps(head.hidden, head.weight, head.targets)
    seen: list[int] = []
    with signalled_after(0.05, lambda number, _: seen.append(number)):
        for _ in range(4):
            assert torch.equal(linear_logps(head.hidden, head.weight, head.targets), want)
    assert seen == [signal.SIGINT]


def test_an_instruction_set_that_is_not_here_is_named() -> None:
    with pytest.raises(ValueError, match="no instruction set 'mmx' on this processor"), native.forced_isa("mmx"):
        pass
    chosen = native.status()["isa"]
    with native.forced_isa("portable"):
        assert native.status()["isa"] == "portable"
    assert native.status()["isa"] == chosen
