"""Operators with a kernel of their own here: fresh memory, copies, values read by the host, resizing.

CUDA's rules for copies (aten/native/cuda/Copy.cu): one between device and pinned memory is done by the device
alone if it is `non_blocking`, of one dtype and of dense memory. From pageable memory the driver first copies
into a pinned buffer of its own, so the source is read before the call returns; to pageable memory the host
waits. If it is not `non_blocking`, the host waits for the stream in any case.

One point is stricter than CUDA: such a wait of a copy to the device puts that copy in order with what comes
later, but not the work before it. A program that is right only because a copy somewhere was from pageable
memory would break as soon as somebody pins that. Values that a program reads (`item`, a copy to the host) are
waits like `synchronize`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from simulated_gpu import private_names
from simulated_gpu.hazards import Span, join
from simulated_gpu.memory import CPU, POISON, alias, device_tensor, span_of
from simulated_gpu.simulation import device_at, running
from simulated_gpu.streams import Stream

_SET = private_names.operator("aten::set_.source_Storage_storage_offset")
_CONTIGUOUS = (None, torch.contiguous_format, torch.preserve_format)


def _dense_strides(size: Sequence[int]) -> list[int]:
    strides: list[int] = []
    step = 1
    for n in reversed(size):
        strides.insert(0, step)
        step *= max(1, n)
    return strides


def _index_of(device: torch.device | None) -> int:
    return running().thread.device if device is None or device.index is None else device.index


def empty(
    size: Sequence[int],
    *,
    dtype: torch.dtype | None = None,
    layout: torch.layout | None = None,
    device: torch.device | None = None,
    pin_memory: bool | None = None,
    memory_format: torch.memory_format | None = None,
) -> Tensor:
    """aten::empty.memory_format"""
    if memory_format in _CONTIGUOUS:
        strides: Sequence[int] = _dense_strides(size)
    else:
        strides = torch.empty(size, device="meta", memory_format=memory_format).stride()
    return empty_strided(size, strides, dtype=dtype, layout=layout, device=device, pin_memory=pin_memory)


def empty_strided(
    size: Sequence[int],
    stride: Sequence[int],
    *,
    dtype: torch.dtype | None = None,
    layout: torch.layout | None = None,
    device: torch.device | None = None,
    pin_memory: bool | None = None,
) -> Tensor:
    """aten::empty_strided"""
    if pin_memory:
        raise RuntimeError("Only dense CPU tensors can be pinned")
    running().num_calls["aten::empty"] += 1
    return device_at(_index_of(device)).empty(size, stride, dtype or torch.get_default_dtype())


def resize(
    tensor: Tensor, size: Sequence[int], *, memory_format: torch.memory_format | None = None
) -> Tensor:
    """aten::resize_. If the storage is too small, the tensor gets a larger one with what was in it; other
    tensors over the old storage keep that, which is not so on a real device."""
    num_elements = 0 if 0 in size else 1
    for n in size:
        num_elements *= n
    storage = tensor.untyped_storage()
    needed = int(tensor.storage_offset()) + num_elements
    if needed * tensor.itemsize > storage.nbytes():
        grown = device_at(tensor.device.index).empty((needed,), (1,), tensor.dtype)
        old = torch.empty(0, dtype=torch.uint8, device=CPU)
        if storage.nbytes() > 0:
            old = old.set_(private_names.storage_at(storage.data_ptr(), CPU, storage.nbytes()))
        alias(grown).view(torch.uint8)[: old.numel()] = old
        storage = grown.untyped_storage()
    result: Tensor = private_names.call_cpu_kernel(
        _SET, tensor, storage, tensor.storage_offset(), size, _dense_strides(size)
    )
    return result


def set_storage(tensor: Tensor, storage: torch.UntypedStorage) -> Tensor:
    """aten::set_.source_Storage: all of a storage, in one dimension."""
    size = (storage.nbytes() // tensor.itemsize,)
    return private_names.call_cpu_kernel(_SET, tensor, storage, 0, size, (1,))


def set_nothing(tensor: Tensor) -> Tensor:
    """aten::set_: lets go of the storage."""
    return set_storage(
        tensor, device_at(tensor.device.index).empty((0,), (1,), torch.uint8).untyped_storage()
    )


def item(tensor: Tensor) -> bool | int | float | complex:
    """aten::_local_scalar_dense: `.item()`, `float()`, `bool()`, each number of a `.tolist()` of none."""
    simulation = running()
    simulation.launch(device_at(tensor.device.index))
    simulation.host_reads.note_value("item")
    stream = simulation.current_stream(tensor.device.index)
    stream.enter("item", [span_of(tensor, tensor.untyped_storage().data_ptr())], [])
    stream.join_host()
    return alias(tensor).item()


def copy_from(source: Tensor, target: Tensor, non_blocking: bool = False) -> Tensor:
    """aten::_copy_from: what `copy_` and `to` do once one of the two is on a device."""
    running().num_calls["aten::copy_"] += 1
    if target.numel() == 0:
        return target
    if device_tensor(source) and device_tensor(target):
        _copy_between_devices(source, target)
    elif device_tensor(source):
        _copy_to_host(source, target, non_blocking)
    else:
        _copy_to_device(source, target, non_blocking)
    running().managed.follow_device()
    return target


def copy_from_and_resize(source: Tensor, target: Tensor) -> Tensor:
    """aten::_copy_from_and_resize"""
    return target.resize_(source.size()).copy_(source)


class _Copy:
    """Queued: a copy, between aliases that own nothing."""

    __slots__ = ("_source", "_target")

    def __init__(self, source: Tensor, target: Tensor) -> None:
        self._source, self._target = source, target

    def __call__(self) -> None:
        self._target.copy_(self._source)


def _storage_span(tensor: Tensor) -> Span:
    return span_of(tensor, tensor.untyped_storage().data_ptr())


def _run(stream: Stream, copy: _Copy, *tensors: Tensor, late: bool) -> None:
    """Now, or when it is waited for."""
    if late:
        stream.add(copy, [t.untyped_storage().data_ptr() for t in tensors if device_tensor(t)])
    else:
        stream.catch_up()
        copy()


def _copy_between_devices(source: Tensor, target: Tensor) -> None:
    """On one device a kernel of the current stream. Between two, on the source's stream, after what the
    target's was given before and before what it is given later."""
    simulation = running()
    stream = simulation.current_stream(source.device.index)
    copy = _Copy(alias(source), alias(target))
    if source.device == target.device:
        simulation.launch(device_at(source.device.index))
        stream.enter("copy_", [_storage_span(source)], [_storage_span(target)])
        _run(stream, copy, source, target, late=stream.is_late)
        return
    other = simulation.current_stream(target.device.index)
    join(stream.clock, other.clock)
    stream.enter("copy_", [_storage_span(source)], [_storage_span(target)])
    join(other.clock, stream.clock)
    other.catch_up()
    _run(stream, copy, source, target, late=False)


def _is_direct(source: Tensor, target: Tensor) -> bool:
    """Without a buffer between: one dtype, and both dense."""
    same_layout = source.size() == target.size() and (
        (source.is_contiguous() and target.is_contiguous()) or source.stride() == target.stride()
    )
    return source.dtype == target.dtype and same_layout


def _pinned_base(source: Tensor, target: Tensor, host: Tensor) -> int | None:
    """Where the pinned range begins that the device reads or writes by itself; None where the host must
    help."""
    return running().pinned.range_of(host) if _is_direct(source, target) else None


def _copy_to_host(source: Tensor, target: Tensor, non_blocking: bool) -> None:
    simulation = running()
    stream = simulation.current_stream(source.device.index)
    base = _pinned_base(source, target, target)
    writes = [] if base is None else [span_of(target, base)]
    stream.enter("copy to the host", [_storage_span(source)], writes)
    copy = _Copy(alias(source), target.detach())
    if base is not None:
        with simulation.lock:
            simulation.hazards.check_sources(overwritten=target)
    if base is not None and non_blocking:
        if simulation.settings.poison and simulation.settings.lazy:
            _bytes_of(target).fill_(POISON)  # until it is waited for
        _run(stream, copy, source, late=simulation.settings.lazy)
        stream.will_write_host(base)
        return
    simulation.host_reads.note_value("copy to the host")
    _run(stream, copy, source, late=False)
    stream.join_host()


def _copy_to_device(source: Tensor, target: Tensor, non_blocking: bool) -> None:
    simulation = running()
    stream = simulation.current_stream(target.device.index)
    base = _pinned_base(source, target, source)
    reads = [] if base is None else [span_of(source, base)]
    stream.enter("copy to the device", reads, [_storage_span(target)], waited_for=not non_blocking)
    if not non_blocking:
        what = "pageable memory" if base is None else "pinned memory, blocking"
        simulation.host_reads.note_copy(what)
        _run(stream, _Copy(source.detach(), alias(target)), target, late=False)
        return
    if base is None:
        simulation.host_reads.note_copy("pageable memory, non_blocking")
        if stream.is_late:
            source = source.detach().clone()
    else:
        stream.finish_writes_to_host(base)
        with simulation.lock:
            simulation.hazards.watch_source(source, stream.stream_id, stream.clock)
    _run(stream, _Copy(source.detach(), alias(target)), target, late=stream.is_late)


def _bytes_of(tensor: Tensor) -> Tensor:
    """A dense tensor's memory as uint8."""
    flat: Any = tensor.detach().as_strided((tensor.numel(),), (1,))
    return flat.view(torch.uint8)
