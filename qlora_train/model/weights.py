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

from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol

import torch
from torch import Tensor

from qlora_train.model.quantize import PackedWeight


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

        Valid until the visit ends, unless `copies_unpacked`."""
        ...


class PresentWeights:
    """Unpacks weights that are on the device, holding them within a visit where asked to.

    `packed`: those present now, by module path. copies_unpacked: what is unpacked outlives the visit, as it
    must where autograd saves it (reference mode): a weight left in 16 bits would otherwise be a view of its
    slot.
    """

    def __init__(self) -> None:
        self.packed: dict[str, PackedWeight] = {}
        self.hold_unpacked = False
        self.copies_unpacked = False
        self._held: dict[tuple[str, torch.dtype], Tensor] = {}
        self._in_visit = False

    def unpack(self, name: str, dtype: torch.dtype) -> Tensor:
        if not (self.hold_unpacked and self._in_visit):
            return self._unpack(name, dtype)
        key = (name, dtype)
        if key not in self._held:
            self._held[key] = self._unpack(name, dtype)
        return self._held[key]

    def _unpack(self, name: str, dtype: torch.dtype) -> Tensor:
        packed = self.packed[name]
        weight = packed.unpack(dtype)
        return weight.clone() if self.copies_unpacked and packed.packing.format == "none" else weight

    @contextmanager
    def holding(self) -> Iterator[None]:
        """A visit, as far as held weights are concerned."""
        self._in_visit = True
        try:
            yield
        finally:
            self._in_visit = False
            self._held.clear()


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
