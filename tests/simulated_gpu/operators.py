"""Every operator without a kernel of its own: the CPU's kernel on the same bytes.

One function stands behind the dispatch key PrivateUse1. It takes the tensors of the device for CPU tensors
over the same addresses, calls the operator again, and takes what is new in the result for memory of the
device. Operators in torch's structured form come as their `.out` overload with outputs already allocated by
`empty`, so allocations happen in CUDA's order, and work can be queued because its shapes are known.

What a CPU forgives and CUDA does not is refused before: tensors of several devices, products of integers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from simulated_gpu import private_names
from simulated_gpu.hazards import Span
from simulated_gpu.memory import CPU, Device, alias, device_tensor, span_of
from simulated_gpu.simulation import DEVICE_TYPE, device_at, running
from simulated_gpu.streams import Stream

_SET = private_names.operator("aten::set_.source_Storage_storage_offset")
_TAKES_HOST_INDICES = frozenset(
    f"aten::{name}"
    for name in ("index", "_unsafe_index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index_put")
)
"""CUDA copies indices on the host over, and waits for that."""
_TAKES_HOST_SCALARS = (
    frozenset(
        f"aten::{name}"
        for name in (
            "where",
            "masked_fill",
            "masked_fill_",
            "index_fill",
            "index_fill_",
            "copy_",
            "fill_",
            "clamp",
        )
    )
    | _TAKES_HOST_INDICES
)
"""Beside the pointwise operators: a host tensor without dimensions is a number to them."""
_SHAPE_IS_DATA = frozenset(
    f"aten::{name}"
    for name in [
        "nonzero",
        "masked_select",
        "_unique",
        "_unique2",
        "unique_dim",
        "unique_consecutive",
        "unique_dim_consecutive",
        "equal",
        "bincount",
        "repeat_interleave",
        "multinomial",
    ]
)
"""The host waits for how large the result is, or what it is."""
_PRODUCTS = frozenset(
    f"aten::{name}"
    for name in ("mm", "addmm", "addmm_", "bmm", "baddbmm", "baddbmm_", "mv", "addmv", "dot", "vdot")
)


class Declaration:
    """What an operator's schema says of its arguments and results. A position is an index, or a name for
    arguments by keyword only."""

    __slots__ = ("is_pure_write", "name", "number_positions", "returned", "takes_host_scalars", "writes")

    def __init__(self, op: Any) -> None:
        schema = private_names.schema(op)
        self.name: str = schema.name
        self.number_positions = [i for i, a in enumerate(schema.arguments) if str(a.type) == "Tensor"]
        self.writes: set[int | str] = set()
        position_of: dict[str, int | str] = {}
        for i, argument in enumerate(schema.arguments):
            if argument.alias_info is not None and argument.alias_info.is_write:
                position = argument.name if argument.kwarg_only else i
                self.writes.add(position)
                position_of |= dict.fromkeys(argument.alias_info.before_set, position)
        self.returned: list[int | str | None] = [_returned(r.alias_info, position_of) for r in schema.returns]
        """Of each result: the argument that it is, or None for a new one."""
        self.is_pure_write = bool(self.writes) and None not in self.returned
        self.takes_host_scalars = self.name in _TAKES_HOST_SCALARS or _is_pointwise(op)


def _returned(alias_info: Any, position_of: dict[str, int | str]) -> int | str | None:
    if alias_info is None or not alias_info.is_write:
        return None
    return next((position_of[name] for name in alias_info.before_set if name in position_of), None)


def _is_pointwise(op: Any) -> bool:
    return torch.Tag.pointwise in op.tags or "foreach" in private_names.schema(op).name


@cache
def declaration_of(op: Any) -> Declaration:
    return Declaration(op)


class Call:
    """One call's arguments, unwrapped. No closures hold tensors here: one that names itself is a cycle, which
    keeps them until the garbage collector comes, and adds half to a peak."""

    __slots__ = ("_by_address", "_by_id", "hosts", "reads", "sims", "writes", "written")

    def __init__(self) -> None:
        self.sims: list[Tensor] = []
        self.hosts: list[Tensor] = []
        self.reads: list[Span] = []
        self.writes: list[Span] = []
        self.written: list[tuple[Tensor, Tensor]] = []
        """(tensor, its alias) that the operator writes."""
        self._by_id: dict[int, Tensor] = {}
        self._by_address: dict[int, Tensor] = {}

    def unwrap(self, value: Any, writes: bool = False) -> Any:
        """As the CPU's kernel takes it."""
        if isinstance(value, Tensor):
            return self._unwrap_tensor(value, writes)
        if isinstance(value, list | tuple) and value and not isinstance(value, torch.Size):
            return type(value)([self.unwrap(part, writes) for part in value])
        if isinstance(value, torch.device):
            return CPU if value.type == DEVICE_TYPE else value
        return value

    def _unwrap_tensor(self, tensor: Tensor, writes: bool) -> Tensor:
        if tensor.device.type != DEVICE_TYPE:
            self.hosts.append(tensor)
            return tensor
        self.sims.append(tensor)
        base = tensor.untyped_storage().data_ptr()
        unwrapped = self._by_id.get(id(tensor))
        if unwrapped is None:
            unwrapped = self._by_id[id(tensor)] = alias(tensor)
            self._by_address.setdefault(base, tensor)
        if writes:
            self.written.append((tensor, unwrapped))
        if base:
            (self.writes if writes else self.reads).append(span_of(tensor, base))
        return unwrapped

    def wrap(self, result: Any, device: Device) -> Any:
        """A kernel's result: views of arguments are views again, the rest is fresh memory."""
        if isinstance(result, list | tuple):
            return type(result)([self.wrap(part, device) for part in result])
        if not isinstance(result, Tensor) or device_tensor(result):
            return result
        base = result.untyped_storage().data_ptr()
        owner = self._by_address.get(base) if base else None
        if owner is None:
            return device.from_cpu(result)
        if self._by_id[id(owner)] is result:
            return owner
        return device.tensor(
            owner.untyped_storage(),
            result.dtype,
            result.size(),
            result.stride(),
            int(result.storage_offset()),
        )


class _Queued:
    """A call that waits on a side stream."""

    __slots__ = ("arguments", "keywords", "run")

    def __init__(self, run: Callable[..., Any], arguments: Sequence[Any], keywords: dict[str, Any]) -> None:
        self.run, self.arguments, self.keywords = run, arguments, keywords

    def __call__(self) -> None:
        with running().managed.used_by_device():
            self.run(*self.arguments, **self.keywords)


def call_on_cpu(op: Any, *args: Any, run: Callable[..., Any] | None = None, **kwargs: Any) -> Any:
    """The kernel of every operator that has none here. run: what is called on the CPU, if not `op` itself."""
    simulation = running()
    declaration = declaration_of(op)
    simulation.num_calls[declaration.name] += 1
    call = Call()
    writes = declaration.writes
    arguments = [call.unwrap(value, i in writes) for i, value in enumerate(args)]
    keywords = {name: call.unwrap(value, name in writes) for name, value in kwargs.items()}
    device = _device_of(call, kwargs.get("device"))
    stream = simulation.current_stream(device.index)
    simulation.launch(device)
    _check_devices(call, declaration, device.index, args)
    _note_waits(call, declaration, args, kwargs)
    stream.enter(declaration.name, call.reads, call.writes)
    run = run or _overload_for_numbers(op, declaration, args)
    if _can_wait(call, declaration, stream):
        _queue(call, stream, run, arguments, keywords)
        simulation.managed.follow_device()
        return _written(declaration, args, kwargs)
    stream.catch_up()
    with simulation.managed.used_by_device():
        result = run(*arguments, **keywords)
    _grow_outputs(call, device)
    simulation.managed.follow_device()
    if declaration.is_pure_write:
        return _written(declaration, args, kwargs)
    if not call.sims and not _makes_on_device(kwargs):
        return result
    return _results(call, declaration, device, result, args, kwargs)


def _device_of(call: Call, asked: torch.device | None) -> Device:
    if call.sims:
        return device_at(call.sims[0].device.index)
    has_index = asked is not None and asked.type == DEVICE_TYPE and asked.index is not None
    return device_at(asked.index if has_index else running().thread.device)  # type: ignore[union-attr]


def _makes_on_device(kwargs: dict[str, Any]) -> bool:
    device = kwargs.get("device")
    return device is not None and device.type == DEVICE_TYPE


def _check_devices(call: Call, declaration: Declaration, index: int, args: Sequence[Any]) -> None:
    """Raises CUDA's RuntimeError for tensors on several devices, for products of integers, and for those that
    are to be deterministic and cannot."""
    if not call.sims:
        return
    elsewhere = [tensor for tensor in call.sims if tensor.device.index != index]
    indices = args[1] if declaration.name in _TAKES_HOST_INDICES and device_tensor(args[0]) else ()
    for tensor in call.hosts:
        is_number = tensor.dim() == 0 and declaration.takes_host_scalars
        is_index = any(tensor is each for each in indices)
        if not (is_number or is_index or running().managed.holds(tensor.data_ptr())):
            elsewhere.append(tensor)
    if elsewhere:
        raise RuntimeError(
            "Expected all tensors to be on the same device, but found at least two devices, "
            f"{DEVICE_TYPE}:{index} and {elsewhere[0].device}! (in {declaration.name})"
        )
    if declaration.name in _PRODUCTS:
        dtype = call.sims[0].dtype
        if not (dtype.is_floating_point or dtype.is_complex):
            raise RuntimeError(f'"{declaration.name}" not implemented on a GPU for {dtype}')
        running().multiply()


def _note_waits(call: Call, declaration: Declaration, args: Sequence[Any], kwargs: dict[str, Any]) -> None:
    """The operators for which the host waits. One that is told the size of its result need not. As with
    copies (kernels.py), nothing else is in order by that: a program that needs it does not ask for a
    `nonzero`."""
    reads = running().host_reads
    if declaration.name in _SHAPE_IS_DATA and kwargs.get("output_size") is None:
        reads.note_value(declaration.name.removeprefix("aten::"))
    if "index_put" in declaration.name and any(map(_is_mask, args[1])):  # `index` makes a nonzero of its own
        reads.note_value("index_put with a mask")
    if declaration.name in _TAKES_HOST_INDICES and any(tensor.dim() > 0 for tensor in call.hosts):
        reads.note_copy("indices on the host")


def _is_mask(index: object) -> bool:
    return device_tensor(index) and index.dtype in (torch.bool, torch.uint8)


def _overload_for_numbers(op: Any, declaration: Declaration, args: Sequence[Any]) -> Callable[..., Any]:
    """`x ^ 3`: C++ wraps the number as a tensor, which arrives as a number again. The overload for tensors
    does not take that; the one for numbers is found by type."""
    for i in declaration.number_positions:
        if i < len(args) and isinstance(args[i], int | float | complex):
            return private_names.packet_of(op)
    return op


def _can_wait(call: Call, declaration: Declaration, stream: Stream) -> bool:
    """Whether nothing but the bytes of known tensors depends on the call: outputs without elements may be
    resized by it."""
    return stream.is_late and declaration.is_pure_write and all(t.numel() > 0 for t, _ in call.written)


def _queue(
    call: Call, stream: Stream, run: Callable[..., Any], arguments: list[Any], keywords: dict[str, Any]
) -> None:
    """Numbers on the host are read at the launch, as CUDA does."""
    numbers = {id(t): t.clone() for t in call.hosts if t.dim() == 0}
    arguments = [numbers.get(id(value), value) for value in arguments]
    bases = [tensor.untyped_storage().data_ptr() for tensor in call.sims]
    stream.add(_Queued(run, arguments, keywords), bases)


def _grow_outputs(call: Call, device: Device) -> None:
    """`out=` of no elements: the kernel has resized the alias, whose memory the tensor now takes."""
    for tensor, unwrapped in call.written:
        if unwrapped.size() != tensor.size():
            new = device.from_cpu(unwrapped)
            private_names.call_cpu_kernel(
                _SET, tensor, new.untyped_storage(), new.storage_offset(), new.size(), new.stride()
            )


def _written(declaration: Declaration, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """Results that are arguments."""
    values = [_argument(position, args, kwargs) for position in declaration.returned]
    return None if not values else values[0] if len(values) == 1 else tuple(values)


def _argument(position: int | str | None, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    assert position is not None
    return args[position] if isinstance(position, int) else kwargs[position]


def _results(
    call: Call,
    declaration: Declaration,
    device: Device,
    result: Any,
    args: Sequence[Any],
    kwargs: dict[str, Any],
) -> Any:
    """Some results may be arguments, and the others new."""
    if not isinstance(result, tuple) or all(position is None for position in declaration.returned):
        return call.wrap(result, device)
    return tuple(
        call.wrap(part, device) if position is None else _argument(position, args, kwargs)
        for part, position in zip(result, declaration.returned, strict=True)
    )
