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
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from qlora_train.errors import BaseModelError, ExportError
from qlora_train.export.disk_writer import DiskWriter
from qlora_train.model.adapter_files import Factors, load_adapter
from qlora_train.model.atomic_folder import atomic_folder
from qlora_train.model.bitsandbytes_checkpoint import (
    bitsandbytes_shape,
    is_bitsandbytes_constant,
    read_bitsandbytes_weight,
)
from qlora_train.model.quantize import PackedWeight, Packing, pack
from qlora_train.model.shards import INDEX_FILE, SINGLE_FILE, ShardReader, tensor_bytes, write_header

BLOCK_BYTES = 4 * 2**20  # of rows as read: in fp32 still in the processor's cache, and in recycled memory
MAX_SHARD_BYTES = 5 * 10**9
SPARE_DISK_BYTES = 64 * 2**20  # headers, tokenizer, file system overhead
MERGEABLE_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
LAYER_NAME = re.compile(r"(^|\.)layers\.\d+\.")
HEAD, EMBEDDING = "lm_head.weight", "embed_tokens.weight"
COPIED_SUFFIXES = (".json", ".jinja", ".model", ".txt", ".tiktoken")


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
) -> MergeReport:
    """Write base + adapter to the folder `out`, all tensors in `dtype`; on the CPU, without loading a model.

    packing: None starts from the original weights; else every matrix of a decoder layer is packed and
    unpacked as in training. cached: what training has packed so. end_ids: tokens that end an answer, which
    generation_config.json is to list for other tools. Raises `ExportError` (out not empty, disk too small,
    adapter that does not fit, values `dtype` cannot hold) and `BaseModelError` (unusable base or adapter);
    `out` is then as it was.
    """
    base_folder, out = Path(base_folder), Path(out)
    require_new_folder(out)
    config, factors = load_adapter(adapter_folder)
    with ShardReader(base_folder) as reader:
        model_config = _read_config(base_folder)
        weights = _Weights(reader, packing, cached, factors, config.scaling)
        if model_config.get("tie_word_embeddings") and _head_is_embedding(reader):
            weights.leave_out_head()
        shards = _plan_shards(weights.shapes, dtype, max_shard_bytes)
        num_bytes = sum(_num_bytes(shape, dtype) for shape in weights.shapes.values())
        _check_disk(out, num_bytes)
        with atomic_folder(out) as partial:
            for file_name, names in shards.items():
                _write_shard(partial / file_name, names, weights, dtype)
            if len(shards) > 1:
                _write_index(partial, shards, num_bytes)
            (partial / "config.json").write_text(_merged_config(model_config, dtype), "utf-8")
            _copy_companions(base_folder, partial)
            _list_end_ids(partial, end_ids)
    return MergeReport(
        out, len(weights.shapes), len(factors), len(weights.dequantized), len(shards), num_bytes
    )


def require_new_folder(out: Path) -> None:
    """Raises `ExportError` unless a folder can be made there, or an empty one is."""
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise ExportError(f"{out}: exists and is not an empty folder. Remove it, or give another --out.")
    lies_in = next(parent for parent in out.absolute().parents if parent.exists())
    if not lies_in.is_dir():
        raise ExportError(f"{out}: {lies_in} is a file, so no folder can be made in it. Give another --out.")


class _Weights:
    """The merged model's tensors: their shapes now, their rows on demand."""

    def __init__(
        self,
        reader: ShardReader,
        packing: Packing | None,
        cached: PackedWeights | None,
        factors: Factors,
        scaling: float,
    ) -> None:
        self._reader = reader
        self._packing, self._cached = packing, cached
        self._scaling = scaling
        self.shapes: dict[str, tuple[int, ...]] = {}
        self._is_packed_already: set[str] = set()
        for name in reader.names():
            if not is_bitsandbytes_constant(name):
                self.shapes[name] = self._shape_of(name)
        if self._is_packed_already and packing is None:
            raise ExportError(
                f"{reader.folder}: the base is already packed by bitsandbytes, its original weights are not"
                " there. Export with --base dequantized."
            )
        self._factors = self._match(factors)
        self.dequantized = self._is_packed_already | {
            name for name, shape in self.shapes.items() if self._is_packed_in_training(name, shape)
        }

    def leave_out_head(self) -> None:
        """Do not write the output head, unless the adapter changes it."""
        if HEAD not in self._factors:
            del self.shapes[HEAD]

    def rows(self, name: str) -> Iterator[Tensor]:
        """The merged tensor, in fp32, some rows [rows, ...] at a time and in order; each valid until the
        next."""
        if not self.shapes[name]:
            yield self._reader.read(name).float()
            return
        for start, stop, block in self._base_rows(name):
            values = block.float()
            if name in self._factors:
                a, b = self._factors[name]
                values.addmm_(b[start:stop], a, alpha=self._scaling)
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

    def _match(self, factors: Factors) -> Factors:
        """Factors by tensor name. A checkpoint may lack the "model." that module paths begin with."""
        matched: Factors = {}
        for path, (a, b) in factors.items():
            candidates = (f"{path}.weight", f"{path.removeprefix('model.')}.weight")
            name = next((name for name in candidates if name in self.shapes), None)
            if name is None:
                raise ExportError(
                    f"the adapter trains {path}, but {self._reader.folder} has no tensor {candidates[0]}. "
                    "Is this the base it was trained on?"
                )
            if self.shapes[name] != (len(b), a.shape[1]):
                raise ExportError(
                    f"the adapter's factors for {path} make a [{len(b)}, {a.shape[1]}] weight, but {name} in "
                    f"{self._reader.folder} is {list(self.shapes[name])}. Is this the base it was trained on?"
                )
            matched[name] = (a, b)
        return matched


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


def _write_shard(path: Path, names: list[str], weights: _Weights, dtype: torch.dtype) -> None:
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


def _read_config(base_folder: Path) -> dict[str, Any]:
    path = base_folder / "config.json"
    try:
        config = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise BaseModelError(f"{path}: cannot be read ({error}).") from error
    if not isinstance(config, dict):
        raise BaseModelError(f"{path}: must be a JSON object.")
    return config


def _merged_config(config: dict[str, Any], dtype: torch.dtype) -> str:
    # transformers 5 calls it dtype, most other tools still read torch_dtype
    name = str(dtype).removeprefix("torch.")
    kept = {key: value for key, value in config.items() if key != "quantization_config"}
    return json.dumps(kept | {"dtype": name, "torch_dtype": name}, indent=2) + "\n"


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


def _copy_companions(base_folder: Path, folder: Path) -> None:
    """Tokenizer, chat templates, generation config: every small file that is no weight and no configuration
    of weights. A link is followed only to what is the base's own: inside its folder, or a blob of its hub
    cache."""
    base = base_folder.resolve()
    own = [base, *([base.parent.parent / "blobs"] if base.parent.name == "snapshots" else [])]
    for path in [*sorted(base.iterdir()), *sorted(base.glob("additional_chat_templates/*"))]:
        is_ours = path.name == "config.json" or path.name.endswith(".index.json")
        is_own = any(path.resolve().is_relative_to(place) for place in own)
        if is_own and path.is_file() and path.suffix in COPIED_SUFFIXES and not is_ours:
            copy = folder / path.relative_to(base)
            copy.parent.mkdir(exist_ok=True)
            shutil.copyfile(path, copy)


def _list_end_ids(folder: Path, end_ids: Sequence[int]) -> None:
    """Add to what generation_config.json (without one: config.json) says ends an answer."""
    file = folder / "generation_config.json"
    config = json.loads(file.read_bytes()) if file.is_file() else {}
    model_config = json.loads((folder / "config.json").read_bytes())
    listed = config.get("eos_token_id", model_config.get("eos_token_id"))
    listed = listed if isinstance(listed, list) else [] if listed is None else [listed]
    if new := [token for token in dict.fromkeys(end_ids) if token not in listed]:
        file.write_text(json.dumps(config | {"eos_token_id": [*listed, *new]}, indent=2) + "\n", "utf-8")


def _num_bytes(shape: tuple[int, ...], dtype: torch.dtype) -> int:
    return math.prod(shape) * dtype.itemsize
