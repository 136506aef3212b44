"""Dequantizing one 4-bit matrix on the GPU: bytes read and written per second, beside a plain copy on it.

Our kernel and bitsandbytes' take the same quantized weight (NF4, double quantization) to bfloat16. The
ceiling is a device-to-device copy, which reads and writes every byte, as dequantizing does.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from bitsandbytes import functional as bnb

from benchmarks.pieces.figures import compute_device, compute_dtype, now
from benchmarks.process import answer
from qlora_train.plan.measured_rates import rates_of

NUM_WARM_UP, NUM_TIMED = 10, 200


def measure(arguments: dict[str, Any]) -> dict[str, Any]:
    """arguments: num_rows, num_columns; by: "ours" or "bitsandbytes"."""
    torch.manual_seed(0)
    shape = (arguments["num_rows"], arguments["num_columns"])
    weight = torch.randn(shape, device=compute_device().torch, dtype=compute_dtype())
    data, state = bnb.quantize_4bit(weight, quant_type="nf4", blocksize=64, compress_statistics=True)
    expected = bnb.dequantize_4bit(data, state)
    out = torch.empty_like(weight)
    dequantize = (_ours if arguments["by"] == "ours" else _bitsandbytes)(data, state, out)
    dequantize()
    if not torch.equal(out, expected):
        raise ValueError("dequantized weights differ from bitsandbytes' own")
    for _ in range(NUM_WARM_UP):
        dequantize()
    started = now()
    for _ in range(NUM_TIMED):
        dequantize()
    seconds = (now() - started) / NUM_TIMED
    with tempfile.TemporaryDirectory() as empty:
        ceiling = rates_of(compute_device(), compute_dtype(), Path(empty)).memory
    scale_bytes = state.absmax.numel() + 4 * state.state2.absmax.numel()
    moved = data.numel() + scale_bytes + out.numel() * out.element_size()
    return {
        "dequantize_microseconds": seconds * 1e6,
        "dequantized_gb_per_second": moved / seconds / 1e9,
        "copy_ceiling_gb_per_second": ceiling / 1e9,
        "share_of_copy_ceiling": moved / seconds / ceiling,
    }


def _ours(data: torch.Tensor, state: bnb.QuantState, out: torch.Tensor) -> Callable[[], object]:
    from qlora_train.quant.dequantize_4bit import NestedScales, Quantized4bit, dequantize_4bit

    nested = NestedScales(state.state2.code, state.state2.absmax, state.offset)
    quantized = Quantized4bit(data.reshape(-1), state.absmax, state.code, state.blocksize, nested)
    return lambda: dequantize_4bit(quantized, out)


def _bitsandbytes(data: torch.Tensor, state: bnb.QuantState, out: torch.Tensor) -> Callable[[], object]:
    return lambda: bnb.dequantize_4bit(data, state, out=out)


if __name__ == "__main__":
    answer(measure)
