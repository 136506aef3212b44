"""Host buffers: exact sizes, used again, counted, given back to the system, never the device's."""

from __future__ import annotations

import gc
import mmap
import random
import weakref
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from qlora_train.device.compute import THE_CPU as CPU
from qlora_train.memory.host_memory import CudaPinning, HostMemory
from qlora_train.memory.meter import DeviceMeter

MIB = 2**20


def host_memory() -> HostMemory:
    return HostMemory(CPU)


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
    with DeviceMeter(CPU) as meter:
        buffer = host.borrow(MIB)
        view = buffer[: MIB // 2].view(torch.float32).view(-1, 64)
        host.give_back(buffer)
        other = host.empty(MIB)
        other.copy_(buffer)
        assert meter.peak_bytes == 0 and host.num_bytes == 2 * MIB
    assert view is not None


class FakePinning:
    """Stands for the CUDA runtime: pins until it refuses."""

    def __init__(self, refuse_after: int) -> None:
        self.refuse_after = refuse_after
        self.pinned: dict[int, int] = {}
        self.num_asked = 0
        self.unmapped_too_early: list[int] = []

    def pin(self, buffer: Tensor) -> bool:
        self.num_asked += 1
        if self.num_asked > self.refuse_after:
            return False
        self.pinned[buffer.data_ptr()] = buffer.numel()
        return True

    def unpin(self, address: int) -> None:
        del self.pinned[address]
        if not is_mapped(address):
            self.unmapped_too_early.append(address)


def is_mapped(address: int) -> bool:
    for line in Path("/proc/self/maps").read_text().splitlines():
        begin, end = (int(number, 16) for number in line.split()[0].split("-"))
        if begin <= address < end:
            return True
    return False


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs /proc")
def test_a_buffer_is_pinned_and_released_while_it_is_still_there() -> None:
    cuda = FakePinning(refuse_after=100)
    host = HostMemory(CPU, pinning=cuda)
    a, b = host.empty(5 * MIB + 1), host.borrow(MIB)
    assert cuda.pinned == {a.data_ptr(): 5 * MIB + 1, b.data_ptr(): MIB}
    saved = (a[: 4 * MIB].view(torch.float32).requires_grad_() ** 2).sum()
    del a
    assert len(cuda.pinned) == 2
    del saved
    assert list(cuda.pinned.values()) == [MIB]
    host.give_back(b)
    del b
    assert host.borrow(2 * MIB).data_ptr() in cuda.pinned  # the useless spare has gone
    assert cuda.pinned == {} and cuda.unmapped_too_early == []
    assert host.pinned and host.num_bytes == 0


def test_where_the_system_refuses_buffers_stay_pageable_and_it_is_said_once() -> None:
    cuda, said = FakePinning(refuse_after=1), []
    host = HostMemory(CPU, pinning=cuda, refused=lambda: said.append(host.pinned))
    first = host.empty(MIB)
    assert host.pinned and said == []
    second, third = host.empty(MIB), host.empty(MIB)
    assert not host.pinned and cuda.num_asked == 2  # asked once more, then no longer
    assert said == [False]
    second.fill_(1), third.fill_(2)
    assert list(cuda.pinned) == [first.data_ptr()] and host.num_bytes == 3 * MIB
    del first, second, third
    assert cuda.pinned == {} and host.num_bytes == 0


class Runtime:
    """The two functions of torch.cuda.cudart() that pinning calls."""

    def __init__(self, error: int) -> None:
        self.error, self.calls = error, list[tuple[str, int]]()

    def cudaHostRegister(self, address: int, num_bytes: int, flags: int) -> int:
        assert flags == 0
        self.calls.append(("register", num_bytes))
        return self.error

    def cudaHostUnregister(self, address: int) -> int:
        self.calls.append(("unregister", address))
        return 0


@pytest.mark.parametrize("error", [0, 2])
def test_cuda_is_asked_for_the_exact_size(error: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A refusal is followed by a launch on the device that takes the runtime's error away."""
    runtime = Runtime(error)
    monkeypatch.setattr(torch.cuda, "cudart", lambda: runtime)
    host = HostMemory(CPU, pinning=CudaPinning(CPU))
    with DeviceMeter(CPU) as meter:
        buffer = host.empty(5 * MIB + 1)
    address = buffer.data_ptr()
    assert host.pinned == (error == 0) and (meter.peak_bytes > 0) == (error != 0)
    del buffer
    released = [("unregister", address)] if error == 0 else []
    assert runtime.calls == [("register", 5 * MIB + 1), *released]


def test_without_a_gpu_nothing_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "cudart", lambda: SimpleNamespace())
    host = host_memory()
    buffer = host.empty(10)
    assert host.pinned and len(buffer) == 10


def test_spare_buffers_go_with_their_host_memory() -> None:
    host = host_memory()
    spare = host.borrow(MIB)
    gone = weakref.ref(spare.untyped_storage())
    host.give_back(spare)
    del spare, host
    gc.collect()
    is_gone = gone() is None  # not in the assert: it would print a million bytes
    assert is_gone
