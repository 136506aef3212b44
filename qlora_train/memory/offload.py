"""Tensors that wait in host memory: remembered layer inputs, and what autograd saves for an offloaded layer.

    HostPark.park(x)   copies x out; the device copy is free once the copy is done and nobody else holds it
    Parked.fetch()     begins to copy it back (before it is needed)
    Parked.take()      the tensor, back on the device

On a GPU all copies run in order on one side stream, so a host buffer that is used again cannot be overtaken;
the host waits for nothing. What leaves is copied while the next thing is computed and held that long: one
thing at a time (`settle` ends it), let go only after the compute stream has been told to wait for its copy.
What comes back is allocated by the compute stream, which then waits for that copy alone: the one after it is
under way meanwhile. So every byte is taken and freed in the compute stream's order, and the peak is what the
plan says however far the host runs ahead. (`record_stream` would free a block at a time that depends on the
host.) On a CPU the same code copies at once.

`OffloadedGraph` is the policy "offload" for one run of one layer: autograd hands every tensor it saves to a
hook. Those that are there anyway (weights, factors, the layer's input, rotary tables) stay; of the others the
*storages* are noted, each once however many views of it are saved, and parked when the layer's forward is
over. In backward they come back as the same views of the same bytes, so gradients are the same bits as with
"keep". Cost: two copies of the saved bytes over the bus; no extra FLOPs.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from qlora_train.device.compute import ComputeDevice, Event
from qlora_train.memory.host_memory import HostMemory


class HostPark:
    """Copies tensors out to `host` memory and back to `device`."""

    def __init__(self, device: ComputeDevice, host: HostMemory) -> None:
        self.device, self.host = device, host
        self.stream = device.side_stream()
        self._leaving: tuple[Event, list[Tensor]] | None = None

    def park(self, tensor: Tensor) -> Parked:
        """Begin to copy `tensor` (contiguous) out."""
        return self.park_all([tensor])[0]

    def park_all(self, tensors: list[Tensor]) -> list[Parked]:
        """Begin to copy tensors (contiguous) out that leave together; what left before is settled."""
        if self.stream is None:
            return [Parked(self, tensor) for tensor in tensors]
        self.settle()
        self.stream.wait_stream(self.device.current_stream())
        with self.device.on(self.stream):
            parked = [Parked(self, tensor) for tensor in tensors]
        self._leaving = self.device.event(self.stream), tensors
        return parked

    def settle(self) -> None:
        """Let go what left last: work queued from now on waits until it is in host memory."""
        if self._leaving is not None:
            self.device.current_stream().wait_event(self._leaving[0])
            self._leaving = None

    def drain(self) -> None:
        """Let the host wait for every copy. For a walk that is broken off: call it while whatever is being
        copied, in either direction, is still held, or its memory is somebody else's before the copy is
        done."""
        if self.stream is not None:
            self.stream.synchronize()
        self._leaving = None


class Parked:
    """A tensor in host memory; made by a `HostPark`. Taken once."""

    def __init__(self, park: HostPark, tensor: Tensor) -> None:
        assert tensor.is_contiguous()
        self._park, self._shape, self._dtype = park, tensor.shape, tensor.dtype
        self._buffer: Tensor | None = park.host.borrow(max(1, tensor.nbytes))
        self._back: Tensor | None = None
        self._is_back: Event | None = None
        self._host_view.copy_(tensor.detach(), non_blocking=True)

    def fetch(self) -> None:
        """Begin to copy back."""
        if self._back is not None:
            return
        assert self._buffer is not None, "taken twice"
        self._back = torch.empty(self._shape, dtype=self._dtype, device=self._park.device.torch)
        stream = self._park.stream
        if stream is None:
            self._back.copy_(self._host_view)
        else:
            device = self._park.device
            stream.wait_stream(device.current_stream())  # until then the memory is somebody else's
            with device.on(stream):
                self._back.copy_(self._host_view, non_blocking=True)
            self._is_back = device.event(stream)
        self._park.host.give_back(self._buffer)
        self._buffer = None

    def take(self) -> Tensor:
        """The tensor on the device, valid for work queued from now on."""
        self.fetch()
        assert self._back is not None
        if self._is_back is not None:  # not for the whole stream: what is fetched next is copied meanwhile
            self._park.device.current_stream().wait_event(self._is_back)
        back, self._back = self._back, None
        return back

    @property
    def _host_view(self) -> Tensor:
        assert self._buffer is not None
        num_bytes = self._shape.numel() * self._dtype.itemsize
        return self._buffer[:num_bytes].view(self._dtype).view(self._shape)


class OffloadedGraph:
    """The saved tensors of one run of one layer. stays: tensors whose storages are not to be moved."""

    def __init__(self, park: HostPark, stays: Iterable[Tensor]) -> None:
        self._park = park
        self._stays = {tensor.untyped_storage().data_ptr() for tensor in stays}
        self._noted: dict[int, _Saved] = {}

    def recording(self) -> AbstractContextManager[None]:
        """Run the layer's forward inside; then call `park`."""
        return torch.autograd.graph.saved_tensors_hooks(self._note, _restore)

    def park(self) -> None:
        """Copy what was noted out."""
        noted = list(self._noted.values())
        for saved, parked in zip(noted, self._park.park_all([s.bytes() for s in noted]), strict=True):
            saved.leave(parked)

    def fetch(self) -> None:
        """Begin to copy everything back."""
        for saved in self._noted.values():
            saved.fetch()

    def leave_to_autograd(self) -> None:
        """Call before backward: from then on each storage goes with the last operation that saved it."""
        self._noted.clear()

    def _note(self, tensor: Tensor) -> Any:
        storage = tensor.untyped_storage()
        address = storage.data_ptr()
        if address in self._stays or not tensor.is_floating_point():
            return tensor
        if address not in self._noted:
            self._noted[address] = _Saved(tensor)
        view = (tensor.dtype, tensor.storage_offset(), tensor.shape, tensor.stride())
        return self._noted[address], view


class _Saved:
    """One storage: on the device until it leaves, in host memory until fetched, then on the device again."""

    def __init__(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        everything = torch.empty(0, dtype=torch.uint8, device=tensor.device)
        self._bytes: Tensor | None = everything.set_(storage, 0, (storage.nbytes(),), (1,))
        self._parked: Parked | None = None

    def leave(self, parked: Parked) -> None:
        self._parked, self._bytes = parked, None

    def fetch(self) -> None:
        if self._parked is not None:
            self._parked.fetch()

    def bytes(self) -> Tensor:
        if self._bytes is None:
            assert self._parked is not None
            self._bytes, self._parked = self._parked.take(), None
        return self._bytes


def _restore(noted: Any) -> Tensor:
    if isinstance(noted, Tensor):
        return noted
    saved, (dtype, offset, shape, stride) = noted
    everything = saved.bytes()
    return torch.empty(0, dtype=dtype, device=everything.device).set_(
        everything.untyped_storage(), offset, shape, stride
    )
