"""Merges an adapter: writes W + scaling * B A for every trained weight W as a safetensors checkpoint, with
DoRA (m / n) (W + scaling * B A), whose rows have the lengths m. Of experts every one has its own B and A,
whether the checkpoint has a tensor for each or one for all. Trained rows of tokens stand in embedding and
head, which grow where tokens are new to them.

It works on a few rows of one tensor at a time: rows are read, computed in fp32, cast and appended to the
shard. A safetensors header holds only dtypes, shapes and offsets, which follow from the base's shapes, so it
is written first and no shard is held in memory. Memory: one block of rows (4 MiB as read, twice that in
fp32), the write buffers (disk_writer.py) and, when merging onto dequantized weights, one quantized weight and
the quantizer's scratch. `peft.merge_and_unload` needs the whole 16-bit model.

W is the original weight, or the weight that training used, dequantized: from training's cache, or quantized
and dequantized again. See export_run.py for the choice; with `quantization: none` both are the same.

Tied embeddings stay tied, and no head that repeats the embedding is written, unless the adapter trains the
head.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from qlora_train.adapter.adapter_config import HEAD, AdapterConfig, match_modules
from qlora_train.adapter.adapter_files import LoraPairs, load_adapter
from qlora_train.adapter.pissa import as_trained
from qlora_train.boundary import require_creatable, require_free_disk
from qlora_train.errors import BaseModelError, ExportError
from qlora_train.export.adapter_updates import updates_of
from qlora_train.export.companions import copy_companions, list_end_ids, merged_config
from qlora_train.export.disk_writer import DiskWriter
from qlora_train.export.quantized_layers import QuantizedLayers
from qlora_train.files.atomic_folder import atomic_folder
from qlora_train.files.shards import (
    INDEX_FILE,
    SINGLE_FILE,
    TensorInfo,
    tensor_bytes,
    write_header,
)
from qlora_train.model.base import MetaModel, read_config
from qlora_train.model.base_folder import read_plain_config
from qlora_train.model.token_rows import blocks_with_rows
from qlora_train.quant.formats import Quantization
from qlora_train.quant.quantize import quantize
from qlora_train.quant.weight import QuantizedWeight
from qlora_train.recipe import LoraSection
from qlora_train.weights.base_checkpoint import BaseCheckpoint
from qlora_train.weights.bitsandbytes_checkpoint import (
    bitsandbytes_quantization,
    bitsandbytes_shape,
    is_bitsandbytes_constant,
    read_bitsandbytes_weight,
)

BLOCK_BYTES = 4 * 2**20  # of rows as read: in fp32 still in the processor's cache, and in recycled memory
MAX_SHARD_BYTES = 5 * 10**9
MERGEABLE_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def merge(
    base_folder: Path,
    adapter_folder: Path,
    out: Path,
    *,
    quantization: Quantization | None,
    dtype: torch.dtype,
    lora: LoraSection | None = None,
    cached: QuantizedLayers | None = None,
    end_ids: Sequence[int] = (),
    max_shard_bytes: int = MAX_SHARD_BYTES,
    check: Callable[[Path], None] = lambda folder: None,
    log: Callable[[str], None] = lambda line: None,
) -> None:
    """Write base + adapter to the folder `out`, all tensors in `dtype`; on the CPU, without loading a model.

    quantization: None: merge onto the original weights; else every linear of a decoder layer is quantized and
    dequantized as in training. lora: of the run; with PiSSA it decides what was quantized. cached: training's
    quantized weights; None: they are quantized again. end_ids: tokens that end an answer, to be listed in
    generation_config.json. check: called with the complete folder before it gets its name; an exception
    undoes the export. log: called with a line for each file that is left out.

    Raises `ExportError` (out not empty, disk too small, adapter that does not fit, values beyond the range of
    `dtype`) and `BaseModelError` (unusable base or adapter); `out` is then unchanged.
    """
    base_folder, out = Path(base_folder), Path(out)
    require_new_folder(out)
    with BaseCheckpoint(base_folder, MetaModel(read_config(base_folder), dtype, lora)) as checkpoint:
        model_config = read_plain_config(base_folder)
        weights = MergedWeights(checkpoint, quantization, cached, load_adapter(adapter_folder))
        sizes = weights.num_bytes(dtype)
        shards, num_bytes = _plan_shards(sizes, max_shard_bytes), sum(sizes.values())
        require_free_disk(out, num_bytes, "the merged model", ExportError, "give an --out on another disk")
        with atomic_folder(out) as partial:
            for file_name, names in shards.items():
                _write_shard(partial / file_name, names, weights, dtype)
            if len(shards) > 1:
                _write_index(partial, shards, num_bytes)
            text = merged_config(
                model_config,
                dtype,
                quantization,
                unties_head=weights.changes_head,
                vocabulary_size=weights.vocabulary_size,
            )
            (partial / "config.json").write_text(text, "utf-8")
            copy_companions(base_folder, partial, log)
            list_end_ids(partial, end_ids)
            check(partial)


def require_new_folder(out: Path) -> None:
    """Raise `ExportError` unless `out` is an empty folder or can be made."""
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise ExportError(f"{out}: exists and is not an empty folder. Remove it, or give another --out.")
    require_creatable(out, ExportError, "Give another --out.")


class MergedWeights:
    """The tensors of the merged model: `shapes` by name, and rows on demand. adapter: its config and LoRA
    parameters by module path as written in its files."""

    def __init__(
        self,
        checkpoint: BaseCheckpoint,
        quantization: Quantization | None,
        cached: QuantizedLayers | None,
        adapter: tuple[AdapterConfig, LoraPairs],
    ) -> None:
        self._checkpoint, self._reader = checkpoint, checkpoint.reader
        self._quantization, self._cached = quantization, cached
        is_quantized = quantization is not None and quantization.is_quantized
        config, lora = as_trained(checkpoint.meta_model.lora, adapter) if is_quantized else adapter
        self._is_quantized_already: set[str] = set()
        self._quantized: dict[tuple[int, str], QuantizedWeight] = {}
        self._unchanged = checkpoint.unchanged - checkpoint.reader.fp8  # FP8 is written in 16 bits anyway
        names = (name for name in self._reader.names() if not is_bitsandbytes_constant(name))
        self.shapes = {name: self._shape_of(name) for name in names}
        if self._is_quantized_already and quantization is None:
            raise ExportError(
                f"{checkpoint.folder}: the base is already quantized by bitsandbytes, its original weights "
                "are not there. Export with --base dequantized."
            )
        meta_model = checkpoint.meta_model
        self._head_source = checkpoint.find(meta_model.head_name)
        self._head = self._head_source
        if meta_model.is_tied:
            self._head = checkpoint.own_head
            self.shapes.pop(self._head, None)  # it repeats the embedding
            if any(path.rpartition(".")[2] == HEAD and len(lora[path]) > 1 for path in lora):
                self.shapes[self._head] = self.shapes[self._head_source]
        rows = {path: tensors[0] for path, tensors in lora.items() if len(tensors) == 1}
        lora = {path: tensors for path, tensors in lora.items() if path not in rows}
        self._updates = updates_of(config, lora, checkpoint, self._head, self.shapes)
        self._token_ids, self._token_rows = config.token_ids, self._match_rows(rows, config.token_ids)
        quantized = checkpoint.parts.keys() - checkpoint.reader.experts if is_quantized else set()
        self.dequantized = self._is_quantized_already | quantized

    @property
    def tensors(self) -> dict[str, tuple[str, ...]]:
        """Parameter of the language model -> the tensors whose rows, one after another, are its rows."""
        checkpoint = self._checkpoint
        own_head = {checkpoint.meta_model.own_head_name: (self._head,)}
        return {
            parameter: names
            for parameter, names in (checkpoint.tensors | own_head).items()
            if names[0] in self.shapes
        }

    @property
    def vocabulary_size(self) -> int:
        """Rows of the merged embedding."""
        return self.shapes[self._checkpoint.find(self._checkpoint.meta_model.embedding_name)][0]

    @property
    def changes_head(self) -> bool:
        """Whether the adapter trains the head."""
        return self._head in self._updates

    def keeps(self, name: str) -> bool:
        """Whether a tensor is of experts in MXFP4 that the adapter does not change."""
        return name in self._reader.experts and name not in self._updates

    def kept_experts(self, name: str) -> Iterator[tuple[Tensor, Tensor]]:
        """Blocks and scales, as they are stored, of experts that merging keeps."""
        return self._reader.kept_experts(name)

    def dtype_of(self, name: str, dtype: torch.dtype) -> torch.dtype:
        """What a tensor is written in: `dtype`, or what it has where it is of another part of the model, or
        where the family keeps it in fp32."""
        return self._reader.info(name).dtype if name in self._unchanged else dtype

    def num_bytes(self, dtype: torch.dtype) -> dict[str, int]:
        """Bytes of every tensor as it is written, by name."""
        return {
            name: math.prod(shape) * self.dtype_of(name, dtype).itemsize
            for name, shape in self.shapes.items()
        }

    def rows_in(self, name: str, dtype: torch.dtype) -> Iterator[Tensor]:
        """Blocks of rows as they are written. Raises `ExportError` for values that `dtype` does not hold."""
        if name in self._unchanged:
            if not self.shapes[name]:
                yield self._reader.read(name)
            else:
                yield from (rows for _, _, rows in self._reader.row_blocks(name, BLOCK_BYTES))
            return
        yield from (_cast(values, dtype, name) for values in self.rows(name))

    def rows(self, name: str) -> Iterator[Tensor]:
        """Blocks of rows [n, ...] of a merged tensor in fp32, in order; each is valid until the next."""
        if not self.shapes[name]:
            yield self._reader.read(name).float()
            return
        if name in self._token_rows:
            blocks = (block.float() for _, _, block in self._base_rows(name))
            yield from blocks_with_rows(blocks, self._token_ids, self._token_rows[name])
            return
        for start, _, block in self._base_rows(self._head_source if name == self._head else name):
            values = block.float()
            if name in self._updates:
                self._updates[name].add_to(values, start)
            yield values

    def _base_rows(self, name: str) -> Iterator[tuple[int, int, Tensor]]:
        if name not in self.dequantized:
            yield from self._reader.row_blocks(name, BLOCK_BYTES)
            return
        quantized, first = self._quantize(name)
        size = self.shapes[name]
        rows_of_one = math.prod(size[1:-1])  # several where all experts are one tensor
        step = max(1, BLOCK_BYTES // 2 // (rows_of_one * quantized.shape[1]))
        for start in range(0, size[0], step):
            stop = min(start + step, size[0])
            begin, end = (first + index * rows_of_one for index in (start, stop))
            rows = quantized.dequantize_rows(begin, end, torch.float32)
            yield start, stop, rows.view(stop - start, *size[1:])

    def _quantize(self, name: str) -> tuple[QuantizedWeight, int]:
        """The quantized weight that a tensor is, or is a part of, and the tensor's first row in it."""
        if name in self._is_quantized_already:
            quantized = read_bitsandbytes_weight(self._reader, name)
            assert quantized is not None
            return quantized, 0
        part = self._checkpoint.parts[name]
        if self._cached is not None:
            return self._cached.get(part.layer, part.weight), part.start
        if (part.layer, part.weight) not in self._quantized:  # experts of one layer are next to each other
            self._quantized = {key: w for key, w in self._quantized.items() if key[0] == part.layer}
            self._quantized[part.layer, part.weight] = self._quantize_whole(part.layer, part.weight)
        weight = self._quantized[part.layer, part.weight]
        if weight.shape[0] == part.stop - part.start:  # the whole of it: nothing else asks for it
            del self._quantized[part.layer, part.weight]
        return weight, part.start

    def _quantize_whole(self, layer: int, weight: str) -> QuantizedWeight:
        assert self._quantization is not None
        meta_model = self._checkpoint.meta_model
        shapes = dict(meta_model.layer_shapes(layer).items())
        name = meta_model.parameter_name(layer, weight)
        rows = self._checkpoint.rows_to_freeze(name, torch.device("cpu"), BLOCK_BYTES)
        return quantize(rows, shapes[weight], self._quantization, name=name)

    def _shape_of(self, name: str) -> tuple[int, ...]:
        info = self._reader.info(name)
        shape = bitsandbytes_shape(self._reader, name)
        if shape is not None and name in self._unchanged:
            raise ExportError(
                f"{self._checkpoint.folder}: {name}, which is not of the language model, is quantized by "
                "bitsandbytes. Merge onto the same model in 16 bits."
            )
        if shape is not None or bitsandbytes_quantization(self._reader, name) is not None:
            self._is_quantized_already.add(name)
            return shape or info.shape
        if info.dtype not in MERGEABLE_DTYPES and name not in self._unchanged:
            raise BaseModelError(
                f"{self._checkpoint.folder}: {name} has the dtype {info.dtype}, which cannot be merged. "
                "Convert the checkpoint to bfloat16 first."
            )
        return info.shape

    def _match_rows(self, rows: Mapping[str, Tensor], ids: Sequence[int]) -> dict[str, Tensor]:
        """Trained rows of tokens by tensor name; embedding and head get room for them."""
        meta_model = self._checkpoint.meta_model
        parameters = {meta_model.embedding_name, meta_model.head_name}
        tensors = {name.removesuffix(".weight"): self._checkpoint.find(name) for name in parameters}
        names = match_modules(rows, tensors)
        matched = {tensors[names[path]]: values for path, values in rows.items() if path in names}
        for name, values in matched.items():
            num_rows, columns = self.shapes[name]
            if len(matched) < len(rows) or values.shape[1] != columns:
                raise ExportError(
                    f"the adapter's rows of tokens do not fit {self._checkpoint.folder}: {name} has "
                    f"{columns} columns, they have {values.shape[1]}. Is this the base it was trained on?"
                )
            self.shapes[name] = (max(num_rows, ids[-1] + 1), columns)
        return matched


class MergedReader:
    """Reads `MergedWeights` as a checkpoint, without writing them; has the methods of `ShardReader`."""

    def __init__(self, folder: Path, weights: MergedWeights, dtype: torch.dtype) -> None:
        self.folder, self._weights, self._dtype = folder, weights, dtype
        self.vocabulary_size, self.has_own_head = weights.vocabulary_size, weights.changes_head

    def names(self) -> list[str]:
        return list(self._weights.shapes)

    def __contains__(self, name: object) -> bool:
        return name in self._weights.shapes

    def info(self, name: str) -> TensorInfo:
        dtype, shape = self._weights.dtype_of(name, self._dtype), self._weights.shapes[name]
        return TensorInfo(name, dtype, shape, math.prod(shape) * dtype.itemsize)

    def read(self, name: str) -> Tensor:
        if not self._weights.shapes[name]:
            return next(self._weights.rows_in(name, self._dtype))
        return torch.cat([rows.clone() for rows in self._weights.rows_in(name, self._dtype)])

    def row_blocks(self, name: str, max_bytes: int = 0) -> Iterator[tuple[int, int, Tensor]]:
        """(start, stop, rows) of a tensor, in the blocks that merging makes, whatever `max_bytes`."""
        start = 0
        for rows in self._weights.rows_in(name, self._dtype):
            yield start, start + len(rows), rows
            start += len(rows)

    def close(self) -> None:
        """Does nothing: the owner of the base's reader closes it."""


def _plan_shards(sizes: Mapping[str, int], max_bytes: int) -> dict[str, list[str]]:
    """File name -> tensors, in the base's order. A tensor beyond `max_bytes` gets a shard of its own."""
    groups: list[list[str]] = [[]]
    group_bytes = 0
    for name, num_bytes in sizes.items():
        if groups[-1] and group_bytes + num_bytes > max_bytes:
            groups.append([])
            group_bytes = 0
        groups[-1].append(name)
        group_bytes += num_bytes
    if len(groups) == 1:
        return {SINGLE_FILE: groups[0]}
    return {f"model-{i:05d}-of-{len(groups):05d}.safetensors": names for i, names in enumerate(groups, 1)}


def _write_shard(path: Path, names: list[str], weights: MergedWeights, dtype: torch.dtype) -> None:
    with DiskWriter(path) as file:
        tensors = {name: (weights.dtype_of(name, dtype), weights.shapes[name]) for name in names}
        write_header(file, tensors, {"format": "pt"})
        for name in names:
            for values in weights.rows_in(name, dtype):
                file.write(tensor_bytes(values))


def _cast(values: Tensor, dtype: torch.dtype, name: str) -> Tensor:
    """The values in `dtype`. Raises `ExportError` where they are not finite or exceed its range."""
    largest = max(abs(bound.item()) for bound in values.aminmax()) if values.numel() else 0.0
    if not math.isfinite(largest):
        raise ExportError(f"{name}: the merged weight is not finite. The base or the adapter is damaged.")
    cast = values.to(dtype).contiguous()
    if largest >= torch.finfo(dtype).max and not torch.isfinite(cast).all():  # rounding decides at the limit
        raise ExportError(
            f"{name}: values up to {largest:.4g} do not fit into {dtype} "
            f"(at most {torch.finfo(dtype).max:.4g}). Export with --dtype bfloat16 (--to gguf: --quant bf16)."
        )
    return cast


def _write_index(folder: Path, shards: Mapping[str, list[str]], num_bytes: int) -> None:
    weight_map = {name: file_name for file_name, names in shards.items() for name in names}
    index = {"metadata": {"total_size": num_bytes}, "weight_map": weight_map}
    (folder / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n", "utf-8")
