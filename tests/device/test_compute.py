"""The device's description and what goes through it, on the simulated GPU and on the CPU."""

from __future__ import annotations

import gc
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch
from simulated_gpu.fixture import SimulatedGpu

from qlora_train.device.compute import THE_CPU, ComputeDevice
from qlora_train.device.description import planned_gpu
from qlora_train.kernels.on_device import find_device

pytestmark = pytest.mark.filterwarnings("ignore:Triton does not run")
MIB = 2**20


def test_without_a_gpu_it_is_the_cpu() -> None:
    assert find_device() == find_device(torch.device("cpu")) == THE_CPU
    assert THE_CPU.torch == torch.device("cpu") and not THE_CPU.is_accelerator
    assert THE_CPU.side_stream() is None and THE_CPU.free_bytes > 0
    THE_CPU.wait()
    THE_CPU.make_current()
    THE_CPU.release_cached()


def test_a_gpu_that_is_here_has_an_index() -> None:
    with pytest.raises(AssertionError):
        ComputeDevice(planned_gpu("RTX 4090", None))
    assert ComputeDevice(replace(planned_gpu("RTX 4090", None), index=1)).torch == torch.device("cuda:1")


@pytest.mark.parametrize(
    ("capability", "has_bfloat16", "varlen"), [((8, 9), True, "grouped heads"), ((7, 5), False, "none")]
)
def test_it_is_read_off_the_device(
    simulated_gpu: SimulatedGpu, capability: tuple[int, int], has_bfloat16: bool, varlen: str
) -> None:
    simulated_gpu.settings.capability = capability
    found = find_device(torch.device("sim")).description
    assert (found.type, found.index, found.capability) == ("sim", 0, capability)
    assert (found.has_bfloat16, found.varlen) == (has_bfloat16, varlen)
    assert not found.has_triton and not found.has_liger and found.dequantize_kernel == "library"
    assert found.memory_bytes == 8 * 2**30 and found.num_multiprocessors == 16
    assert not found.blocks_documents and found.name == "Simulated GPU"


def test_a_new_thread_is_put_on_the_device(simulated_gpu: SimulatedGpu) -> None:
    simulated_gpu.num_devices = 2
    device = find_device(torch.device("sim", 1))
    module = torch.get_device_module("sim")
    with ThreadPoolExecutor(1) as threads:
        assert threads.submit(module.current_device).result() == 0
    with ThreadPoolExecutor(1, initializer=device.make_current) as threads:
        assert threads.submit(module.current_device).result() == 1


def test_streams_are_those_of_its_index_whatever_is_current(simulated_gpu: SimulatedGpu) -> None:
    simulated_gpu.num_devices = 2
    device = find_device(torch.device("sim", 1))
    assert device.current_stream().device.index == 1
    side = device.side_stream()
    assert side is not None and side.device.index == 1
    with device.on(side):
        assert device.current_stream() == side
    assert device.event().query() and device.event(side).query()


def test_memory_figures_and_limit(simulated_gpu: SimulatedGpu) -> None:
    device = find_device()
    gc.collect()  # what was tried on it
    free_before, before = device.free_bytes, device.allocated_bytes
    held = torch.empty(64 * MIB, dtype=torch.uint8, device=device.torch)
    assert device.allocated_bytes - before == 64 * MIB <= device.reserved_bytes
    assert free_before - device.free_bytes >= 64 * MIB
    del held
    assert device.peak_allocated_bytes >= before + 64 * MIB and device.peak_reserved_bytes >= 64 * MIB
    device.reset_peaks()
    assert device.peak_allocated_bytes == device.allocated_bytes
    device.release_cached()
    assert device.free_bytes >= free_before
    device.limit_allocator(32 * MIB)
    with pytest.raises(torch.OutOfMemoryError):
        torch.empty(64 * MIB, dtype=torch.uint8, device=device.torch)


def test_pages_are_pinned_and_a_refusal_leaves_no_error(simulated_gpu: SimulatedGpu) -> None:
    device = find_device()
    pages = torch.zeros(8192, dtype=torch.uint8)
    assert device.pin(pages) and simulated_gpu.pinned_bytes == 8192
    device.unpin(pages.data_ptr())
    assert simulated_gpu.pinned_bytes == 0
    simulated_gpu.refuse_pinning()
    assert not device.pin(pages)
    assert int(torch.ones(3, device=device.torch).sum()) == 3  # the runtime keeps no error for it
