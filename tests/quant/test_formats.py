"""The table of formats: bytes as it states them, and no torch."""

from __future__ import annotations

import subprocess
import sys
from math import prod

import pytest

from qlora_train.quant.formats import UNQUANTIZED, Quantization

ITEM_BYTES = {"uint8": 1, "int8": 1, "float32": 4, None: 2}


@pytest.mark.parametrize(
    ("quantization", "bytes_per_number"),
    [
        (Quantization("nf4", True), (4 + 8 / 64 + 32 / (64 * 256)) / 8),
        (Quantization("fp4"), 0.5625),
        (Quantization("int8"), 1 + 4 / 4096),
        (UNQUANTIZED, 2),
    ],
)
def test_bytes_per_number(quantization: Quantization, bytes_per_number: float) -> None:
    shape = (14336, 4096)
    tables = 4 + 256 * 4 if quantization.double_quant else 0  # once per weight
    num_bytes = sum(ITEM_BYTES[dtype] * prod(size) for dtype, size in quantization.tensors(shape).values())
    assert num_bytes - tables == bytes_per_number * prod(shape)
    by_row = quantization.by_row(4096)
    stored = sum(ITEM_BYTES[dtype] * prod(size) for dtype, size in by_row.tensors(shape).values())
    assert by_row.row_bytes(4096, itemsize=2) * shape[0] == stored


def test_importing_it_imports_no_torch() -> None:
    code = (
        "import qlora_train.quant.formats, qlora_train.weights.cache_key, sys; print('torch' in sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout == "False\n"
