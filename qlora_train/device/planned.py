"""A compute device that need not be here: what runs on it has shapes and no numbers.

A plan is made by running the program on torch's meta device. Which paths the program takes there follows from
the description of the card (or the CPU) that is planned for, as it does on the device itself: with streams
where it is an accelerator, which do nothing here.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from qlora_train.device.compute import ComputeDevice, Event, Stream


class PlannedDevice(ComputeDevice):
    """See the module docstring. description: of what is planned for."""

    is_planned = True

    def __post_init__(self) -> None:
        """Any description will do."""

    @property
    def torch(self) -> torch.device:
        return torch.device("meta")

    def make_current(self) -> None:
        """There is no other."""

    def wait(self) -> None:
        """Nothing is queued."""

    def side_stream(self) -> Stream | None:
        return _Idle() if self.is_accelerator else None

    def current_stream(self) -> Stream:
        return _Idle()

    def on(self, stream: Stream) -> AbstractContextManager[Any]:
        return nullcontext()

    def event(self, stream: Stream | None = None) -> Event:
        return _Idle()

    def pin(self, pages: Tensor) -> bool:
        return True

    def unpin(self, address: int) -> None:
        """There are no pages."""

    def release_cached(self) -> None:
        """Nothing is held."""


class _Idle:
    """A stream or an event on which nothing ever runs."""

    def wait_stream(self, stream: Stream) -> None: ...

    def wait_event(self, event: Event) -> None: ...

    def synchronize(self) -> None: ...
