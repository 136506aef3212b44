"""From a checkpoint to a decoder whose parts are where the plan says.

    checkpoint -> packed base on disk (packed_cache.py; once) -> slabs on the device | in RAM | left on disk
                                                              -> ring and slots for what streams

Where nothing streams and no cache is wanted, layers are packed straight into their resident slabs and nothing
touches the disk. Either way the 16-bit model is never held: peak = what stays, plus one slab, one block of
rows and the quantiser's scratch.
"""

from __future__ import annotations

import os
import tempfile
import weakref
from collections.abc import Callable
from pathlib import Path

import torch
import xxhash
from torch import Tensor

from qlora_train.device.compute import ComputeDevice
from qlora_train.memory.disk_file import page_aligned
from qlora_train.memory.execution import HEAD_TILE_ROWS, ExecutionPlan, Place, everything_resident
from qlora_train.memory.host_memory import HostMemory
from qlora_train.memory.packed_cache import (
    EMBEDDING,
    HEAD,
    PackedBase,
    cache_root,
    content_fingerprint,
    open_packed_base,
)
from qlora_train.memory.ring import Ring
from qlora_train.memory.stores import FilePart, HostRows, ItemReader, tile_items
from qlora_train.memory.streaming import StreamedMatrix, StreamedWeights
from qlora_train.memory.uploads import Uploads
from qlora_train.model.base import Skeleton, read_config
from qlora_train.model.checkpoint import BaseCheckpoint
from qlora_train.model.decoder import FrozenDecoder
from qlora_train.model.packed_matrix import UNPACKED, RowFormat, as_token_matrix
from qlora_train.model.quantize import PackedWeight, Packing
from qlora_train.model.shards import tensor_bytes
from qlora_train.model.token_matrix import ResidentMatrix, TokenMatrix
from qlora_train.model.weights import ResidentWeights, by_path


def load_base(
    folder: Path,
    packing: Packing,
    dtype: torch.dtype,
    device: ComputeDevice,
    *,
    plan: ExecutionPlan | None = None,
    cache: Path | None = None,
    host: HostMemory | None = None,
    say: Callable[[str], None] = lambda line: None,
    poison: bool = False,
) -> FrozenDecoder:
    """Load a base model as `plan` says; None: everything resident.

    folder: with config.json and safetensors. packing: of the decoder layers' linears. dtype: of everything
    else and of the computation. cache: the folder that keeps packed bases (packed_cache.py); None keeps
    nothing, and what streams from disk does so from a temporary file. host: for what waits in
    RAM; None: its own, silent where pinning is refused. say: told, a line each, what takes time. poison: see
    ring.py. Raises `BaseModelError` for missing, surplus, misshapen or differently packed tensors,
    `UserError` for a disk that is too small.
    """
    skeleton = Skeleton(read_config(folder), dtype)
    plan = plan or everything_resident(len(skeleton.layer_paths))
    if cache is None and plan.is_resident:
        return _from_checkpoint(folder, skeleton, packing, device, plan.head_tile_rows)
    temporary = None
    if cache is None:
        cache_root().mkdir(parents=True, exist_ok=True)
        temporary = tempfile.TemporaryDirectory(prefix=f"temporary-{os.getpid()}-", dir=cache_root())
        cache = Path(temporary.name)
    base = open_packed_base(cache, folder, skeleton, packing, device.torch, say)
    decoder = _Assembly(skeleton, base, plan, device, host or HostMemory(device)).decoder(poison)
    decoder.fingerprint = base.fingerprint()
    if isinstance(decoder.weights, StreamedWeights):
        decoder.at_close.append(decoder.weights.close)
    if temporary is not None:
        decoder.at_close.append(weakref.finalize(decoder, temporary.cleanup))
    return decoder


def _from_checkpoint(
    folder: Path, skeleton: Skeleton, packing: Packing, device: ComputeDevice, tile_rows: int
) -> FrozenDecoder:
    """Everything resident, packed where it stays."""
    layouts = skeleton.layouts(packing)
    unpack_kernel = device.description.unpack_kernel
    weights = ResidentWeights(layouts, unpack_kernel)
    hashed = xxhash.xxh3_128()
    with BaseCheckpoint(folder, skeleton) as checkpoint:
        for i, layout in enumerate(layouts):
            slab = torch.zeros(layout.num_bytes, dtype=torch.uint8, device=device.torch)
            checkpoint.pack_layer(i, layout, slab)
            hashed.update(tensor_bytes(slab.cpu()))
            hashed.update(bytes(page_aligned(layout.num_bytes) - layout.num_bytes))  # as in the packed cache
            weights.packed |= by_path(layout.weights(slab), skeleton.layer_paths[i])
        plain = checkpoint.plain(device.torch)
        formats = {skeleton.embedding_name: _row_format(skeleton, UNPACKED)}
        formats.setdefault(skeleton.head_name, _row_format(skeleton, checkpoint.head_packing))
        stored = {
            name: _read_matrix(checkpoint, skeleton, name, row_format, device.torch)
            for name, row_format in formats.items()
        }
    matrices = {
        name: as_token_matrix(ResidentMatrix(stored[name], tile_rows), row_format, unpack_kernel)
        for name, row_format in formats.items()
    }
    decoder = skeleton.come_alive(
        weights, plain, matrices[skeleton.embedding_name], matrices[skeleton.head_name], device
    )
    decoder.fingerprint = content_fingerprint([hashed.hexdigest(), *map(_hash_of, stored.values())])
    return decoder


def _row_format(skeleton: Skeleton, packing: Packing) -> RowFormat:
    return RowFormat(packing, skeleton.matrix_shape[1], skeleton.dtype)


def _hash_of(matrix: Tensor) -> str:
    hashed = xxhash.xxh3_128()
    for rows in matrix.split(HEAD_TILE_ROWS):
        hashed.update(tensor_bytes(rows.cpu()))
    return hashed.hexdigest()


def _read_matrix(
    checkpoint: BaseCheckpoint, skeleton: Skeleton, name: str, row_format: RowFormat, device: torch.device
) -> Tensor:
    """Embedding or head as it is stored."""
    shape = (skeleton.matrix_shape[0], row_format.stored_columns)
    matrix = torch.empty(shape, dtype=row_format.stored_dtype, device=device)
    start = 0
    for rows in checkpoint.matrix_rows(name):
        matrix[start : start + len(rows)] = rows
        start += len(rows)
    return matrix


class _Assembly:
    """Puts the parts of a packed base where a plan wants them."""

    def __init__(
        self,
        skeleton: Skeleton,
        base: PackedBase,
        plan: ExecutionPlan,
        device: ComputeDevice,
        host: HostMemory,
    ) -> None:
        self._skeleton, self._base, self._plan, self._device = skeleton, base, plan, device
        self._host, self._unpack_kernel = host, device.description.unpack_kernel
        self._reader, self._uploads = ItemReader(device, host), Uploads(device, host)  # pinned before weights
        self._embedding_format = _row_format(skeleton, UNPACKED)
        self._head_format = (
            self._embedding_format if skeleton.is_tied else _row_format(skeleton, base.head_packing)
        )

    def decoder(self, poison: bool) -> FrozenDecoder:
        """The decoder; see `load_base` for poison."""
        skeleton, base, plan, device = self._skeleton, self._base, self._plan, self._device
        resident: dict[str, PackedWeight] = {}
        for i, place in enumerate(plan.weights):
            if place is Place.RESIDENT:
                slab = self._on_device(base.slab(i))
                resident |= by_path(base.layouts[i].weights(slab), skeleton.layer_paths[i])
            else:
                self._reader.items[i] = self._off_device(base.slab(i), place)
        head_file = EMBEDDING if skeleton.is_tied else HEAD
        head_at = None if plan.head is Place.RESIDENT else self._off_device(base.matrix(head_file), plan.head)
        if head_at is not None:
            row_bytes = self._head_format.row_bytes
            self._reader.items |= tile_items(head_at, row_bytes, plan.head_tile_rows, len(plan.weights))
        weights: ResidentWeights | StreamedWeights = ResidentWeights(base.layouts, self._unpack_kernel)
        ring = None
        if self._reader.items:
            ring = Ring(self._reader, plan.num_slots, self._reader.largest_bytes, device, poison=poison)
            weights = StreamedWeights(
                skeleton.layer_paths, base.layouts, ring, self._reader, self._unpack_kernel
            )
        weights.packed |= resident
        head = self._head(head_at, ring)
        embedding = head if skeleton.is_tied else self._embedding()
        self._reader.finish()
        return skeleton.come_alive(weights, base.plain(device.torch), embedding, head, device)

    def _head(self, at: Tensor | FilePart | None, ring: Ring | None) -> TokenMatrix:
        row_format = self._head_format
        if at is None:
            return self._resident_matrix(EMBEDDING if self._skeleton.is_tied else HEAD, row_format)
        num_layers = len(self._plan.weights)
        items = sorted(item for item in self._reader.items if item >= num_layers)
        return self._streamed_matrix(at, row_format, ring, items)

    def _embedding(self) -> TokenMatrix:
        if self._plan.embedding is Place.RESIDENT:
            return self._resident_matrix(EMBEDDING, self._embedding_format)
        at = self._off_device(self._base.matrix(EMBEDDING), self._plan.embedding)
        return self._streamed_matrix(at, self._embedding_format, None, [])

    def _resident_matrix(self, file_name: str, row_format: RowFormat) -> TokenMatrix:
        flat = self._on_device(self._base.matrix(file_name)).view(row_format.stored_dtype)
        stored = flat.view(self._skeleton.matrix_shape[0], row_format.stored_columns)
        return as_token_matrix(
            ResidentMatrix(stored, self._plan.head_tile_rows), row_format, self._unpack_kernel
        )

    def _streamed_matrix(
        self, at: Tensor | FilePart, row_format: RowFormat, ring: Ring | None, items: list[int]
    ) -> TokenMatrix:
        stored = StreamedMatrix(
            (self._skeleton.matrix_shape[0], row_format.stored_columns),
            row_format.stored_dtype,
            self._uploads,
            HostRows(at, row_format.row_bytes),
            ring,
            items,
            self._plan.head_tile_rows,
        )
        return as_token_matrix(stored, row_format, self._unpack_kernel)

    def _on_device(self, part: FilePart) -> Tensor:
        target = torch.empty(part.num_bytes, dtype=torch.uint8, device=self._device.torch)
        self._reader.copy(part, target)
        return target

    def _off_device(self, part: FilePart, place: Place) -> Tensor | FilePart:
        if place is Place.DISK:
            return part
        buffer = self._host.empty(part.num_bytes, gives_way=True)
        self._reader.read_to_host(part, buffer)
        return buffer
