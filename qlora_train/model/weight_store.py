"""Weight store: gives the frozen linears their weights. The protocol, and its form with all on the device.

The walk visits layers: it announces the order (`set_schedule`), enters a layer (`layer_on_device`), runs its
micro-batches and leaves it. During a visit the layer's quantized weights are on the compute device; otherwise
they need not be. `weights/streaming.py` has the other implementation, whose layers are stored anywhere and
brought to the device for a visit.

With `hold_dequantized`, a weight is dequantized at its first use in a visit and kept until the visit ends: 2
bytes per parameter of one layer in 16 bits. Otherwise every use dequantizes: once per micro-batch forward,
twice per micro-batch backward if the layer is recomputed. The results are the same bits.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol

import torch
from torch import Tensor

from qlora_train.device.description import DequantizeKernel
from qlora_train.model.layer_buffer import LayerBufferLayout
from qlora_train.quant.weight import QuantizedWeight


class WeightStore(Protocol):
    """The quantized weights of all decoder layers.

    hold_dequantized: keep dequantized weights until the visit ends. copies_dequantized: return new tensors
    that stay valid."""

    hold_dequantized: bool
    copies_dequantized: bool

    def set_schedule(self, order: Iterable[int]) -> None:
        """Announce the next visits in order, replacing the schedule so far.

        Items: a decoder layer's index, or the number of layers plus the index of a tile of a streamed head.
        """
        ...

    def layer_on_device(self, layer: int) -> AbstractContextManager[None]:
        """A visit: inside the returned context the weights of this layer can be dequantized."""
        ...

    def dequantize(self, name: str, dtype: torch.dtype) -> Tensor:
        """The weight `name` (module path) as [out, in] in `dtype` on the compute device; read-only.

        Valid until the next call, with `hold_dequantized` until the visit ends, with `copies_dequantized`
        without limit."""
        ...

    experts_at_once: int
    """Experts whose weights are dequantized together."""

    def dequantize_rows(self, name: str, start: int, stop: int, dtype: torch.dtype) -> Tensor:
        """Rows start..stop of a weight of experts, of `experts_at_once` or fewer, as [rows, in]. Valid until
        rows of a weight with the same last name are asked for again; never held for a visit."""
        ...


class PresentWeights:
    """Dequantizes weights that are on the device; base class of the stores.

    layouts: the layer buffer layouts of all layers. dequantize_kernel: the device's. quantized: the weights
    on the device now, by module path. hold_dequantized: keep dequantized weights until the visit ends.
    copies_dequantized: each result is a new tensor, as autograd needs to save it (reference mode). Otherwise
    results share one reused buffer of the size of the largest weight, or with `hold_dequantized` of the
    largest layer.
    """

    def __init__(self, layouts: Sequence[LayerBufferLayout], dequantize_kernel: DequantizeKernel) -> None:
        self.quantized: dict[str, QuantizedWeight] = {}
        self._dequantize_kernel = dequantize_kernel
        self.hold_dequantized = False
        self.copies_dequantized = False
        self.experts_at_once = experts_at_once(dequantize_kernel)
        sizes = [list(whole_sizes(layout)) for layout in layouts]
        self._largest_layer = max(map(sum, sizes))
        self._largest_weight = max((size for layer in sizes for size in layer), default=0)
        self._chunk_sizes = chunk_sizes(layouts, self.experts_at_once)
        self._chunks: dict[str, Tensor] = {}
        self._buffer = torch.empty(0)
        self._held: dict[str, Tensor] = {}
        self._num_held_elements = 0
        self._in_visit = False

    def dequantize(self, name: str, dtype: torch.dtype) -> Tensor:
        """See `WeightStore.dequantize`."""
        quantized = self.quantized[name]
        if self.copies_dequantized:
            weight = quantized.dequantize(dtype)
            return weight if quantized.quantization.is_quantized else weight.clone()
        if not quantized.quantization.is_quantized:
            return quantized.dequantize(dtype)
        if name in self._held:
            return self._held[name]
        holds = self.hold_dequantized and self._in_visit
        self._make_room(self._largest_layer if holds else self._largest_weight, quantized, dtype)
        start = self._num_held_elements
        room = self._buffer[start : start + math.prod(quantized.shape)].view(quantized.shape)
        weight = quantized.dequantize_into(room, self._dequantize_kernel)
        if holds:
            self._held[name] = weight
            self._num_held_elements += weight.numel()
        return weight

    def dequantize_rows(self, name: str, start: int, stop: int, dtype: torch.dtype) -> Tensor:
        """See `WeightStore`."""
        quantized = self.quantized[name]
        if self.copies_dequantized or not quantized.quantization.is_quantized:
            rows = quantized.dequantize_rows(start, stop, dtype)
            return rows.clone() if self.copies_dequantized else rows
        columns = quantized.shape[1]
        buffer = self._chunk_buffer(name.rpartition(".")[2], quantized.tensors["data"].device, dtype)
        room = buffer[: (stop - start) * columns].view(stop - start, columns)
        return quantized.dequantize_into(room, self._dequantize_kernel, start)

    def _chunk_buffer(self, matrix: str, device: torch.device, dtype: torch.dtype) -> Tensor:
        """What chunks of experts are dequantized into; one for each of their matrices, for all layers."""
        if matrix not in self._chunks or self._chunks[matrix].dtype != dtype:
            self._chunks[matrix] = torch.empty(self._chunk_sizes[matrix], dtype=dtype, device=device)
        return self._chunks[matrix]

    def _make_room(self, num_elements: int, quantized: QuantizedWeight, dtype: torch.dtype) -> None:
        if self._buffer.numel() < num_elements or self._buffer.dtype != dtype:
            assert not self._held
            self._buffer = torch.empty(0)  # freed before the new one is allocated
            self._buffer = torch.empty(num_elements, dtype=dtype, device=quantized.tensors["data"].device)

    @contextmanager
    def holding(self) -> Iterator[None]:
        """Context of a visit: weights may be held inside, and are released at its end."""
        self._in_visit = True
        try:
            yield
        finally:
            self._in_visit = False
            self._held.clear()
            self._num_held_elements = 0


class ResidentWeights(PresentWeights):
    """A `WeightStore` whose quantized weights all stay on the compute device."""

    def set_schedule(self, order: Iterable[int]) -> None:
        """Does nothing: all layers are on the device."""

    def layer_on_device(self, layer: int) -> AbstractContextManager[None]:
        return self.holding()

    @property
    def num_bytes(self) -> int:
        return sum(weight.num_bytes for weight in self.quantized.values())


def experts_at_once(dequantize_kernel: DequantizeKernel) -> int:
    """Experts that are dequantized together: a GPU wants few launches, a CPU what its cache holds."""
    return 1 if dequantize_kernel == "parts" else 16


def whole_sizes(layout: LayerBufferLayout) -> Iterator[int]:
    """Numbers in each quantized weight that is dequantized as a whole: all but experts."""
    stacked = {name for name, _ in layout.num_experts}
    return (
        math.prod(shape)
        for name, shape in layout.shapes
        if name not in stacked and layout.quantization_of(name).is_quantized
    )


def chunk_sizes(layouts: Iterable[LayerBufferLayout], experts_at_once: int) -> dict[str, int]:
    """Last name of a quantized matrix of experts -> numbers in the largest chunk that is dequantized at
    once."""
    sizes: dict[str, int] = {}
    for layout in layouts:
        shapes = dict(layout.shapes)
        for name, num_experts in layout.num_experts:
            if not layout.quantization_of(name).is_quantized:
                continue
            size = math.prod(shapes[name]) // num_experts * min(experts_at_once, num_experts)
            matrix = name.rpartition(".")[2]
            sizes[matrix] = max(size, sizes.get(matrix, 0))
    return sizes


def by_path(weights: Mapping[str, QuantizedWeight], layer_path: str) -> dict[str, QuantizedWeight]:
    """The same weights keyed by module path instead of the name within the layer."""
    return {f"{layer_path}.{name}": weight for name, weight in weights.items()}
