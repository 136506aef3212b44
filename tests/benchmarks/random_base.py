"""A base of any size without its weights: random bytes in the format of the quantized cache, made directly.

Memory and speed do not depend on what the weights say, only on their shapes, so a 70B base can be measured
where no 141 GB checkpoint is. Every byte is a valid pair of 4-bit codes, so a slab is random bytes; only its
floating-point constants have to make sense, so that losses and gradients are finite and of an ordinary size:

    weights        mean square 1/in in every linear: products keep the size of what they multiply
    absmax         offset + code * nested_absmax, spread a quarter around what that mean square asks for
    embedding, head   normal, mean square 1/D: logits of size one, a loss near ln V + 1/2
    norms          ones; biases zeros
    routers        normal, mean square 1/D: every expert gets its share of the tokens

What costs is bandwidth, not random numbers: one random pattern, a little longer than a slab, is copied from
another place for every layer (likewise for blocks of matrix rows), so no two layers are alike and 40 GB take
as long as writing and hashing them does. The 16-bit weights never exist. The rest is the product's own
(quantized_cache.py): layout, manifest, hashes, atomic folder. What it makes is opened by `load_base` like any
quantized base, since a base folder with nothing but its config.json has the same fingerprint every time.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from bitsandbytes import functional as bnb
from safetensors.torch import save_file
from torch import Tensor

from qlora_train.device.compute_dtype import dtype_name
from qlora_train.model.base import MetaModel, read_config
from qlora_train.model.layer_buffer import LayerBufferLayout
from qlora_train.quant.formats import Quantization
from qlora_train.quant.weight import QuantizedWeight
from qlora_train.weights.cache_key import quantized_folder
from qlora_train.weights.quantized_cache import open_quantized_base

SHIFT = 4099
"""Bytes (of slabs) or numbers (of matrices) between the places that consecutive copies start from; odd, so
that rows do not meet themselves."""
SPREAD = 0.25
BLOCK_NUMBERS = 2**24
INT8_MEAN_SQUARE = (256**2 - 1) / 12  # of uniform codes, around their mean of -1/2


def write_config(folder: Path, config: Mapping[str, Any]) -> Path:
    """A base folder with nothing but its config.json, and weights of which there are none; returns it."""
    folder.mkdir(parents=True, exist_ok=True)
    weights = folder / "model.safetensors"
    if not weights.is_file():  # a run remembers its base's weights, and the cache when they were written
        save_file({}, weights)
    (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
    return folder


def make_random_base(
    base_folder: Path,
    quantization: Quantization,
    dtype: torch.dtype,
    cache: Path,
    log: Callable[[str], None] = lambda line: None,
) -> Path:
    """The folder of the random quantized base of `base_folder` (write_config) below `cache`, made if it is
    not there. What is there is not read: whoever opens it does that.

    dtype: the compute dtype. Raises `UserError` for a disk that is too small.
    """
    meta_model = MetaModel(read_config(base_folder), dtype)
    folder = quantized_folder(cache, base_folder, quantization, dtype_name(meta_model.dtype))
    if not folder.exists():
        open_quantized_base(
            cache, base_folder, meta_model, quantization, torch.device("cpu"), log, RandomWeights
        )
    return folder


class RandomWeights:
    """Stands where a `BaseCheckpoint` stands; a context manager. CPU tensors only."""

    head_quantization = Quantization("none")

    def __init__(self, base_folder: Path, meta_model: MetaModel) -> None:
        self._meta_model = meta_model
        self.factors: dict[str, tuple[Tensor, Tensor]] = {}
        self._generator = torch.Generator().manual_seed(0)
        self._bytes = torch.empty(0, dtype=torch.uint8)
        self._dynamic_code = bnb.create_dynamic_map()

    def __enter__(self) -> RandomWeights:
        return self

    def __exit__(self, *exc: object) -> None:
        self._bytes = torch.empty(0, dtype=torch.uint8)

    def quantize_layer(self, layer: int, layout: LayerBufferLayout, layer_buffer: Tensor) -> None:
        """Fill `layer_buffer` (uint8) with a layer of this layout."""
        start = layer * SHIFT
        if len(self._bytes) < start + len(layer_buffer):
            self._bytes = self._random_bytes(len(self._meta_model.layer_paths) * SHIFT + len(layer_buffer))
        layer_buffer.copy_(self._bytes[start : start + len(layer_buffer)])
        for weight in layout.weights(layer_buffer).values():
            self._set_constants(weight)

    def matrix_rows(self, name: str) -> Iterator[Tensor]:
        """Consecutive rows [n, D] of the embedding or the head, in the compute dtype."""
        num_rows, num_columns = self._meta_model.matrix_shape
        block = min(num_rows, max(1, BLOCK_NUMBERS // num_columns))
        starts = range(0, num_rows, block)
        pattern = torch.empty(block * num_columns + len(starts) * SHIFT)
        pattern.normal_(std=num_columns**-0.5, generator=self._generator)
        pattern = pattern.to(self._meta_model.dtype)
        for number, start in enumerate(starts):
            rows = min(block, num_rows - start)
            yield pattern[number * SHIFT :][: rows * num_columns].view(rows, num_columns)

    def plain(self, device: torch.device) -> dict[str, Tensor]:
        """Norms, biases and routers."""
        shapes = self._meta_model.plain_shapes
        return {name: self._plain(name, shape).to(device) for name, shape in shapes.items()}

    def _plain(self, name: str, shape: tuple[int, ...]) -> Tensor:
        if len(shape) == 2:  # of one number each, a router would send every token to the same experts
            values = torch.empty(shape).normal_(std=shape[1] ** -0.5, generator=self._generator)
            return values.to(self._meta_model.dtype)
        return torch.full(shape, 0.0 if name.endswith("bias") else 1.0, dtype=self._meta_model.dtype)

    def _random_bytes(self, num_bytes: int) -> Tensor:
        words = torch.empty(-(-num_bytes // 8), dtype=torch.int64)
        words.random_(-(2**63), None, generator=self._generator)  # eight bytes a draw
        return words.view(torch.uint8)

    def _set_constants(self, weight: QuantizedWeight) -> None:
        """Scales for random codes: see the module docstring."""
        quantization, tensors, root_mean_square = weight.quantization, weight.tensors, weight.shape[1] ** -0.5
        if quantization.format == "none":
            tensors["data"].normal_(std=root_mean_square, generator=self._generator)
            return
        if quantization.format == "int8":
            tensors["row_absmax"].fill_(127 * root_mean_square / math.sqrt(INT8_MEAN_SQUARE))
            return
        codes = bnb.get_4bit_type(quantization.format, device="cpu")
        absmax = root_mean_square / float(codes.square().mean().sqrt())
        if not quantization.double_quant:
            tensors["absmax"].uniform_(
                (1 - SPREAD) * absmax, (1 + SPREAD) * absmax, generator=self._generator
            )
            return
        tensors["nested_absmax"].fill_(SPREAD * absmax)
        tensors["nested_offset"].fill_(absmax)
        tensors["nested_code"].copy_(self._dynamic_code)
