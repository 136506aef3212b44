"""Who waits for whom on a GPU: ring, offloaded tensors and host memory while a stream is made slow.

A missing wait is a race that a fast machine may win. So the stream that could be overtaken sleeps, and what
arrives is compared with what was sent.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from qlora_train.kernels.on_device import find_device
from qlora_train.walk.host_offload import HostOffloader
from qlora_train.weights.host_memory import HostMemory
from qlora_train.weights.ring import Ring
from qlora_train.weights.stores import STAGING_BYTES, FilePart, ItemReader

pytestmark = pytest.mark.gpu
CYCLES = 20_000_000  # about 10 ms
NUM_BYTES = 2**23


def sleep() -> None:
    torch.cuda._sleep(CYCLES)


class Counted:
    """A reader of items that consist of one number, from pinned memory."""

    def __init__(self, host: HostMemory, num_items: int, *, slow: bool) -> None:
        self._items = [host.empty(NUM_BYTES).fill_(i + 1) for i in range(num_items)]
        self._slow = slow

    def read(self, item: int, slot: Tensor) -> None:
        if self._slow:
            sleep()
        slot[:NUM_BYTES].copy_(self._items[item], non_blocking=True)


@pytest.mark.parametrize("poison", [False, True])
@pytest.mark.parametrize("slow", ["uses", "copies", "both", "neither"])
@pytest.mark.parametrize("num_slots", [2, 3])
def test_a_slot_holds_its_item_for_as_long_as_it_is_used(
    gpu: torch.device, num_slots: int, slow: str, poison: bool
) -> None:
    num_items = 6
    order = [*range(num_items), *reversed(range(num_items))] * 2
    reader = Counted(HostMemory(find_device(gpu)), num_items, slow=slow in ("copies", "both"))
    ring = Ring(reader, num_slots, NUM_BYTES, find_device(gpu), poison=poison)
    ring.set_schedule(order)
    seen = []
    for item in order:
        _, slot = ring.acquire(item)
        if slow in ("uses", "both"):
            sleep()
        part = slot[:NUM_BYTES]
        seen.append(torch.stack([part.amin(), part.amax()]))
        ring.release(item)
    ring.close()
    assert [pair.tolist() for pair in seen] == [[item + 1] * 2 for item in order]


def test_an_order_that_is_broken_off_leaves_the_ring_usable(gpu: torch.device) -> None:
    ring = Ring(Counted(HostMemory(find_device(gpu)), 4, slow=True), 2, NUM_BYTES, find_device(gpu))
    ring.set_schedule(range(4))
    ring.acquire(0)
    sleep()
    ring.release(0)
    ring.set_schedule([3, 1])
    for item in (3, 1):
        _, slot = ring.acquire(item)
        assert int(slot[:NUM_BYTES].amin()) == item + 1
        ring.release(item)
    ring.close()


@pytest.mark.parametrize("offset_bytes", [0, 4096, 4096 * 3 + 17])
def test_a_file_passes_through_the_staging_pieces(
    gpu: torch.device, tmp_path: Path, offset_bytes: int
) -> None:
    num_bytes = 5 * STAGING_BYTES + 12_345
    content = torch.randint(256, (offset_bytes + num_bytes,), dtype=torch.uint8)
    (tmp_path / "file").write_bytes(content.numpy().tobytes())
    reader = ItemReader(find_device(gpu), HostMemory(find_device(gpu)))
    reader.items = {0: FilePart(tmp_path / "file", offset_bytes, num_bytes)}
    slot = torch.zeros(num_bytes + 99, dtype=torch.uint8, device=gpu)
    for _ in range(2):
        slot.fill_(7)
        sleep()
        reader.read(0, slot)
        assert torch.equal(slot[:num_bytes].cpu(), content[offset_bytes:])
        assert (slot[num_bytes:] == 7).all()
    reader.close()


def slow_down(offload: HostOffloader) -> None:
    assert offload.stream is not None
    with torch.cuda.stream(offload.stream):
        sleep()


def numbered(value: int, gpu: torch.device) -> Tensor:
    return torch.full((NUM_BYTES // 4,), float(value), device=gpu)


@pytest.mark.parametrize("slow", [False, True])
def test_parked_tensors_come_back_whatever_is_written_where_they_were(gpu: torch.device, slow: bool) -> None:
    offload = HostOffloader(find_device(gpu), HostMemory(find_device(gpu)))
    offloaded = []
    for value in range(8):
        if slow:
            slow_down(offload)
        x = numbered(value, gpu)
        offloaded.append(offload.offload(x))
        del x
        numbered(-1, gpu)  # what is freed is taken again, and written
    for value, one in enumerate(offloaded):
        if slow:
            slow_down(offload)
        one.fetch()
        back = one.take()
        assert torch.equal(back, numbered(value, gpu)), value
        del back
        numbered(-2, gpu)


def test_a_host_buffer_that_is_used_again_is_not_overtaken(gpu: torch.device) -> None:
    offload = HostOffloader(find_device(gpu), HostMemory(find_device(gpu)))
    first = offload.offload(numbered(1, gpu))
    slow_down(offload)
    first.fetch()  # gives the buffer back while the copy from it waits
    second = offload.offload(numbered(2, gpu))
    assert torch.equal(first.take(), numbered(1, gpu))
    assert torch.equal(second.take(), numbered(2, gpu))


def test_things_that_leave_together_come_back_apart(gpu: torch.device) -> None:
    offload = HostOffloader(find_device(gpu), HostMemory(find_device(gpu)))
    first, second = offload.offload_all([numbered(1, gpu), numbered(2, gpu)[: NUM_BYTES // 8]])
    assert torch.equal(second.take(), numbered(2, gpu)[: NUM_BYTES // 8])
    assert torch.equal(first.take(), numbered(1, gpu))


def test_host_memory_is_pinned_and_copies_leave_the_host_alone(gpu: torch.device) -> None:
    host = HostMemory(find_device(gpu))
    buffer = host.empty(NUM_BYTES + 1)
    assert host.is_pinned(buffer) and buffer.is_pinned()
    there = torch.zeros(NUM_BYTES + 1, dtype=torch.uint8, device=gpu)
    for source, target in ((buffer, there), (there, buffer)):
        torch.cuda.synchronize()
        torch.cuda._sleep(100 * CYCLES)
        target.copy_(source, non_blocking=True)
        done = torch.cuda.Event()
        done.record()
        assert not done.query(), "the host has waited for the copy"
    torch.cuda.synchronize()


def test_pinned_memory_that_goes_can_be_pinned_anew(gpu: torch.device) -> None:
    host = HostMemory(find_device(gpu))
    for _ in range(20):
        buffer = host.empty(NUM_BYTES)
        buffer.fill_(3)
        assert host.is_pinned(buffer) and buffer.is_pinned()
        assert int(buffer.to(gpu).amin()) == 3
        del buffer
    assert host.num_unpinned_bytes == host.num_bytes == 0
