"""How much memory is used: one definition of "peak" for logs, tests and measurements.

Three readings, none of which knows the planner's formulas:

- `DeviceMeter`, bytes of tensors on the compute device. On a GPU it asks the allocator. On the CPU there is
  no such thing to ask, so a dispatch mode watches every operation: a result whose storage is none of its
  inputs' is new and counts until that storage is freed; a view counts nothing. Scratch inside one
  operation is not seen, nor memory that torch did not allocate (a mapped file, a numpy array): host
  buffers are made that way, so that "device" means the same in both cases. Nor, on a GPU, the libraries'
  workspaces, which come from the same allocator but belong to the context (`make_workspaces`).
- `peak_bytes`, for the log: our tensors on a GPU, the whole process elsewhere.
- `process_peak_bytes`, resident memory of this process at its highest, as the kernel counts it, Python and
  all imports included. `reset_process_peak` starts it anew where the kernel offers that.

Why not `tracemalloc` or a profiler: the first does not see tensors, the second records every event of a run.
"""

from __future__ import annotations

import sys
import weakref
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from qlora_train.device.compute import ComputeDevice


class DeviceMeter:
    """Within `with DeviceMeter(device) as meter`: bytes of the tensors made since, on `device`.

    live_bytes: now. peak_bytes: the most since entering or since `reset_peak`. On the CPU only operations of
    the thread that entered are seen (autograd's backward runs there too). On a GPU the libraries' workspaces
    are made on entering, if they are not there yet.
    """

    def __init__(self, device: ComputeDevice) -> None:
        self._device = device
        self._watch = None if device.is_accelerator else _StorageWatch()
        self._bytes_before = 0

    def __enter__(self) -> DeviceMeter:
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
            self._watch.peak_bytes = self._watch.live_bytes
        else:
            self._device.reset_peaks()


def make_workspaces(device: ComputeDevice) -> None:
    """Let cuBLAS take its workspaces, and wait for it: products forward and back, since it takes one for each
    thread that multiplies (the backward pass is autograd's own thread) at the thread's first product, from
    torch's allocator. The plan counts them with the context (plan/target.py)."""
    for dtype in (torch.float32, torch.float16):
        a = torch.ones(64, 64, dtype=dtype, device=device.torch, requires_grad=True)
        b = torch.ones(64, dtype=dtype, device=device.torch)
        F.linear(a, a, b).addmm(a, a).sum().backward()
    device.wait()


class _StorageWatch(TorchDispatchMode):
    """Sums the CPU storages that operations make, each until it is freed."""

    def __init__(self) -> None:
        super().__init__()
        self.live_bytes = 0
        self.peak_bytes = 0
        self._alive: dict[int, _StorageReference] = {}

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        output = function(*args, **kwargs)
        made = [t for t in tree_leaves(output) if isinstance(t, Tensor) and t.device.type == "cpu"]
        if made:
            given = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
            for tensor in made:
                self._note(tensor.untyped_storage(), given)
        return output

    def _note(self, storage: torch.UntypedStorage, given: set[int]) -> None:
        key, num_bytes = storage._cdata, storage.nbytes()
        known = self._alive.get(key)
        if known is None:
            if key in given or num_bytes == 0:
                return  # a view, an in-place result, or nothing
            known = self._alive[key] = _StorageReference(storage, self._freed)
            known.key, known.num_bytes = key, 0
        self.live_bytes += num_bytes - known.num_bytes  # a known storage may have been resized
        known.num_bytes = num_bytes
        self.peak_bytes = max(self.peak_bytes, self.live_bytes)

    def _freed(self, reference: _StorageReference) -> None:
        del self._alive[reference.key]
        self.live_bytes -= reference.num_bytes


class _StorageReference(weakref.ref):
    """A weak reference that remembers what it stood for."""

    key: int
    num_bytes: int


def peak_bytes(device: ComputeDevice) -> int:
    """Peak memory so far: of our tensors on a GPU, of the whole process otherwise."""
    return device.peak_allocated_bytes if device.is_accelerator else process_peak_bytes()


def process_peak_bytes() -> int:
    """Peak resident size of this process so far, or since `reset_process_peak`, as the kernel reports it.

    Linux: VmHWM. `ru_maxrss` is taken only where there is none: a child's starts at what its parent held
    before the child's program was loaded.
    """
    for line in _read_lines(Path("/proc/self/status")):
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    import resource  # not on Windows

    unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss is in bytes on macOS, in KiB on Linux
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def reset_process_peak() -> bool:
    """Let `process_peak_bytes` begin at the present size; False where the kernel cannot."""
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    except OSError:
        return False
    return True


def _read_lines(file: Path) -> list[str]:
    return file.read_text(encoding="ascii", errors="replace").splitlines() if file.is_file() else []
