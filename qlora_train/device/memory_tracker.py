"""Measured memory use: one definition of "peak" for logs, tests and measurements.

Three measurements, independent of the planner's formulas:

- `MemoryTracker`: bytes of tensors on the compute device. On a GPU they come from torch's allocator. The CPU
  allocator has no counters, so a dispatch mode sees every operation: a result whose storage is none of its
  inputs' is new and counts until that storage is freed; a view counts nothing. Not included are scratch
  inside one operation and memory that torch did not allocate (a mapped file, a numpy array): host buffers are
  allocated that way, so that they do not count as device memory on a CPU either. Not included on a GPU are
  the libraries' workspaces, which a plan counts with the context (device/context.py).
- `peak_bytes`, for the log: tensors on a GPU, the whole process elsewhere.
- `process_peak_bytes` (process_peak.py): peak resident memory of this process.

Why not `tracemalloc` or a profiler: the first does not see tensors, the second records every event of a run.
"""

from __future__ import annotations

import weakref
from types import TracebackType
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from qlora_train.device.compute import ComputeDevice
from qlora_train.device.context import make_workspaces
from qlora_train.device.process_peak import process_peak_bytes as process_peak_bytes
from qlora_train.device.process_peak import reset_process_peak as reset_process_peak

_USES_BY_AUTOGRAD = 4


class MemoryTracker:
    """Context manager that counts the bytes of tensors allocated on `device` since it was entered.

    live_bytes: now. peak_bytes: the largest since entering or `reset_peak`. On the CPU only operations of the
    thread that entered are counted (autograd's backward runs in it too). On a GPU the libraries' workspaces
    are allocated on entering, if they do not exist yet.
    """

    def __init__(self, device: ComputeDevice) -> None:
        self._device = device
        self._watch = None if device.is_accelerator else StorageMeter("cpu")
        self._bytes_before = 0

    def __enter__(self) -> MemoryTracker:
        if self._watch is not None:
            self._watch.__enter__()
        else:
            make_workspaces(self._device)
            self._bytes_before = self._device.allocated_bytes
            self.reset_peak()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._watch is not None:
            self._watch.__exit__(kind, error, trace)

    @property
    def live_bytes(self) -> int:
        if self._watch is not None:
            return self._watch.live_bytes
        return self._device.allocated_bytes - self._bytes_before

    @property
    def peak_bytes(self) -> int:
        if self._watch is not None:
            return self._watch.peak_bytes
        return self._device.peak_allocated_bytes - self._bytes_before

    def reset_peak(self) -> None:
        """Let the peak begin at what is alive now."""
        if self._watch is not None:
            self._watch.reset_peak()
        else:
            self._device.reset_peaks()


class StorageMeter(TorchDispatchMode):
    """Dispatch mode that sums the bytes of storages that operations allocate on devices of one type.

    live_bytes, peak_bytes: as of `MemoryTracker`. cause: name under which new storages are counted. live,
    peak: the same bytes by cause. is_paused: new storages are not counted.
    """

    def __init__(self, device_type: str) -> None:
        super().__init__()
        self._device_type = device_type
        self.live_bytes = self.peak_bytes = 0
        self.live: dict[str, int] = {}
        self.peak: dict[str, int] = {}
        self.cause = ""
        self.is_paused = False
        self._alive: dict[int, StorageReference] = {}

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if function is torch.ops.aten.add.Tensor and _accumulates_in_place(args):
            return args[0].add_(args[1])
        output = function(*args, **kwargs)
        made = [
            t for t in tree_leaves(output) if isinstance(t, Tensor) and t.device.type == self._device_type
        ]
        if made and not self.is_paused:
            given = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
            for tensor in made:
                self._note(tensor.untyped_storage(), given)
        return output

    def find(self, storage: torch.UntypedStorage) -> StorageReference | None:
        """What is known of a storage that was allocated since entering; None: it was not."""
        return self._alive.get(storage._cdata)

    def is_alive(self, known: StorageReference) -> bool:
        """Whether that storage is still there. A later one may lie at its address."""
        return self._alive.get(known.key) is known

    def reset_peak(self) -> None:
        """Let the peak begin at what is alive now."""
        self.peak_bytes, self.peak = self.live_bytes, dict(self.live)

    def add(self, num_bytes: int, cause: str) -> None:
        """Add `num_bytes` (negative when freed) to the live bytes of `cause`, and update the peak."""
        self.live_bytes += num_bytes
        self.live[cause] = self.live.get(cause, 0) + num_bytes
        if self.live_bytes > self.peak_bytes:
            self.reset_peak()

    def _note(self, storage: torch.UntypedStorage, given: set[int]) -> None:
        key, num_bytes = storage._cdata, storage.nbytes()
        known = self._alive.get(key)
        if known is None:
            if key in given or num_bytes == 0:
                return  # a view, an in-place result, or nothing
            known = self._alive[key] = StorageReference(storage, self._freed)
            known.key, known.num_bytes, known.cause = key, 0, self.cause
        grown_bytes, known.num_bytes = num_bytes - known.num_bytes, num_bytes  # it may have been resized
        self.add(grown_bytes, known.cause)

    def _freed(self, reference: StorageReference) -> None:
        del self._alive[reference.key]
        self.add(-reference.num_bytes, reference.cause)


def _accumulates_in_place(args: tuple[Any, ...]) -> bool:
    """Whether autograd adds two gradients of which it holds the only reference to the first.

    It would add in place then, but not while a dispatch mode is active; this mode does it instead. Seen from
    here, such a gradient has four references, and its storage two."""
    if torch._C._current_graph_task_id() < 0 or torch.is_grad_enabled():
        return False
    first, second = args
    return (
        first._use_count() == _USES_BY_AUTOGRAD
        and torch._C._storage_Use_Count(first.untyped_storage()._cdata) == 2
        and isinstance(second, Tensor)
        and first.shape == second.shape
        and first.dtype == second.dtype
    )


class StorageReference(weakref.ref):
    """A weak reference to a storage, with its key, bytes and cause for the time after it is freed."""

    key: int
    num_bytes: int
    cause: str


def peak_bytes(device: ComputeDevice) -> int:
    """Peak memory so far: of tensors on a GPU, of the whole process otherwise."""
    return device.peak_allocated_bytes if device.is_accelerator else process_peak_bytes()
