"""Where the time of training goes: the seconds of each step, and of what happens between steps, by cause.

A GPU works behind the host, so the host's clock does not say what waited for what. There a moment is an event
with a time on the compute stream: between two of them around a wait lies what the computation waited, for a
copy or, idle, for the host. On a CPU a moment is the host's clock. Every moment begins a cause and ends the
one before, so the causes sum to the time.

No moment makes the host wait: `read` returns what was over at the step's one host read. The update of the
LoRA parameters comes after it and belongs to the next reading.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from enum import StrEnum
from itertools import pairwise
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from qlora_train.device.compute import ComputeDevice, Moment


class Cause(StrEnum):
    """What time is spent on. OPTIMIZER: reading loss and norm, clipping, the update. OTHER: all else of a
    step, with several processes also waiting for them."""

    ROWS = "waiting_for_rows"
    WEIGHTS = "waiting_for_weights"
    ACTIVATIONS = "waiting_for_activations"
    FORWARD = "forward"
    LOSS = "loss"
    BACKWARD = "backward"
    OPTIMIZER = "optimizer"
    OTHER = "other"
    EVALUATION = "evaluation"
    SAMPLES = "samples"
    CHECKPOINT = "checkpoint"

    @property
    def key(self) -> str:
        """Of its seconds in a row of metrics.jsonl and in plan.json."""
        return f"{self}_seconds"

    @property
    def in_words(self) -> str:
        return self.replace("_", " ")


BETWEEN_STEPS = (Cause.EVALUATION, Cause.SAMPLES, Cause.CHECKPOINT)
OF_A_STEP = tuple(cause for cause in Cause if cause not in BETWEEN_STEPS)


class StepClock:
    """The clock of a device's compute stream. Outside `step` and `between_steps` it stands still."""

    def __init__(self, device: ComputeDevice) -> None:
        self._device = device
        self._moments: list[tuple[Moment, Cause | None]] = []
        """With the cause that begins there; None: nothing is counted."""
        self._over: list[tuple[Moment, Cause | None]] = []
        self._is_divided = False
        self.cause: Cause | None = None
        """What time is spent on now."""

    @contextmanager
    def step(self) -> Iterator[None]:
        """A step is taken inside, whose time `spent_on` divides."""
        self._is_divided = True
        try:
            with self._counting(Cause.OTHER):
                yield
        finally:
            self._is_divided = False

    def between_steps(self, cause: Cause) -> AbstractContextManager[None]:
        """All time inside is spent on one cause."""
        return self._counting(cause)

    def spent_on(self, cause: Cause) -> AbstractContextManager[None]:
        """The time inside is spent on this cause, apart from what is said of parts of it."""
        return self._counting(cause) if self._is_divided else nullcontext()

    def host_has_waited(self) -> None:
        """To be called when the host has waited for the device: `read` will return all up to the newest
        moment."""
        self._over += self._moments
        self._moments = self._moments[-1:]

    def read(self) -> dict[str, float]:
        """Seconds by `Cause.key`, without causes that did not occur, of what was over and not read yet."""
        seconds: dict[str, float] = {}
        for (start, cause), (end, _) in pairwise(self._over):
            if cause is not None:
                seconds[cause.key] = seconds.get(cause.key, 0.0) + self._device.seconds_between(start, end)
        self._over = []
        return seconds

    @contextmanager
    def _counting(self, cause: Cause) -> Iterator[None]:
        outer = self.cause
        self._begin(cause)
        try:
            yield
        finally:
            self._begin(outer)

    def _begin(self, cause: Cause | None) -> None:
        self.cause = cause
        self._moments.append((self._device.moment(), cause))
