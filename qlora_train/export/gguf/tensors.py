"""The tensors of a GGUF file: which of the checkpoint's each one holds, in what order and type.

Most are one tensor of the checkpoint. Experts are one tensor of a layer there, [E, out, in], and in the
checkpoint one for each expert, or one for all of them, mostly with gate and up together:

    experts.0.gate_proj, experts.1.gate_proj, ...  ->  blk.N.ffn_gate_exps        rows of one after the other
    experts.gate_up_proj [E, 2 * out, in]          ->  blk.N.ffn_gate_exps, blk.N.ffn_up_exps

Experts in MXFP4 stay so, bit for bit, where the adapter does not change them: llama.cpp has the same codes
and scales in another order. Norms, biases and routers stay in fp32. A matrix whose rows are no multiple of a
block of 32 is written in float16. Below 8 bits the head (also where it is the embedding) is written in q8_0,
as rounding there is what a model notices most.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import gguf
import torch
from gguf import GGMLQuantizationType as GgmlType
from gguf import LlamaFileType
from torch import Tensor

from qlora_train.export.gguf.architecture import Architecture
from qlora_train.export.merge import MergedWeights
from qlora_train.files.shards import tensor_bytes

EMBEDDING, HEAD = "token_embd.weight", "output.weight"
DTYPES = {GgmlType.F32: torch.float32, GgmlType.F16: torch.float16, GgmlType.BF16: torch.bfloat16}


@dataclass(frozen=True)
class GgufTensor:
    """A tensor of the file. sources: its names in the checkpoint; several are stacked. num_rotated_heads:
    heads whose rows change places (see families.py). is_shifted: 1 is added to it. is_transposed: its
    matrices are [in, out] in the checkpoint. picked: the rows of each expert that it holds; None:
    all."""

    sources: tuple[str, ...]
    name: str
    shape: tuple[int, ...]
    type: GgmlType
    num_rotated_heads: int = 0
    is_shifted: bool = False
    is_transposed: bool = False
    picked: slice | None = None

    @property
    def num_bytes(self) -> int:
        return math.prod(gguf.quant_shape_to_byte_shape(self.shape, self.type))

    def quantized(self, rows: Tensor) -> bytes | memoryview:
        """The bytes of rows in fp32, or in the dtype that is written."""
        if (dtype := DTYPES.get(self.type)) is not None:
            return tensor_bytes(rows.to(dtype).contiguous())
        return gguf.quantize(rows.contiguous().numpy(), self.type).tobytes()

    def kept(self, blocks: Tensor, scales: Tensor) -> memoryview:
        """The bytes of an expert in MXFP4. blocks [1, out, in/32, 16]: of neighbours, two codes a byte; here
        a byte has one code of the first 16 and one of the last. scales [1, out, in/32]: exponents."""
        if self.picked is not None:
            blocks, scales = blocks[:, self.picked], scales[:, self.picked]
        first, last = torch.stack((blocks & 15, blocks >> 4), -1).flatten(-2).chunk(2, -1)
        return tensor_bytes(torch.cat((scales[..., None], first | last << 4), -1))

    def laid_out(self, rows: Tensor) -> Tensor:
        """Rows of a source as llama.cpp has them. rows: all of it where heads' rows change places."""
        if heads := self.num_rotated_heads:
            return rows.view(heads, 2, -1, *rows.shape[1:]).transpose(1, 2).reshape(rows.shape)
        if self.is_transposed:
            rows = rows.transpose(1, 2)
        if self.picked is not None:
            rows = rows[:, self.picked]
        return rows.float() + 1 if self.is_shifted else rows

    def put_back(self, rows: Tensor, out: Tensor) -> None:
        """Undo `laid_out`: write rows of the file to where they are in the source. out: its rows."""
        if heads := self.num_rotated_heads:
            rows = rows.view(heads, -1, 2, *rows.shape[1:]).transpose(1, 2).reshape(rows.shape)
        if self.is_transposed:
            out = out.transpose(1, 2)
        if self.picked is not None:
            out = out[:, self.picked]
        out.copy_(rows - 1 if self.is_shifted else rows)


def list_tensors(weights: MergedWeights, architecture: Architecture, quant: str) -> list[GgufTensor]:
    """The tensors of the file. quant: `f16`, `q8_0`, ... Raises `ExportError` for one without a place."""
    wanted = GgmlType[quant.upper()]
    unquantized = [
        tensor
        for parameter, sources in weights.tensors.items()
        for tensor in _tensors_of(parameter, sources, weights, architecture)
    ]
    head = HEAD if any(tensor.name == HEAD for tensor in unquantized) else EMBEDDING

    def type_of(tensor: GgufTensor) -> GgmlType:
        if weights.keeps(tensor.sources[0]):
            return GgmlType.MXFP4
        if len(tensor.shape) < 2 or tensor.name.endswith(".bias") or ".ffn_gate_inp" in tensor.name:
            return GgmlType.F32
        if wanted in DTYPES or tensor.shape[-1] % gguf.GGML_QUANT_SIZES[wanted][0] == 0:
            return GgmlType.Q8_0 if tensor.name == head and wanted not in DTYPES else wanted
        return GgmlType.F16

    return [replace(tensor, type=type_of(tensor)) for tensor in unquantized]


def _tensors_of(
    parameter: str, sources: tuple[str, ...], weights: MergedWeights, architecture: Architecture
) -> Iterator[GgufTensor]:
    """The tensors that a parameter becomes, in fp32."""
    family, size = architecture.family, weights.shapes[sources[0]]
    halves: list[tuple[str, tuple[str, ...], slice | None]] = [(parameter, sources, None)]
    if ".experts.gate_up_proj" in parameter and len(sources) > 1:
        halves = [(part, sources[i::2], None) for i, part in enumerate(_gate_and_up(parameter))]
    elif ".experts.gate_up_proj" in parameter and not family.fuses_gate_and_up:
        half = size[1] // 2
        rows = (
            (slice(0, None, 2), slice(1, None, 2)) if family.alternates else (slice(half), slice(half, None))
        )
        halves = [(part, sources, picked) for part, picked in zip(_gate_and_up(parameter), rows, strict=True)]
    for part, of_part, picked in halves:
        shape = list(size)
        is_transposed = family.alternates and len(shape) == 3
        if is_transposed:
            shape[1:] = shape[:0:-1]
        if picked is not None:
            shape[1] = len(range(shape[1])[picked])
        yield GgufTensor(
            of_part,
            architecture.tensor_name(part),
            (*([len(of_part)] if len(of_part) > 1 else []), *shape),
            GgmlType.F32,
            architecture.num_rotated_heads(parameter),
            architecture.is_shifted_norm(parameter),
            is_transposed,
            picked,
        )


def _gate_and_up(parameter: str) -> tuple[str, str]:
    return parameter.replace("gate_up_proj", "gate_proj"), parameter.replace("gate_up_proj", "up_proj")


def file_type(quant: str) -> LlamaFileType:
    return LlamaFileType.ALL_F32 if quant == "f32" else LlamaFileType[f"MOSTLY_{quant.upper()}"]
