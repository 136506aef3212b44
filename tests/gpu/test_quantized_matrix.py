"""A quantized head on a GPU: tiles by our kernel, labels by the library's, both with bitsandbytes' bits."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from qlora_train.kernels.on_device import find_device
from qlora_train.model.quantized_matrix import QuantizedMatrix, RowLayout
from qlora_train.model.vocab_matrix import ResidentMatrix, TokenIds, tiles
from qlora_train.quant.formats import Quantization
from qlora_train.quant.quantize import quantize

pytestmark = pytest.mark.gpu
V = 1001
CASES = [
    (Quantization("nf4", True), 192),
    (Quantization("fp4"), 4096),
    (Quantization("int8"), 63),
    (Quantization("int8"), 256),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("quantization", "num_columns"), CASES, ids=str)
@pytest.mark.parametrize("tile_rows", [1, 300, 1001, 5000])
def test_parts_are_those_of_the_whole(
    gpu: torch.device, quantization: Quantization, num_columns: int, dtype: torch.dtype, tile_rows: int
) -> None:
    weight = quantize(
        [torch.randn(V, num_columns, generator=torch.Generator().manual_seed(0))],
        (V, num_columns),
        quantization,
    )
    row_format = RowLayout(quantization.by_row(num_columns), num_columns, dtype)
    stored = ResidentMatrix(row_format.store(weight, 0, V).to(gpu), tile_rows)
    matrix, expected = (
        QuantizedMatrix(stored, row_format, find_device(gpu).description.dequantize_kernel),
        weight.to(gpu).dequantize(dtype),
    )
    for start, rows in tiles(matrix):
        assert torch.equal(rows, expected[start : start + tile_rows])
    for ids in ([1000, 3, 3, 0], list(range(V)), [7], []):
        asked = TokenIds.of(np.array(ids, dtype=np.int64), gpu)
        assert torch.equal(matrix.gather(asked), expected[asked.device])
