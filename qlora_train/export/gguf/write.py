"""Writes a GGUF file of a merged model, and reads it back.

A few rows of one tensor are in memory at a time (of q and k of families whose rows change places: one
tensor; of a tensor of all experts: one expert), as in merge.py, in fp32, so that the sum W + scaling * B A is
rounded once, to what is written:

    metadata, tokenizer, names and sizes of tensors -> rows of the first tensor, quantized -> ...

`GgufReader` reads the file as if it were the checkpoint it came from, so that the receipt measures what was
written, with everything that was done to it undone.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as GgmlType
from gguf import GGUFReader, GGUFWriter
from torch import Tensor

from qlora_train.errors import ExportError
from qlora_train.export.disk_writer import DiskWriter
from qlora_train.export.gguf.architecture import ROPE_FACTORS
from qlora_train.export.gguf.tensors import DTYPES, EMBEDDING, HEAD, GgufTensor
from qlora_train.export.merge import BLOCK_BYTES, MergedWeights
from qlora_train.files.shards import TensorInfo

_ERROR_BOUNDS = {
    GgmlType.F32: 0.0,
    GgmlType.MXFP4: 0.0,
    GgmlType.F16: 2.0**-11,
    GgmlType.BF16: 2.0**-8,
    GgmlType.Q8_0: 1 / 200,
    GgmlType.Q5_0: 1 / 15,
    GgmlType.Q5_1: 1 / 15,
    GgmlType.Q4_0: 1 / 7,
    GgmlType.Q4_1: 1 / 14,
}
"""The largest error that rounding makes, as a share of a tensor's largest value."""


def write_gguf(
    file: Path,
    writer: GGUFWriter,
    tensors: Sequence[GgufTensor],
    weights: MergedWeights,
    factors: Tensor | None,
) -> None:
    """Write the file. writer: with all metadata. factors: of the rotary embedding. Raises `ExportError` for
    values that are not finite or beyond the range of what is written."""
    of_rope = [] if factors is None else [GgufTensor((), ROPE_FACTORS, tuple(factors.shape), GgmlType.F32)]
    for tensor in [*of_rope, *tensors]:
        writer.add_tensor_info(tensor.name, tensor.shape, np.dtype(np.float32), tensor.num_bytes, tensor.type)
    writer.write_header_to_file(file)
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    header = file.read_bytes()
    with DiskWriter(file) as out:
        out.write(_padded(header))
        for tensor in of_rope:
            assert factors is not None
            out.write(_padded(bytes(tensor.quantized(factors))))
        for tensor in tensors:
            for data in _data(tensor, weights):
                out.write(data)
            out.write(bytes(-tensor.num_bytes % gguf.GGUF_DEFAULT_ALIGNMENT))


def _padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % gguf.GGUF_DEFAULT_ALIGNMENT)


def _data(tensor: GgufTensor, weights: MergedWeights) -> Iterator[bytes | memoryview]:
    """A tensor as it is written, in parts."""
    if tensor.type == GgmlType.MXFP4:
        yield from (tensor.kept(*parts) for parts in weights.kept_experts(tensor.sources[0]))
        return
    for source in tensor.sources:
        blocks = weights.rows_in(source, DTYPES.get(tensor.type, torch.float32))
        if tensor.num_rotated_heads:
            blocks = iter([torch.cat([rows.clone() for rows in blocks])])
        yield from (tensor.quantized(tensor.laid_out(rows)) for rows in blocks)


class GgufReader:
    """Reads a GGUF file under the names, and with the rows and values, of the checkpoint it came from; has
    the methods of `ShardReader`. folder: of that checkpoint. shapes: of its merged tensors."""

    def __init__(
        self,
        folder: Path,
        file: Path,
        tensors: Sequence[GgufTensor],
        shapes: Mapping[str, tuple[int, ...]],
    ) -> None:
        self.folder, self._shapes = folder, shapes
        stored = {tensor.name: tensor.data for tensor in GGUFReader(file).tensors}
        self.has_own_head = HEAD in stored
        self._parts: dict[str, list[tuple[GgufTensor, np.ndarray]]] = {}
        for tensor in tensors:
            data = stored[tensor.name]
            for source, part in zip(tensor.sources, data if len(tensor.sources) > 1 else [data], strict=True):
                self._parts.setdefault(source, []).append((tensor, part))

    @property
    def vocabulary_size(self) -> int:
        """Rows of the embedding."""
        return next(tensor.shape[0] for ((tensor, _), *_) in self._parts.values() if tensor.name == EMBEDDING)

    def names(self) -> list[str]:
        return list(self._parts)

    def __contains__(self, name: object) -> bool:
        return name in self._parts

    def info(self, name: str) -> TensorInfo:
        shape = self._shapes[name]
        return TensorInfo(name, torch.float32, shape, 4 * math.prod(shape))

    def read(self, name: str) -> Tensor:
        return torch.cat([rows for _, _, rows in self.row_blocks(name)])

    def row_blocks(self, name: str, max_bytes: int = BLOCK_BYTES) -> Iterator[tuple[int, int, Tensor]]:
        """(start, stop, rows in fp32) of a tensor."""
        num_rows, *size = self._shapes[name]
        step = max(1, max_bytes // (4 * math.prod(size)))
        if any(tensor.num_rotated_heads for tensor, _ in self._parts[name]):
            step = num_rows
        for start in range(0, num_rows, step):
            stop = min(start + step, num_rows)
            rows = torch.empty(stop - start, *size)
            for tensor, stored in self._parts[name]:
                values = torch.from_numpy(gguf.dequantize(stored[start:stop], tensor.type).copy())
                tensor.put_back(values, rows)
            yield start, stop, rows

    def close(self) -> None:
        """Does nothing: the file is mapped, and closed with this object."""


def compare_with_merged(
    reader: GgufReader, tensors: Sequence[GgufTensor], weights: MergedWeights
) -> list[str]:
    """Lines of a table: the first rows of every tensor in the file against those of the merge. Raises
    `ExportError` where they differ by more than rounding."""
    found: dict[GgmlType, list[float]] = {}
    for tensor in tensors:
        ends = {tensor.sources[0], tensor.sources[-1]}
        found.setdefault(tensor.type, []).append(
            max(_checked_error(reader, tensor, source, weights) for source in ends)
        )
    return [
        "read back and compared with the merged weights, the first rows of each tensor:",
        *(
            f"  {kind.name.lower():5} {len(errors):5} tensors, error at most {max(errors):.1e} of the largest"
            for kind, errors in found.items()
        ),
    ]


def _checked_error(reader: GgufReader, tensor: GgufTensor, source: str, weights: MergedWeights) -> float:
    """The largest error of the first rows of a source, as a share of their largest value."""
    merged = next(weights.rows_in(source, torch.float32))
    _, _, rows = next(reader.row_blocks(source))
    num_rows = min(len(rows), len(merged))
    largest = float((merged[:num_rows] + tensor.is_shifted).abs().max())
    error = float((rows[:num_rows] - merged[:num_rows]).abs().max()) / (largest or 1.0)
    allowed = _ERROR_BOUNDS[tensor.type] + (2.0**-22 if tensor.is_shifted else 0.0)
    if not error <= allowed:
        raise ExportError(
            f"{source}: read back from the GGUF file it differs from the merged weight by {error:.1%} of its "
            f"largest value; {tensor.type.name} makes {allowed:.1%} at the most. The disk may be faulty; "
            "export again to another one (--out)."
        )
    return error
