"""A model of meta tensors with LoRA parameters; the program runs it to find out its memory.

weights     of one layer of each layout, shared by all such layers
head        three tiles and a remainder: the peak of the loss does not depend on the number of tiles
layers      as many as the model has; each kind runs once and is replayed from then on (recorded_layers.py)
host        meta tensors, which are not counted as the device's
"""

from __future__ import annotations

import weakref
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from qlora_train.device.planned import PlannedDevice
from qlora_train.kernels.planned_sdpa import attention_scratch
from qlora_train.micro_batch import IGNORED_LABEL, MicroBatch
from qlora_train.model.base import MetaModel
from qlora_train.model.layer_buffer import LayerBufferLayout
from qlora_train.model.lora_parameters import LoraParameters
from qlora_train.model.loss import TiledLoss
from qlora_train.model.packed_tokens import PackedTokens
from qlora_train.model.quantized_matrix import RowLayout, as_vocab_matrix
from qlora_train.model.vocab_matrix import ResidentMatrix, TokenIds, VocabMatrix
from qlora_train.model.weight_store import by_path
from qlora_train.plan.planned_meter import PlannedMeter
from qlora_train.plan.recorded_layers import PlannedWeights, RecordedDecoder
from qlora_train.plan.workload import Workload
from qlora_train.quant.formats import UNQUANTIZED
from qlora_train.quant.weight import QuantizedWeight
from qlora_train.weights.execution_plan import HEAD_TILE_ROWS, ExecutionPlan, Placement
from qlora_train.weights.host_memory import HostMemory

NUM_TILES = 3
LOSS = "loss and its gradients"


class PlannedModel:
    """The decoder and LoRA parameters of a workload, on the meta device."""

    def __init__(self, workload: Workload) -> None:
        shape, dtype = workload.shape, workload.dtype
        self.device = PlannedDevice(workload.target)
        self._workload = workload
        meta_model = MetaModel(shape.config, dtype)
        _fix_rotary_tables(meta_model.model)
        layouts = meta_model.layouts(workload.quantization)
        weights = PlannedWeights(layouts, workload.target.dequantize_kernel)
        empty: dict[LayerBufferLayout, dict[str, QuantizedWeight]] = {}
        for layout, path in zip(layouts, meta_model.layer_paths, strict=True):
            if layout not in empty:
                empty[layout] = layout.weights(_empty((layout.num_bytes,), torch.uint8))
            weights.quantized |= by_path(empty[layout], path)
        plain = {
            name: _empty(size, meta_model.plain_dtype(name)) for name, size in meta_model.plain_shapes.items()
        }
        matrix = self._matrix(shape.head_format(dtype), Placement.DEVICE, HEAD_TILE_ROWS)
        self.decoder = meta_model.materialize_as(RecordedDecoder, weights, plain, matrix, matrix, self.device)
        self.decoder.skippable = shape.probed.skippable
        if not workload.reference:
            found = shape.probed
            self.decoder.fuse(norms=found.fuses_norms, mlps=found.fuses_mlps, qkv=found.fuses_qkv)
        ranks = dict(workload.lora_ranks)
        self.lora = LoraParameters(
            {path: self.decoder.adaptable[path] for path in ranks},
            rank=ranks,
            scaling=1.0,
            dropout=0.5 if workload.dropout else 0.0,
            seed=0,
            dtype=dtype,
            device=self.device.torch,
            use_dora=workload.use_dora,
            token_rows={
                path: _empty((workload.num_added_tokens, shape.hidden), torch.float32)
                for path in (self.decoder.matrix_paths if workload.num_added_tokens else ())
            },
            lora_bias=workload.lora_bias,
        )
        self.decoder.prepare()

    def place(self, plan: ExecutionPlan) -> None:
        """Place embedding and head as a plan has them."""
        shape, dtype = self._workload.shape, self._workload.dtype
        self.decoder.head = self._matrix(shape.head_format(dtype), plan.head, plan.head_tile_rows)
        self.decoder.embedding = self.decoder.head
        if not shape.is_tied:
            rows = RowLayout(UNQUANTIZED, shape.hidden, dtype)
            self.decoder.embedding = self._matrix(rows, plan.embedding, plan.head_tile_rows)
        if (number := self._workload.num_added_tokens) > 0:
            vocabulary = self.decoder.embedding.num_rows
            ids = (0, *range(vocabulary, vocabulary + number - 1))  # one in a whole tile, which takes most
            rows_of, lora = self.lora.token_rows, self.lora
            self.decoder.set_token_rows(ids, rows_of(lora.working), rows_of(lora.gradient))

    def meter(self, most_documents: int) -> PlannedMeter:
        """A new meter of device memory. most_documents: the largest number in any micro-batch."""
        target = self._workload.target
        scratch = attention_scratch(
            target, deterministic=self._workload.deterministic, most_documents=most_documents
        )
        return PlannedMeter(scratch, may_write_scores=not target.is_accelerator)

    def micro_batch(self, documents: tuple[int, ...], num_supervised: int) -> PackedTokens:
        """A meta micro-batch. documents: token counts. num_supervised: tokens that have a label."""
        num_tokens = sum(documents)
        zeros = np.zeros(num_tokens, dtype=np.int64)
        return PackedTokens.from_host(
            MicroBatch(
                token_ids=zeros,
                position_ids=np.concatenate([np.arange(length) for length in documents]),
                labels=np.where(np.arange(num_tokens) < num_supervised, 0, IGNORED_LABEL),
                cu_seqlens=np.cumsum([0, *documents]),
                row_ids=zeros,
                token_offsets=zeros,
            ),
            self.device.torch,
        )

    def _matrix(self, rows: RowLayout, place: Placement, tile_rows: int) -> VocabMatrix:
        vocabulary = self._workload.shape.vocabulary
        if not self._workload.reference:  # reference mode has no tiles
            vocabulary = min(vocabulary, NUM_TILES * tile_rows + vocabulary % tile_rows)
        stored = _PlannedMatrix(
            _empty((vocabulary, rows.stored_columns), rows.stored_dtype),
            tile_rows,
            self._gathers_on_device(place),
        )
        matrix = as_vocab_matrix(stored, rows, self.device.description.dequantize_kernel)
        with matrix.tile(0):  # makes the buffer that tiles are dequantized into
            pass
        return matrix

    def _gathers_on_device(self, place: Placement) -> bool:
        """Whether gathered rows are assembled in device memory. On a CPU, rows from a file are assembled in
        host memory first, which is the device's too."""
        return self._workload.on_accelerator or place is not Placement.DISK


class _PlannedMatrix(ResidentMatrix):
    """A matrix of meta tensors. gathers_on_device: see `PlannedModel._gathers_on_device`."""

    def __init__(self, weight: Tensor, tile_rows: int, gathers_on_device: bool) -> None:
        super().__init__(weight, tile_rows)
        self._gathers_on_device = gathers_on_device

    def gather(self, ids: TokenIds) -> Tensor:
        if self._gathers_on_device:
            return super().gather(ids)
        found, rows = super().gather(ids), super().gather(ids)  # as weights/stores.py's HostRows
        del found, rows
        return super().gather(ids)


class PlannedLoss(TiledLoss):
    """A `TiledLoss` that runs one tile of each size: all others need the same memory, and keep nothing."""

    def __call__(self, *arguments: Any) -> tuple[Tensor, list[Tensor]]:
        decoder = self._decoder
        assert isinstance(decoder, RecordedDecoder)
        with decoder.meter.counting(LOSS):
            return super().__call__(*arguments)

    def _add_tile(self, state: Any, block: slice, start: int, rows: Tensor) -> None:
        decoder = self._decoder
        assert isinstance(decoder, RecordedDecoder)
        size = (block.stop - block.start, len(rows), state.weighted is not None)
        tiles = self.__dict__.setdefault("_tiles", {})
        if size not in tiles:
            with decoder.meter.paused(), decoder.meter.another() as meter:
                super()._add_tile(state, block, start, rows)
            tiles[size] = meter.peak_bytes
        decoder.meter.note_peak(tiles[size], decoder.meter.cause)


class PlannedHost(HostMemory):
    """Host memory of meta tensors. meter: the device's, which must not count them."""

    def __init__(self, device: PlannedDevice, meter: PlannedMeter) -> None:
        super().__init__(device)
        self._meter = meter
        self.live_bytes = 0

    def empty(self, num_bytes: int, *, gives_way: bool = False) -> Tensor:
        with self._meter.paused():
            buffer = torch.empty(num_bytes, dtype=torch.uint8, device="meta")
        self.live_bytes += num_bytes
        weakref.finalize(buffer.untyped_storage(), self._gone, num_bytes)
        return buffer

    @property
    def num_bytes(self) -> int:
        return self.live_bytes

    def _gone(self, num_bytes: int) -> None:
        self.live_bytes -= num_bytes


def _empty(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _fix_rotary_tables(model: nn.Module) -> None:
    """Make length-dependent rotary tables fixed, as they read a tensor's value, which meta tensors lack.
    Where the length matters, `train` refuses the sequence (model/rope_lengths.py)."""
    for module in model.modules():
        if (
            "dynamic" in str(getattr(module, "rope_type", ""))
            or getattr(module, "rope_type", "") == "longrope"
        ):
            module.rope_type = "default"  # type: ignore[assignment]


@lru_cache(maxsize=4)
def planned_model(workload: Workload) -> PlannedModel:
    """The cached planned model of a workload."""
    return PlannedModel(workload)
