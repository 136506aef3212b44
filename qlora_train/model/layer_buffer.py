"""Layer buffer: all quantized weights of one decoder layer in one contiguous buffer, and its layout.

    layer buffer   uint8 [num_bytes]
    layout         (weight, tensor) -> offset, dtype, shape    e.g. (mlp.up_proj, absmax) -> 3,211,264,
                                                               uint8, [..]

Moving a layer (disk to RAM to GPU) is then one copy of known size: a 7-linear layer in NF4 with double
quantization would otherwise be 35 small copies. Offsets are multiples of 64 bytes, which is aligned for every
dtype and vector instruction; padding is under 64 bytes per tensor. Names are relative to the layer, so layers
of the same shape share one layout, and the views into a reused buffer are made once.

Norms, biases and module buffers are stored elsewhere: autograd of a library norm saves its weight, and a
saved tensor must not lie in a buffer that the next layer overwrites.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from qlora_train.quant.formats import Quantization
from qlora_train.quant.weight import QuantizedWeight, quantized_layout
from qlora_train.units import round_up

ALIGNMENT_BYTES = 64


def aligned(num_bytes: int) -> int:
    """`num_bytes` rounded up to a multiple of `ALIGNMENT_BYTES`."""
    return round_up(num_bytes, ALIGNMENT_BYTES)


@dataclass(frozen=True)
class LayerShapes:
    """Sizes of a layer's quantized weights, by name within the layer. linears: (out, in). experts: (rows of
    all experts, columns), and how many experts. kept: how the checkpoint has quantized the experts, if they
    stay so."""

    linears: tuple[tuple[str, tuple[int, int]], ...]
    experts: tuple[tuple[str, tuple[int, int], int], ...] = ()
    kept: Quantization | None = None

    def items(self) -> Iterator[tuple[str, tuple[int, int]]]:
        """Every weight, in the order of the layer buffer."""
        yield from self.linears
        yield from ((name, shape) for name, shape, _ in self.experts)

    def layout(self, quantization: Quantization, dtype: torch.dtype) -> LayerBufferLayout:
        num_experts = {name: number for name, _, number in self.experts}
        return LayerBufferLayout.of(dict(self.items()), quantization, dtype, num_experts, self.kept)


@dataclass(frozen=True)
class LayerBufferEntry:
    """Place of one tensor of one quantized weight in the layer buffer."""

    weight: str
    tensor: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset_bytes: int

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class LayerBufferLayout:
    """The layout of a layer buffer; equal for layers of equal shapes.

    shapes: (weight name within the layer, (out, in)) pairs. num_bytes: the size of the whole buffer."""

    quantization: Quantization
    shapes: tuple[tuple[str, tuple[int, int]], ...]
    entries: tuple[LayerBufferEntry, ...]
    num_bytes: int
    num_experts: tuple[tuple[str, int], ...] = ()
    """The number of experts in each weight that holds the rows of several, one after another."""
    kept: Quantization | None = None
    """The quantization of these weights; None: that of the others."""

    @staticmethod
    def of(
        shapes: Mapping[str, tuple[int, int]],
        quantization: Quantization,
        dtype: torch.dtype,
        num_experts: Mapping[str, int] | None = None,
        kept: Quantization | None = None,
    ) -> LayerBufferLayout:
        """shapes: weight name within the layer -> (out, in), in the order of the layer buffer. dtype: that of
        unquantized weights. num_experts, kept: see the fields."""
        stacked = tuple((num_experts or {}).items())
        layout = LayerBufferLayout(quantization, tuple(shapes.items()), (), 0, stacked, kept)
        entries, offset = [], 0
        for weight, shape in shapes.items():
            for tensor, (kind, size) in quantized_layout(
                layout.quantization_of(weight), shape, dtype
            ).items():
                entry = LayerBufferEntry(weight, tensor, kind, size, offset)
                entries.append(entry)
                offset += aligned(entry.num_bytes)
        return replace(layout, entries=tuple(entries), num_bytes=offset)

    def quantization_of(self, weight: str) -> Quantization:
        """How the weight of this name is quantized."""
        return self.kept if self.kept is not None and weight in dict(self.num_experts) else self.quantization

    def weights(self, layer_buffer: Tensor) -> dict[str, QuantizedWeight]:
        """The quantized weights as views of `layer_buffer` (uint8, at least num_bytes long, on any
        device)."""
        assert layer_buffer.dtype == torch.uint8 and layer_buffer.numel() >= self.num_bytes
        tensors: dict[str, dict[str, Tensor]] = {weight: {} for weight, _ in self.shapes}
        for entry in self.entries:
            part = layer_buffer[entry.offset_bytes : entry.offset_bytes + entry.num_bytes]
            tensors[entry.weight][entry.tensor] = part.view(entry.dtype).view(entry.shape)
        return {
            weight: QuantizedWeight(self.quantization_of(weight), shape, tensors[weight])
            for weight, shape in self.shapes
        }
