"""Merging: W + scaling * B A for every trained weight, written as a checkpoint that any tool loads.

One tensor at a time, a few rows at a time: rows are read, computed in fp32, cast and appended to the shard.
A safetensors header holds only dtypes, shapes and offsets, and those follow from the base's shapes, so it
is written first and no shard is ever held. Memory: one block of rows (4 MiB as read, twice that in fp32),
what waits to be written (disk_writer.py) and, in `dequantized` mode, one packed weight and the quantiser's
scratch. `peft.merge_and_unload` needs the whole 16-bit model.

Which base? The factors were trained against the packed weights, errors included: on top of those they are
exact up to the final cast (`packing` given: each weight is unpacked from training's cache, or packed and
unpacked again, as training did). On top of the original weights the quantisation error goes, and so does
whatever the factors learned to make up for it. `packing: none` has no error to keep: its weights are the
original ones.

Tied embeddings stay tied: nothing is written that the base does not have, nor a head that repeats them.
"""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from qlora_train.errors import BaseModelError, ExportError
from qlora_train.export.companions import copy_companions, list_end_ids, merged_config
from qlora_train.export.disk_writer import DiskWriter
from qlora_train.model.adapter_config import HEAD as HEAD_PATH
from qlora_train.model.adapter_config import AdapterConfig, match_modules
from qlora_train.model.adapter_files import Factors, load_adapter
from qlora_train.model.atomic_folder import atomic_folder
from qlora_train.model.base_folder import read_plain_config
from qlora_train.model.bitsandbytes_checkpoint import (
    bitsandbytes_shape,
    is_bitsandbytes_constant,
    read_bitsandbytes_weight,
)
from qlora_train.model.quantize import PackedWeight, Packing, pack
from qlora_train.model.shards import (
    INDEX_FILE,
    SINGLE_FILE,
    ShardReader,
    TensorInfo,
    tensor_bytes,
    write_header,
)

BLOCK_BYTES = 4 * 2**20  # of rows as read: in fp32 still in the processor's cache, and in recycled memory
MAX_SHARD_BYTES = 5 * 10**9
SPARE_DISK_BYTES = 64 * 2**20  # headers, tokenizer, file system overhead
MERGEABLE_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
LAYER_NAME = re.compile(r"(^|\.)layers\.\d+\.")
HEAD, EMBEDDING = "lm_head.weight", "embed_tokens.weight"


class PackedWeights(Protocol):
    """Weights that are packed already."""

    def get(self, name: str) -> PackedWeight | None:
        """By the name of a tensor; None: not among them. Valid until the next is asked for."""
        ...


@dataclass(frozen=True)
class MergeReport:
    """What was written. `num_merged`: weights that took factors; `num_dequantized`: weights packed and
    unpacked."""

    folder: Path
    num_tensors: int
    num_merged: int
    num_dequantized: int
    num_shards: int
    num_bytes: int


def merge(
    base_folder: Path,
    adapter_folder: Path,
    out: Path,
    *,
    packing: Packing | None,
    dtype: torch.dtype,
    cached: PackedWeights | None = None,
    end_ids: Sequence[int] = (),
    max_shard_bytes: int = MAX_SHARD_BYTES,
    check: Callable[[Path], None] = lambda folder: None,
    say: Callable[[str], None] = lambda line: None,
) -> MergeReport:
    """Write base + adapter to the folder `out`, all tensors in `dtype`; on the CPU, without loading a model.

    packing: None starts from the original weights; else every matrix of a decoder layer is packed and
    unpacked as in training. cached: what training has packed so. end_ids: tokens that end an answer, which
    generation_config.json is to list for other tools. check: called with the complete folder before it gets
    its name; what it raises undoes the export. say: told of files that are left out.

    Raises `ExportError` (out not empty, disk too small,
    adapter that does not fit, values `dtype` cannot hold) and `BaseModelError` (unusable base or adapter);
    `out` is then as it was.
    """
    base_folder, out = Path(base_folder), Path(out)
    require_new_folder(out)
    with ShardReader(base_folder) as reader:
        model_config = read_plain_config(base_folder)
        weights = MergedWeights(reader, packing, cached, load_adapter(adapter_folder))
        if model_config.get("tie_word_embeddings"):
            weights.tie_head()
        shards = _plan_shards(weights.shapes, dtype, max_shard_bytes)
        num_bytes = sum(_num_bytes(shape, dtype) for shape in weights.shapes.values())
        _check_disk(out, num_bytes)
        with atomic_folder(out) as partial:
            for file_name, names in shards.items():
                _write_shard(partial / file_name, names, weights, dtype)
            if len(shards) > 1:
                _write_index(partial, shards, num_bytes)
            text = merged_config(model_config, dtype, packing, unties_head=weights.changes_head)
            (partial / "config.json").write_text(text, "utf-8")
            copy_companions(base_folder, partial, say)
            list_end_ids(partial, end_ids)
            check(partial)
    return MergeReport(
        out, len(weights.shapes), weights.num_merged, len(weights.dequantized), len(shards), num_bytes
    )


def require_new_folder(out: Path) -> None:
    """Raises `ExportError` unless a folder can be made there, or an empty one is."""
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise ExportError(f"{out}: exists and is not an empty folder. Remove it, or give another --out.")
    lies_in = next(parent for parent in out.absolute().parents if parent.exists())
    if not lies_in.is_dir():
        raise ExportError(f"{out}: {lies_in} is a file, so no folder can be made in it. Give another --out.")


class MergedWeights:
    """The merged model's tensors: their shapes now, their rows on demand. adapter: config and factors, paths
    as they are written."""

    def __init__(
        self,
        reader: ShardReader,
        packing: Packing | None,
        cached: PackedWeights | None,
        adapter: tuple[AdapterConfig, Factors],
    ) -> None:
        self._reader = reader
        self._packing, self._cached = packing, cached
        self._config, factors = adapter
        self.shapes: dict[str, tuple[int, ...]] = {}
        self._is_packed_already: set[str] = set()
        self._head_source = HEAD
        for name in reader.names():
            if not is_bitsandbytes_constant(name):
                self.shapes[name] = self._shape_of(name)
        if HEAD not in self.shapes and any(path.rpartition(".")[2] == HEAD_PATH for path in factors):
            self._head_source = next(name for name in self.shapes if name.endswith(EMBEDDING))
            self.shapes[HEAD] = self.shapes[self._head_source]
        if self._is_packed_already and packing is None:
            raise ExportError(
                f"{reader.folder}: the base is already packed by bitsandbytes, its original weights are not"
                " there. Export with --base dequantized."
            )
        self._factors = self._match(factors)
        self.dequantized = self._is_packed_already | {
            name for name, shape in self.shapes.items() if self._is_packed_in_training(name, shape)
        }

    @property
    def num_merged(self) -> int:
        """Weights that take factors."""
        return len(self._factors)

    @property
    def changes_head(self) -> bool:
        return HEAD in self._factors

    def tie_head(self) -> None:
        """Of a tied base: a head that repeats the embedding is not written, unless the adapter changes it."""
        if not self.changes_head and _head_is_embedding(self._reader):
            del self.shapes[HEAD]

    def rows(self, name: str) -> Iterator[Tensor]:
        """The merged tensor, in fp32, some rows [rows, ...] at a time and in order; each valid until the
        next."""
        if not self.shapes[name]:
            yield self._reader.read(name).float()
            return
        for start, stop, block in self._base_rows(self._head_source if name == HEAD else name):
            values = block.float()
            if name in self._factors:
                a, b, scaling = self._factors[name]
                values.addmm_(b[start:stop], a, alpha=scaling)
            yield values

    def _base_rows(self, name: str) -> Iterator[tuple[int, int, Tensor]]:
        if name not in self.dequantized:
            yield from self._reader.row_blocks(name, BLOCK_BYTES)
            return
        packed = self._pack(name)
        num_rows = max(1, BLOCK_BYTES // 2 // packed.shape[1])
        for start in range(0, packed.shape[0], num_rows):
            stop = min(start + num_rows, packed.shape[0])
            yield start, stop, packed.unpack_rows(start, stop, torch.float32)

    def _pack(self, name: str) -> PackedWeight:
        if name in self._is_packed_already:
            packed = read_bitsandbytes_weight(self._reader, name)
            assert packed is not None
            return packed
        cached = self._cached.get(name) if self._cached is not None else None
        if cached is not None:
            return cached
        assert self._packing is not None
        out_features, in_features = self.shapes[name]
        blocks = (rows for _, _, rows in self._reader.row_blocks(name, BLOCK_BYTES))
        return pack(blocks, (out_features, in_features), self._packing, name=name)

    def _shape_of(self, name: str) -> tuple[int, ...]:
        info = self._reader.info(name)
        shape = bitsandbytes_shape(self._reader, name)
        if shape is not None or name.removesuffix("weight") + "SCB" in self._reader:
            self._is_packed_already.add(name)
            return shape or info.shape
        if info.dtype not in MERGEABLE_DTYPES:
            raise BaseModelError(
                f"{self._reader.folder}: {name} has the dtype {info.dtype}, which cannot be merged. "
                "Convert the checkpoint to bfloat16 first."
            )
        return info.shape

    def _is_packed_in_training(self, name: str, shape: tuple[int, ...]) -> bool:
        if self._packing is None or self._packing.format == "none":
            return False
        return len(shape) == 2 and name.endswith(".weight") and LAYER_NAME.search(name) is not None

    def _match(self, factors: Factors) -> dict[str, tuple[Tensor, Tensor, float]]:
        """A, B and scaling by tensor name."""
        modules = [name.removesuffix(".weight") for name in self.shapes if name.endswith(".weight")]
        names = match_modules(factors, modules)
        matched: dict[str, tuple[Tensor, Tensor, float]] = {}
        for path, (a, b) in factors.items():
            if path not in names:
                raise ExportError(
                    f"the adapter trains {path}, but {self._reader.folder} has no tensor {path}.weight. "
                    "Is this the base it was trained on?"
                )
            name = f"{names[path]}.weight"
            if self.shapes[name] != (len(b), a.shape[1]):
                raise ExportError(
                    f"the adapter's factors for {path} make a [{len(b)}, {a.shape[1]}] weight, but {name} in "
                    f"{self._reader.folder} is {list(self.shapes[name])}. Is this the base it was trained on?"
                )
            matched[name] = (a, b, self._config.scaling_of(path))
        return matched


class MergedReader:
    """What `MergedWeights` would be once written, as a checkpoint that can be read: see `ShardReader`."""

    def __init__(self, folder: Path, weights: MergedWeights, dtype: torch.dtype) -> None:
        self.folder, self._weights, self._dtype = folder, weights, dtype

    def names(self) -> list[str]:
        return list(self._weights.shapes)

    def __contains__(self, name: object) -> bool:
        return name in self._weights.shapes

    def info(self, name: str) -> TensorInfo:
        shape = self._weights.shapes[name]
        return TensorInfo(name, self._dtype, shape, _num_bytes(shape, self._dtype))

    def read(self, name: str) -> Tensor:
        return torch.cat([rows.to(self._dtype) for rows in self._weights.rows(name)])

    def row_blocks(
        self, name: str, max_bytes: int = 0, multiple_of_rows: int = 1
    ) -> Iterator[tuple[int, int, Tensor]]:
        """In blocks of the size that merging makes."""
        start = 0
        for rows in self._weights.rows(name):
            yield start, start + len(rows), rows.to(self._dtype)
            start += len(rows)

    def close(self) -> None:
        """The base's reader is its owner's."""


def _plan_shards(
    shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype, max_bytes: int
) -> dict[str, list[str]]:
    """File name -> tensors, in the base's order. A tensor beyond `max_bytes` gets a shard of its own."""
    groups: list[list[str]] = [[]]
    group_bytes = 0
    for name, shape in shapes.items():
        num_bytes = _num_bytes(shape, dtype)
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
        write_header(file, {name: (dtype, weights.shapes[name]) for name in names}, {"format": "pt"})
        for name in names:
            for values in weights.rows(name):
                file.write(tensor_bytes(_cast(values, dtype, name)))


def _cast(values: Tensor, dtype: torch.dtype, name: str) -> Tensor:
    largest = max(abs(bound.item()) for bound in values.aminmax()) if values.numel() else 0.0
    if not math.isfinite(largest):
        raise ExportError(f"{name}: the merged weight is not finite. The base or the adapter is damaged.")
    cast = values.to(dtype).contiguous()
    if largest >= torch.finfo(dtype).max and not torch.isfinite(cast).all():  # rounding decides at the limit
        raise ExportError(
            f"{name}: values up to {largest:.4g} do not fit into {dtype} "
            f"(at most {torch.finfo(dtype).max:.4g}). Export with --dtype bfloat16."
        )
    return cast


def _write_index(folder: Path, shards: Mapping[str, list[str]], num_bytes: int) -> None:
    weight_map = {name: file_name for file_name, names in shards.items() for name in names}
    index = {"metadata": {"total_size": num_bytes}, "weight_map": weight_map}
    (folder / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n", "utf-8")


def _check_disk(out: Path, num_bytes: int) -> None:
    existing = next(parent for parent in out.resolve().parents if parent.exists())
    free_bytes = shutil.disk_usage(existing).free
    if free_bytes < num_bytes + SPARE_DISK_BYTES:
        raise ExportError(
            f"{out}: the merged model needs {(num_bytes + SPARE_DISK_BYTES) / 1e9:.2f} GB, the disk has "
            f"{free_bytes / 1e9:.2f} GB free. Make room, or give an --out on another disk."
        )


def _head_is_embedding(reader: ShardReader) -> bool:
    """Whether the checkpoint of a tied model holds its one matrix twice, byte for byte."""
    embedding = next((name for name in reader.names() if name.endswith(EMBEDDING)), None)
    if HEAD not in reader or embedding is None:
        return False
    head_info, embedding_info = reader.info(HEAD), reader.info(embedding)
    if (head_info.dtype, head_info.shape) != (embedding_info.dtype, embedding_info.shape):
        return False
    pairs = zip(reader.row_blocks(HEAD, BLOCK_BYTES), reader.row_blocks(embedding, BLOCK_BYTES), strict=True)
    return all(tensor_bytes(a) == tensor_bytes(b) for (_, _, a), (_, _, b) in pairs)


def _num_bytes(shape: tuple[int, ...], dtype: torch.dtype) -> int:
    return math.prod(shape) * dtype.itemsize
