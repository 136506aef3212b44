"""Checkpoints in FP8: weights are read as the numbers they stand for, code times scale, in float32.

A published FP8 weight is two tensors: `X.weight` in float8_e4m3fn, and its scales. Their shape tells what
one scale is for, together with `quantization_config.weight_block_size` in config.json:

    X.weight_scale_inv  [ceil(out/128), ceil(in/128)]   one for each block; the last blocks may be smaller
    X.weight_scale      [out, 1] or [out]               one for each row
    either              [], [1] or [1, 1]               one for the whole matrix

Both names mean a factor, whatever `inv` suggests. Scales are floats, or exponents of two (ue8m0: one byte s
stands for 2^(s - 127), typed float8_e8m0fnu or uint8). Matrices of several experts [E, out, in] have scales
[E, ...].

The product is rounded once, to float32: bfloat16 could not hold it, and NF4 made from bfloat16 products
differs in 1 % of the bytes. `Fp8Reader` hides the scales, so that nobody who reads weights needs to know of
them; weights that are not in FP8 (`modules_to_not_convert`) are read as they are.

FP8 kernels also want scales for their input (`X.input_scale`, `X.activation_scale`). Nothing is multiplied in
FP8 here: they are left out.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from qlora_train.errors import BaseModelError
from qlora_train.files.shards import MAX_READ_BYTES, ShardReader, TensorInfo
from qlora_train.model.base_folder import CONFIG_REMEDY, read_plain_config
from qlora_train.units import ceil_div

FP8_DTYPES = (torch.float8_e4m3fn, torch.float8_e5m2)
SCALE_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float8_e8m0fnu, torch.uint8)
SCALE_ENDINGS = ("_scale_inv", "_scale")  # behind the weight's own name
INPUT_SCALES = ("input_scale", "activation_scale")  # in the place of "weight"
DEFAULT_BLOCK = (128, 128)  # where config.json does not say, as transformers has it


@dataclass(frozen=True)
class _Scaling:
    """The scales of a weight in FP8. scales: the name of their tensor. shape: the shape of the weight. rows,
    columns: the size of the block that shares one scale."""

    scales: str
    shape: tuple[int, ...]
    rows: int
    columns: int

    def apply(self, values: Tensor, start: int, scales: Tensor) -> None:
        """Multiply `values` [n, ..., in], the weight from row `start` on, in place. scales: the scales of the
        whole weight, [rows of scales, scales in a row]."""
        num_rows, num_columns = self.shape[-2:]
        values = values.view(-1, num_columns)
        first = start * prod(self.shape[1:-1])
        row = torch.arange(first, first + len(values))
        matrix, row = row // num_rows, row % num_rows
        of_row = scales[matrix * ceil_div(num_rows, self.rows) + row // self.rows]
        num_whole = num_columns // self.columns
        whole, rest = values.tensor_split([num_whole * self.columns], dim=1)
        whole.unflatten(1, (num_whole, self.columns)).mul_(of_row[:, :num_whole, None])
        rest.mul_(of_row[:, num_whole:])


class Fp8Reader(ShardReader):
    """The tensors of a checkpoint, those in FP8 (`fp8`) in float32 and without their scales.

    Raises `BaseModelError` on opening, as `ShardReader` does, and for an FP8 weight whose scales are missing
    or do not fit it, or scales that no FP8 weight has: a weight without its scale is hundreds of times too
    large.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        names = super().names()
        self.fp8 = frozenset(name for name in names if self._place(name).info.dtype in FP8_DTYPES)
        block = _block_size(folder) if self.fp8 else None
        self._scalings = {name: self._scaling_of(name, block) for name in names if name in self.fp8}
        self._hidden = {scaling.scales for scaling in self._scalings.values()}
        self._refuse_surplus(names)
        self._hidden |= {name.removesuffix("weight") + ending for name in self.fp8 for ending in INPUT_SCALES}

    def names(self) -> list[str]:
        """Every weight's name, in the order of the files and of the bytes in them."""
        return [name for name in super().names() if name not in self._hidden]

    def info(self, name: str) -> TensorInfo:
        """The weight as it is read: in fp32 where it is stored in FP8."""
        info = super().info(name)
        if name not in self._scalings:
            return info
        return TensorInfo(name, torch.float32, info.shape, prod(info.shape) * torch.float32.itemsize)

    def read(self, name: str) -> Tensor:
        if name not in self._scalings:
            return super().read(name)
        return torch.cat([rows.clone() for _, _, rows in self.row_blocks(name)])

    def row_blocks(self, name: str, max_bytes: int = MAX_READ_BYTES) -> Iterator[tuple[int, int, Tensor]]:
        """The same as `ShardReader.row_blocks`; `max_bytes` counts both the codes and the numbers."""
        scaling = self._scalings.get(name)
        if scaling is None:
            yield from super().row_blocks(name, max_bytes)
            return
        scales = super().read(scaling.scales)
        if scales.dtype == torch.uint8:
            scales = scales.view(torch.float8_e8m0fnu)
        scales = scales.float().reshape(-1, ceil_div(scaling.shape[-1], scaling.columns))
        buffer: Tensor | None = None
        for start, stop, codes in super().row_blocks(name, max_bytes // (1 + torch.float32.itemsize)):
            if buffer is None:
                buffer = torch.empty(codes.shape)  # later blocks are not larger
            values = buffer[: stop - start].copy_(codes)
            scaling.apply(values, start, scales)
            yield start, stop, values

    def _scaling_of(self, name: str, block: tuple[int, int] | None) -> _Scaling:
        weight = super().info(name)
        scale_names = [name + ending for ending in SCALE_ENDINGS if name + ending in self]
        if not scale_names:
            raise BaseModelError(
                f"{self.folder}: {name} is in FP8, and its scales ({name}{SCALE_ENDINGS[0]} or "
                f"{name}{SCALE_ENDINGS[1]}) are missing: without them its numbers are wrong. Download the "
                "checkpoint again, or use one of the same model with weights in 16 bits."
            )
        scales = super().info(scale_names[0])
        if len(weight.shape) >= 2 and scales.dtype in SCALE_DTYPES:
            *matrices, rows, columns = weight.shape
            sizes = [(rows, columns), (1, columns)] + ([] if block is None else [block])
            for size in sizes:
                if scales.shape in _shapes_of_scales(tuple(matrices), (rows, columns), size):
                    return _Scaling(scales.name, weight.shape, *size)
        blocks = "" if block is None else f", or one for each block of {block[0]} x {block[1]}"
        raise BaseModelError(
            f"{self.folder}: {scales.name} is {scales.dtype} {list(scales.shape)}, {name} is "
            f"{list(weight.shape)}: a matrix in FP8 has one floating-point scale, one for each row{blocks} "
            "(quantization_config.weight_block_size in config.json). Download the checkpoint and its "
            "config.json again."
        )

    def _refuse_surplus(self, names: list[str]) -> None:
        endings = (SCALE_ENDINGS[0], *(f".weight{ending}" for ending in SCALE_ENDINGS))
        surplus = [name for name in names if name.endswith(endings) and name not in self._hidden]
        if surplus:
            raise BaseModelError(
                f"{self.folder}: the checkpoint holds {len(surplus)} scales too many (such as {surplus[0]}): "
                "each should be the only one of a weight in FP8. Download it again, or use one of the same "
                "model with weights in 16 bits."
            )


def _shapes_of_scales(
    matrices: tuple[int, ...], shape: tuple[int, int], size: tuple[int, int]
) -> list[tuple[int, ...]]:
    """How the scales of matrices of this shape may be shaped, one for each `size` numbers."""
    grid = (ceil_div(shape[0], size[0]), ceil_div(shape[1], size[1]))
    shapes: list[tuple[int, ...]] = [(*matrices, *grid)]
    if not matrices and size[1] == shape[1]:  # whole rows: written without the second size as well
        shapes += [grid[:1]] + ([()] if grid == (1, 1) else [])
    return shapes


def _block_size(folder: Path) -> tuple[int, int] | None:
    """(rows, columns) of one scale, as config.json says; None: it says that there are no blocks."""
    stored = read_plain_config(folder).get("quantization_config")
    size = (stored if isinstance(stored, dict) else {}).get("weight_block_size", DEFAULT_BLOCK)
    if size is None:
        return None
    if not (
        isinstance(size, list | tuple) and len(size) == 2 and all(type(n) is int and n > 0 for n in size)
    ):
        raise BaseModelError(
            f"{folder / 'config.json'}: quantization_config.weight_block_size is {str(size)[:40]}, not two "
            f"whole numbers. {CONFIG_REMEDY}"
        )
    return size[0], size[1]
