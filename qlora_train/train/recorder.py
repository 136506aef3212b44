"""Recording of GPU work as CUDA graphs: what walk_graphs.py needs of torch.cuda, and nothing of the walk.

A capture that goes wrong because the host waits for the device inside it is not wholly undone by torch
(memory of its pool may be lost, pytorch/pytorch#190308; before 2.13 the allocator even believes it goes on,
#180395). So work is watched once before it is captured.
"""

from __future__ import annotations

import gc
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Protocol

import torch

from qlora_train.memory.meter import make_workspaces

Replay = Callable[[], None]


class Recorder(Protocol):
    """Makes graphs; `CudaRecorder`, and in tests a tape."""

    def capture(self, work: Callable[[], None]) -> Replay:
        """Notes what `work` queues on the device, without doing it; returns what does it."""
        ...

    def watching(self, waits: list[str]) -> AbstractContextManager[object]:
        """Inside, operations in which the host waits for the device are noted."""
        ...

    def release(self) -> None:
        """Give the memory of graphs back that nobody holds any more."""
        ...


class CudaRecorder:
    """Graphs with one pool, captured on one stream."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._stream = device, torch.cuda.Stream(device)
        self._pool: Any = None

    def capture(self, work: Callable[[], None]) -> Replay:
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
            with torch.cuda.stream(self._stream):
                make_workspaces(self._device)  # cuBLAS keeps those of a stream for good: not in the pool
        gc.collect()  # nothing of CUDA should be destroyed during a capture
        torch.cuda.synchronize(self._device)
        torch.cuda.empty_cache()  # during one, the allocator cannot take back what it keeps for others
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.stream(self._stream):
            # thread_local: the next batches are pinned, and NCCL is watched, by threads of their own
            graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
            try:
                work()
            finally:
                graph.capture_end()
        return graph.replay

    @contextmanager
    def watching(self, waits: list[str]) -> Iterator[None]:
        before = torch.cuda.get_sync_debug_mode()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                yield
            finally:
                torch.cuda.set_sync_debug_mode(before)
        for warning in caught:
            if "synchronizing CUDA operation" in str(warning.message):
                waits.append(str(warning.message))
            elif "Synchronization debug mode" not in str(warning.message):  # of the mode itself
                warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)

    def release(self) -> None:
        self._pool = None  # torch refuses a pool that has lost all its graphs
        gc.collect()
        torch.cuda.empty_cache()
