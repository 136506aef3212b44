"""Host buffers: exact sizes, used again, counted, given back to the system, never the device's."""

from __future__ import annotations

import gc
import mmap
import random
import threading
import weakref
from pathlib import Path

import pytest
import torch
from simulated_gpu.fixture import SimulatedGpu
from torch import Tensor

from qlora_train.device.compute import THE_CPU, ComputeDevice
from qlora_train.device.memory_tracker import MemoryTracker
from qlora_train.weights.host_memory import HostMemory

MIB = 2**20


def host_memory() -> HostMemory:
    return HostMemory(THE_CPU)


@pytest.mark.parametrize("num_bytes", [1, 7, mmap.PAGESIZE, mmap.PAGESIZE + 1, 3 * MIB + 5])
def test_a_buffer_is_exact_aligned_and_writable(num_bytes: int) -> None:
    buffer = host_memory().empty(num_bytes)
    assert buffer.dtype == torch.uint8 and buffer.shape == (num_bytes,)
    assert buffer.untyped_storage().nbytes() == num_bytes
    assert buffer.data_ptr() % mmap.PAGESIZE == 0
    buffer.fill_(0xA5)
    assert bool((buffer == 0xA5).all())


def test_bytes_alive_are_counted_until_the_last_view_is_gone() -> None:
    host = host_memory()
    a, b = host.empty(1000), host.empty(77)
    assert host.num_bytes == 1077
    view = a[8:16].view(torch.float32)
    del a
    assert host.num_bytes == 1077
    del view
    assert host.num_bytes == 77
    y = b.to(torch.float32)
    del b
    assert host.num_bytes == 0 and len(y) == 77


def test_what_autograd_saves_is_alive() -> None:
    host = host_memory()
    x = host.empty(64).view(torch.float32).requires_grad_()
    y = (x * x).sum()
    del x
    assert host.num_bytes == 64
    del y
    assert host.num_bytes == 0


def test_spare_buffers_count_as_alive() -> None:
    host = host_memory()
    host.give_back(host.borrow(500))
    assert host.num_bytes == 500


@pytest.mark.parametrize(("spare", "asked"), [(1000, 1000), (1000, 800), (1000, 999), (5, 4), (1, 1)])
def test_a_spare_buffer_serves_up_to_a_quarter_less(spare: int, asked: int) -> None:
    host = host_memory()
    buffer = host.borrow(spare)
    address = buffer.data_ptr()
    host.give_back(buffer)
    del buffer
    again = host.borrow(asked)
    assert again.data_ptr() == address and len(again) == spare == host.num_bytes


@pytest.mark.parametrize(("spare", "asked"), [(1000, 799), (1000, 1001), (5, 3), (1000, 1), (2, 1)])
def test_a_spare_buffer_that_does_not_fit_makes_room(spare: int, asked: int) -> None:
    host = host_memory()
    host.give_back(host.borrow(spare))
    other = host.borrow(asked)
    assert len(other) == asked == host.num_bytes


def test_the_smallest_that_fits_is_taken_and_none_twice() -> None:
    host = host_memory()
    buffers = [host.borrow(size) for size in (1000, 900, 950, 900)]
    for buffer in buffers:
        host.give_back(buffer)
    taken = [host.borrow(850) for _ in range(4)]
    assert [len(buffer) for buffer in taken] == [900, 900, 950, 1000]
    assert len({buffer.data_ptr() for buffer in taken}) == 4 and host.num_bytes == 3750


def test_what_is_borrowed_is_nobody_elses() -> None:
    """Random sizes, many borrowers at a time: nobody writes over another, memory stays bounded."""
    host, rng = host_memory(), random.Random(1)
    held: list[tuple[Tensor, int]] = []
    most_held, largest = 0, 0
    for turn in range(2000):
        if held and (len(held) == 6 or rng.random() < 0.5):
            buffer, mark = held.pop(rng.randrange(len(held)))
            assert bool((buffer == mark).all())
            host.give_back(buffer)
            del buffer
            continue
        size = rng.randint(1, 5000)
        buffer = host.borrow(size).fill_(turn % 251)
        assert size <= len(buffer) <= 1.25 * size
        held.append((buffer, turn % 251))
        del buffer
        most_held, largest = max(most_held, len(held)), max(largest, size)
        # One spare at most for everything that was ever held at the same time.
        assert host.num_bytes <= most_held * 1.25 * largest
    assert most_held == 6


@pytest.mark.parametrize("spread", [0.0, 0.2])
def test_steps_of_like_sizes_use_the_same_buffers(spread: float) -> None:
    host, rng = host_memory(), random.Random(2)
    sizes = [1000, 20_000, 300_000]
    addresses: set[int] = set()
    for _ in range(50):
        buffers = [host.borrow(size - int(rng.random() * spread * size)) for size in sizes]
        addresses |= {buffer.data_ptr() for buffer in buffers}
        for buffer in buffers:
            host.give_back(buffer)
        del buffers, buffer
        assert host.num_bytes <= sum(sizes)
    if spread == 0:
        assert len(addresses) == len(sizes)


def test_the_meter_of_the_device_does_not_see_it() -> None:
    host = host_memory()
    with MemoryTracker(THE_CPU) as meter:
        buffer = host.borrow(MIB)
        view = buffer[: MIB // 2].view(torch.float32).view(-1, 64)
        host.give_back(buffer)
        other = host.empty(MIB)
        other.copy_(buffer)
        assert meter.peak_bytes == 0 and host.num_bytes == 2 * MIB
    assert view is not None


def is_mapped(address: int) -> bool:
    for line in Path("/proc/self/maps").read_text().splitlines():
        begin, end = (int(number, 16) for number in line.split()[0].split("-"))
        if begin <= address < end:
            return True
    return False


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs /proc")
def test_a_buffer_is_pinned_and_released_while_it_is_still_there(
    simulated_gpu: SimulatedGpu, sim: ComputeDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    unmapped_too_early: list[int] = []
    unpin = ComputeDevice.unpin

    def watched(device: ComputeDevice, address: int) -> None:
        if not is_mapped(address):
            unmapped_too_early.append(address)
        unpin(device, address)

    monkeypatch.setattr(ComputeDevice, "unpin", watched)
    host = HostMemory(sim)
    a, b = host.empty(5 * MIB + 1), host.borrow(MIB)
    assert simulated_gpu.pinned_bytes == 6 * MIB + 1  # the exact size
    assert host.is_pinned(a) and host.is_pinned(b[10:20]) and not host.is_pinned(torch.zeros(10))
    saved = (a[: 4 * MIB].view(torch.float32).requires_grad_() ** 2).sum()
    del a
    assert simulated_gpu.pinned_bytes == 6 * MIB + 1
    del saved
    assert simulated_gpu.pinned_bytes == MIB
    host.give_back(b)
    del b
    assert host.is_pinned(host.borrow(2 * MIB))  # the useless spare has gone
    assert simulated_gpu.pinned_bytes == 0 == host.num_bytes and unmapped_too_early == []


def test_a_refusal_is_of_one_buffer_and_said_once(simulated_gpu: SimulatedGpu, sim: ComputeDevice) -> None:
    said: list[int] = []
    host = HostMemory(sim, refused=lambda host: said.append(host.num_unpinned_bytes))
    first = host.empty(MIB)
    assert said == []
    simulated_gpu.refuse_pinning(blocks={1, 3})
    second, third, fourth = host.empty(5), host.empty(6), host.empty(7)
    assert said == [5] and host.num_unpinned_bytes == 12
    assert [host.is_pinned(buffer) for buffer in (first, second, third, fourth)] == [True, False, True, False]
    second.fill_(1), fourth.fill_(2)  # as usable as others
    torch.zeros(2, device=sim.torch).add_(1)  # a refusal leaves no error behind for the next kernel
    del second, fourth
    assert host.num_unpinned_bytes == 0 and simulated_gpu.pinned_bytes == MIB + 6


def test_weights_give_way_the_last_first_to_what_cannot_be_copied_in_pieces(
    simulated_gpu: SimulatedGpu, sim: ComputeDevice
) -> None:
    said: list[bool] = []
    host = HostMemory(sim, refused=lambda host: said.append(True))
    simulated_gpu.refuse_pinning(beyond_bytes=10 * MIB)
    weights = [host.empty(4 * MIB, gives_way=True) for _ in range(3)]
    assert [host.is_pinned(w) for w in weights] == [True, True, False] and said == [True]
    small = host.empty(MIB)
    assert host.is_pinned(small) and host.is_pinned(weights[1])  # there was room for it
    staging = host.empty(3 * MIB)
    assert host.is_pinned(staging)
    assert [host.is_pinned(w) for w in weights] == [True, False, False]
    assert host.num_unpinned_bytes == 8 * MIB and said == [True]
    del staging, small
    assert host.is_pinned(host.borrow(6 * MIB)) and host.is_pinned(weights[0])
    hopeless = host.empty(11 * MIB)
    assert not host.is_pinned(hopeless) and not any(map(host.is_pinned, weights))
    del weights, hopeless
    assert host.num_unpinned_bytes == 0 == simulated_gpu.pinned_bytes


def test_pages_are_not_unpinned_under_a_copy(simulated_gpu: SimulatedGpu, sim: ComputeDevice) -> None:
    """The copy is queued on a side stream, where it is late; who unpins waits for it."""
    host, stream = HostMemory(sim), sim.side_stream()
    simulated_gpu.refuse_pinning(beyond_bytes=MIB)
    weights = host.empty(MIB, gives_way=True)
    weights.fill_(7)
    slot = torch.zeros(MIB, dtype=torch.uint8, device=sim.torch)
    stream.wait_stream(sim.current_stream())
    with sim.on(stream):
        assert host.copy_if_pinned(weights[:1000], slot[:1000])
    offloaded = host.empty(100)
    assert host.is_pinned(offloaded) and not host.is_pinned(weights)
    weights.fill_(9)  # too late to reach the slot
    with sim.on(stream):
        assert not host.copy_if_pinned(weights, slot)
    sim.current_stream().wait_stream(stream)
    assert slot[:1000].cpu().unique().tolist() == [7]


def test_nothing_is_unpinned_between_the_question_and_the_copy(
    simulated_gpu: SimulatedGpu, sim: ComputeDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked, made = threading.Event(), threading.Event()
    order: list[str] = []

    class Hesitating(HostMemory):
        def is_pinned(self, tensor: Tensor) -> bool:
            answer = super().is_pinned(tensor)
            asked.set()
            made.wait(0.3)  # time for another thread to unpin, if it can
            order.append("copy")
            return answer

    unpin = ComputeDevice.unpin
    monkeypatch.setattr(
        ComputeDevice, "unpin", lambda device, address: (order.append("unpin"), unpin(device, address))
    )
    host = Hesitating(sim)
    simulated_gpu.refuse_pinning(beyond_bytes=4096)
    weights, slot = host.empty(4096, gives_way=True), torch.zeros(4096, dtype=torch.uint8, device=sim.torch)
    offloaded: list[Tensor] = []

    def offload() -> None:
        asked.wait(30)
        offloaded.append(host.empty(100))
        made.set()

    other = threading.Thread(target=offload)
    other.start()
    assert host.copy_if_pinned(weights, slot)
    other.join()
    assert order == ["copy", "unpin"] and simulated_gpu.pinned_bytes == 100


def test_a_spare_that_makes_room_is_not_freed_under_a_copy(
    simulated_gpu: SimulatedGpu, sim: ComputeDevice
) -> None:
    host, stream = HostMemory(sim), sim.side_stream()
    buffer, there = host.borrow(1000), torch.zeros(1000, dtype=torch.uint8, device=sim.torch)
    buffer.fill_(3)
    stream.wait_stream(sim.current_stream())
    with sim.on(stream):
        there.copy_(buffer, non_blocking=True)
    host.give_back(buffer)
    del buffer
    assert len(host.borrow(5000)) == 5000 == simulated_gpu.pinned_bytes
    sim.current_stream().wait_stream(stream)
    assert there.cpu().unique().tolist() == [3]


def test_without_a_gpu_nothing_is_pinned(simulated_gpu: SimulatedGpu) -> None:
    host = host_memory()
    buffer = host.empty(10)
    assert not host.is_pinned(buffer) and host.num_unpinned_bytes == 0 == simulated_gpu.pinned_bytes


def test_spare_buffers_go_with_their_host_memory() -> None:
    host = host_memory()
    spare = host.borrow(MIB)
    gone = weakref.ref(spare.untyped_storage())
    host.give_back(spare)
    del spare, host
    gc.collect()
    is_gone = gone() is None  # not in the assert: it would print a million bytes
    assert is_gone
