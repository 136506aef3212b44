"""Writes a GGUF file of a merged model, and reads it back.

A few rows of one tensor are in memory at a time (of q and k of families whose rows change places: one
tensor), as in merge.py, in fp32, so that the sum W + scaling * B A is rounded once, to what is written:

    metadata, tokenizer, names and sizes of tensors -> rows of the first tensor, quantized -> ...

Norms and biases stay in fp32. A matrix whose rows are no multiple of a block of 32 is written in float16.
Below 8 bits the head (also where it is the embedding) is written in q8_0, as rounding there is what a model
notices most.

`GgufReader` reads the file as if it were the checkpoint it came from, so that the receipt measures what was
written, with everything that was done to it undone.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as GgmlType
from gguf import GGUFReader, GGUFWriter, LlamaFileType
from torch import Tensor

from qlora_train.errors import ExportError
from qlora_train.export.disk_writer import DiskWriter
from qlora_train.export.gguf.architecture import ROPE_FACTORS, Architecture
from qlora_train.export.merge import BLOCK_BYTES, MergedWeights
from qlora_train.files.shards import TensorInfo, tensor_bytes

EMBEDDING = "token_embd.weight"
_DTYPES = {GgmlType.F32: torch.float32, GgmlType.F16: torch.float16, GgmlType.BF16: torch.bfloat16}
_ERROR_BOUNDS = {
    GgmlType.F32: 0.0,
    GgmlType.F16: 2.0**-11,
    GgmlType.BF16: 2.0**-8,
    GgmlType.Q8_0: 1 / 200,
    GgmlType.Q5_0: 1 / 15,
    GgmlType.Q5_1: 1 / 15,
    GgmlType.Q4_0: 1 / 7,
    GgmlType.Q4_1: 1 / 14,
}
"""The largest error that rounding makes, as a share of a tensor's largest value."""


@dataclass(frozen=True)
class GgufTensor:
    """A tensor of the file. source: its name in the checkpoint. num_rotated_heads: heads whose rows change
    places (see architecture.py). is_shifted: 1 is added to it."""

    source: str
    name: str
    shape: tuple[int, ...]
    type: GgmlType
    num_rotated_heads: int = 0
    is_shifted: bool = False

    @property
    def num_bytes(self) -> int:
        return math.prod(gguf.quant_shape_to_byte_shape(self.shape, self.type))

    def quantized(self, rows: Tensor) -> bytes | memoryview:
        """The bytes of rows in fp32, or in the dtype that is written."""
        if (dtype := _DTYPES.get(self.type)) is not None:
            return tensor_bytes(rows.to(dtype).contiguous())
        return gguf.quantize(rows.numpy(), self.type).tobytes()


def list_tensors(weights: MergedWeights, architecture: Architecture, quant: str) -> list[GgufTensor]:
    """The tensors of the file. quant: `f16`, `q8_0`, ... Raises `ExportError` for one without a place."""
    wanted = GgmlType[quant.upper()]
    names = {name: architecture.tensor_name(name) for name in weights.shapes if not _is_computed(name)}
    head = "output.weight" if "output.weight" in names.values() else EMBEDDING

    def type_of(name: str, shape: tuple[int, ...]) -> GgmlType:
        if len(shape) < 2:
            return GgmlType.F32
        if wanted in _DTYPES or shape[-1] % gguf.GGML_QUANT_SIZES[wanted][0] == 0:
            return GgmlType.Q8_0 if name == head and wanted not in _DTYPES else wanted
        return GgmlType.F16

    return [
        GgufTensor(
            source,
            name,
            weights.shapes[source],
            type_of(name, weights.shapes[source]),
            architecture.num_rotated_heads(source),
            architecture.is_shifted_norm(source),
        )
        for source, name in names.items()
    ]


def _is_computed(name: str) -> bool:
    """Whether a tensor of an old checkpoint is one that every program computes itself."""
    return name.endswith("rotary_emb.inv_freq")


def file_type(quant: str) -> LlamaFileType:
    return LlamaFileType.ALL_F32 if quant == "f32" else LlamaFileType[f"MOSTLY_{quant.upper()}"]


def write_gguf(
    file: Path,
    writer: GGUFWriter,
    tensors: Sequence[GgufTensor],
    weights: MergedWeights,
    factors: Tensor | None,
) -> None:
    """Write the file. writer: with all metadata. factors: of the rotary embedding. Raises `ExportError` for
    values that are not finite or beyond the range of what is written."""
    of_rope = [] if factors is None else [GgufTensor("", ROPE_FACTORS, tuple(factors.shape), GgmlType.F32)]
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
            for rows in _rows(tensor, weights):
                out.write(tensor.quantized(rows))
            out.write(bytes(-tensor.num_bytes % gguf.GGUF_DEFAULT_ALIGNMENT))


def _padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % gguf.GGUF_DEFAULT_ALIGNMENT)


def _rows(tensor: GgufTensor, weights: MergedWeights) -> Iterator[Tensor]:
    """Blocks of rows as llama.cpp has them."""
    blocks = weights.rows_in(tensor.source, _DTYPES.get(tensor.type, torch.float32))
    if heads := tensor.num_rotated_heads:
        whole = torch.cat([rows.clone() for rows in blocks])
        yield whole.view(heads, 2, -1, *whole.shape[1:]).transpose(1, 2).reshape(whole.shape)
        return
    for rows in blocks:
        yield rows + 1 if tensor.is_shifted else rows


class GgufReader:
    """Reads a GGUF file under the names, and with the rows and values, of the checkpoint it came from; has
    the methods of `ShardReader`. folder: of that checkpoint."""

    def __init__(self, folder: Path, file: Path, tensors: Sequence[GgufTensor]) -> None:
        self.folder = folder
        stored = {tensor.name: tensor.data for tensor in GGUFReader(file).tensors}
        self._tensors = {tensor.source: (tensor, stored[tensor.name]) for tensor in tensors}

    @property
    def vocabulary_size(self) -> int:
        """Rows of the embedding."""
        return next(tensor.shape[0] for tensor, _ in self._tensors.values() if tensor.name == EMBEDDING)

    def names(self) -> list[str]:
        return list(self._tensors)

    def __contains__(self, name: object) -> bool:
        return name in self._tensors

    def info(self, name: str) -> TensorInfo:
        shape = self._tensors[name][0].shape
        return TensorInfo(name, torch.float32, shape, 4 * math.prod(shape))

    def read(self, name: str) -> Tensor:
        return torch.cat([rows for _, _, rows in self.row_blocks(name)])

    def row_blocks(self, name: str, max_bytes: int = BLOCK_BYTES) -> Iterator[tuple[int, int, Tensor]]:
        """(start, stop, rows in fp32) of a tensor."""
        tensor, stored = self._tensors[name]
        num_rows = tensor.shape[0]
        heads = tensor.num_rotated_heads
        step = num_rows if heads else max(1, max_bytes // (4 * math.prod(tensor.shape[1:])))
        for start in range(0, num_rows, step):
            stop = min(start + step, num_rows)
            rows = torch.from_numpy(gguf.dequantize(stored[start:stop], tensor.type).copy())
            if heads:
                rows = rows.view(heads, -1, 2, *rows.shape[1:]).transpose(1, 2).reshape(rows.shape)
            yield start, stop, rows - 1 if tensor.is_shifted else rows

    def close(self) -> None:
        """Does nothing: the file is mapped, and closed with this object."""


def compare_with_merged(
    reader: GgufReader, tensors: Sequence[GgufTensor], weights: MergedWeights
) -> list[str]:
    """Lines of a table: the first rows of every tensor in the file against those of the merge. Raises
    `ExportError` where they differ by more than rounding."""
    found: dict[GgmlType, list[float]] = {}
    for tensor in tensors:
        merged = next(weights.rows_in(tensor.source, torch.float32))
        _, _, rows = next(reader.row_blocks(tensor.source))
        num_rows = min(len(rows), len(merged))
        largest = float((merged[:num_rows] + tensor.is_shifted).abs().max())
        error = float((rows[:num_rows] - merged[:num_rows]).abs().max()) / (largest or 1.0)
        allowed = _ERROR_BOUNDS[tensor.type] + (2.0**-22 if tensor.is_shifted else 0.0)
        if not error <= allowed:
            raise ExportError(
                f"{tensor.source}: read back from the GGUF file it differs from the merged weight by "
                f"{error:.1%} of its largest value; {tensor.type.name} makes {allowed:.1%} at the most. The "
                "disk may be faulty; export again to another one (--out)."
            )
        found.setdefault(tensor.type, []).append(error)
    return [
        "read back and compared with the merged weights, the first rows of each tensor:",
        *(
            f"  {kind.name.lower():5} {len(errors):5} tensors, error at most {max(errors):.1e} of the largest"
            for kind, errors in found.items()
        ),
    ]
