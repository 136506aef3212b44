"""What only hardware can show. Without a CUDA device everything here is skipped."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from statistics import median

import pytest
import torch

from qlora_train.device.compute import ComputeDevice
from qlora_train.kernels.on_device import find_device

if torch.cuda.is_available():  # read once in a process, at its first product: no test can set it in time
    os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
CYCLES_AHEAD = 200_000_000  # about 0.1 s


@pytest.fixture(autouse=True)
def gpu() -> torch.device:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    return torch.device("cuda", torch.cuda.current_device())


@pytest.fixture
def device(gpu: torch.device) -> ComputeDevice:
    """The same, described."""
    return find_device(gpu)


@pytest.fixture
def gpu_seconds(gpu: torch.device) -> Callable[[Callable[[int], object]], float]:
    """Measures work(i), called with 0, 1, ...: the median of the GPU's seconds. The GPU is kept busy until
    the host is far ahead: else the time that it takes to launch would count."""

    def measure(work: Callable[[int], object], repeats: int = 60) -> float:
        events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repeats)]
        for i in range(10):
            work(i)
        torch.cuda._sleep(CYCLES_AHEAD)
        for i, (before, after) in enumerate(events):
            before.record()
            work(i)
            after.record()
        torch.cuda.synchronize()
        return median(before.elapsed_time(after) for before, after in events) / 1e3

    return measure


@pytest.fixture
def deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)  # warn_only leaves flash attention its atomics
    yield
    torch.use_deterministic_algorithms(False)
