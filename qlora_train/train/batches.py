"""The next step's batches, made while this step computes.

    worker thread   rows -> flat micro-batches -> document layouts, pinned where the device is a GPU
    main thread     takes them at their step and queues the copies: from pinned pages nobody waits for them

One step ahead and no further: what is held beside the current step's batches is one step's, some 70 bytes
per token. A step's batches follow from its number alone (loop.py), so who makes them, and when, changes no
bit. They are pinned by torch's own allocator, which uses a block again only when the copies from it are over;
what it rounds up is small here (host_memory.py is for what is not).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor

from qlora_train.model.packed_tokens import HostMicroBatch, PackedTokens


class BatchesAhead:
    """A context manager; the thread ends with it."""

    def __init__(
        self,
        make: Callable[[int], Sequence[HostMicroBatch]],
        steps: range,
        device: torch.device,
        *,
        pin: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        """make: the micro-batches of a step, called on the worker thread. steps: those that will be taken, in
        order; no other is made. pin: None is torch's for a GPU, and none elsewhere; a RuntimeError of it
        means that the system refuses, and nothing is pinned any more."""
        self._make, self._steps, self._device = make, steps, device
        self._pin = Tensor.pin_memory if pin is None and device.type == "cuda" else pin
        self._worker = ThreadPoolExecutor(1, "qlora_train-batches", self._begin)
        self._ahead: Future[list[PackedTokens]] | None = None

    def __enter__(self) -> BatchesAhead:
        self._prepare(self._steps.start)
        return self

    def __exit__(self, *exc: object) -> None:
        self._worker.shutdown(cancel_futures=True)

    def take(self, step: int) -> list[PackedTokens]:
        """On the device, the copies queued on the current stream. Raises what making them raised."""
        assert self._ahead is not None and step == self._steps.start, "steps are taken in order"
        batches = self._ahead.result()
        self._steps = self._steps[1:]
        self._prepare(step + 1)
        return [batch.moved(lambda t: t.to(self._device, non_blocking=True)) for batch in batches]

    def _prepare(self, step: int) -> None:
        self._ahead = self._worker.submit(self._on_host, step) if step in self._steps else None

    def _begin(self) -> None:
        if self._device.type == "cuda":  # a new thread is on the first GPU, and would pin for that one
            torch.cuda.set_device(self._device)

    def _on_host(self, step: int) -> list[PackedTokens]:
        return [PackedTokens.from_host(batch, "cpu").moved(self._pinned) for batch in self._make(step)]

    def _pinned(self, tensor: Tensor) -> Tensor:
        if self._pin is not None:
            try:
                return self._pin(tensor)
            except RuntimeError:
                self._pin = None
        return tensor
