"""Weight streaming: layers and head tiles in RAM or a file are copied to the device for each visit.

`StreamedWeights` is a `WeightStore` (model/weight_store.py) whose layers live on the device, in RAM or in a
file, in any mixture. A visit to a resident layer costs nothing; the others come through the ring (ring.py),
which also reads ahead while resident layers compute. `StreamedMatrix` is a `VocabMatrix`
(model/vocab_matrix.py) in RAM or a file: rows are gathered on the host, tiles come through the same ring, in
the same order as the layers:

    forward 0..L-1, head tiles, backward L-1..0       one order, one set of slots, no second buffer

Bytes on the device: num_slots * slot_bytes; slot_bytes is the size of the largest streamed item.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from qlora_train.device.description import DequantizeKernel
from qlora_train.device.step_clock import Cause
from qlora_train.model.layer_buffer import LayerBufferLayout
from qlora_train.model.vocab_matrix import TokenIds
from qlora_train.model.weight_store import PresentWeights, by_path
from qlora_train.quant.weight import QuantizedWeight
from qlora_train.weights.heap import HeapTrimmer
from qlora_train.weights.ring import Ring
from qlora_train.weights.stores import HostRows, ItemReader
from qlora_train.weights.uploads import Uploads


class StreamedWeights(PresentWeights):
    """A `WeightStore` over a ring. layer_paths, layouts: module path and layer buffer layout of every layer.
    Layers that are not items of `reader` are resident (`quantized`)."""

    def __init__(
        self,
        layer_paths: Sequence[str],
        layouts: Sequence[LayerBufferLayout],
        ring: Ring,
        reader: ItemReader,
        dequantize_kernel: DequantizeKernel,
    ) -> None:
        super().__init__(layouts, dequantize_kernel)
        self._paths, self._layouts = layer_paths, layouts
        self.ring, self.reader = ring, reader
        self._heap = HeapTrimmer()
        self._views: dict[tuple[int, int], dict[str, QuantizedWeight]] = {}

    def set_schedule(self, order: Iterable[int]) -> None:
        self.ring.set_schedule(item for item in order if item in self.reader.items)

    @contextmanager
    def layer_on_device(self, layer: int) -> Iterator[None]:
        if layer not in self.reader.items:
            with self.holding():
                yield
            return
        slot_number, slot = self.ring.acquire(layer)
        present = by_path(self._weights_in(slot_number, slot, layer), self._paths[layer])
        self.quantized.update(present)
        try:
            with self.holding():
                yield
        finally:
            for name in present:
                del self.quantized[name]
            self.ring.release(layer)
            if slot.device.type == "cpu":
                self._heap.trim_if_grown()

    def close(self) -> None:
        """Stop reading; streamed layers can no longer be visited."""
        self.ring.close()
        self.reader.close()

    def _weights_in(self, slot_number: int, slot: Tensor, layer: int) -> dict[str, QuantizedWeight]:
        """Views of a slot as the layer's weights, shared by all layers of one layout."""
        layout = self._layouts[layer]
        key = (slot_number, id(layout))
        if key not in self._views:
            self._views[key] = layout.weights(slot)
        return self._views[key]


class StreamedMatrix:
    """A `VocabMatrix` that is not on the device: [V, D] in `dtype`, rows from `rows`, tiles from the ring."""

    def __init__(
        self,
        shape: tuple[int, int],
        dtype: torch.dtype,
        uploads: Uploads,
        rows: HostRows,
        ring: Ring | None,
        items: Sequence[int],
        tile_rows: int,
    ) -> None:
        """ring: None for an embedding that is not the head: its rows are gathered, tiles never used."""
        self.num_rows, self._num_columns = shape
        self.tile_rows, self.items = tile_rows, tuple(items)
        self._dtype, self._uploads, self._rows, self._ring = dtype, uploads, rows, ring

    def gather(self, ids: TokenIds) -> Tensor:
        with self._uploads.device.clock.spent_on(Cause.WEIGHTS):
            staged = self._uploads.stage_rows(
                len(ids), self._rows.row_bytes, lambda rows: self._rows.gather(ids.host, rows)
            )
            return self._uploads.send(staged)[0].view(self._dtype)

    @contextmanager
    def tile(self, index: int) -> Iterator[Tensor]:
        assert self._ring is not None
        start = index * self.tile_rows
        shape = (min(self.tile_rows, self.num_rows - start), self._num_columns)
        item = self.items[index]
        _, slot = self._ring.acquire(item)
        try:
            yield slot[: shape[0] * shape[1] * self._dtype.itemsize].view(self._dtype).view(shape)
        finally:
            self._ring.release(item)
