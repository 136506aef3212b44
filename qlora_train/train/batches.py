"""Prefetches the next step's micro-batches while the current step computes.

    worker thread   rows -> flat micro-batches -> document layouts, in pinned memory if the device is a GPU
    main thread     takes them at their step and queues the copies, which are asynchronous from pinned memory

Exactly one step is prefetched, about 70 bytes per token. A step's batches depend on its number alone
(loop.py), so prefetching changes no bit of the result. Host memory comes from weights/uploads.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

from qlora_train.device.compute import ComputeDevice
from qlora_train.device.step_clock import Cause
from qlora_train.micro_batch import MicroBatch
from qlora_train.model.packed_tokens import PackedTokens
from qlora_train.weights.uploads import Staged, Uploads


@dataclass(frozen=True)
class _StagedBatch:
    """A micro-batch in host memory, and its tensors staged for copying to the device."""

    on_host: PackedTokens
    staged: Staged


class BatchPrefetcher:
    """Makes the micro-batches of each step one step ahead. A context manager; its thread ends with it."""

    def __init__(
        self,
        make: Callable[[int], Sequence[MicroBatch]],
        steps: range,
        device: ComputeDevice,
        uploads: Uploads,
    ) -> None:
        """make: returns a step's micro-batches; called on the worker thread. steps: those that will be taken,
        in order."""
        self._make, self._steps, self._uploads, self._clock = make, steps, uploads, device.clock
        self._worker = ThreadPoolExecutor(1, "qlora_train-batches", device.make_current)
        self._ahead: Future[list[_StagedBatch]] | None = None

    def __enter__(self) -> BatchPrefetcher:
        if self._steps:
            self._prepare(self._steps.start)
        return self

    def __exit__(self, *exc: object) -> None:
        self._worker.shutdown(cancel_futures=True)

    def take(self, step: int) -> list[PackedTokens]:
        """A step's micro-batches on the device; the copies are queued on the current stream. Raises whatever
        `make` raised."""
        assert self._ahead is not None and step == self._steps.start, "steps are taken in order"
        with self._clock.spent_on(Cause.ROWS):
            sent = [self._sent(batch) for batch in self._ahead.result()]
        self._steps = self._steps[1:]
        self._prepare(step + 1)
        return sent

    def all(self) -> Iterator[PackedTokens]:
        """The micro-batches of every step in turn."""
        while self._steps:
            yield from self.take(self._steps.start)

    def _prepare(self, step: int) -> None:
        self._ahead = self._worker.submit(self._on_host, step) if step in self._steps else None

    def _on_host(self, step: int) -> list[_StagedBatch]:
        return [self._staged(PackedTokens.from_host(batch, "cpu")) for batch in self._make(step)]

    def _staged(self, batch: PackedTokens) -> _StagedBatch:
        return _StagedBatch(batch, self._uploads.stage(batch.tensors()))

    def _sent(self, batch: _StagedBatch) -> PackedTokens:
        on_device = iter(self._uploads.send(batch.staged))
        return batch.on_host.moved(lambda _: next(on_device))
