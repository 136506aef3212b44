"""Memory of the simulated GPU: poison, limits, what the caching allocator counts, views and storages."""

from __future__ import annotations

import gc

import pytest
import torch

from simulated_gpu import device_module as sim
from simulated_gpu.allocator import GIB, KIB, MIB, Block, CachingAllocator
from simulated_gpu.fixture import SimulatedGpu


def allocate(num_bytes: int) -> torch.Tensor:
    return torch.empty(num_bytes, dtype=torch.uint8, device="sim")


def test_fresh_memory_is_poisoned(simulated_gpu: SimulatedGpu) -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        assert torch.empty(3, dtype=dtype, device="sim").isnan().all()
    assert torch.empty(2, dtype=torch.int32, device="sim").tolist() == [-1, -1]
    assert torch.empty_like(torch.ones(3, device="sim")).isnan().all()
    assert torch.empty_strided((2, 3), (1, 2), device="sim").stride() == (1, 2)
    simulated_gpu.settings.poison = False
    torch.empty(3, device="sim")


def test_allocated_bytes_are_rounded_up_and_come_back(simulated_gpu: SimulatedGpu) -> None:
    x = allocate(1)
    y = allocate(513)
    assert sim.memory_allocated() == simulated_gpu.live_bytes() == 512 + 1024
    assert sim.memory_reserved() == 2 * MIB
    view = x.view(1)
    del x, y
    assert sim.memory_allocated() == 512, "a view keeps the storage"
    del view
    assert sim.memory_allocated() == 0 and sim.max_memory_allocated() == 1536
    assert sim.memory_reserved() == 2 * MIB
    sim.empty_cache()
    assert sim.memory_reserved() == 0 and sim.max_memory_reserved() == 2 * MIB
    sim.reset_peak_memory_stats()
    assert sim.max_memory_allocated() == sim.max_memory_reserved() == 0


def test_results_of_kernels_count_too(simulated_gpu: SimulatedGpu) -> None:
    x = torch.ones(1000, device="sim")
    before = sim.memory_allocated()
    total = x + x
    values, indices = x.topk(5)
    assert sim.memory_allocated() == before + 4096 + 512 + 512
    del total, values, indices
    assert sim.memory_allocated() == before
    x.add_(1)
    x.view(10, 100).t()[3:5].unsqueeze(0)
    x[None].expand(5, -1)
    assert sim.max_memory_allocated() == before + 4096 + 512 + 512


def test_nothing_takes_no_memory(simulated_gpu: SimulatedGpu) -> None:
    empty = torch.empty(0, 5, device="sim")
    assert empty.sum(0).tolist() == [0] * 5 and (empty + 1).shape == (0, 5)
    torch.empty(0, device="sim")
    del empty
    assert sim.memory_allocated() == 0


def test_statistics_have_the_names_of_cuda(simulated_gpu: SimulatedGpu) -> None:
    kept = allocate(700)
    stats = sim.memory_stats()
    assert stats["requested_bytes.all.peak"] == 700 and stats["allocated_bytes.all.peak"] == 1024
    assert stats["reserved_bytes.all.peak"] == stats["reserved_bytes.small_pool.current"] == 2 * MIB
    assert stats["num_ooms"] == stats["num_alloc_retries"] == 0 and stats["segment.all.current"] == 1
    assert kept.numel() == 700


def test_what_is_reserved_is_not_free(simulated_gpu: SimulatedGpu) -> None:
    simulated_gpu.set_total_memory(GIB)
    assert sim.mem_get_info() == (GIB, GIB)
    x = allocate(3 * MIB)
    assert sim.mem_get_info() == (GIB - 20 * MIB, GIB)
    del x
    assert sim.mem_get_info("sim") == (GIB - 20 * MIB, GIB)
    sim.empty_cache()
    simulated_gpu.limit_memory(100 * MIB)
    assert sim.mem_get_info(torch.device("sim", 0)) == (100 * MIB, GIB)
    assert sim.get_device_properties().total_memory == GIB


def test_the_context_takes_memory_from_the_first_kernel_on(simulated_gpu: SimulatedGpu) -> None:
    simulated_gpu.settings.context_bytes = 300 * MIB
    before, total = sim.mem_get_info()
    x = torch.empty(2, device="sim")
    assert before - sim.mem_get_info()[0] == 2 * MIB
    x.fill_(1)
    assert total - sim.mem_get_info()[0] == sim.memory_reserved() + 300 * MIB


def test_memory_ends(simulated_gpu: SimulatedGpu) -> None:
    simulated_gpu.set_total_memory(64 * MIB)
    x = allocate(40 * MIB)
    with pytest.raises(torch.OutOfMemoryError, match=r"allocate 30.00 MiB. GPU 0 has a total capacity"):
        allocate(30 * MIB)
    assert sim.memory_stats()["num_ooms"] == 1
    del x
    y = allocate(50 * MIB)
    assert sim.memory_stats()["num_alloc_retries"] == 2, "the cached block of 40 MiB had to go first"
    assert sim.memory_reserved() == 50 * MIB and y.numel() == 50 * MIB


def test_memory_ends_inside_an_operator(simulated_gpu: SimulatedGpu) -> None:
    simulated_gpu.set_total_memory(50 * MIB)
    x = torch.ones(30 * MIB // 8, dtype=torch.float64, device="sim")
    with pytest.raises(torch.OutOfMemoryError):
        x + x
    with pytest.raises(torch.OutOfMemoryError):
        x.nonzero()
    gc.collect()
    assert sim.memory_allocated() == 30 * MIB


def test_a_process_gets_its_fraction(simulated_gpu: SimulatedGpu) -> None:
    simulated_gpu.set_total_memory(100 * MIB)
    sim.set_per_process_memory_fraction(0.5)
    assert sim.get_per_process_memory_fraction() == 0.5
    x = allocate(40 * MIB)
    with pytest.raises(torch.OutOfMemoryError):
        allocate(20 * MIB)
    assert sim.mem_get_info()[0] == 60 * MIB and x.numel()
    sim.set_per_process_memory_fraction(1.0, "sim:0")
    allocate(20 * MIB)
    for wrong, error in ((1, TypeError), (1.5, ValueError)):
        with pytest.raises(error):
            sim.set_per_process_memory_fraction(wrong)


def test_the_nth_allocation_fails(simulated_gpu: SimulatedGpu) -> None:
    simulated_gpu.fail_allocation(3)
    kept = [allocate(1), allocate(1)]
    with pytest.raises(torch.OutOfMemoryError):
        allocate(1)
    kept.append(allocate(1))
    assert simulated_gpu.num_allocations == 4 and sim.memory_stats()["num_ooms"] == 1
    assert sim.memory_allocated() == 3 * 512


def test_devices_count_apart(simulated_gpu: SimulatedGpu) -> None:
    simulated_gpu.num_devices = 2
    x = torch.empty(1, device="sim:1")
    assert sim.memory_allocated(0) == 0 and sim.memory_allocated("sim:1") == 512
    assert (x.to("sim:0") + 1).device == torch.device("sim", 0)


def test_large_blocks_are_split_and_joined() -> None:
    allocator = CachingAllocator(0)
    first = allocator.allocate(3 * MIB, 0)
    second = allocator.allocate(3 * MIB, 0)
    assert allocator.reserved_bytes == 20 * MIB and allocator.allocated_bytes == 6 * MIB
    allocator.free(first)
    allocator.empty_cache()
    assert allocator.reserved_bytes == 20 * MIB, "half of the segment is in use"
    allocator.free(second)
    whole = allocator.allocate(20 * MIB - 100, 0)
    assert allocator.reserved_bytes == allocator.allocated_bytes == 20 * MIB, "joined again"
    allocator.free(whole)
    allocator.empty_cache()
    assert allocator.reserved_bytes == 0


def test_small_rests_of_large_blocks_stay_with_them() -> None:
    allocator = CachingAllocator(0)
    allocator.allocate(11 * MIB, 0)
    assert allocator.reserved_bytes == allocator.allocated_bytes == 12 * MIB
    assert allocator.statistics()["requested_bytes.all.current"] == 11 * MIB


def test_streams_do_not_share_cached_blocks() -> None:
    allocator = CachingAllocator(0)
    allocator.free(allocator.allocate(KIB, 0))
    allocator.allocate(KIB, 1)
    assert allocator.reserved_bytes == 4 * MIB
    allocator.allocate(KIB, 0)
    assert allocator.reserved_bytes == 4 * MIB


def test_the_smallest_block_that_fits_is_taken() -> None:
    allocator = CachingAllocator(0)
    blocks = [allocator.allocate(size * MIB, 0) for size in (30, 14, 20)]
    for block in blocks:
        allocator.free(block)
    assert allocator.allocate(13 * MIB, 0) is blocks[1]
    assert allocator.reserved_bytes == 64 * MIB


def test_random_requests_keep_the_books_in_order() -> None:
    generator = torch.Generator().manual_seed(0)
    allocator = CachingAllocator(0)
    live: list[Block] = []
    for _ in range(600):
        if live and torch.rand((), generator=generator) < 0.45:
            allocator.free(live.pop(int(torch.randint(len(live), (), generator=generator))))
        else:
            size = int(2 ** (torch.rand((), generator=generator) * 24))
            live.append(allocator.allocate(size, 0))
        assert allocator.allocated_bytes == sum(block.num_bytes for block in live)
        assert allocator.reserved_bytes >= allocator.allocated_bytes
    for block in live:
        allocator.free(block)
    allocator.empty_cache()
    assert allocator.allocated_bytes == allocator.reserved_bytes == 0
    assert all(figures.current == 0 for figures in allocator.figures.values())


def test_storages_are_real(simulated_gpu: SimulatedGpu) -> None:
    layer_buffer = torch.zeros(64, dtype=torch.uint8, device="sim")
    assert layer_buffer.data_ptr() != 0 and layer_buffer.untyped_storage().device == torch.device("sim", 0)
    part = torch.empty(0, dtype=torch.float32, device="sim")
    part.set_(layer_buffer.untyped_storage(), 4, (2, 2), (2, 1))
    part.fill_(1)
    assert layer_buffer.view(torch.float32).tolist() == [0] * 4 + [1] * 4 + [0] * 8
    assert layer_buffer[16:32].view(torch.float32).view(2, 2).equal(part)
    assert part.untyped_storage().data_ptr() == layer_buffer.data_ptr()
    alias = torch.empty(0, dtype=torch.uint8, device="sim").set_(layer_buffer)  # type: ignore[call-overload]
    assert alias.data_ptr() == layer_buffer.data_ptr() and alias.shape == layer_buffer.shape
    parameter = torch.nn.Parameter(part)
    assert type(parameter.data) is torch.Tensor and parameter.data.data_ptr() == part.data_ptr()


def test_resizing_keeps_what_was_there(simulated_gpu: SimulatedGpu) -> None:
    x = torch.arange(4.0, device="sim")
    x.resize_(2)
    assert x.tolist() == [0, 1]
    x.resize_(6)
    assert x[:4].tolist() == [0, 1, 2, 3] and x[4:].isnan().all()
    assert sim.memory_allocated() == 512
    out = torch.empty(0, device="sim")
    torch.add(x[:2], x[2:4], out=out)
    assert out.tolist() == [2, 4]
    sorted_values, order = torch.empty(0, device="sim"), torch.empty(0, dtype=torch.int64, device="sim")
    torch.sort(out, descending=True, out=(sorted_values, order))
    assert sorted_values.tolist() == [4, 2] and order.tolist() == [1, 0]
