"""What only hardware can show. Without a CUDA device everything here is skipped."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch

from qlora_train.device.compute import ComputeDevice
from qlora_train.kernels.on_device import find_device

if torch.cuda.is_available():  # read once in a process, at its first product: no test can set it in time
    os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"


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
def deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)  # warn_only leaves flash attention its atomics
    yield
    torch.use_deterministic_algorithms(False)
