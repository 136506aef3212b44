"""The unpacking kernel on a GPU: bitsandbytes' bits, and the speed of a copy."""

from __future__ import annotations

from collections.abc import Callable
from statistics import median

import bitsandbytes.functional as bnb
import pytest
import torch
from torch import Tensor

from qlora_train.model.quantize import PackedWeight, Packing, _code_on, pack

pytestmark = pytest.mark.gpu
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
COPY_SHARE = 0.85


def bits(numbers: Tensor) -> Tensor:
    return numbers.reshape(-1).view(torch.int32 if numbers.dtype == torch.float32 else torch.int16)


def packed_weight(shape: tuple[int, int], packing: Packing, device: torch.device) -> PackedWeight:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=torch.bfloat16)
    return pack([weight], shape, packing).to(device)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("form", ["nf4", "fp4"])
@pytest.mark.parametrize("block_size", [32, 64, 128, 256, 512, 1024, 2048, 4096])
def test_a_weight_has_the_bits_of_bitsandbytes(gpu, block_size, form, double_quant, dtype) -> None:
    for shape in [(300, 4096), (37, 514), (3, 21), (1, 1)]:
        packed = packed_weight(shape, Packing(form, double_quant, block_size), gpu)
        around = torch.full((packed.shape[0] * packed.shape[1] + 16,), 7.0, dtype=dtype, device=gpu)
        out = around[8:-8].view(shape)
        assert packed.unpack_into(out, "triton") is out
        assert torch.equal(bits(out), bits(packed.unpack(dtype)))
        assert (around[:8] == 7).all() and (around[-8:] == 7).all()


def test_the_library_has_the_same_codes_on_cpu_and_gpu(gpu) -> None:
    for form in ("nf4", "fp4"):
        assert torch.equal(_code_on(form, gpu).cpu(), _code_on(form, torch.device("cpu")))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("start", "num_elements"), [(0, 1), (1, 1024), (31, 5000), (1023, 2), (4096, 8193)])
def test_any_range_has_the_bits_of_the_reference(gpu, start, num_elements, dtype) -> None:
    from qlora_train.kernels.unpack_4bit import Packed4bit, unpack_4bit, unpack_4bit_reference

    data = torch.randint(256, ((start + num_elements + 1) // 2,), dtype=torch.uint8, device=gpu)
    # normal and subnormal scales
    absmax = torch.logspace(-40, 3, -(-2 * len(data) // 64), dtype=torch.float64, device=gpu).float()
    packed = Packed4bit(data, absmax, _code_on("nf4", gpu), 64)
    out, expected = torch.empty(2, num_elements, dtype=dtype, device=gpu)
    assert torch.equal(
        bits(unpack_4bit(packed, out, start)), bits(unpack_4bit_reference(packed, expected, start))
    )


def test_numbers_beyond_2_to_the_31(gpu) -> None:
    from qlora_train.kernels.unpack_4bit import Packed4bit, unpack_4bit, unpack_4bit_reference

    if torch.cuda.mem_get_info(gpu)[0] < 2 * 2**30:
        pytest.skip("needs 2 GiB of free memory")
    start, num_elements = 2**31 - 5000, 10001
    data = torch.zeros((start + num_elements + 1) // 2, dtype=torch.uint8, device=gpu)
    data[start // 2 :].random_(0, 256)
    absmax = torch.rand(-(-(start + num_elements) // 64), device=gpu)
    packed = Packed4bit(data, absmax, _code_on("nf4", gpu), 64)
    out, expected = torch.empty(2, num_elements, device=gpu)
    assert torch.equal(unpack_4bit(packed, out, start), unpack_4bit_reference(packed, expected, start))


def seconds(work: Callable[[int], object], repeats: int = 60) -> float:
    """Median GPU time of work(i)."""
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repeats)]
    for i in range(10):
        work(i)
    for i, (before, after) in enumerate(events):
        before.record()
        work(i)
        after.record()
    torch.cuda.synchronize()
    return median(before.elapsed_time(after) for before, after in events) / 1e3


def test_unpacking_is_as_fast_as_copying(gpu, record_property) -> None:
    """4096 x 14336, nf4 with double quantisation, to bfloat16, against a copy of as many bytes."""
    shape = (4096, 14336)
    packed = packed_weight(shape, Packing("nf4", True), gpu)
    outs = [torch.empty(shape, dtype=torch.bfloat16, device=gpu) for _ in range(4)]  # more than any cache
    num_bytes = packed.num_bytes + outs[0].nbytes
    halves = [torch.empty(num_bytes // 2, dtype=torch.uint8, device=gpu) for _ in range(8)]
    copy_seconds = seconds(lambda i: halves[i % 4].copy_(halves[4 + i % 4]))
    unpack_seconds = seconds(lambda i: packed.unpack_into(outs[i % 4], "triton"))
    state = packed._state(0, shape[0], torch.bfloat16)
    library_seconds = seconds(
        lambda i: bnb.dequantize_4bit(packed.tensors["data"].unsqueeze(1), state, out=outs[i % 4])
    )
    share = copy_seconds / unpack_seconds
    said = (
        f"{torch.cuda.get_device_name(gpu)}: copy {num_bytes / copy_seconds / 1e9:.0f} GB/s, unpack "
        f"{num_bytes / unpack_seconds / 1e9:.0f} GB/s ({share:.0%}), the library's last launch alone "
        f"{num_bytes / library_seconds / 1e9:.0f} GB/s"
    )
    record_property("bandwidth", said)
    print(said)
    assert share >= COPY_SHARE, said
