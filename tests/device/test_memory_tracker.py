"""The meter: what counts as a byte of the device, and when it stops counting."""

from __future__ import annotations

import mmap
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from qlora_train.device import memory_tracker as meter_module
from qlora_train.device.compute import THE_CPU, ComputeDevice
from qlora_train.device.description import planned_gpu
from qlora_train.device.memory_tracker import (
    MemoryTracker,
    make_workspaces,
    process_peak_bytes,
    reset_process_peak,
)
from qlora_train.kernels.on_device import find_device

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
KIB = 1024


def device_of(name: str) -> ComputeDevice:
    if name == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    return find_device(torch.device(name))


def block(device: ComputeDevice, num_kib: int = 64) -> Tensor:
    return torch.zeros(num_kib * KIB, dtype=torch.uint8, device=device.torch)


@pytest.mark.parametrize("name", DEVICES)
def test_live_falls_and_peak_stays(name: str) -> None:
    device = device_of(name)
    before = block(device)
    with MemoryTracker(device) as meter:
        assert (meter.live_bytes, meter.peak_bytes) == (0, 0)
        a, b = block(device), block(device, 128)
        assert meter.live_bytes == meter.peak_bytes == 192 * KIB
        del b
        assert (meter.live_bytes, meter.peak_bytes) == (64 * KIB, 192 * KIB)
        meter.reset_peak()
        assert meter.peak_bytes == 64 * KIB
        c = a + 1
        assert meter.peak_bytes == 128 * KIB
        del a, c
        assert meter.live_bytes == 0
    assert before is not None


@pytest.mark.parametrize("name", DEVICES)
def test_views_and_in_place_results_count_nothing_and_hold_their_storage(name: str) -> None:
    device = device_of(name)
    with MemoryTracker(device) as meter:
        whole = block(device)
        part = whole.view(4, -1)[1:3].t()
        whole.add_(1)
        torch.add(whole, 1, out=whole)
        assert meter.peak_bytes == 64 * KIB
        del whole
        assert meter.live_bytes == 64 * KIB  # the view still needs it
        del part
        assert meter.live_bytes == 0


@pytest.mark.parametrize("name", DEVICES)
def test_what_autograd_saves_counts_until_backward(name: str) -> None:
    device = device_of(name)
    x = torch.ones(4 * KIB, device=device.torch, requires_grad=True)  # 16 KiB
    with MemoryTracker(device) as meter:
        y = (x.exp() * 2).sum()
        assert meter.live_bytes >= 16 * KIB  # exp saves its result
        y.backward()
        del y
        assert meter.live_bytes == 16 * KIB  # the gradient
        x.grad = None
        assert meter.live_bytes == 0


def test_memory_that_torch_did_not_allocate_is_not_the_devices() -> None:
    with MemoryTracker(THE_CPU) as meter:
        host = torch.frombuffer(mmap.mmap(-1, 64 * KIB), dtype=torch.uint8)
        view = host[KIB:].view(torch.int32)
        assert meter.peak_bytes == 0
        copy = view.clone()
        assert meter.live_bytes == 63 * KIB
    assert copy is not None


def test_a_resized_storage_counts_with_its_new_size() -> None:
    with MemoryTracker(THE_CPU) as meter:
        x = block(THE_CPU, 1)
        x.resize_(3 * KIB)
        assert meter.live_bytes == 3 * KIB


def test_after_the_block_nothing_more_is_counted() -> None:
    with MemoryTracker(THE_CPU) as meter:
        x = block(THE_CPU)
    y = block(THE_CPU)
    assert meter.live_bytes == 64 * KIB
    del x, y
    assert meter.live_bytes == 0


def test_the_process_peak_sees_pages_that_were_touched() -> None:
    size = 96 * KIB * KIB
    could_reset = reset_process_peak()
    before = process_peak_bytes()
    with mmap.mmap(-1, size) as pages:  # new pages, not some that the heap has to spare
        pages[::4096] = b"x" * (size // 4096)
    assert could_reset is False or process_peak_bytes() - before > 0.9 * size
    if could_reset:
        assert reset_process_peak()
        assert process_peak_bytes() < before + size // 2


def test_a_librarys_workspaces_are_there_before_counting_begins(monkeypatch: pytest.MonkeyPatch) -> None:
    allocated = [5 * KIB]

    def make(device: ComputeDevice) -> None:
        allocated[0] += KIB

    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: allocated[0])
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: allocated[0])
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: None)
    monkeypatch.setattr(meter_module, "make_workspaces", make)
    gpu = ComputeDevice(replace(planned_gpu("RTX 3060", None), index=0))
    with MemoryTracker(gpu) as meter:
        assert allocated == [6 * KIB]
        assert (meter.live_bytes, meter.peak_bytes) == (0, 0)
        allocated[0] += KIB
        assert (meter.live_bytes, meter.peak_bytes) == (KIB, KIB)


@pytest.mark.parametrize("name", DEVICES)
def test_making_workspaces_leaves_no_tensor(name: str) -> None:
    device = device_of(name)
    make_workspaces(device)
    with MemoryTracker(device) as meter:
        make_workspaces(device)
        assert meter.live_bytes == 0


class _Doubled(torch.autograd.Function):
    """A fresh gradient each time; notes which memory comes by."""

    @staticmethod
    def forward(ctx, x: Tensor, seen: list[int]) -> Tensor:
        ctx.seen = seen
        return x * 2

    @staticmethod
    def backward(ctx, gradient: Tensor):
        ctx.seen.append(gradient.data_ptr())
        made = gradient * 2
        ctx.seen.append(made.data_ptr())
        return made, None


@pytest.mark.parametrize("is_metered", [False, True])
@pytest.mark.parametrize("is_held", [False, True])
def test_autograd_adds_in_place_under_the_meter_as_without(is_metered: bool, is_held: bool) -> None:
    """A gradient that only autograd holds is added to in place; one that the caller holds is not."""
    first, branch = [], []
    x = torch.randn(64, 64, requires_grad=True)
    gradient = torch.randn(64, 64)
    with MemoryTracker(THE_CPU) if is_metered else nullcontext():
        h = _Doubled.apply(x, first)
        other = h if is_held else _Doubled.apply(h, branch)
        y = other + _Doubled.apply(h, branch)
        y.backward(gradient)
    arrived = first[0]
    assert (arrived in branch[1::2]) != is_held
