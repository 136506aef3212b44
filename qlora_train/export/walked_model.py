"""Runs a model once on a few documents with one layer in memory, for the comparisons of a receipt.

    embedding rows of the documents' tokens -> layer 0, quantized into one layer buffer -> layer 1, in the
    same buffer -> ... -> final norm -> hidden states [S, D] at the positions whose next token is supervised

Logits are not stored, as S x V of them would take 1 GB: two models are compared by their hidden states and
heads, tile by tile (receipt.py). Weights come from a checkpoint in any quantization, from training's cache,
or from a merge made in memory (`merge.MergedReader`).

Memory: one layer buffer and its dequantized largest weight, the documents' hidden states, a block of rows.
Time: each weight is read, and quantized if necessary, once.

The largest absolute value of any module's inputs and outputs is recorded: it must fit into fp16, whose range
ends at 65,504.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from qlora_train.adapter.adapter_config import HEAD, AdapterConfig
from qlora_train.adapter.adapter_files import LoraPairs
from qlora_train.device.compute import ComputeDevice
from qlora_train.export.merge import MergedReader
from qlora_train.files.shards import ShardReader
from qlora_train.model.attention import DocumentLayout
from qlora_train.model.base import MetaModel, read_config
from qlora_train.model.decoder import FrozenDecoder
from qlora_train.model.layer_buffer import LayerBufferLayout
from qlora_train.model.lora_parameters import LoraParameters
from qlora_train.model.quantized_matrix import RowLayout
from qlora_train.model.token_rows import blocks_with_rows
from qlora_train.model.vocab_matrix import TokenIds
from qlora_train.model.weight_store import PresentWeights, by_path
from qlora_train.quant.formats import Quantization
from qlora_train.recipe import LoraSection
from qlora_train.weights.base_checkpoint import BaseCheckpoint
from qlora_train.weights.execution_plan import HEAD_TILE_ROWS

if TYPE_CHECKING:
    from qlora_train.export.gguf.write import GgufReader  # of an optional library


@dataclass(frozen=True)
class HeldOut:
    """Documents to compare models on. token_ids: int64 [n] each. places: positions whose next token is
    supervised, [s] each. labels: those tokens. source: where the documents come from, as text."""

    token_ids: list[np.ndarray]
    places: list[np.ndarray]
    labels: list[np.ndarray]
    source: str

    @property
    def all_labels(self) -> np.ndarray:
        """The labels of all documents, int64 [S]."""
        return np.concatenate(self.labels)


@dataclass
class LargestValue:
    """The largest absolute value of all modules' inputs and outputs. where: the module it occurred at."""

    value: float = 0.0
    where: str = ""

    def note(self, tensors: Any, where: str) -> None:
        """Record a module's input or output: a tensor, or several."""
        parts = tensors if isinstance(tensors, tuple | list) else (tensors,)
        for tensor in parts:
            if isinstance(tensor, Tensor) and tensor.is_floating_point() and tensor.numel():
                value = float(tensor.abs().amax())
                if not value <= self.value:  # NaN counts as the largest
                    self.value, self.where = value, where


@dataclass(frozen=True)
class WalkedModel:
    """The result of running a model. decoder: to compute logits; its layers' weights are freed. hidden [S,
    D]: after the final norm. head_rows: iterates over consecutive blocks of rows [n, D] of the head."""

    decoder: FrozenDecoder
    hidden: Tensor
    head_rows: Callable[[], Iterator[Tensor]]
    largest: LargestValue = field(default_factory=LargestValue)

    def head_tiles(self) -> Iterator[tuple[int, Tensor]]:
        """(first row, rows) in tiles of `HEAD_TILE_ROWS`, on the device of the hidden states."""
        start, waiting = 0, torch.empty(0)
        for rows in self.head_rows():
            rows = rows.to(self.hidden)
            waiting = torch.cat([waiting, rows]) if len(waiting) else rows.clone()
            while len(waiting) >= HEAD_TILE_ROWS:
                yield start, waiting[:HEAD_TILE_ROWS]
                start, waiting = start + HEAD_TILE_ROWS, waiting[HEAD_TILE_ROWS:]
        if len(waiting):
            yield start, waiting


@torch.no_grad()
def walk_model(
    folder: Path,
    documents: HeldOut,
    quantization: Quantization,
    dtype: torch.dtype,
    device: ComputeDevice,
    *,
    reader: ShardReader | MergedReader | GgufReader | None = None,
    fill: Callable[[int, Tensor], None] | None = None,
    adapter: tuple[AdapterConfig, LoraPairs] | None = None,
    lora: LoraSection | None = None,
) -> WalkedModel:
    """Run the model in `folder` on the documents, layer by layer.

    quantization: of its layers. dtype: of the computation. reader: of other weights than the folder's. fill:
    writes a layer's quantized bytes into a layer buffer; None: they are quantized from the reader. adapter:
    config and LoRA parameters by the base's module paths. lora: of the adapter's run.
    """
    config = read_config(folder)
    if reader is not None:  # a merged model is not quantized
        config.__dict__.pop("quantization_config", None)
    if reader is not None and not isinstance(reader, ShardReader):  # merged, with added tokens
        config.vocab_size = reader.vocabulary_size
        config.tie_word_embeddings &= not reader.has_own_head
    shape_of_all = MetaModel(config, dtype, lora)  # stays on meta; the other one is materialized and used up
    checkpoint = BaseCheckpoint(folder, shape_of_all, reader)  # type: ignore[arg-type]  # both read alike
    meta_model = MetaModel(config, dtype)
    layouts = meta_model.layouts(quantization)
    weights = _OneLayer(
        meta_model.layer_paths,
        layouts,
        fill or (lambda i, layer_buffer: checkpoint.quantize_layer(i, layouts[i], layer_buffer)),
        device,
    )
    embedding = _Gathered.of(
        checkpoint.matrix_rows(meta_model.embedding_name), np.concatenate(documents.token_ids), device.torch
    )
    head_name = meta_model.head_name
    decoder = meta_model.materialize(weights, checkpoint.plain(device.torch), embedding, embedding, device)
    head = _attach(decoder, adapter, dtype, device) if adapter is not None else None
    token_ids = adapter[0].token_ids if adapter is not None else ()
    largest = LargestValue()
    hidden = _hidden_states(decoder, documents, largest)
    weights.release()

    def head_rows() -> Iterator[Tensor]:
        blocks = stored_head_rows()
        if adapter is None or not token_ids:
            return blocks
        return blocks_with_rows(blocks, token_ids, adapter[1][decoder.matrix_paths[-1]][0])

    def stored_head_rows() -> Iterator[Tensor]:
        row_format = RowLayout(checkpoint.head_quantization, shape_of_all.matrix_shape[1], dtype)
        start = 0
        for stored in checkpoint.matrix_rows(head_name):
            rows = row_format.quantized(stored).dequantize(dtype) if row_format.is_quantized else stored
            if head is not None:
                (a, b), scaling = head
                part = b[start : start + len(rows)]
                rows = torch.addmm(rows.float(), part, a, alpha=scaling).to(dtype)
            yield rows
            start += len(rows)

    return WalkedModel(decoder, hidden, head_rows, largest)


def _attach(
    decoder: FrozenDecoder,
    adapter: tuple[AdapterConfig, LoraPairs],
    dtype: torch.dtype,
    device: ComputeDevice,
) -> tuple[tuple[Tensor, ...], float] | None:
    """Attach LoRA parameters to linears and experts; returns ((A, B), scaling) of the head, if the adapter
    has them."""
    config, pairs = adapter[0], dict(adapter[1])
    head = pairs.pop(HEAD) if len(pairs.get(HEAD, ())) > 1 else None
    lora = LoraParameters.of_adapter(decoder.adaptable, config, pairs, dtype=dtype, device=device.torch)
    if config.token_ids:
        decoder.set_token_rows(config.token_ids, lora.token_rows(lora.working))
    return None if head is None else (head, config.scaling_of(HEAD))


def _hidden_states(decoder: FrozenDecoder, documents: HeldOut, largest: LargestValue) -> Tensor:
    """Hidden states [S, D] after the final norm, at the documents' places."""
    device, xs, arguments = decoder.device.torch, [], []
    for ids in documents.token_ids:
        layout = DocumentLayout.of(np.array([0, len(ids)]), device)
        positions = torch.arange(len(ids), device=device)[None]
        x, of_layers = decoder.embed(TokenIds.of(ids, device), positions, documents=layout)
        largest.note(x, "the embedding")
        xs.append(x)
        arguments.append(of_layers)
    for i in decoder.layers_in_turn():
        with _noting(decoder.layers[i], f"layer {i}", largest):
            for k, x in enumerate(xs):
                xs[k] = decoder.run_layer(i, x, arguments[k][i])
    normed = [
        decoder.norm(x)[0, torch.from_numpy(places).to(device)]
        for x, places in zip(xs, documents.places, strict=True)
    ]
    largest.note(normed, "the final norm")
    return torch.cat(normed)


@contextmanager
def _noting(layer: nn.Module, name: str, largest: LargestValue) -> Iterator[None]:
    """Inside, inputs and outputs of every module of the layer are recorded in `largest`."""

    def note(where: str) -> Callable[..., None]:
        def hook(module: nn.Module, given: Any, returned: Any) -> None:
            largest.note(given, f"{where}, going in")
            largest.note(returned, where)

        return hook

    handles = [
        module.register_forward_hook(note(f"{name} {path}".strip())) for path, module in layer.named_modules()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class _OneLayer(PresentWeights):
    """A `WeightStore` with one layer buffer, which is filled with each visited layer in turn."""

    def __init__(
        self,
        layer_paths: Sequence[str],
        layouts: list[LayerBufferLayout],
        fill: Callable[[int, Tensor], None],
        device: ComputeDevice,
    ) -> None:
        super().__init__(layouts, device.description.dequantize_kernel)
        self._paths, self._layouts, self._fill = layer_paths, layouts, fill
        largest = max(layout.num_bytes for layout in layouts)
        self._layer_buffer = torch.empty(largest, dtype=torch.uint8, device=device.torch)

    def set_schedule(self, order: object) -> None:
        """Does nothing: no copies are made ahead."""

    def layer_on_device(self, layer: int) -> AbstractContextManager[None]:
        layout = self._layouts[layer]
        self._fill(layer, self._layer_buffer[: layout.num_bytes])
        self.quantized = by_path(layout.weights(self._layer_buffer), self._paths[layer])
        return self.holding()

    def release(self) -> None:
        """Free the buffers, when no layer is visited any more."""
        self.quantized, self._layer_buffer, self._buffer = {}, torch.empty(0), torch.empty(0)


class _Gathered:
    """A `VocabMatrix` of only those rows that the documents use."""

    items: tuple[int, ...] = ()

    def __init__(self, num_rows: int, ids: np.ndarray, rows: Tensor) -> None:
        self.num_rows, self.tile_rows = num_rows, num_rows
        self._ids, self._rows = ids, rows

    @staticmethod
    def of(blocks: Iterator[Tensor], token_ids: np.ndarray, device: torch.device) -> _Gathered:
        ids, start, kept = (
            np.unique(np.append(token_ids, 0)),
            0,
            [],
        )  # 0 is asked for in trained tokens' places
        for rows in blocks:
            here = ids[(ids >= start) & (ids < start + len(rows))] - start
            kept.append(rows[torch.from_numpy(here)].clone())
            start += len(rows)
        return _Gathered(start, ids, torch.cat(kept).to(device))

    def gather(self, ids: TokenIds) -> Tensor:
        places = torch.from_numpy(np.searchsorted(self._ids, ids.host))
        return self._rows[places.to(self._rows.device)]

    def tile(self, index: int) -> AbstractContextManager[Tensor]:
        raise AssertionError("the head is read by WalkedModel.head_tiles")
