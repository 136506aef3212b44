"""Reads the quantized weights of training from the cache, so that an export need not quantize again.

Quantizing again would give the same bytes, but take a third of a merge's time. Memory: one layer buffer
(0.11 GB of an 8B model).
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from qlora_train.model.base import MetaModel, read_config
from qlora_train.quant.formats import Quantization
from qlora_train.quant.weight import QuantizedWeight
from qlora_train.recipe import LoraSection
from qlora_train.weights.cache_key import cache_root
from qlora_train.weights.disk_file import DiskFile
from qlora_train.weights.quantized_cache import QuantizedBase, find_quantized_layers


class QuantizedLayers:
    """Reads quantized weights by layer and name within the layer. A context manager."""

    def __init__(self, base: QuantizedBase) -> None:
        self._base = base
        self._file = DiskFile(base.layer_buffer(0).path)
        self._layer_buffer = torch.empty(0, dtype=torch.uint8)
        self._layer = -1

    def __enter__(self) -> QuantizedLayers:
        return self

    def __exit__(self, *exc: object) -> None:
        self._file.close()

    def read_layer(self, layer: int, layer_buffer: Tensor) -> None:
        """Read all quantized bytes of a layer into `layer_buffer` (uint8 of that length, on any device)."""
        part = self._base.layer_buffer(layer)
        bytes_on_host = (
            layer_buffer
            if layer_buffer.device.type == "cpu"
            else torch.empty(part.num_bytes, dtype=torch.uint8)
        )
        self._file.read(part.offset_bytes, bytes_on_host)
        if bytes_on_host is not layer_buffer:
            layer_buffer.copy_(bytes_on_host)

    def get(self, layer: int, name: str) -> QuantizedWeight:
        """The quantized weight; valid until one of another layer is read."""
        if layer != self._layer:
            num_bytes = self._base.layer_buffer(layer).num_bytes
            if self._layer_buffer.numel() != num_bytes:
                self._layer_buffer = torch.empty(num_bytes, dtype=torch.uint8)
            self.read_layer(layer, self._layer_buffer)
            self._layer = layer
        return self._base.layouts[layer].weights(self._layer_buffer)[name]


def cached_layers(
    base_folder: Path, quantization: Quantization, dtype: torch.dtype, lora: LoraSection | None = None
) -> QuantizedLayers | None:
    """The cached layers of a base in this quantization and compute dtype, as a run with this `lora` section
    has them; None: the cache does not have them, or not all."""
    meta_model = MetaModel(read_config(base_folder), dtype, lora)
    base = find_quantized_layers(cache_root(), base_folder, meta_model, quantization)
    return None if base is None else QuantizedLayers(base)
