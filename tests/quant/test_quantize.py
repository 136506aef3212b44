"""Quantized bytes and dequantized numbers against bitsandbytes itself."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import bitsandbytes.functional as bnb
import pytest
import torch

from qlora_train.errors import BaseModelError
from qlora_train.quant import quantize as quantizing
from qlora_train.quant import weight as dequantizing
from qlora_train.quant.formats import Quantization
from qlora_train.quant.quantize import quantize
from qlora_train.quant.weight import quantized_layout

SHAPES = [(8, 64), (128, 256), (7, 33), (5, 96), (13, 130), (1, 1), (1, 2), (3, 21), (300, 70), (257, 129)]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def random_weight(shape: tuple[int, int], dtype: torch.dtype) -> torch.Tensor:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))
    weight.view(-1)[64:192] = 0.0  # whole blocks of zeros
    return weight.to(dtype)


def reused_blocks(weight: torch.Tensor, num_rows: int):
    """Row blocks in one buffer that is overwritten, as ShardReader.row_blocks yields them."""
    buffer = torch.empty(num_rows, weight.shape[1], dtype=weight.dtype)
    for part in weight.split(num_rows):
        buffer[: len(part)] = part
        yield buffer[: len(part)]
        buffer.fill_(float("nan"))


def same_bytes(left: torch.Tensor, right: torch.Tensor) -> bool:
    left, right = left.contiguous().view(-1), right.contiguous().view(-1)
    return left.dtype == right.dtype and torch.equal(left.view(torch.uint8), right.view(torch.uint8))


def dequantized_by_definition(
    data: torch.Tensor, state: bnb.QuantState, shape: tuple[int, int]
) -> torch.Tensor:
    """fp32: the 4-bit code of every number times its block's absmax, over the flat weight."""
    all_codes = torch.tensor([[16 * low + low + 1] for low in range(0, 16, 2)], dtype=torch.uint8)
    one_block = bnb.QuantState(torch.ones(1), torch.Size((1, 16)), None, 64, state.quant_type, torch.float32)
    table = bnb.dequantize_4bit(all_codes, one_block).view(-1)  # fp4: differs from state.code in the last bit
    torch.testing.assert_close(table, state.code, rtol=0, atol=1e-7)
    absmax = state.absmax
    if state.nested:
        absmax = bnb.dequantize_blockwise(absmax, state.state2) + state.offset
    indices = torch.stack([data.view(-1) >> 4, data.view(-1) & 15], dim=1).view(-1)[: shape[0] * shape[1]]
    return (table[indices.int()] * absmax.repeat_interleave(64)[: len(indices)]).reshape(shape)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("form", ["nf4", "fp4"])
@pytest.mark.parametrize("double_quant", [False, True])
def test_4bit_has_the_bytes_of_bitsandbytes(shape, dtype, form, double_quant, monkeypatch) -> None:
    monkeypatch.setattr(quantizing, "CHUNK_ELEMENTS", 1024)
    weight = random_weight(shape, dtype)
    data, state = bnb.quantize_4bit(weight, blocksize=64, compress_statistics=double_quant, quant_type=form)
    for num_rows in (shape[0], 3, 1):
        quantized = quantize(reused_blocks(weight, num_rows), shape, Quantization(form, double_quant))
        assert same_bytes(quantized.tensors["data"], data)
        assert same_bytes(quantized.tensors["absmax"], state.absmax)
        if double_quant:
            assert same_bytes(quantized.tensors["nested_absmax"], state.state2.absmax)
            assert same_bytes(quantized.tensors["nested_offset"], state.offset)
            assert same_bytes(quantized.tensors["nested_code"], state.state2.code)
    for out_dtype in DTYPES:
        expected = dequantized_by_definition(data, state, shape).to(out_dtype)
        if shape[1] % 64 == 0:  # the library's CPU kernel mixes up absmax where rows are not whole blocks
            state.dtype = out_dtype
            assert same_bytes(quantized.dequantize(out_dtype), bnb.dequantize_4bit(data, state))
        assert quantized.dequantize(out_dtype).dtype == out_dtype
        for start, stop in [
            (0, shape[0]),
            (0, 1),
            (shape[0] // 2, shape[0]),
            (shape[0] - 1, shape[0]),
            (0, 0),
        ]:
            assert torch.equal(quantized.dequantize_rows(start, stop, out_dtype), expected[start:stop])


@pytest.mark.parametrize("dtype", DTYPES)
def test_int8_has_the_bytes_of_bitsandbytes(dtype, monkeypatch) -> None:
    monkeypatch.setattr(quantizing, "CHUNK_ELEMENTS", 500)
    monkeypatch.setattr(dequantizing, "INT8_ELEMENTS", 500)
    weight = random_weight((41, 70), dtype)  # row 1 is all zeros
    codes, scales, _ = bnb.int8_vectorwise_quant(weight.half())
    quantized = quantize(reused_blocks(weight, 6), (41, 70), Quantization("int8"))
    assert same_bytes(quantized.tensors["data"], codes)
    assert same_bytes(quantized.tensors["row_absmax"], scales)
    expected = bnb.int8_vectorwise_dequant(codes, scales)
    assert same_bytes(quantized.dequantize(torch.float32), expected)
    assert same_bytes(quantized.dequantize_rows(5, 30, torch.bfloat16), expected[5:30].bfloat16())
    assert (expected - weight.float()).abs().max() < weight.abs().max() / 200


def test_none_casts(tmp_path) -> None:
    weight = random_weight((9, 70), torch.float32)
    quantized = quantize(reused_blocks(weight, 2), (9, 70), Quantization("none"), dtype=torch.bfloat16)
    assert same_bytes(quantized.dequantize(torch.bfloat16), weight.bfloat16())
    assert quantized.num_bytes == 9 * 70 * 2


@pytest.mark.parametrize(
    "quantization",
    [Quantization("nf4", True), Quantization("fp4"), Quantization("int8"), Quantization("none")],
)
def test_layout_is_what_quantization_makes(quantization: Quantization) -> None:
    quantized = quantize([torch.randn(70, 257)], (70, 257), quantization, dtype=torch.float16)
    found = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in quantized.tensors.items()}
    assert found == quantized_layout(quantization, (70, 257), torch.float16)


def slab_views(
    quantization: Quantization, shape: tuple[int, int], dtype: torch.dtype
) -> dict[str, torch.Tensor]:
    """The tensors of `quantized_layout` in one buffer of 0xFF, each 64 bytes from the last one's end."""
    layout = quantized_layout(quantization, shape, dtype)
    layer_buffer = torch.full(
        (sum(math.prod(size) * kind.itemsize + 128 for kind, size in layout.values()),), 255
    )
    layer_buffer, end, views = layer_buffer.to(torch.uint8), 0, {}
    for key, (kind, size) in layout.items():
        num_bytes = math.prod(size) * kind.itemsize
        views[key] = layer_buffer[end : end + num_bytes].view(kind).view(size)
        end += -(-num_bytes // 64) * 64 + 64
    return views


@pytest.mark.parametrize(
    "quantization",
    [Quantization("nf4", True), Quantization("fp4"), Quantization("int8"), Quantization("none")],
)
@pytest.mark.parametrize("shape", [(70, 257), (64, 64), (1, 1)])
def test_out_takes_the_same_bytes_and_nothing_beside_them(quantization: Quantization, shape) -> None:
    weight = random_weight(shape, torch.bfloat16)
    expected = quantize([weight], shape, quantization)
    views = slab_views(quantization, shape, torch.bfloat16)
    quantized = quantize(reused_blocks(weight, 3), shape, quantization, out=views)
    layer_buffer = next(iter(views.values())).untyped_storage()
    assert all(quantized.tensors[key] is views[key] for key in expected.tensors)
    assert all(same_bytes(views[key], tensor) for key, tensor in expected.tensors.items())
    untouched = torch.tensor(layer_buffer, dtype=torch.uint8)
    for view in views.values():
        start = view.storage_offset() * view.itemsize
        untouched[start : start + view.nbytes] = 255
    assert (untouched == 255).all()


def test_out_must_be_the_layout() -> None:
    views = slab_views(Quantization("nf4"), (4, 64), torch.bfloat16)
    with pytest.raises(AssertionError, match="down_proj"):
        quantize([torch.ones(4, 64)], (4, 64), Quantization("nf4", True), name="down_proj", out=views)


@pytest.mark.parametrize("block_size", [32, 128, 4096])
def test_other_block_sizes_have_the_bytes_of_bitsandbytes(block_size) -> None:
    weight = random_weight((37, 514), torch.bfloat16)
    data, state = bnb.quantize_4bit(weight, blocksize=block_size, compress_statistics=True, quant_type="nf4")
    quantized = quantize(reused_blocks(weight, 5), (37, 514), Quantization("nf4", True, block_size))
    assert same_bytes(quantized.tensors["data"], data)
    assert same_bytes(quantized.tensors["absmax"], state.absmax)
    assert same_bytes(quantized.tensors["nested_absmax"], state.state2.absmax)


def test_a_weight_of_zeros_has_the_bytes_of_bitsandbytes() -> None:
    for shape in ((8, 64), (9, 65)):
        weight = torch.zeros(shape, dtype=torch.bfloat16)
        for form in ("nf4", "fp4"):
            data, state = bnb.quantize_4bit(weight, blocksize=64, compress_statistics=True, quant_type=form)
            quantized = quantize([weight], shape, Quantization(form, True))
            assert same_bytes(quantized.tensors["data"], data)
            assert same_bytes(quantized.tensors["absmax"], state.absmax)
            assert quantized.dequantize(torch.float32).abs().max() < 1e-37


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("num_blocks", [1, 300, 2**15, 2**15 + 1, 100_000, 229_376, 917_504])
def test_the_mean_is_that_of_one_thread(num_blocks, threads) -> None:
    absmax = 0.01 + 0.1 * torch.rand(num_blocks, generator=torch.Generator().manual_seed(num_blocks))
    threads(1)
    expected = absmax.mean()
    for number in (1, 2, 3, 8):
        threads(number)
        assert same_bytes(quantizing._mean(absmax), expected)


def test_double_quantisation_has_the_bytes_of_one_thread(threads) -> None:
    """2.6M numbers: torch would share their sum among threads."""
    weight = random_weight((1300, 2048), torch.bfloat16)
    threads(1)
    _, state = bnb.quantize_4bit(weight, blocksize=64, compress_statistics=True, quant_type="nf4")
    for number in (1, 2, 4):
        threads(number)
        quantized = quantize([weight], (1300, 2048), Quantization("nf4", True))
        assert same_bytes(quantized.tensors["nested_offset"], state.offset)
        assert same_bytes(quantized.tensors["absmax"], state.absmax)
        assert same_bytes(quantized.tensors["nested_absmax"], state.state2.absmax)


def test_a_double_quantised_weight_takes_0_5159_byte_per_number() -> None:
    quantized = quantize([torch.randn(1024, 1024)], (1024, 1024), Quantization("nf4", True))
    assert quantized.num_bytes == 2**20 * 4 // 8 + 2**20 // 64 + 4 * 2**20 // 64 // 256 + 4 + 256 * 4


@pytest.mark.parametrize(
    "quantization", [Quantization("nf4", True), Quantization("int8"), Quantization("none")]
)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused_by_name(quantization: Quantization, bad: float) -> None:
    weight = torch.ones(4, 64)
    weight[2, 5] = bad
    with pytest.raises(BaseModelError, match="up_proj"):
        quantize([weight], (4, 64), quantization, name="up_proj")


def test_int8_refuses_what_fp16_cannot_hold() -> None:
    with pytest.raises(BaseModelError, match="float16"):
        quantize([torch.full((2, 64), 1e5)], (2, 64), Quantization("int8"))


def test_other_dtypes_are_refused() -> None:
    with pytest.raises(BaseModelError, match="float64"):
        quantize([torch.ones(2, 64, dtype=torch.float64)], (2, 64), Quantization("nf4"))
