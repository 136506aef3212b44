"""Pages that processes share, as buffers that a device copies from."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch
from simulated_gpu.fixture import SimulatedGpu
from torch import Tensor

from qlora_train.device.compute import ComputeDevice
from qlora_train.kernels.on_device import find_device
from qlora_train.weights.host_memory import HostMemory
from qlora_train.weights.shared_pages import make_pages, open_pages
from qlora_train.weights.stores import ItemReader

NUM_BYTES = 3 * 2**20 + 5
pytestmark = [
    pytest.mark.skipif(not hasattr(os, "memfd_create"), reason="needs Linux"),
    pytest.mark.filterwarnings("ignore:Triton does not run"),
]


@pytest.fixture
def gpu(simulated_gpu: SimulatedGpu) -> Iterator[ComputeDevice]:
    yield find_device(torch.device("sim"))


def shared(host: HostMemory) -> tuple[Tensor, Tensor]:
    """The buffer of the rank that fills it, and another rank's over the same pages."""
    descriptor, pages = make_pages(NUM_BYTES)
    again = open_pages(os.getpid(), descriptor, NUM_BYTES)
    os.close(descriptor)
    return host.adopt(pages, gives_way=True), host.adopt(again, gives_way=True)


def read_all(device: ComputeDevice, host: HostMemory, buffer: Tensor) -> Tensor:
    target = torch.empty(NUM_BYTES, dtype=torch.uint8, device=device.torch)
    ItemReader(device, host).copy(buffer, target)
    return target.cpu()


def test_every_rank_pins_the_same_pages_and_lets_them_go(
    gpu: ComputeDevice, simulated_gpu: SimulatedGpu
) -> None:
    host = HostMemory(gpu)
    first, second = shared(host)
    assert host.is_pinned(first) and host.is_pinned(second)
    assert simulated_gpu.pinned_bytes == 2 * NUM_BYTES == host.num_bytes
    first.copy_(torch.arange(NUM_BYTES) % 251)
    assert torch.equal(read_all(gpu, host, second), first)
    gpu.wait()
    del first, second
    assert simulated_gpu.pinned_bytes == 0 and host.num_bytes == 0


def test_where_pinning_is_refused_they_are_copied_through_pieces(
    gpu: ComputeDevice, simulated_gpu: SimulatedGpu
) -> None:
    host = HostMemory(gpu)
    simulated_gpu.refuse_pinning()
    first, second = shared(host)
    assert not host.is_pinned(first) and host.num_unpinned_bytes == 2 * NUM_BYTES
    first.copy_(torch.arange(NUM_BYTES) % 251)
    assert torch.equal(read_all(gpu, host, second), first)
