"""Activations offloaded to host memory: stored layer inputs, and the tensors that autograd saves for a layer.

    HostOffloader.offload(x)    starts the copy to the host; the device copy is freed after it
    OffloadedTensor.fetch()     starts the copy back, before the tensor is needed
    OffloadedTensor.take()      returns the tensor on the device

On a GPU all copies run in order on one side stream, so a host buffer that is used again is never overtaken,
and the host waits for nothing. Copies to the host overlap the next micro-batch: `finish_copies` makes the
compute stream wait for them and frees the device copies. Copies back go into memory that the compute stream
allocates, and it waits for one copy at a time, so the next copy overlaps its work. Memory is therefore
allocated and freed in the order of the compute stream, and the planned peak holds however far the host runs
ahead. (`record_stream` would free memory at a moment that depends on the host.) On a CPU the same code copies
synchronously.

`OffloadedGraph` is the activation policy "offload" for one forward pass of one layer. Autograd passes every
tensor that it saves to a hook. Tensors that stay on the device anyway (weights, LoRA parameters, the layer's
input, rotary tables) are kept; the storages of the others are recorded, once each however many views are
saved, and offloaded when the forward pass is over. In backward they come back as the same views of the same
bytes, so the gradients have the same bits as with "keep". Cost: two copies of the saved bytes over the bus,
no extra FLOPs.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from qlora_train.device.compute import ComputeDevice, Event
from qlora_train.device.step_clock import Cause
from qlora_train.weights.host_memory import HostMemory


class HostOffloader:
    """Copies tensors between `device` and `host` memory."""

    def __init__(self, device: ComputeDevice, host: HostMemory) -> None:
        self.device, self.host = device, host
        self.stream = device.side_stream()
        self._leaving: tuple[Event, list[Tensor]] | None = None
        self.num_fetched = self.num_arrived = 0
        """Copies back that were started, and those of them that the compute stream has waited for."""

    def offload(self, tensor: Tensor) -> OffloadedTensor:
        """Start copying `tensor` (contiguous) to the host."""
        return self.offload_all([tensor])[0]

    def offload_all(self, tensors: list[Tensor]) -> list[OffloadedTensor]:
        """Start copying tensors (contiguous) to the host together; earlier copies are finished first."""
        if self.stream is None:
            with self.waiting():
                return [OffloadedTensor(self, tensor) for tensor in tensors]
        self.finish_copies()
        self.stream.wait_stream(self.device.current_stream())
        with self.device.on(self.stream):
            offloaded = [OffloadedTensor(self, tensor) for tensor in tensors]
        self._leaving = self.device.event(self.stream), tensors
        return offloaded

    def finish_copies(self) -> None:
        """Free the device copies of the last offload; work queued from now on waits for its copies."""
        if self._leaving is not None:
            with self.waiting():
                self.device.current_stream().wait_event(self._leaving[0])
            self._leaving = None

    def waiting(self) -> AbstractContextManager[None]:
        """Context of what computing waits for."""
        return self.device.clock.spent_on(Cause.ACTIVATIONS)

    def synchronize(self) -> None:
        """Let the host wait for every copy. For a walk that is aborted: call it while the tensors that are
        being copied are still referenced, or their memory is reused before the copy is done."""
        if self.stream is not None:
            self.stream.synchronize()
        self._leaving = None


class OffloadedTensor:
    """A tensor in host memory, made by a `HostOffloader`; `take` is called once."""

    def __init__(self, offload: HostOffloader, tensor: Tensor) -> None:
        assert tensor.is_contiguous()
        self._offloader, self._shape, self._dtype = offload, tensor.shape, tensor.dtype
        self._buffer: Tensor | None = offload.host.borrow(max(1, tensor.nbytes))
        self._back: Tensor | None = None
        self._is_back: Event | None = None
        self._number = 0
        """Among the copies back, from 1 on."""
        self._host_view.copy_(tensor.detach(), non_blocking=True)

    def fetch(self) -> None:
        """Start the copy to the device."""
        if self._back is not None:
            return
        assert self._buffer is not None, "taken twice"
        self._back = torch.empty(self._shape, dtype=self._dtype, device=self._offloader.device.torch)
        stream = self._offloader.stream
        if stream is None:
            with self._offloader.waiting():
                self._back.copy_(self._host_view)
        else:
            device = self._offloader.device
            stream.wait_stream(device.current_stream())  # queued work may still use that memory
            with device.on(stream):
                self._back.copy_(self._host_view, non_blocking=True)
            self._is_back = device.event(stream)
            self._number = self._offloader.num_fetched = self._offloader.num_fetched + 1
        self._offloader.host.give_back(self._buffer)
        self._buffer = None

    def take(self) -> Tensor:
        """Return the tensor on the device, valid for work queued from now on."""
        self.fetch()
        assert self._back is not None
        if self._is_back is not None and self._number > self._offloader.num_arrived:
            with self._offloader.waiting():  # not for the whole stream: the next fetch overlaps
                self._offloader.device.current_stream().wait_event(self._is_back)
            self._offloader.num_arrived = self._number  # with all that were started before it
        back, self._back = self._back, None
        return back

    @property
    def _host_view(self) -> Tensor:
        assert self._buffer is not None
        num_bytes = self._shape.numel() * self._dtype.itemsize
        return self._buffer[:num_bytes].view(self._dtype).view(self._shape)


class OffloadedGraph:
    """The tensors that autograd saves in one forward pass of one layer. stays: tensors that are not moved."""

    def __init__(self, offload: HostOffloader, stays: Iterable[Tensor]) -> None:
        self._offloader = offload
        self._stays = {tensor.untyped_storage()._cdata for tensor in stays}  # addresses of live storages
        self._recorded: dict[int, _Saved] = {}

    def recording(self) -> AbstractContextManager[None]:
        """Context for the layer's forward pass, which records the saved storages; then call `offload`."""
        return torch.autograd.graph.saved_tensors_hooks(self._record, _restore)

    def offload(self) -> None:
        """Start copying the recorded storages to the host."""
        recorded = list(self._recorded.values())
        copies = self._offloader.offload_all([saved.bytes() for saved in recorded])
        for saved, copy in zip(recorded, copies, strict=True):
            saved.leave(copy)

    def fetch(self) -> None:
        """Start copying all recorded storages to the device."""
        for saved in self._recorded.values():
            saved.fetch()

    def leave_to_autograd(self) -> None:
        """Drop the references of this object before backward: autograd then frees each storage after the last
        operation that saved it."""
        self._recorded.clear()

    def _record(self, tensor: Tensor) -> Any:
        storage = tensor.untyped_storage()._cdata
        if storage in self._stays or not tensor.is_floating_point():
            return tensor
        if storage not in self._recorded:
            self._recorded[storage] = _Saved(tensor)
        view = (tensor.dtype, tensor.storage_offset(), tensor.shape, tensor.stride())
        return self._recorded[storage], view


class _Saved:
    """One saved storage: on the device until `leave`, in host memory until `fetch`, then on the device."""

    def __init__(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        everything = torch.empty(0, dtype=torch.uint8, device=tensor.device)
        self._bytes: Tensor | None = everything.set_(storage, 0, (storage.nbytes(),), (1,))
        self._offloaded: OffloadedTensor | None = None

    def leave(self, offloaded: OffloadedTensor) -> None:
        self._offloaded, self._bytes = offloaded, None

    def fetch(self) -> None:
        if self._offloaded is not None:
            self._offloaded.fetch()

    def bytes(self) -> Tensor:
        if self._bytes is None:
            assert self._offloaded is not None
            self._bytes, self._offloaded = self._offloaded.take(), None
        return self._bytes


def _restore(recorded: Any) -> Tensor:
    if isinstance(recorded, Tensor):
        return recorded
    saved, (dtype, offset, shape, stride) = recorded
    everything = saved.bytes()
    return torch.empty(0, dtype=dtype, device=everything.device).set_(
        everything.untyped_storage(), offset, shape, stride
    )
