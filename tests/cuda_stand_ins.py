"""CUDA streams and events without a GPU: they only know which copies were queued, and who waits for how many.

On a CPU a copy is done at once, so a missing wait changes no number. What can be tested there is the waiting
itself: after which copies does the work that is queued now begin?
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode


class Stream:
    """num_copies: queued on it so far. waits_for: of each other stream, so many copies are done before what
    is queued now begins. num_done: so many the host has waited for."""

    def __init__(self) -> None:
        self.num_copies = self.num_done = 0
        self.waits_for: dict[Stream, int] = {}

    def wait_stream(self, other: Stream) -> None:
        self.waits_for[other] = other.num_copies

    def wait_event(self, event: Event) -> None:
        self.waits_for[event.stream] = max(event.num_copies, self.waits_for.get(event.stream, 0))

    def synchronize(self) -> None:
        self.num_done = self.num_copies


class Event:
    """A place in the stream that is current when it is recorded."""

    stream: Stream
    num_copies: int

    def record(self) -> None:
        self.stream = torch.cuda.current_stream()  # type: ignore[assignment]
        self.num_copies = self.stream.num_copies


class Streams(TorchDispatchMode):
    """Inside, copies count as queued on the current stream: `compute`, or `side` within torch.cuda.stream."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        super().__init__()
        self.compute, self.side = Stream(), Stream()
        self.current = self.compute
        monkeypatch.setattr(torch.cuda, "current_stream", lambda: self.current)
        monkeypatch.setattr(torch.cuda, "stream", self._within)
        monkeypatch.setattr(torch.cuda, "Event", Event)

    @contextmanager
    def _within(self, stream: Stream) -> Iterator[None]:
        before, self.current = self.current, stream
        yield
        self.current = before

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if function is torch.ops.aten.copy_.default:
            self.current.num_copies += 1
        return function(*args, **(kwargs or {}))
