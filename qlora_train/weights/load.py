"""Loads a base model from a checkpoint into a decoder, every weight placed as the execution plan says.

    checkpoint -> quantized base on disk (quantized_cache.py; once) -> layer buffers on the device | in RAM |
    left on disk
                                                              -> ring and slots for what streams

Where nothing streams and no cache is wanted, layers are quantized straight into their resident layer buffers
and nothing is written to disk. Either way the 16-bit model is never in memory: peak = the resident weights,
one layer buffer, one block of rows and the quantizer's scratch.

Of several ranks one per machine quantizes, and weights in RAM are stored once per machine, in pages that all
of its ranks map (ranks.py).
"""

from __future__ import annotations

import mmap
import shutil
import weakref
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import torch
import xxhash
from torch import Tensor

from qlora_train.device.compute import ComputeDevice
from qlora_train.files.atomic_folder import locked_partial
from qlora_train.files.folder_lock import lock_folder, remove_leftovers
from qlora_train.files.shards import tensor_bytes
from qlora_train.model.base import MetaModel, read_config
from qlora_train.model.decoder import FrozenDecoder
from qlora_train.model.quantized_matrix import RowLayout, as_vocab_matrix
from qlora_train.model.vocab_matrix import ResidentMatrix, VocabMatrix
from qlora_train.model.weight_store import ResidentWeights, by_path
from qlora_train.quant.formats import UNQUANTIZED, Quantization
from qlora_train.quant.weight import QuantizedWeight
from qlora_train.recipe import LoraSection
from qlora_train.weights.base_checkpoint import BaseCheckpoint
from qlora_train.weights.cache_key import cache_root
from qlora_train.weights.disk_file import page_aligned
from qlora_train.weights.execution_plan import HEAD_TILE_ROWS, ExecutionPlan, Placement, everything_resident
from qlora_train.weights.host_memory import HostMemory
from qlora_train.weights.quantized_cache import (
    EMBEDDING_FILE,
    HEAD_FILE,
    QuantizedBase,
    content_fingerprint,
    made_quantized_base,
    make_root,
    open_quantized_base,
)
from qlora_train.weights.ranks import ALONE, Ranks
from qlora_train.weights.ring import Ring
from qlora_train.weights.stores import FilePart, HostRows, ItemReader, tile_items
from qlora_train.weights.streaming import StreamedMatrix, StreamedWeights
from qlora_train.weights.uploads import Uploads


def load_base(
    folder: Path,
    quantization: Quantization,
    dtype: torch.dtype,
    device: ComputeDevice,
    *,
    plan: ExecutionPlan | None = None,
    cache: Path | None = None,
    host: HostMemory | None = None,
    ranks: Ranks = ALONE,
    log: Callable[[str], None] = lambda line: None,
    poison: bool = False,
    lora: LoraSection | None = None,
) -> FrozenDecoder:
    """Load a base model, placed by `plan`; None: everything resident.

    folder: it holds config.json and safetensors. quantization: that of the decoder layers' linears. dtype:
    that of everything else and of the computation. cache: the folder that keeps quantized bases
    (quantized_cache.py); None keeps nothing, and weights stream from a temporary folder. host: memory for
    weights in RAM; None: its own, silent where pinning is refused. ranks: all of them load the same base by
    the same plan. log: called with a line for each slow operation. poison: see ring.py. lora: of the run that
    the base is for; after PiSSA it is what the decoder's `principal_factors` leave, and always passes through
    a folder. Raises `BaseModelError` for missing, surplus, misshapen or differently quantized tensors,
    `UserError` if the disk is too small.
    """
    meta_model = MetaModel(read_config(folder), dtype, lora)
    plan = plan or everything_resident(len(meta_model.layer_paths))
    if cache is None and plan.is_resident and not meta_model.principal_ranks:
        return _from_checkpoint(folder, meta_model, quantization, device, plan.head_tile_rows)
    with ExitStack() as held:
        if cache is None:
            scratch = None
            if ranks.leads:
                make_root(cache_root())
                remove_leftovers(cache_root())
                scratch = held.enter_context(locked_partial(cache_root() / "temporary"))
                held.callback(shutil.rmtree, scratch.folder, ignore_errors=True)
            cache = Path(ranks.of_leader(scratch and str(scratch.folder)))
        with ranks.leaders_first():
            base = None if ranks.leads else made_quantized_base(cache, folder, meta_model, quantization)
            base = base or open_quantized_base(cache, folder, meta_model, quantization, device.torch, log)
        if (in_use := lock_folder(base.folder, shared=True)) is not None:
            held.enter_context(in_use)  # `cache clear` leaves it alone
        decoder = _Assembly(meta_model, base, plan, device, host or HostMemory(device), ranks).decoder(poison)
        decoder.fingerprint, decoder.principal_factors = base.fingerprint(), base.factors()
        if isinstance(decoder.weights, StreamedWeights):
            decoder.at_close.append(decoder.weights.close)
        decoder.at_close.append(weakref.finalize(decoder, held.pop_all().close))
    return decoder


def _from_checkpoint(
    folder: Path, meta_model: MetaModel, quantization: Quantization, device: ComputeDevice, tile_rows: int
) -> FrozenDecoder:
    """Load everything resident, quantizing straight into the layer buffers on the device."""
    layouts = meta_model.layouts(quantization)
    dequantize_kernel = device.description.dequantize_kernel
    weights = ResidentWeights(layouts, dequantize_kernel)
    hashed = xxhash.xxh3_128()
    with BaseCheckpoint(folder, meta_model) as checkpoint:
        for i, layout in enumerate(layouts):
            layer_buffer = torch.zeros(layout.num_bytes, dtype=torch.uint8, device=device.torch)
            checkpoint.quantize_layer(i, layout, layer_buffer)
            hashed.update(tensor_bytes(layer_buffer.cpu()))
            hashed.update(
                bytes(page_aligned(layout.num_bytes) - layout.num_bytes)
            )  # as in the quantized cache
            weights.quantized |= by_path(layout.weights(layer_buffer), meta_model.layer_paths[i])
        plain = checkpoint.plain(device.torch)
        formats = {meta_model.embedding_name: _row_format(meta_model, UNQUANTIZED)}
        formats.setdefault(meta_model.head_name, _row_format(meta_model, checkpoint.head_quantization))
        stored = {
            name: _read_matrix(checkpoint, meta_model, name, row_format, device.torch)
            for name, row_format in formats.items()
        }
    matrices = {
        name: as_vocab_matrix(ResidentMatrix(stored[name], tile_rows), row_format, dequantize_kernel)
        for name, row_format in formats.items()
    }
    decoder = meta_model.materialize(
        weights, plain, matrices[meta_model.embedding_name], matrices[meta_model.head_name], device
    )
    decoder.fingerprint = content_fingerprint([hashed.hexdigest(), *map(_hash_of, stored.values())])
    return decoder


def _row_format(meta_model: MetaModel, quantization: Quantization) -> RowLayout:
    return RowLayout(quantization, meta_model.matrix_shape[1], meta_model.dtype)


def _hash_of(matrix: Tensor) -> str:
    hashed = xxhash.xxh3_128()
    for rows in matrix.split(HEAD_TILE_ROWS):
        hashed.update(tensor_bytes(rows.cpu()))
    return hashed.hexdigest()


def _read_matrix(
    checkpoint: BaseCheckpoint, meta_model: MetaModel, name: str, row_format: RowLayout, device: torch.device
) -> Tensor:
    """The embedding or the head on the device, in the format in which it is stored."""
    shape = (meta_model.matrix_shape[0], row_format.stored_columns)
    matrix = torch.empty(shape, dtype=row_format.stored_dtype, device=device)
    start = 0
    for rows in checkpoint.matrix_rows(name):
        matrix[start : start + len(rows)] = rows
        start += len(rows)
    return matrix


class _Assembly:
    """Copies the parts of a quantized base to the placements of a plan and builds the decoder."""

    def __init__(
        self,
        meta_model: MetaModel,
        base: QuantizedBase,
        plan: ExecutionPlan,
        device: ComputeDevice,
        host: HostMemory,
        ranks: Ranks,
    ) -> None:
        self._meta_model, self._base, self._plan, self._device = meta_model, base, plan, device
        self._ranks = ranks
        self._host, self._dequantize_kernel = host, device.description.dequantize_kernel
        self._reader, self._uploads = ItemReader(device, host), Uploads(device, host)  # pinned before weights
        self._embedding_format = _row_format(meta_model, UNQUANTIZED)
        self._head_format = (
            self._embedding_format if meta_model.is_tied else _row_format(meta_model, base.head_quantization)
        )

    def decoder(self, poison: bool) -> FrozenDecoder:
        """Build the decoder. poison: see ring.py."""
        meta_model, base, plan, device = self._meta_model, self._base, self._plan, self._device
        resident: dict[str, QuantizedWeight] = {}
        for i, place in enumerate(plan.weights):
            if place is Placement.DEVICE:
                layer_buffer = self._on_device(base.layer_buffer(i))
                resident |= by_path(base.layouts[i].weights(layer_buffer), meta_model.layer_paths[i])
            else:
                self._reader.items[i] = self._off_device(base.layer_buffer(i), place)
        head_file = EMBEDDING_FILE if meta_model.is_tied else HEAD_FILE
        head_at = (
            None if plan.head is Placement.DEVICE else self._off_device(base.matrix(head_file), plan.head)
        )
        if head_at is not None:
            row_bytes = self._head_format.row_bytes
            self._reader.items |= tile_items(head_at, row_bytes, plan.head_tile_rows, len(plan.weights))
        weights: ResidentWeights | StreamedWeights = ResidentWeights(base.layouts, self._dequantize_kernel)
        ring = None
        if self._reader.items:
            ring = Ring(self._reader, plan.num_slots, self._reader.largest_bytes, device, poison=poison)
            weights = StreamedWeights(
                meta_model.layer_paths, base.layouts, ring, self._reader, self._dequantize_kernel
            )
        weights.quantized |= resident
        head = self._head(head_at, ring)
        embedding = head if meta_model.is_tied else self._embedding()
        self._reader.finish()
        return meta_model.materialize(weights, base.plain(device.torch), embedding, head, device)

    def _head(self, at: Tensor | FilePart | None, ring: Ring | None) -> VocabMatrix:
        row_format = self._head_format
        if at is None:
            return self._resident_matrix(
                EMBEDDING_FILE if self._meta_model.is_tied else HEAD_FILE, row_format
            )
        num_layers = len(self._plan.weights)
        items = sorted(item for item in self._reader.items if item >= num_layers)
        return self._streamed_matrix(at, row_format, ring, items)

    def _embedding(self) -> VocabMatrix:
        if self._plan.embedding is Placement.DEVICE:
            return self._resident_matrix(EMBEDDING_FILE, self._embedding_format)
        at = self._off_device(self._base.matrix(EMBEDDING_FILE), self._plan.embedding)
        return self._streamed_matrix(at, self._embedding_format, None, [])

    def _resident_matrix(self, file_name: str, row_format: RowLayout) -> VocabMatrix:
        flat = self._on_device(self._base.matrix(file_name)).view(row_format.stored_dtype)
        stored = flat.view(self._meta_model.matrix_shape[0], row_format.stored_columns)
        return as_vocab_matrix(
            ResidentMatrix(stored, self._plan.head_tile_rows), row_format, self._dequantize_kernel
        )

    def _streamed_matrix(
        self, at: Tensor | FilePart, row_format: RowLayout, ring: Ring | None, items: list[int]
    ) -> VocabMatrix:
        stored = StreamedMatrix(
            (self._meta_model.matrix_shape[0], row_format.stored_columns),
            row_format.stored_dtype,
            self._uploads,
            HostRows(at, row_format.row_bytes),
            ring,
            items,
            self._plan.head_tile_rows,
        )
        return as_vocab_matrix(stored, row_format, self._dequantize_kernel)

    def _on_device(self, part: FilePart) -> Tensor:
        target = torch.empty(part.num_bytes, dtype=torch.uint8, device=self._device.torch)
        self._reader.copy(part, target)
        return target

    def _off_device(self, part: FilePart, place: Placement) -> Tensor | FilePart:
        if place is Placement.DISK:
            return part
        if self._ranks.shares_memory:
            return self._host.adopt(self._shared(part), gives_way=True)
        buffer = self._host.empty(part.num_bytes, gives_way=True)
        self._reader.read_to_host(part, buffer)
        return buffer

    def _shared(self, part: FilePart) -> mmap.mmap:
        def fill(pages: mmap.mmap) -> None:
            self._reader.read_to_host(part, torch.frombuffer(pages, dtype=torch.uint8))

        return self._ranks.shared_pages(part.num_bytes, fill)
