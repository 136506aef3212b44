"""Packed bytes and unpacked numbers against bitsandbytes itself, and checkpoints that it packed."""

from __future__ import annotations

import json
from pathlib import Path

import bitsandbytes.functional as bnb
import pytest
import torch
from safetensors.torch import save_file

from qlora_train.errors import BaseModelError
from qlora_train.model import quantize
from qlora_train.model.quantize import Packing, pack, packed_layout, read_bitsandbytes_weight
from qlora_train.model.shards import ShardReader

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


def unpacked_by_definition(data: torch.Tensor, state: bnb.QuantState, shape: tuple[int, int]) -> torch.Tensor:
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
    monkeypatch.setattr(quantize, "CHUNK_ELEMENTS", 1024)
    weight = random_weight(shape, dtype)
    data, state = bnb.quantize_4bit(weight, blocksize=64, compress_statistics=double_quant, quant_type=form)
    for num_rows in (shape[0], 3, 1):
        packed = pack(reused_blocks(weight, num_rows), shape, Packing(form, double_quant))
        assert same_bytes(packed.tensors["data"], data)
        assert same_bytes(packed.tensors["absmax"], state.absmax)
        if double_quant:
            assert same_bytes(packed.tensors["nested_absmax"], state.state2.absmax)
            assert same_bytes(packed.tensors["nested_offset"], state.offset)
            assert same_bytes(packed.tensors["nested_code"], state.state2.code)
    for out_dtype in DTYPES:
        expected = unpacked_by_definition(data, state, shape).to(out_dtype)
        if shape[1] % 64 == 0:  # the library's CPU kernel mixes up absmax where rows are not whole blocks
            state.dtype = out_dtype
            assert same_bytes(packed.unpack(out_dtype), bnb.dequantize_4bit(data, state))
        assert packed.unpack(out_dtype).dtype == out_dtype
        for start, stop in [
            (0, shape[0]),
            (0, 1),
            (shape[0] // 2, shape[0]),
            (shape[0] - 1, shape[0]),
            (0, 0),
        ]:
            assert torch.equal(packed.unpack_rows(start, stop, out_dtype), expected[start:stop])


@pytest.mark.parametrize("dtype", DTYPES)
def test_int8_has_the_bytes_of_bitsandbytes(dtype, monkeypatch) -> None:
    monkeypatch.setattr(quantize, "CHUNK_ELEMENTS", 500)
    weight = random_weight((41, 70), dtype)  # row 1 is all zeros
    codes, scales, _ = bnb.int8_vectorwise_quant(weight.half())
    packed = pack(reused_blocks(weight, 6), (41, 70), Packing("int8"))
    assert same_bytes(packed.tensors["data"], codes)
    assert same_bytes(packed.tensors["row_absmax"], scales)
    expected = bnb.int8_vectorwise_dequant(codes, scales)
    assert same_bytes(packed.unpack(torch.float32), expected)
    assert same_bytes(packed.unpack_rows(5, 30, torch.bfloat16), expected[5:30].bfloat16())
    assert (expected - weight.float()).abs().max() < weight.abs().max() / 200


def test_none_casts(tmp_path) -> None:
    weight = random_weight((9, 70), torch.float32)
    packed = pack(reused_blocks(weight, 2), (9, 70), Packing("none"), dtype=torch.bfloat16)
    assert same_bytes(packed.unpack(torch.bfloat16), weight.bfloat16())
    assert packed.num_bytes == 9 * 70 * 2


@pytest.mark.parametrize("packing", [Packing("nf4", True), Packing("fp4"), Packing("int8"), Packing("none")])
def test_layout_is_what_packing_makes(packing: Packing) -> None:
    packed = pack([torch.randn(70, 257)], (70, 257), packing, dtype=torch.float16)
    found = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in packed.tensors.items()}
    assert found == packed_layout(packing, (70, 257), torch.float16)


def test_a_double_quantised_weight_takes_0_5159_byte_per_number() -> None:
    packed = pack([torch.randn(1024, 1024)], (1024, 1024), Packing("nf4", True))
    assert packed.num_bytes == 2**20 * 4 // 8 + 2**20 // 64 + 4 * 2**20 // 64 // 256 + 4 + 256 * 4


@pytest.mark.parametrize("packing", [Packing("nf4", True), Packing("int8"), Packing("none")])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused_by_name(packing: Packing, bad: float) -> None:
    weight = torch.ones(4, 64)
    weight[2, 5] = bad
    with pytest.raises(BaseModelError, match="up_proj"):
        pack([weight], (4, 64), packing, name="up_proj")


def test_int8_refuses_what_fp16_cannot_hold() -> None:
    with pytest.raises(BaseModelError, match="float16"):
        pack([torch.full((2, 64), 1e5)], (2, 64), Packing("int8"))


def test_other_dtypes_are_refused() -> None:
    with pytest.raises(BaseModelError, match="float64"):
        pack([torch.ones(2, 64, dtype=torch.float64)], (2, 64), Packing("nf4"))


NAME = "model.layers.0.mlp.up_proj.weight"


def bitsandbytes_tensors(
    form: str, double_quant: bool = False
) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """A weight as bitsandbytes' layers save it, and its fp32 values."""
    weight = random_weight((24, 128), torch.bfloat16)
    if form == "int8":
        codes, scales, _ = bnb.int8_vectorwise_quant(weight.half())
        parts = {
            NAME: codes,
            NAME.replace("weight", "SCB"): scales,
            NAME + "_format": torch.tensor(0, dtype=torch.uint8),
        }
        return parts, bnb.int8_vectorwise_dequant(codes, scales)
    data, state = bnb.quantize_4bit(weight, blocksize=64, compress_statistics=double_quant, quant_type=form)
    parts = {NAME: data} | {f"{NAME}.{key}": value for key, value in state.as_dict(packed=True).items()}
    state.dtype = torch.float32
    return parts, bnb.dequantize_4bit(data, state)


@pytest.mark.parametrize("form,double_quant", [("nf4", True), ("nf4", False), ("fp4", True), ("int8", False)])
def test_checkpoints_packed_by_bitsandbytes_load_as_they_are(tmp_path, form, double_quant) -> None:
    parts, expected = bitsandbytes_tensors(form, double_quant)
    save_file(parts | {"model.norm.weight": torch.ones(4)}, tmp_path / "model.safetensors")
    with ShardReader(tmp_path) as reader:
        packed = read_bitsandbytes_weight(reader, NAME)
        assert read_bitsandbytes_weight(reader, "model.norm.weight") is None
        assert quantize.bitsandbytes_shape(reader, NAME) == (None if form == "int8" else (24, 128))
    assert packed is not None and packed.packing == Packing(form, double_quant) and packed.shape == (24, 128)
    assert same_bytes(packed.tensors["data"], parts[NAME])
    assert same_bytes(packed.unpack(torch.float32), expected)
    constants = {name for name in parts if quantize.is_bitsandbytes_constant(name)}
    assert constants == set(parts) - {NAME}


def damage_state(parts: dict[str, torch.Tensor], **changes: object) -> None:
    key = f"{NAME}.quant_state.bitsandbytes__nf4"
    state = json.loads(bytes(parts[key].numpy())) | changes
    parts[key] = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)


@pytest.mark.parametrize(
    "damage",
    [
        lambda p: p.pop(f"{NAME}.absmax"),
        lambda p: p.update({NAME: p[NAME][:-1]}),
        lambda p: p.update({f"{NAME}.nested_absmax": torch.ones(7)}),
        lambda p: p.update({f"{NAME}.quant_map": torch.zeros(16)}),
        lambda p: p.update({f"{NAME}.quant_state.bitsandbytes__nf4": torch.ones(9, dtype=torch.uint8)}),
        lambda p: damage_state(p, shape=[24, 64]),
        lambda p: damage_state(p, blocksize=48),
        lambda p: damage_state(p, nested_blocksize=128),
        lambda p: p.pop(f"{NAME}.quant_state.bitsandbytes__nf4"),
    ],
)
def test_damaged_packed_weights_are_refused_by_name(tmp_path: Path, damage) -> None:
    parts, _ = bitsandbytes_tensors("nf4", double_quant=True)
    damage(parts)
    save_file(parts, tmp_path / "model.safetensors")
    with ShardReader(tmp_path) as reader, pytest.raises(BaseModelError, match="up_proj"):
        read_bitsandbytes_weight(reader, NAME)
