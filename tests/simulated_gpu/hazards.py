"""Conflicting accesses that no wait has put in order, found by vector clocks.

Two accesses to the same bytes conflict if one of them writes. On one stream they are in order; on two they
are only if the second stream has waited, directly or by way of others, for the first. Every stream s counts
its accesses: c_s(s). It also keeps, for every other stream t, how many accesses of t are over before what it
does next: c_s(t). Recording an event copies the clock, waiting for it takes the maximum of both, component by
component (Lamport 1978; Mattern 1989). An access of t that was its n-th is over before the next of s exactly
if n <= c_s(t).

That is independent of timing: a missing wait is found in every run that comes by the place, not in one of a
thousand. The host has a clock too: what it has waited for is over before anything that it launches later.
Host threads share one clock, which can hide a wait that is missing between two of them.
"""

from __future__ import annotations

import ctypes
import weakref
import zlib
from typing import NamedTuple

import torch

from simulated_gpu import places
from simulated_gpu.places import Placement

Clock = dict[int, int]
"""Stream: number of its accesses."""


class Span(NamedTuple):
    """Bytes low <= address < high of the storage (or pinned range) that begins at `base`."""

    base: int
    low: int
    high: int


class _Access:
    __slots__ = ("high", "low", "name", "place", "stream", "time", "writes")

    def __init__(
        self, low: int, high: int, stream: int, time: int, writes: bool, name: str, place: Placement
    ) -> None:
        self.low, self.high, self.stream, self.time = low, high, stream, time
        self.writes, self.name, self.place = writes, name, place

    def __str__(self) -> str:
        return f"{self.name} (stream {self.stream}, {places.words(self.place)})"


class _Source(NamedTuple):
    """Pinned memory that a queued copy reads, with the checksum that it had when that was queued. It is not
    kept alive: that it goes too early is what `unpin` sees."""

    storage: weakref.ref[torch.UntypedStorage]
    address: int
    num_bytes: int
    checksum: int
    stream: int
    time: int
    place: Placement


def join(clock: Clock, other: Clock) -> None:
    """clock becomes the maximum of both."""
    for stream, time in other.items():
        if clock.get(stream, 0) < time:
            clock[stream] = time


class Hazards:
    """Accesses to all memory of one simulation, and what was found wrong with them."""

    def __init__(self) -> None:
        self.found: list[str] = []
        self.host: Clock = {}
        """What the host has waited for."""
        self.launched: Clock = {}
        """How far every stream has been given work."""
        self._accesses: dict[int, list[_Access]] = {}
        self._sources: list[_Source] = []

    @property
    def device_is_idle(self) -> bool:
        """As far as the host can know: it has waited for all work."""
        return all(self.host.get(stream, 0) >= time for stream, time in self.launched.items())

    def touch(
        self,
        stream: int,
        clock: Clock,
        name: str,
        reads: list[Span],
        writes: list[Span],
        place: Placement,
        waited_for: bool = False,
    ) -> None:
        """One operator on a stream. clock: the stream's, which moves on. waited_for: by the host, at once, so
        that all that comes later is after it."""
        join(clock, self.host)  # launched by the host: after all that it has waited for
        time = clock[stream] = clock.get(stream, 0) + 1
        if waited_for:
            time = 0
        else:
            self.launched[stream] = time
        for span in [span for span in reads if span not in writes]:
            self._enter(span, _Access(span.low, span.high, stream, time, False, name, place), clock)
        for span in writes:
            self._enter(span, _Access(span.low, span.high, stream, time, True, name, place), clock)

    def _enter(self, span: Span, access: _Access, clock: Clock) -> None:
        """Compares with what is known of the memory. An older access in order, of bytes that this one covers,
        can be forgotten: whoever is in order with this one is in order with that one too."""
        low, high, stream, writes = access.low, access.high, access.stream, access.writes
        kept = []
        for other in self._accesses.get(span.base, ()):
            in_order = other.stream == stream or clock.get(other.stream, 0) >= other.time
            if not in_order and (writes or other.writes) and low < other.high and other.low < high:
                self.report(
                    f"{access} {'writes' if writes else 'reads'} what {other} "
                    f"{'writes' if other.writes else 'reads'}, and neither waits for the other"
                )
            covered = low <= other.low and other.high <= high
            if not (covered and in_order and (writes or not other.writes)):
                kept.append(other)
        kept.append(access)
        self._accesses[span.base] = kept

    def free(self, base: int, owner: int, clock: Clock) -> None:
        """Memory goes back to the pool of the stream it was allocated on, which may hand it out again at
        once: all other streams must be through with it, before the owner's next work or by the host's
        waiting."""
        for access in self._accesses.pop(base, ()):
            waited = max(clock.get(access.stream, 0), self.host.get(access.stream, 0))
            if access.stream != owner and waited < access.time:
                self.report(f"memory was freed while {access} may still {_verb(access)} it")

    def unpin(self, base: int) -> None:
        """Pinned memory goes back to the system: nobody but the host orders that."""
        for access in self._accesses.pop(base, ()):
            if self.host.get(access.stream, 0) < access.time:
                self.report(f"pinned memory was unregistered while {access} may still {_verb(access)} it")

    def watch_source(self, tensor: torch.Tensor, stream: int, clock: Clock) -> None:
        """A copy from pinned memory was queued: until the host has waited, its bytes must stay."""
        self._sources.append(
            _Source(
                weakref.ref(tensor.untyped_storage()),
                tensor.data_ptr(),
                tensor.nbytes,
                _checksum(tensor.data_ptr(), tensor.nbytes),
                stream,
                clock.get(stream, 0),
                places.caller(),
            )
        )

    def check_sources(self, overwritten: torch.Tensor | None = None) -> None:
        """Of all copies, or of those whose source the device is about to overwrite; those that are over are
        let go."""
        kept = []
        for source in self._sources:
            if source.storage() is None:
                continue
            if overwritten is not None and not _overlap(overwritten, source):
                kept.append(source)
            elif _checksum(source.address, source.num_bytes) != source.checksum:
                self.report(
                    f"pinned memory was written by the host while the copy from it (stream {source.stream}, "
                    f"{places.words(source.place)}) was not waited for"
                )
            elif overwritten is None and self.host.get(source.stream, 0) < source.time:
                kept.append(source)
        self._sources = kept

    def report(self, text: str) -> None:
        """Once for each kind and place."""
        if text not in self.found:
            self.found.append(text)


def _verb(access: _Access) -> str:
    return "write" if access.writes else "read"


def _checksum(address: int, num_bytes: int) -> int:
    return zlib.crc32((ctypes.c_char * num_bytes).from_address(address))


def _overlap(tensor: torch.Tensor, source: _Source) -> bool:
    low, high = tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes
    return low < source.address + source.num_bytes and source.address < high
