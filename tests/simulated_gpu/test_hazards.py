"""Which faults in the order of work are found, each beside the program that does it right."""

from __future__ import annotations

import mmap
import weakref
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from simulated_gpu import device_module as sim
from simulated_gpu.fixture import SimulatedGpu, simulated_gpu_of_test


def pinned(*values: float, size: int = 0) -> Tensor:
    """float32 on registered pages, which go with it."""
    size = size or len(values)
    buffer = torch.frombuffer(mmap.mmap(-1, 4 * size), dtype=torch.float32)
    assert int(sim.cudart().cudaHostRegister(buffer.data_ptr(), buffer.nbytes, 0)) == 0
    unregister = sim.cudart().cudaHostUnregister
    weakref.finalize(buffer.untyped_storage(), unregister, buffer.data_ptr()).atexit = False
    if values:
        buffer.copy_(torch.tensor(values))
    return buffer


def test_used_before_it_is_copied(simulated_gpu: SimulatedGpu) -> None:
    host, side = pinned(1, 2), sim.Stream()
    slot = torch.zeros(2, device="sim")
    side.wait_stream(sim.current_stream())
    with sim.stream(side):
        slot.copy_(host, non_blocking=True)
    too_early = slot + 0
    [hazard] = simulated_gpu.take_hazards()
    assert "aten::add" in hazard and "copy to the device" in hazard and hazard.count("test_hazards.py:") == 2
    sim.current_stream().wait_stream(side)
    assert (slot + 0).tolist() == [1, 2]
    assert too_early.tolist() == [0, 0], "the copy was late"
    assert not simulated_gpu.hazards


def test_slot_overwritten_while_it_is_used(simulated_gpu: SimulatedGpu) -> None:
    host, side = pinned(1, 2), sim.Stream()
    slot = torch.zeros(2, device="sim")
    side.wait_stream(sim.current_stream())
    used = slot + 1
    with sim.stream(side):
        slot.copy_(host, non_blocking=True)
    [hazard] = simulated_gpu.take_hazards()
    assert "writes what aten::add" in hazard
    side.wait_event(sim.current_stream().record_event())
    with sim.stream(side):
        slot.copy_(host, non_blocking=True)
    side.synchronize()
    assert used.tolist() == [1, 1] and not simulated_gpu.hazards


def test_waits_go_by_way_of_others(simulated_gpu: SimulatedGpu) -> None:
    x = torch.zeros(2, device="sim")
    first, second, third = sim.Stream(), sim.Stream(), sim.Stream()
    first.wait_stream(sim.current_stream())
    with sim.stream(first):
        x.add_(1)
    second.wait_stream(first)
    third.wait_stream(second)
    with sim.stream(third):
        x.mul_(2)
    third.synchronize()  # the host waits: what it launches later is in order
    assert x.tolist() == [2, 2] and not simulated_gpu.hazards


def test_an_event_covers_what_was_before_it(simulated_gpu: SimulatedGpu) -> None:
    x, side, event = torch.zeros(2, device="sim"), sim.Stream(), sim.Event()
    side.wait_stream(sim.current_stream())
    event.record(side)
    with sim.stream(side):
        x.add_(1)
    sim.current_stream().wait_event(event)
    assert (x + 0).tolist() == [0, 0]
    assert len(simulated_gpu.take_hazards()) == 1
    side.synchronize()


def test_reads_do_not_conflict(simulated_gpu: SimulatedGpu) -> None:
    x, side = torch.ones(2, device="sim"), sim.Stream()
    side.wait_stream(sim.current_stream())
    with sim.stream(side):
        total = x.sum()
    (x + x).tolist()
    side.synchronize()
    assert total.item() == 2 and not simulated_gpu.hazards


def test_parts_of_one_buffer_do_not_conflict(simulated_gpu: SimulatedGpu) -> None:
    layer_buffer, side = torch.zeros(8, device="sim"), sim.Stream()
    side.wait_stream(sim.current_stream())
    with sim.stream(side):
        layer_buffer[:4].add_(1)
    layer_buffer[4:].add_(2)
    assert not simulated_gpu.hazards
    layer_buffer[3:5].add_(1)
    assert len(simulated_gpu.take_hazards()) == 1
    side.synchronize()


def test_memory_freed_while_another_stream_uses_it(simulated_gpu: SimulatedGpu) -> None:
    side, host = sim.Stream(), pinned(size=2)
    x = torch.ones(2, device="sim")
    side.wait_stream(sim.current_stream())
    with sim.stream(side):
        host.copy_(x, non_blocking=True)
    del x
    [hazard] = simulated_gpu.take_hazards()
    assert hazard.startswith("memory was freed while copy to the host")
    side.synchronize()
    assert host.isnan().all(), "the copy, late, found the memory of others"


def test_memory_freed_after_the_wait(simulated_gpu: SimulatedGpu) -> None:
    side, host = sim.Stream(), pinned(size=2)
    x = torch.ones(2, device="sim")
    side.wait_stream(sim.current_stream())
    with sim.stream(side):
        host.copy_(x, non_blocking=True)
    sim.current_stream().wait_stream(side)
    del x
    side.synchronize()
    assert host.tolist() == [1, 1]


def test_new_memory_used_by_a_stream_that_has_not_waited(simulated_gpu: SimulatedGpu) -> None:
    """What the allocating stream did with it before may not be over."""
    side = sim.Stream()
    slot = torch.empty(2, device="sim")
    with sim.stream(side):
        slot.fill_(1)
    [hazard] = simulated_gpu.take_hazards()
    assert "writes what allocation" in hazard
    sim.synchronize()


@pytest.mark.parametrize(
    ("wait", "orders"),
    (
        (lambda x: torch.zeros(2).to("sim"), False),
        (lambda x: x.nonzero(), False),
        (lambda x: x.sum().item(), True),
        (lambda x: x.cpu(), True),
        (lambda x: sim.synchronize(), True),
    ),
)
def test_waits_by_accident_order_nothing(
    simulated_gpu: SimulatedGpu, wait: Callable[[Tensor], object], orders: bool
) -> None:
    """CUDA's host waits in all of these, and a program should not build on the first two."""
    x, side = torch.ones(2, device="sim"), sim.Stream()
    x.add_(1)
    wait(x)
    with sim.stream(side):
        x.mul_(2)
    assert bool(simulated_gpu.take_hazards()) != orders
    sim.synchronize()
    assert x.tolist() == [4, 4]


def test_what_a_blocking_copy_brought_is_there(simulated_gpu: SimulatedGpu) -> None:
    x, side = torch.ones(2).to("sim"), sim.Stream()
    with sim.stream(side):
        total = x.sum()
    side.synchronize()
    assert total.item() == 2


def test_pinned_source_overwritten_while_it_is_copied(simulated_gpu: SimulatedGpu) -> None:
    host, side = pinned(1, 2), sim.Stream()
    x = torch.zeros(2, device="sim")
    side.wait_stream(sim.current_stream())
    with sim.stream(side):
        x.copy_(host, non_blocking=True)
        copied = side.record_event()
    host[0] = 7
    copied.synchronize()
    [hazard] = simulated_gpu.take_hazards()
    assert "written by the host" in hazard and "test_hazards.py:" in hazard
    assert x.tolist() == [7, 2], "the copy was late"


def test_pinned_source_reused_after_the_wait(simulated_gpu: SimulatedGpu) -> None:
    host = pinned(1, 2)
    x = torch.empty(2, device="sim")
    x.copy_(host, non_blocking=True)
    sim.current_stream().record_event().synchronize()
    host[0] = 7
    assert x.tolist() == [1, 2]


def test_pinned_source_overwritten_by_the_device(simulated_gpu: SimulatedGpu) -> None:
    host, side = pinned(1, 2), sim.Stream()
    x, y = torch.zeros(2, device="sim"), torch.ones(2, device="sim")
    x.copy_(host, non_blocking=True)
    with sim.stream(side):
        host.copy_(y, non_blocking=True)
    hazards = simulated_gpu.take_hazards()
    assert any("copy to the host" in h and "copy to the device" in h for h in hazards)
    sim.synchronize()


def test_pinned_target_read_before_the_wait(simulated_gpu: SimulatedGpu) -> None:
    """On the default stream too: only the host's waiting makes it safe."""
    host = pinned(1, 2)
    host.copy_(torch.ones(2, device="sim"), non_blocking=True)
    assert host.isnan().all()
    sim.synchronize()
    assert host.tolist() == [1, 1]


def test_pinned_memory_unregistered_while_it_is_copied(simulated_gpu: SimulatedGpu) -> None:
    host = pinned(1, 2)
    x = torch.empty(2, device="sim")
    x.copy_(host, non_blocking=True)
    del host
    [hazard] = simulated_gpu.take_hazards()
    assert hazard.startswith("pinned memory was unregistered while")


def test_asking_an_event_moves_the_device_on(simulated_gpu: SimulatedGpu) -> None:
    x, side = torch.zeros(2, device="sim"), sim.Stream()
    side.wait_stream(sim.current_stream())
    with sim.stream(side):
        x.add_(1)
        event = side.record_event()
    answers = [event.query() for _ in range(4)]
    assert answers == sorted(answers) and answers[0] is False and answers[-1] is True
    assert x.tolist() == [1, 1] and not simulated_gpu.hazards


def test_numbers_of_the_host_are_read_at_the_launch(simulated_gpu: SimulatedGpu) -> None:
    x, side, number = torch.zeros(2, device="sim"), sim.Stream(), torch.tensor(1.0)
    side.wait_stream(sim.current_stream())
    with sim.stream(side):
        x.add_(number)
    number.fill_(5)
    side.synchronize()
    assert x.tolist() == [1, 1]


def test_without_laziness_the_clocks_still_find_it(simulated_gpu: SimulatedGpu) -> None:
    simulated_gpu.settings.lazy = False
    x, side = torch.zeros(2, device="sim"), sim.Stream()
    side.wait_stream(sim.current_stream())
    with sim.stream(side):
        x.add_(1)
    assert (x + 0).tolist() == [1, 1]
    assert len(simulated_gpu.take_hazards()) == 1
    side.synchronize()


def test_a_stream_on_a_second_device(simulated_gpu: SimulatedGpu) -> None:
    simulated_gpu.num_devices = 2
    x = torch.ones(2, device="sim:1")
    side = sim.Stream("sim:1")
    side.wait_stream(sim.current_stream("sim:1"))
    with sim.stream(side):
        assert sim.current_device() == 1 and sim.current_stream() is side
        x.add_(1)
    assert sim.current_device() == 0
    sim.current_stream("sim:0").wait_stream(side)  # waits, but not for the device that uses it
    (x + 0).tolist()
    assert len(simulated_gpu.take_hazards()) == 1
    assert x.to("sim:0").tolist() == [2, 2]


def test_hazards_that_nobody_took_fail_the_test() -> None:
    failure = pytest.raises(pytest.fail.Exception, match="hazards on the simulated GPU:\n  .*neither waits")
    with failure, simulated_gpu_of_test() as gpu:
        slot = torch.empty(2, device="sim")
        with sim.stream(sim.Stream()):
            slot.fill_(1)
        assert gpu.hazards
        sim.synchronize()
    assert not torch.accelerator.is_available()


def test_out_and_back_in_through_one_pinned_buffer_is_in_order(simulated_gpu: SimulatedGpu) -> None:
    """On one stream a copy out is over before the copy back begins, although nobody has waited yet."""
    out, back = torch.full((64,), 3.0, device="sim:0"), torch.zeros(64, device="sim:0")
    side, buffer = sim.Stream(), pinned(size=64)
    side.wait_stream(sim.current_stream())
    with sim.stream(side):
        buffer.copy_(out, non_blocking=True)
        back.copy_(buffer, non_blocking=True)
    sim.current_stream().wait_stream(side)
    assert back.tolist() == [3.0] * 64
