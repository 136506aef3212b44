"""A compute device for plans, which need not exist: its tensors have shapes but no numbers.

A plan runs the program on torch's meta device. The description of the planned card (or CPU) selects the
program's paths as on the real device. If it is an accelerator, streams exist and do nothing.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from qlora_train.device.compute import ComputeDevice, Event, Stream


class PlannedDevice(ComputeDevice):
    """`ComputeDevice` on torch's meta device. description: of the planned device."""

    is_planned = True

    def __post_init__(self) -> None:
        """Accepts any description: an index is not needed."""

    @property
    def torch(self) -> torch.device:
        return torch.device("meta")

    def make_current(self) -> None:
        """Does nothing: there is one meta device."""

    def wait(self) -> None:
        """Does nothing: no work is queued."""

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
        """Does nothing: no pages were pinned."""

    def release_cached(self) -> None:
        """Does nothing: no memory is cached."""


class _Idle:
    """A stream or event without work."""

    def wait_stream(self, stream: Stream) -> None: ...

    def wait_event(self, event: Event) -> None: ...

    def synchronize(self) -> None: ...
