"""Where the frozen linears find their weights: the protocol, and its plain member, everything on the device.

The walk *visits* layers: it announces the order of its visits (`expect`), enters a layer (`visit`), runs its
micro-batches, leaves. Inside a visit the layer's packed weights are on the compute device; outside they need
not be. `memory/streaming.py` is the other member of the protocol: a layer may be anywhere until it is
visited.

`hold_unpacked`: within a visit a weight is unpacked at its first use and kept until the visit ends, 2 bytes
per parameter of ONE layer in 16 bits. Otherwise every use unpacks: once per micro-batch forward, twice per
micro-batch backward if the layer is recomputed. The same bits either way.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol

import torch
from torch import Tensor

from qlora_train.device.description import UnpackKernel
from qlora_train.model.quantize import PackedWeight
from qlora_train.model.slab import SlabLayout


class LayerSource(Protocol):
    """The packed weights of all decoder layers."""

    hold_unpacked: bool
    copies_unpacked: bool

    def expect(self, order: Iterable[int]) -> None:
        """Announce what will be visited from now on, in order; replaces what was announced before.

        Items: decoder layers by index, then, from the number of layers on, the tiles of a head that streams.
        """
        ...

    def visit(self, layer: int) -> AbstractContextManager[None]:
        """Inside the returned context the weights of this layer can be unpacked."""
        ...

    def unpack(self, name: str, dtype: torch.dtype) -> Tensor:
        """The weight `name` (module path) as [out, in] in `dtype` on the compute device; not to be changed.

        Valid until the next call, or, with `hold_unpacked`, until the visit ends; with `copies_unpacked`
        for good."""
        ...


class PresentWeights:
    """Unpacks weights that are on the device, holding them within a visit where asked to.

    layouts: of all layers. unpack_kernel: of the device. `packed`: the weights present now, by module path.
    copies_unpacked: what is
    unpacked is a new tensor that outlives the visit, as it must where autograd saves it (reference mode).
    Otherwise it lies in one buffer that is used again and again: as large as the largest weight, or, where
    weights are held, the largest layer.
    """

    def __init__(self, layouts: Sequence[SlabLayout], unpack_kernel: UnpackKernel) -> None:
        self.packed: dict[str, PackedWeight] = {}
        self._unpack_kernel = unpack_kernel
        self.hold_unpacked = False
        self.copies_unpacked = False
        sizes = [[math.prod(shape) for _, shape in layout.shapes] for layout in layouts]
        self._largest_weight, self._largest_layer = max(map(max, sizes)), max(map(sum, sizes))
        self._buffer = torch.empty(0)
        self._held: dict[str, Tensor] = {}
        self._num_held_elements = 0
        self._in_visit = False

    def unpack(self, name: str, dtype: torch.dtype) -> Tensor:
        """See `LayerSource`. Unless held or copied, valid until the next call."""
        packed = self.packed[name]
        if self.copies_unpacked:
            weight = packed.unpack(dtype)
            return weight.clone() if packed.packing.format == "none" else weight
        if packed.packing.format == "none":
            return packed.unpack(dtype)
        if name in self._held:
            return self._held[name]
        holds = self.hold_unpacked and self._in_visit
        self._make_room(self._largest_layer if holds else self._largest_weight, packed, dtype)
        start = self._num_held_elements
        room = self._buffer[start : start + math.prod(packed.shape)].view(packed.shape)
        weight = packed.unpack_into(room, self._unpack_kernel)
        if holds:
            self._held[name] = weight
            self._num_held_elements += weight.numel()
        return weight

    def _make_room(self, num_elements: int, packed: PackedWeight, dtype: torch.dtype) -> None:
        if self._buffer.numel() < num_elements or self._buffer.dtype != dtype:
            assert not self._held
            self._buffer = torch.empty(0)  # the old one goes first
            self._buffer = torch.empty(num_elements, dtype=dtype, device=packed.tensors["data"].device)

    @contextmanager
    def holding(self) -> Iterator[None]:
        """A visit, as far as held weights are concerned."""
        self._in_visit = True
        try:
            yield
        finally:
            self._in_visit = False
            self._held.clear()
            self._num_held_elements = 0


class ResidentWeights(PresentWeights):
    """A `LayerSource` whose packed weights are all on the compute device, always."""

    def expect(self, order: Iterable[int]) -> None:
        """Nothing to prepare."""

    def visit(self, layer: int) -> AbstractContextManager[None]:
        return self.holding()

    @property
    def num_bytes(self) -> int:
        return sum(weight.num_bytes for weight in self.packed.values())


def by_path(weights: Mapping[str, PackedWeight], layer_path: str) -> dict[str, PackedWeight]:
    """Names within a layer -> module paths."""
    return {f"{layer_path}.{name}": weight for name, weight in weights.items()}
