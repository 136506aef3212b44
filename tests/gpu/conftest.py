"""What only hardware can show. Without a CUDA device everything here is skipped."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from qlora_train.device.compute import ComputeDevice
from qlora_train.kernels.on_device import find_device


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
def deterministic(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)  # warn_only leaves flash attention its atomics
    yield
    torch.use_deterministic_algorithms(False)
