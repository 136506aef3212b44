"""Reads and writes checkpoints in safetensors format, a few rows at a time.

A safetensors file is: 8 bytes (little endian) with the length H of the header, H bytes of JSON, then the
tensors' bytes, row-major. The header maps each name to `{"dtype": "BF16", "shape": [out, in],
"data_offsets": [begin, end]}`, offsets counted from the end of the header. A large checkpoint is several
such files (shards) and `model.safetensors.index.json`, whose `weight_map` says which shard holds which
tensor.

The safetensors library maps files into memory, and touched pages count as resident memory: reading a 16 GB
model would take 16 GB under a memory limit. Plain reads of at most 64 MiB go straight into the tensor's own
memory and leave nothing behind. Nothing is ever unpickled.

Headers and sizes are checked when a checkpoint is opened, before anything is loaded. The shards count, not
the index: an entry that no shard holds (such as a tied head) is an error only when it is read, and a tensor
that the index leaves out is found in its shard. Published checkpoints have both.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import torch
from torch import Tensor

from qlora_train.errors import BaseModelError

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
MAX_READ_BYTES = 64 * 2**20
MAX_HEADER_BYTES = 100 * 2**20
PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt")

DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class TensorInfo:
    """Name, dtype, shape and size of one tensor, from the header."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    num_bytes: int


@dataclass(frozen=True)
class _Place:
    info: TensorInfo
    path: Path
    offset_bytes: int  # from the start of the file


class ShardReader:
    """The tensors of one checkpoint folder (or adapter file), read on demand to the CPU.

    Opens `model.safetensors`, or the shards named by `model.safetensors.index.json`; `single_file` names
    another file to read instead. Not for use by two threads at once: open one reader per thread.

    Raises `BaseModelError` on opening if the folder, its weights or any file's header is not usable.
    """

    def __init__(self, folder: Path | str, single_file: str = SINGLE_FILE) -> None:
        self.folder = Path(folder)
        self._files: dict[Path, BinaryIO] = {}
        self._places: dict[str, _Place] = {}
        if not self.folder.is_dir():
            raise BaseModelError(
                f"{self.folder}: no such folder. Give a folder with config.json and safetensors weights."
            )
        if (self.folder / single_file).is_file():
            self._places = read_header(self.folder / single_file)
        elif (self.folder / INDEX_FILE).is_file():
            self._places = _read_index(self.folder)
        else:
            raise _no_weights(self.folder, single_file)

    def __enter__(self) -> ShardReader:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the files. Reading opens them again."""
        for file in self._files.values():
            file.close()
        self._files.clear()

    def names(self) -> list[str]:
        """The names of all tensors, in the order of the files and of the bytes in them."""
        return list(self._places)

    def __contains__(self, name: object) -> bool:
        return name in self._places

    def info(self, name: str) -> TensorInfo:
        """dtype, shape and size of a tensor. Raises `BaseModelError` if there is none of that name."""
        return self._place(name).info

    def read(self, name: str) -> Tensor:
        """The whole tensor, in the checkpoint's dtype, in freshly allocated CPU memory of exactly its
        size."""
        place = self._place(name)
        buffer = torch.empty(place.info.num_bytes, dtype=torch.uint8)
        self._fill(buffer, place.path, place.offset_bytes)
        return buffer.view(place.info.dtype).reshape(place.info.shape)

    def read_bytes(self, name: str, start: int, num_bytes: int) -> bytes:
        """Bytes of a tensor from `start` on, fewer than num_bytes at its end."""
        place = self._place(name)
        buffer = torch.empty(max(0, min(num_bytes, place.info.num_bytes - start)), dtype=torch.uint8)
        self._fill(buffer, place.path, place.offset_bytes + start)
        return bytes(tensor_bytes(buffer))

    def row_blocks(self, name: str, max_bytes: int = MAX_READ_BYTES) -> Iterator[tuple[int, int, Tensor]]:
        """Iterate over a tensor along its first dimension: yields `(start, stop, rows)`.

        A block holds as many rows as fit in `max_bytes`, and at least one. All blocks share ONE buffer:
        `rows` is valid until the next step of the iteration only.
        """
        place = self._place(name)
        info = place.info
        assert info.shape, f"{name} is a scalar: it has no rows"
        num_rows = info.shape[0]
        if num_rows == 0:
            return
        row_bytes = info.num_bytes // num_rows
        rows_per_block = max(1, max_bytes // max(1, row_bytes))
        buffer = torch.empty(min(rows_per_block, num_rows) * row_bytes, dtype=torch.uint8)
        for start in range(0, num_rows, rows_per_block):
            stop = min(start + rows_per_block, num_rows)
            part = buffer[: (stop - start) * row_bytes]
            self._fill(part, place.path, place.offset_bytes + start * row_bytes)
            yield start, stop, part.view(info.dtype).reshape(stop - start, *info.shape[1:])

    def _place(self, name: str) -> _Place:
        if name not in self._places:
            raise BaseModelError(f"{self.folder}: the checkpoint has no tensor named {name}.")
        return self._places[name]

    def _fill(self, buffer: Tensor, path: Path, offset_bytes: int) -> None:
        """Read `len(buffer)` bytes into the uint8 tensor's own memory."""
        if path not in self._files:
            self._files[path] = open(path, "rb", buffering=0)  # noqa: SIM115  # closed by close()
        file = self._files[path]
        file.seek(offset_bytes)
        memory = tensor_bytes(buffer)
        done = 0
        while done < len(memory):
            num_read = file.readinto(memory[done : done + MAX_READ_BYTES])  # type: ignore[attr-defined]
            if not num_read:
                raise BaseModelError(f"{path}: the file became shorter while it was being read.")
            done += num_read


def read_header(path: Path) -> dict[str, _Place]:
    """The places of all tensors in one safetensors file, in byte order. Raises `BaseModelError` for a damaged
    header or a truncated file."""
    file_bytes = path.stat().st_size
    with open(path, "rb") as file:
        prefix = file.read(8)
        header_bytes = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else 0
        if not 2 <= header_bytes <= MAX_HEADER_BYTES:
            raise BaseModelError(
                f"{path}: not a safetensors file (its header length is not believable). Download it again."
            )
        if 8 + header_bytes > file_bytes:
            raise _truncated(path, file_bytes, 8 + header_bytes)
        raw = file.read(header_bytes)
    try:
        header = json.loads(raw)
        entries = {name: entry for name, entry in header.items() if name != "__metadata__"}
        places = [_read_entry(path, name, entry, 8 + header_bytes) for name, entry in entries.items()]
    except (ValueError, TypeError, AttributeError, KeyError, OverflowError, RecursionError) as error:
        if isinstance(error, BaseModelError):
            raise
        raise BaseModelError(
            f"{path}: the safetensors header is damaged ({error}). Download the file again."
        ) from error
    places.sort(key=lambda place: place.offset_bytes)
    needed_bytes = max((place.offset_bytes + place.info.num_bytes for place in places), default=0)
    if needed_bytes > file_bytes:
        raise _truncated(path, file_bytes, needed_bytes)
    return {place.info.name: place for place in places}


def _read_entry(path: Path, name: str, entry: dict[str, Any], data_start: int) -> _Place:
    if entry["dtype"] not in DTYPES:
        raise BaseModelError(
            f"{path}: tensor {name} has the dtype {entry['dtype']}, which is not supported "
            f"({', '.join(DTYPES)} are). Convert the checkpoint to bfloat16 or float16."
        )
    dtype = DTYPES[entry["dtype"]]
    shape = tuple(int(size) for size in entry["shape"])
    begin, end = (int(offset) for offset in entry["data_offsets"])
    num_bytes = math.prod(shape) * dtype.itemsize
    if min((*shape, begin), default=0) < 0 or end - begin != num_bytes:
        raise BaseModelError(
            f"{path}: the safetensors header is damaged (tensor {name} of shape {list(shape)} needs"
            f" {num_bytes} bytes, the header gives it {end - begin}). Download the file again."
        )
    return _Place(TensorInfo(name, dtype, shape, num_bytes), path, data_start + begin)


def _read_index(folder: Path) -> dict[str, _Place]:
    path = folder / INDEX_FILE
    try:
        weight_map: dict[str, str] = dict(json.loads(path.read_bytes())["weight_map"])
        if not all(isinstance(text, str) for text in chain(weight_map, weight_map.values())):
            raise TypeError("names of tensors and files are texts")
        shards = sorted(set(weight_map.values()))
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise BaseModelError(
            f"{path}: not a readable index with a weight_map ({error!r}). Download it again."
        ) from error
    places: dict[str, _Place] = {}
    for shard in shards:
        if Path(shard).name != shard:
            raise BaseModelError(
                f"{path}: names the shard {shard!r}, which is not a file name in this folder."
            )
        if not (folder / shard).is_file():
            raise BaseModelError(
                f"{path}: names the shard {shard}, which is missing. Download the checkpoint again."
            )
        present = read_header(folder / shard)
        # A tensor that the index assigns to another file is skipped; one that it leaves out is taken.
        places.update(
            {name: place for name, place in present.items() if weight_map.get(name, shard) == shard}
        )
    return places


def _no_weights(folder: Path, wanted: str) -> BaseModelError:
    pickled = sorted(path.name for path in folder.iterdir() if path.suffix in PICKLE_SUFFIXES)
    if pickled:
        return BaseModelError(
            f"{folder}: the weights are in pickle format only ({', '.join(pickled[:3])}), which can run code"
            " when loaded and is refused. Convert them once, where you trust them:"
            " AutoModelForCausalLM.from_pretrained(folder).save_pretrained(new_folder) writes safetensors."
        )
    return BaseModelError(f"{folder}: no weights: neither {wanted} nor {INDEX_FILE} is there.")


def _truncated(path: Path, file_bytes: int, needed_bytes: int) -> BaseModelError:
    return BaseModelError(
        f"{path}: truncated: the file has {file_bytes} bytes, its header needs {needed_bytes}. Download it"
        " again."
    )


class Appendable(Protocol):
    """A file that is written sequentially."""

    def write(self, data: bytes | memoryview, /) -> object: ...


def write_header(
    file: Appendable, tensors: Mapping[str, tuple[torch.dtype, tuple[int, ...]]], metadata: Mapping[str, str]
) -> None:
    """Write the header of a safetensors file, from dtypes and shapes alone.

    The caller then writes the tensors' bytes, row-major, in the order of `tensors` and without gaps.
    """
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    offset = 0
    for name, (dtype, shape) in tensors.items():
        end = offset + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": DTYPE_NAMES[dtype], "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    raw = json.dumps(header, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % 8)  # tensors start aligned
    file.write(struct.pack("<Q", len(raw)))
    file.write(raw)


def write_tensors(file: Appendable, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write a whole safetensors file of contiguous CPU tensors, in this order."""
    write_header(
        file, {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}, metadata
    )
    for tensor in tensors.values():
        file.write(tensor_bytes(tensor))


def tensor_bytes(tensor: Tensor) -> memoryview:
    """A contiguous CPU tensor's memory as bytes, without a copy."""
    assert tensor.is_contiguous() and tensor.device.type == "cpu"
    return memoryview(tensor.reshape(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]  # a numpy stub gap
