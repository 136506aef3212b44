"""The ring: a few device buffers ("slots") into which streamed layers and head tiles are read ahead of use.

The order of use is known in advance (the walk sets it), so one rule is enough:

    the slots hold the next num_slots different items of the order

While item i is in use, the items after it are being read; at the turn from forward to backward the last items
are still there and are not read again. An item is a decoder layer buffer or a tile of the head. Nothing is
copied back: a slot holds a copy of frozen bytes.

A worker thread fills slots, one at a time, in the order of requests: from RAM or a file, on a GPU by copies
on a side stream. Synchronization:

    worker   fills a slot only after the compute stream has passed the slot's last use     (`used` event)
    user     uses a slot only after the worker is done (a future), and the compute stream only after the copy
             (`copied` event); the host never waits for the device

Without a GPU there are no events, only the future; the thread is just as asynchronous.

`poison`, for tests: a slot is filled with 0xFF when its item is dropped and again before the next one is
read, so that reading a slot at the wrong time gives NaN, not plausible values.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Protocol

import torch
from torch import Tensor

from qlora_train.device.compute import ComputeDevice, Event
from qlora_train.device.step_clock import Cause
from qlora_train.weights.disk_file import PAGE_BYTES


class Reader(Protocol):
    """Copies items into slots; called on the ring's worker thread, on a GPU with the side stream current."""

    def read(self, item: int, slot: Tensor) -> None:
        """Fill the beginning of `slot` (uint8, on the device) with the item's bytes."""
        ...


def _page_aligned_slot(num_bytes: int, device: torch.device) -> Tensor:
    """A slot, uint8 [num_bytes], aligned to a page so that O_DIRECT can read into it (disk_file.py)."""
    memory = torch.empty(num_bytes + PAGE_BYTES, dtype=torch.uint8, device=device)
    start = -memory.data_ptr() % PAGE_BYTES
    return memory[start : start + num_bytes]


class Ring:
    """num_slots slots of slot_bytes each on `device`, filled by `reader`. num_reads: reads requested so
    far."""

    def __init__(
        self, reader: Reader, num_slots: int, slot_bytes: int, device: ComputeDevice, *, poison: bool = False
    ) -> None:
        self._reader, self._device = reader, device
        self._slots = [_page_aligned_slot(slot_bytes, device.torch) for _ in range(num_slots)]
        self._free = deque(range(num_slots))
        self._slot_of: dict[int, int] = {}
        self._filled: dict[int, Future[None]] = {}
        self._order: deque[int] = deque()
        self._in_use: int | None = None
        self._worker = ThreadPoolExecutor(1, "qlora_train-ring", device.make_current)
        self._stream = device.side_stream()
        self._used: list[Event | None] = [None] * num_slots
        self._copied: list[Event | None] = [None] * num_slots
        self._poison = poison
        self.num_reads = 0
        if self._stream is not None:  # the slots' memory may still be in use by what was freed before
            self._stream.wait_stream(device.current_stream())

    def set_schedule(self, order: Iterable[int]) -> None:
        """Set the order of the coming uses, replacing the previous one. Reading begins at once."""
        assert self._in_use is None, "a new order while an item is in use"
        self._order = deque(order)
        for item in [item for item, filled in self._filled.items() if filled.done() and filled.exception()]:
            self._drop(item)  # a read ahead that failed and was never used: read again
        self._refill()

    def acquire(self, item: int) -> tuple[int, Tensor]:
        """(slot number, slot) of the next item of the order; its bytes are valid for work queued from now on.

        Raises the reader's exception.
        """
        assert self._in_use is None and self._order and self._order[0] == item, (item, list(self._order)[:3])
        self._refill()
        slot = self._slot_of[item]
        with self._device.clock.spent_on(Cause.WEIGHTS):
            try:
                self._filled[item].result()
            except BaseException:
                self._drop(item)
                raise
            copied = self._copied[slot]
            if copied is not None:
                self._device.current_stream().wait_event(copied)
        self._in_use = item
        return slot, self._slots[slot]

    def release(self, item: int) -> None:
        """End the use of the item acquired last."""
        assert self._in_use == item
        self._in_use = None
        self._order.popleft()
        if self._stream is not None:
            self._used[self._slot_of[item]] = self._device.event()
        self._refill()

    def close(self) -> None:
        """End the worker thread."""
        self._worker.shutdown(wait=True, cancel_futures=True)
        if self._stream is not None:
            self._stream.synchronize()  # slots may be freed now

    def _refill(self) -> None:
        window = self._window()
        idle = deque(item for item in self._slot_of if item not in window)
        for item in window:
            if item not in self._slot_of:
                if not self._free:
                    self._drop(idle.popleft())
                self._fill(item)

    def _window(self) -> list[int]:
        """The next different items of the order, at most one per slot; the item in use comes first."""
        window: list[int] = []
        for item in self._order:
            if item not in window:
                if len(window) == len(self._slots):
                    break
                window.append(item)
        return window

    def _fill(self, item: int) -> None:
        slot = self._free.popleft()
        self._slot_of[item] = slot
        self._filled[item] = self._worker.submit(self._read, item, slot)
        self.num_reads += 1

    def _drop(self, item: int) -> None:
        slot = self._slot_of.pop(item)
        del self._filled[item]
        self._free.append(slot)
        if self._poison:
            self._worker.submit(self._overwrite, slot)

    def _read(self, item: int, slot: int) -> None:
        """Runs on the worker thread, like every write to a slot, so that writes keep the order of
        requests."""
        if self._poison:
            self._overwrite(slot)
        with self._on_side_stream(slot):
            self._reader.read(item, self._slots[slot])
        if self._stream is not None:
            self._copied[slot] = self._device.event(self._stream)

    def _overwrite(self, slot: int) -> None:
        with self._on_side_stream(slot):
            self._slots[slot].fill_(0xFF)

    @contextmanager
    def _on_side_stream(self, slot: int) -> Iterator[None]:
        """Work queued inside begins when the compute stream has passed the slot's last use."""
        if self._stream is None:
            yield
            return
        with self._device.on(self._stream):
            used = self._used[slot]
            if used is not None:
                self._stream.wait_event(used)
            yield
