"""Streams and events as torch.cuda's, where late work is as late as the program allows.

Work on the default stream runs at once. Work on a side stream that returns nothing new is queued, and runs
when something waits for it: an event, a stream that waits for it and is used, the host. A program that reads
too early then reads old bytes, always, not once in a while. Copies to pinned memory are queued on every
stream, since the host is the one that must wait for them.

Late alone shows only half of the faults: a slot that is overwritten too early has been read already. The
clocks that streams and events carry show the other half (hazards.py).
"""

from __future__ import annotations

import ctypes
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from simulated_gpu import places
from simulated_gpu.hazards import Clock, Span, join
from simulated_gpu.simulation import DEVICE_TYPE, Simulation, device_at, index_of, running


class _Work:
    """Something queued. memory: what it works on, kept until it is done."""

    __slots__ = ("_run", "memory")

    def __init__(self, run: Callable[[], object], memory: Sequence[Tensor | None]) -> None:
        self._run, self.memory = run, memory

    def __call__(self) -> None:
        self._run()


class Stream:
    """As torch.cuda.Stream. device: whose stream; None, no index or a negative one: the current device's.

    priority is taken and means nothing here. Raises the TypeError of an unknown argument: the handles of
    foreign streams, which CUDA takes, do not exist.
    """

    def __init__(self, device: Any = None, priority: int = 0, **kwargs: Any) -> None:
        if kwargs:
            raise TypeError(f"a simulated stream takes no {', '.join(kwargs)}")
        index = index_of(device, optional=True)
        index = running().thread.device if index < 0 else device_at(index).index
        self._set_up(running(), index, priority, is_default=False)

    @classmethod
    def make_default(cls, simulation: Simulation, index: int) -> Stream:
        """The default stream of a device that is being made."""
        stream = cls.__new__(cls)
        stream._set_up(simulation, index, priority=0, is_default=True)
        return stream

    def _set_up(self, simulation: Simulation, index: int, priority: int, *, is_default: bool) -> None:
        self._simulation, self.device_index, self.priority = simulation, index, priority
        self.is_default = is_default
        self.device = torch.device(DEVICE_TYPE, index)
        with simulation.lock:
            self.stream_id = len(simulation.streams)
            simulation.streams.append(self)
        self.clock: Clock = {}
        self.num_queued = self.num_done = 0
        self._queue: deque[_Work] = deque()
        self._writes_to_host: dict[int, int] = {}
        """Where pinned memory begins -> the last piece of work queued here that writes it."""

    @property
    def cuda_stream(self) -> int:
        """The handle that a native library would be given: 0 for a default stream."""
        return 0 if self.is_default else self.stream_id

    @property
    def _as_parameter_(self) -> ctypes.c_void_p:
        return ctypes.c_void_p(self.cuda_stream)

    @property
    def is_late(self) -> bool:
        """Whether its work waits in the queue until it is needed."""
        return self._simulation.settings.lazy and not self.is_default

    @property
    def is_behind(self) -> bool:
        """Whether it has work that is not done."""
        return bool(self._queue)

    def add(self, run: Callable[[], object], bases: Sequence[int] = ()) -> None:
        """Queues work. bases: addresses of the storages that it works on."""
        with self._simulation.lock:
            memory = [self._simulation.host_memory.get(base) for base in bases]
            self._queue.append(_Work(run, memory))
            self.num_queued += 1

    def will_write_host(self, base: int) -> None:
        """The piece queued last writes the pinned memory that begins at `base`."""
        self._writes_to_host[base] = self.num_queued

    def finish_writes_to_host(self, base: int) -> None:
        """Does what is queued up to the last piece that writes the pinned memory at `base`: what is queued
        here from now on will read that."""
        self.catch_up(self._writes_to_host.pop(base, 0))

    def catch_up(self, until: int | None = None) -> None:
        """Does what is queued: all of it, or the first `until` pieces ever queued here."""
        if not self._queue:
            return
        with self._simulation.lock:
            goal = self.num_queued if until is None else until
            while self._queue and self.num_done < goal:
                work = self._queue.popleft()
                self.num_done += 1
                work()

    def enter(self, name: str, reads: list[Span], writes: list[Span], *, waited_for: bool = False) -> None:
        """An operator's accesses, at this point of the stream."""
        simulation, place = self._simulation, places.caller()
        with simulation.lock:
            simulation.hazards.touch(self.stream_id, self.clock, name, reads, writes, place, waited_for)

    def join_host(self) -> None:
        """The host has waited for all that was queued here."""
        with self._simulation.lock:
            self.catch_up()
            join(self._simulation.hazards.host, self.clock)
            self._simulation.hazards.check_sources()
            self._simulation.managed.follow_device()

    def wait_event(self, event: Event) -> None:
        event.wait(self)

    def wait_stream(self, stream: Stream) -> None:
        self.wait_event(stream.record_event())

    def record_event(self, event: Event | None = None) -> Event:
        event = Event() if event is None else event
        event.record(self)
        return event

    def synchronize(self) -> None:
        self._simulation.host_reads.note_synchronization("stream")
        self.join_host()

    def query(self) -> bool:
        """Whether all is done. Asking lets the device do one piece more, so that a loop of asking ends."""
        if self.is_behind:
            self.catch_up(self.num_done + 1)
            return False
        self.join_host()
        return True

    def __enter__(self) -> Stream:
        thread = self._simulation.thread
        thread.outer.append((thread.device, self._simulation.current_stream(self.device_index)))
        make_current(self)
        return self

    def __exit__(self, *exception: object) -> None:
        thread = self._simulation.thread
        device, stream = thread.outer.pop()
        make_current(stream)
        thread.device = device

    def __repr__(self) -> str:
        return f"<torch.{DEVICE_TYPE}.Stream device={self.device} number={self.stream_id}>"


def make_current(stream: Stream) -> None:
    """For the calling thread; its device becomes the current one, as CUDA has it."""
    thread = running().thread
    thread.device = stream.device_index
    thread.streams[stream.device_index] = stream


class Event:
    """As torch.cuda.Event: a place in a stream. Recorded at first on one device, it stays that device's."""

    def __init__(
        self,
        enable_timing: bool = False,
        blocking: bool = False,
        interprocess: bool = False,
        external: bool = False,
    ) -> None:
        if interprocess or external:
            raise NotImplementedError("a simulated event is of one process, and of no graph")
        self._has_time = enable_timing
        self._stream: Stream | None = None
        self._position = 0
        self._clock: Clock = {}
        self._seconds = 0.0

    @property
    def device(self) -> torch.device | None:
        """Known once it is recorded."""
        return None if self._stream is None else self._stream.device

    def record(self, stream: Stream | None = None) -> None:
        """Raises the RuntimeError of CUDA for a stream of another device than at first."""
        simulation = running()
        stream = simulation.current_stream(simulation.thread.device) if stream is None else stream
        if self._stream is not None and self._stream.device_index != stream.device_index:
            raise RuntimeError(
                f"Event device {self._stream.device_index} does not match recording stream's device "
                f"{stream.device_index}."
            )
        with simulation.lock:
            self._stream, self._position = stream, stream.num_queued
            self._clock = dict(stream.clock)
            join(self._clock, simulation.hazards.host)
            self._seconds = time.perf_counter()

    def wait(self, stream: Stream | None = None) -> None:
        """Later work of `stream` begins after this event. One that was never recorded is over already."""
        simulation = running()
        stream = simulation.current_stream(simulation.thread.device) if stream is None else stream
        recorded = self._stream
        if recorded is None:
            return
        with simulation.lock:
            join(stream.clock, self._clock)
            if stream.is_late:
                stream.add(_CatchUp(recorded, self._position))
            else:
                recorded.catch_up(self._position)

    def query(self) -> bool:
        """Whether it is over. Asking lets the device do one piece more, so that a loop of asking ends."""
        if self._stream is None:
            return True
        if self._stream.num_done < self._position:
            self._stream.catch_up(self._stream.num_done + 1)
            return False
        self._join_host()
        return True

    def synchronize(self) -> None:
        running().host_reads.note_synchronization("event")
        if self._stream is not None:
            self._stream.catch_up(self._position)
            self._join_host()

    def elapsed_time(self, end_event: Event) -> float:
        """Milliseconds of the host's clock between the two records: there is no other clock. Raises CUDA's
        errors, that of an event which is not over also where it is but the host has not waited for it."""
        if not (self._has_time and end_event._has_time):
            raise ValueError("Both events must be created with argument 'enable_timing=True'.")
        if self._stream is None or end_event._stream is None:
            raise ValueError("Both events must be recorded before calculating elapsed time.")
        if self.device != end_event.device:
            raise RuntimeError("CUDA error: invalid resource handle")
        host = running().hazards.host
        for event in (self, end_event):
            if any(host.get(stream, 0) < time for stream, time in event._clock.items()):
                raise RuntimeError("CUDA error: device not ready")
        return (end_event._seconds - self._seconds) * 1000

    def _join_host(self) -> None:
        simulation = running()
        with simulation.lock:
            join(simulation.hazards.host, self._clock)
            simulation.hazards.check_sources()
            simulation.managed.follow_device()


class _CatchUp:
    """Queued on a late stream: another one must have come this far."""

    __slots__ = ("_position", "_stream")

    def __init__(self, stream: Stream, position: int) -> None:
        self._stream, self._position = stream, position

    def __call__(self) -> None:
        self._stream.catch_up(self._position)


class StreamContext:
    """As torch.cuda.StreamContext: `with torch.sim.stream(s)`. Does nothing for None."""

    def __init__(self, stream: Stream | None) -> None:
        self.stream = stream

    def __enter__(self) -> None:
        if self.stream is not None:
            self.stream.__enter__()

    def __exit__(self, type: Any, value: Any, traceback: Any) -> None:
        if self.stream is not None:
            self.stream.__exit__()
