"""The layers' packed weights from the cache: the bytes that training saw, and no need to pack again.

Packing them again gives the same bytes, but is a third of a merge's time (bench/LOG.md). Memory: one layer's
slab (0.11 GB of an 8B model).
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from qlora_train.memory.cache_key import cache_root
from qlora_train.memory.disk_file import DiskFile
from qlora_train.memory.packed_cache import PackedBase, find_packed_layers
from qlora_train.model.base import Skeleton, read_config
from qlora_train.model.quantize import PackedWeight, Packing


class PackedLayers:
    """Packed weights by the name that their tensor has in a checkpoint. A context manager."""

    def __init__(self, base: PackedBase, layer_paths: tuple[str, ...]) -> None:
        self._base = base
        self._places = {
            f"{path}.{name}.weight": (layer, name)
            for layer, (path, layout) in enumerate(zip(layer_paths, base.layouts, strict=True))
            for name, _ in layout.shapes
        }
        self._file = DiskFile(base.slab(0).path)
        self._slab: Tensor | None = None
        self._layer = -1

    def __enter__(self) -> PackedLayers:
        return self

    def __exit__(self, *exc: object) -> None:
        self._file.close()

    def read_layer(self, layer: int, slab: Tensor) -> None:
        """All packed bytes of a layer into `slab` (uint8 of that length, on any device)."""
        part = self._base.slab(layer)
        bytes_on_host = slab if slab.device.type == "cpu" else torch.empty(part.num_bytes, dtype=torch.uint8)
        self._file.read(part.offset_bytes, bytes_on_host)
        if bytes_on_host is not slab:
            slab.copy_(bytes_on_host)

    def get(self, name: str) -> PackedWeight | None:
        """The packed weight, valid until one of another layer is asked for; None: the cache has none such."""
        place = self._places.get(name) or self._places.get(f"model.{name}")
        if place is None:
            return None
        layer, name_in_layer = place
        if layer != self._layer:
            part = self._base.slab(layer)
            if self._slab is None or self._slab.numel() != part.num_bytes:
                self._slab = torch.empty(part.num_bytes, dtype=torch.uint8)
            self._file.read(part.offset_bytes, self._slab)
            self._layer = layer
        assert self._slab is not None
        return self._base.layouts[layer].weights(self._slab)[name_in_layer]


def cached_layers(base_folder: Path, packing: Packing, dtype: torch.dtype) -> PackedLayers | None:
    """Those of a base that was trained on in this packing and compute dtype; None: the cache does not have
    them, or not whole."""
    skeleton = Skeleton(read_config(base_folder), dtype)
    base = find_packed_layers(cache_root(), base_folder, skeleton, packing)
    return None if base is None else PackedLayers(base, tuple(skeleton.layer_paths))
