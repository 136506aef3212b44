"""The dequantizing kernel on a GPU: bitsandbytes' bits, and the speed of a copy."""

from __future__ import annotations

import bitsandbytes.functional as bnb
import pytest
import torch
from torch import Tensor

from qlora_train.quant.formats import Quantization
from qlora_train.quant.quantize import quantize
from qlora_train.quant.weight import QuantizedWeight, _code_on

pytestmark = pytest.mark.gpu
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
COPY_SHARE = 0.85


def bits(numbers: Tensor) -> Tensor:
    return numbers.reshape(-1).view(torch.int32 if numbers.dtype == torch.float32 else torch.int16)


def quantized_weight(
    shape: tuple[int, int], quantization: Quantization, device: torch.device
) -> QuantizedWeight:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=torch.bfloat16)
    return quantize([weight], shape, quantization).to(device)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("form", ["nf4", "fp4"])
@pytest.mark.parametrize("block_size", [32, 64, 1024])  # every size that is tried is compiled anew
def test_a_weight_has_the_bits_of_bitsandbytes(gpu, block_size, form, double_quant, dtype) -> None:
    for shape in [(300, 4096), (37, 514), (3, 21), (1, 1)]:
        quantized = quantized_weight(shape, Quantization(form, double_quant, block_size), gpu)
        around = torch.full((quantized.shape[0] * quantized.shape[1] + 16,), 7.0, dtype=dtype, device=gpu)
        out = around[8:-8].view(shape)
        assert quantized.dequantize_into(out, "triton") is out
        assert torch.equal(bits(out), bits(quantized.dequantize(dtype)))
        assert (around[:8] == 7).all() and (around[-8:] == 7).all()


def test_the_library_has_the_same_codes_on_cpu_and_gpu(gpu) -> None:
    for form in ("nf4", "fp4"):
        assert torch.equal(_code_on(form, gpu).cpu(), _code_on(form, torch.device("cpu")))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("start", "num_elements"), [(0, 1), (1, 1024), (31, 5000), (1023, 2), (4096, 8193)])
def test_any_range_has_the_bits_of_the_reference(gpu, start, num_elements, dtype) -> None:
    from qlora_train.quant.dequantize_4bit import Quantized4bit, dequantize_4bit, dequantize_4bit_reference

    data = torch.randint(256, ((start + num_elements + 1) // 2,), dtype=torch.uint8, device=gpu)
    # normal and subnormal scales
    absmax = torch.logspace(-40, 3, -(-2 * len(data) // 64), dtype=torch.float64, device=gpu).float()
    quantized = Quantized4bit(data, absmax, _code_on("nf4", gpu), 64)
    out, expected = torch.empty(2, num_elements, dtype=dtype, device=gpu)
    assert torch.equal(
        bits(dequantize_4bit(quantized, out, start)),
        bits(dequantize_4bit_reference(quantized, expected, start)),
    )


def test_numbers_beyond_2_to_the_31(gpu) -> None:
    from qlora_train.quant.dequantize_4bit import Quantized4bit, dequantize_4bit, dequantize_4bit_reference

    if torch.cuda.mem_get_info(gpu)[0] < 2 * 2**30:
        pytest.skip("needs 2 GiB of free memory")
    start, num_elements = 2**31 - 5000, 10001
    data = torch.zeros((start + num_elements + 1) // 2, dtype=torch.uint8, device=gpu)
    data[start // 2 :].random_(0, 256)
    absmax = torch.rand(-(-(start + num_elements) // 64), device=gpu)
    quantized = Quantized4bit(data, absmax, _code_on("nf4", gpu), 64)
    out, expected = torch.empty(2, num_elements, device=gpu)
    assert torch.equal(
        dequantize_4bit(quantized, out, start), dequantize_4bit_reference(quantized, expected, start)
    )


def test_dequantizing_is_as_fast_as_copying(gpu, gpu_seconds, record_property) -> None:
    """4096 x 14336, nf4 with double quantization, to bfloat16, against a copy of as many bytes."""
    shape = (4096, 14336)
    quantized = quantized_weight(shape, Quantization("nf4", True), gpu)
    outs = [torch.empty(shape, dtype=torch.bfloat16, device=gpu) for _ in range(4)]  # more than any cache
    num_bytes = quantized.num_bytes + outs[0].nbytes
    halves = [torch.empty(num_bytes // 2, dtype=torch.uint8, device=gpu) for _ in range(8)]
    copy_seconds = gpu_seconds(lambda i: halves[i % 4].copy_(halves[4 + i % 4]))
    dequantize_seconds = gpu_seconds(lambda i: quantized.dequantize_into(outs[i % 4], "triton"))
    state = quantized._state(0, shape[0], torch.bfloat16)
    library_seconds = gpu_seconds(
        lambda i: bnb.dequantize_4bit(quantized.tensors["data"].unsqueeze(1), state, out=outs[i % 4])
    )
    share = copy_seconds / dequantize_seconds
    said = (
        f"{torch.cuda.get_device_name(gpu)}: copy {num_bytes / copy_seconds / 1e9:.0f} GB/s, dequantize "
        f"{num_bytes / dequantize_seconds / 1e9:.0f} GB/s ({share:.0%}), the library's last launch alone "
        f"{num_bytes / library_seconds / 1e9:.0f} GB/s"
    )
    record_property("bandwidth", said)
    print(said)
    assert share >= COPY_SHARE, said
