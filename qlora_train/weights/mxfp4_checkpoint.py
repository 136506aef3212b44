"""Experts that are published in MXFP4 (gpt_oss): their numbers are kept, bit for bit.

A matrix X of all experts of a layer is two tensors:

    X_blocks    uint8 [E, out, in/32, 16]    two codes a byte, the first in the LOW nibble
    X_scales    uint8 [E, out, in/32]        exponents: value = table[code] * 2^(exponent - 127)

Training keeps the codes (quant/formats.py): rounding them again to NF4 would be an error of 7 % RMS on a base
that was trained in MXFP4, for 3 % fewer bytes. Only the two nibbles of every byte change places. For all
others, such as a merge, X is what transformers makes of it: [E, in, out], which bfloat16 holds exactly.
"""

from __future__ import annotations

from collections.abc import Iterator
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from qlora_train.errors import BaseModelError
from qlora_train.files.shards import MAX_READ_BYTES, TensorInfo
from qlora_train.model.base_folder import kept_quantization, read_plain_config
from qlora_train.quant.formats import MXFP4, NESTED_BLOCK_SIZE
from qlora_train.quant.weight import QuantizedWeight
from qlora_train.units import ceil_div
from qlora_train.weights.fp8_checkpoint import Fp8Reader

BLOCKS, SCALES = "_blocks", "_scales"
NOT_A_NUMBER = 255  # as an exponent


class Mxfp4Reader(Fp8Reader):
    """The tensors of a checkpoint, those of experts in MXFP4 as one of bfloat16 numbers, [E, in, out].

    experts: their names. Raises `BaseModelError` on opening for blocks and scales that do not belong
    together, or that config.json does not call for."""

    experts: frozenset[str] = frozenset()

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        names = [name.removesuffix(BLOCKS) for name in super().names() if name.endswith(BLOCKS)]
        self.experts = frozenset(names)
        for name in names:
            self._check(name)
        if names and kept_quantization(read_plain_config(folder).get("quantization_config") or {}) != MXFP4:
            raise BaseModelError(
                f"{folder}: {names[0]} is in MXFP4, of which config.json says nothing (quantization_config). "
                "Download config.json again."
            )

    def names(self) -> list[str]:
        hidden = {name + SCALES for name in self.experts}
        return [
            name.removesuffix(BLOCKS) if name.removesuffix(BLOCKS) in self.experts else name
            for name in super().names()
            if name not in hidden
        ]

    def __contains__(self, name: object) -> bool:
        return name in self.experts or super().__contains__(name)

    def info(self, name: str) -> TensorInfo:
        if name not in self.experts:
            return super().info(name)
        num_experts, rows, columns = self._sizes(name)
        shape = (num_experts, columns, rows)
        return TensorInfo(name, torch.bfloat16, shape, prod(shape) * torch.bfloat16.itemsize)

    def read(self, name: str) -> Tensor:
        if name not in self.experts:
            return super().read(name)
        return torch.cat([rows for _, _, rows in self.row_blocks(name)])

    def row_blocks(self, name: str, max_bytes: int = MAX_READ_BYTES) -> Iterator[tuple[int, int, Tensor]]:
        """The same as `ShardReader.row_blocks`; experts come one at a time."""
        if name not in self.experts:
            yield from super().row_blocks(name, max_bytes)
            return
        _, rows, columns = self._sizes(name)
        for start, (blocks, scales) in enumerate(self.kept_experts(name)):
            tensors = {"data": _turned(blocks.flatten()), "absmax": scales.flatten()}
            expert = QuantizedWeight(MXFP4, (rows, columns), tensors | _constants(scales.numel()))
            values = expert.dequantize_into(torch.empty(rows, columns, dtype=torch.bfloat16), "parts")
            yield start, start + 1, values.t()[None]

    def kept_experts(self, name: str) -> Iterator[tuple[Tensor, Tensor]]:
        """Of every expert, its blocks [1, out, in/32, 16] and scales [1, out, in/32] as they are stored."""
        blocks, scales = (super(Mxfp4Reader, self).row_blocks(name + end, 1) for end in (BLOCKS, SCALES))
        for (_, _, codes), (_, _, exponents) in zip(blocks, scales, strict=True):
            yield codes, exponents

    def read_kept(self, name: str, tensors: dict[str, Tensor]) -> None:
        """Copy all experts' codes and scales into `tensors`, those of an MXFP4 weight [E * out, in]."""
        for key, tensor in _constants(len(tensors["absmax"])).items():
            tensors[key].copy_(tensor)
        for key, ending in (("data", BLOCKS), ("absmax", SCALES)):
            done = 0
            for _, _, part in super().row_blocks(name + ending):
                codes = part.flatten()
                if ending == SCALES and codes.max() == NOT_A_NUMBER:
                    raise BaseModelError(
                        f"{self.folder}: {name} holds values that are not finite. Repair the checkpoint."
                    )
                tensors[key][done : done + len(codes)] = _turned(codes) if ending == BLOCKS else codes
                done += len(codes)

    def _sizes(self, name: str) -> tuple[int, int, int]:
        """(experts, out, in)."""
        num_experts, rows, num_groups, _ = super().info(name + BLOCKS).shape
        return num_experts, rows, num_groups * MXFP4.block_size

    def _check(self, name: str) -> None:
        if name + SCALES not in self:
            raise BaseModelError(f"{self.folder}: {name}{BLOCKS} has no {name}{SCALES}. Download it again.")
        blocks, scales = (super(Mxfp4Reader, self).info(name + ending) for ending in (BLOCKS, SCALES))
        is_right = len(blocks.shape) == 4 and blocks.shape[3] == MXFP4.block_size // 2
        if not is_right or scales.shape != blocks.shape[:3] or {blocks.dtype, scales.dtype} != {torch.uint8}:
            raise BaseModelError(
                f"{self.folder}: {blocks.name} is {blocks.dtype} {list(blocks.shape)} and {scales.name} "
                f"{scales.dtype} {list(scales.shape)}; MXFP4 is uint8 [experts, out, in/32, 16] and "
                "[experts, out, in/32]. Download the checkpoint again."
            )


def _turned(codes: Tensor) -> Tensor:
    """The other nibble first."""
    return (codes << 4) | (codes >> 4)


def _constants(num_blocks: int) -> dict[str, Tensor]:
    """The quantization constants that make a scale of an exponent."""
    exponents = torch.arange(256, dtype=torch.uint8).view(torch.float8_e8m0fnu)
    return {
        "nested_code": exponents.float(),
        "nested_absmax": torch.ones(ceil_div(num_blocks, NESTED_BLOCK_SIZE)),
        "nested_offset": torch.zeros(()),
    }
