"""Device memory: real storages that torch takes for the simulated device's.

DLPack's device type 12 (kDLExtDev) is PrivateUse1 in torch. A buffer of the CPU whose capsule says 12 comes
back as a plain tensor on `sim:i` that owns the same bytes: `data_ptr()`, views, `set_`, Parameters and
autograd work as for any tensor, which wrapper subclasses do not reach. The way back is an alias: a CPU tensor
over the same address, which owns nothing.
"""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Sequence
from typing import TYPE_CHECKING, TypeGuard

import torch
from torch import Tensor
from torch.utils.dlpack import from_dlpack, to_dlpack

from simulated_gpu import private_names
from simulated_gpu.allocator import Block, CachingAllocator
from simulated_gpu.hazards import Span
from simulated_gpu.simulation import DEVICE_TYPE, Simulation, running

if TYPE_CHECKING:
    from simulated_gpu.streams import Stream

CPU = torch.device("cpu")
POISON = 0xFF
_EXTENSION_DEVICE = 12
_AS_STRIDED = private_names.operator("aten::as_strided")
_SET = private_names.operator("aten::set_.source_Storage_storage_offset")


class _DLDevice(ctypes.Structure):
    _fields_ = [("type", ctypes.c_int), ("id", ctypes.c_int)]


class _DLTensor(ctypes.Structure):
    """The beginning of a DLManagedTensor, which has not changed since DLPack 0.2."""

    _fields_ = [("data", ctypes.c_void_p), ("device", _DLDevice)]


_pointer_in = ctypes.pythonapi.PyCapsule_GetPointer
_pointer_in.restype, _pointer_in.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]


def on_device(cpu: Tensor, index: int) -> Tensor:
    """The same bytes as a tensor of sim:index, which keeps them alive from now on."""
    capsule = to_dlpack(cpu)
    head = _DLTensor.from_address(_pointer_in(capsule, b"dltensor"))
    head.device.type, head.device.id = _EXTENSION_DEVICE, index
    return from_dlpack(capsule)


def alias(tensor: Tensor) -> Tensor:
    """The bytes of a device tensor as a CPU tensor that does not own them."""
    storage = tensor.untyped_storage()
    if storage.nbytes() == 0:
        return torch.empty_strided(tensor.size(), tensor.stride(), dtype=tensor.dtype, device=CPU)
    view = torch.empty(0, dtype=tensor.dtype, device=CPU)
    bytes_ = private_names.storage_at(storage.data_ptr(), CPU, storage.nbytes())
    return view.set_(bytes_, tensor.storage_offset(), tensor.size(), tensor.stride())


def num_elements_spanned(size: Sequence[int], stride: Sequence[int]) -> int:
    """From the first element to the last, holes included."""
    return 0 if 0 in size else 1 + sum((n - 1) * s for n, s in zip(size, stride, strict=True))


def span_of(tensor: Tensor, base: int) -> Span:
    """Bytes from a tensor's first to its last, of the storage at `base`."""
    low = tensor.data_ptr()
    if tensor.is_contiguous():
        return Span(base, low, low + tensor.nbytes)
    return Span(base, low, low + num_elements_spanned(tensor.size(), tensor.stride()) * tensor.itemsize)


class Device:
    """One simulated GPU: allocator and default stream."""

    def __init__(self, index: int, total_bytes: int, default_stream: Stream) -> None:
        self.index, self.default_stream = index, default_stream
        self.allocator = CachingAllocator(index, total_bytes)
        self._seeds: dict[torch.dtype, Tensor] = {}
        """A tensor of one element, of each type: others begin as views of it, since DLPack alone makes new
        ones."""

    def tensor(
        self,
        storage: torch.UntypedStorage,
        dtype: torch.dtype,
        size: Sequence[int],
        stride: Sequence[int],
        offset: int = 0,
    ) -> Tensor:
        """A tensor over a storage of this device."""
        seed = self._seeds.get(dtype)
        if seed is None:
            seed = self._seeds[dtype] = on_device(torch.zeros(1, dtype=dtype, device=CPU), self.index)
        view = private_names.call_cpu_kernel(_AS_STRIDED, seed, (0,), (1,), 0)
        result: Tensor = private_names.call_cpu_kernel(_SET, view, storage, offset, size, stride)
        return result

    def empty(self, size: Sequence[int], stride: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Fresh memory. Raises torch.OutOfMemoryError."""
        num_bytes = num_elements_spanned(size, stride) * dtype.itemsize
        block = self._allocate(num_bytes)
        memory = torch.empty(num_bytes, dtype=torch.uint8, device=CPU)
        if running().settings.poison:
            memory.fill_(POISON)
        return self.tensor(self._adopt(memory, block), dtype, size, stride)

    def from_cpu(self, result: Tensor) -> Tensor:
        """What a CPU kernel has allocated and returned, from now on memory of this device."""
        storage = result.untyped_storage()
        block = self._allocate(storage.nbytes())
        flat = torch.empty(0, dtype=torch.uint8, device=CPU).set_(storage, 0, (storage.nbytes(),), (1,))
        size, stride = result.size(), result.stride()
        return self.tensor(self._adopt(flat, block), result.dtype, size, stride, int(result.storage_offset()))

    def _allocate(self, num_bytes: int) -> Block | None:
        """None for nothing: no bytes take no block."""
        if num_bytes == 0:
            return None
        simulation = running()
        with simulation.lock:
            stream = simulation.current_stream(self.index)
            return self.allocator.allocate(num_bytes, stream.stream_id)

    def _adopt(self, memory: Tensor, block: Block | None) -> torch.UntypedStorage:
        """Its bytes are this block's, until the storage goes."""
        storage = on_device(memory, self.index).untyped_storage()
        if block is None:
            return storage
        simulation, address = running(), storage.data_ptr()
        with simulation.lock:
            simulation.host_memory[address] = memory
            # The allocating stream may write at once. Others must wait for what it did with the memory
            # before.
            stream = simulation.current_stream(self.index)
            stream.enter("allocation", [], [Span(address, address, address + memory.numel())])
        weakref.finalize(storage, _free, simulation, self, block, address, stream).atexit = False
        return storage


def _free(simulation: Simulation, device: Device, block: Block, address: int, owner: Stream) -> None:
    """When a storage goes. Whoever is next overwrites it, in the owner's order: what is queued on other
    streams then reads what is nobody's, and writes where nobody reads."""
    with simulation.lock:
        device.allocator.free(block)
        simulation.hazards.free(address, owner.stream_id, owner.clock)
        memory = simulation.host_memory.pop(address, None)
        if memory is None or not any(stream.is_behind for stream in simulation.streams):
            return
        if owner.is_behind:
            owner.add(_Overwrite(memory))
        else:
            memory.fill_(POISON)


class _Overwrite:
    """Queued: memory that nobody owns any more gets other contents."""

    __slots__ = ("_memory",)

    def __init__(self, memory: Tensor) -> None:
        self._memory = memory

    def __call__(self) -> None:
        self._memory.fill_(POISON)


def device_tensor(value: object) -> TypeGuard[Tensor]:
    """Whether it is a tensor of the simulated device."""
    return isinstance(value, Tensor) and value.device.type == DEVICE_TYPE
