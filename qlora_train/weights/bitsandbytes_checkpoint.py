"""Checkpoints that bitsandbytes has quantized already: their bytes are read unchanged.

Beside a 4-bit weight `X.weight` (uint8 [ceil(n/2), 1], or the same bytes in another dtype) its layers save

    X.weight.absmax, X.weight.quant_map              scales, and the 16 code values
    X.weight.nested_absmax, .nested_quant_map        with double quantization
    X.weight.quant_state.bitsandbytes__nf4           JSON, as uint8: shape, block size, nested_offset

and beside an int8 one `X.SCB` (float32 [out], `row_absmax` here) and `X.weight_format`, 0 for row-major. All
of it is checked against the weight's shape, since dequantizing trusts these sizes and a wrong scale gives a
wrong model.
"""

from __future__ import annotations

import re
from typing import Any, Literal

import torch
from bitsandbytes import functional as bnb
from bitsandbytes.utils import unpack_tensor_to_dict
from torch import Tensor

from qlora_train.errors import BaseModelError
from qlora_train.files.shards import ShardReader
from qlora_train.quant.formats import Quantization
from qlora_train.quant.weight import QuantizedWeight, quantized_layout


def read_bitsandbytes_weight(
    reader: ShardReader, name: str, device: torch.device | str = "cpu"
) -> QuantizedWeight | None:
    """The weight `name` (such as "model.layers.0.mlp.up_proj.weight") if bitsandbytes has already quantized
    it, else None.

    The bytes are unchanged. Raises `BaseModelError` if tensors are missing or do not fit each other.
    """
    form = _form_of(reader, name)
    if form:
        quantized = _read_4bit(reader, name, form)
    elif _scale_name(name) in reader:
        quantized = _read_int8(reader, name)
    elif not reader.info(name).dtype.is_floating_point:
        raise _damaged(
            reader,
            name,
            f"it is {reader.info(name).dtype} but has no bitsandbytes quant_state or SCB beside it",
        )
    else:
        return None
    for key, (dtype, shape) in quantized_layout(
        quantized.quantization, quantized.shape, torch.bfloat16
    ).items():
        tensor = quantized.tensors[key]
        if tensor.dtype != dtype or tensor.shape != shape:
            stored_as = f"{tensor.dtype} {list(tensor.shape)}"
            raise _damaged(
                reader, name, f"its {key} is {stored_as} where the weight's shape needs {dtype} {list(shape)}"
            )
    return quantized.to(device)


def bitsandbytes_quantization(reader: ShardReader, name: str) -> Quantization | None:
    """How bitsandbytes has quantized the weight `name`, without reading the weight; None if it has not."""
    form = _form_of(reader, name)
    if form:
        return _read_state(reader, name, form)[0]
    return Quantization("int8") if _scale_name(name) in reader else None


def bitsandbytes_shape(reader: ShardReader, name: str) -> tuple[int, int] | None:
    """The shape of a weight that bitsandbytes has quantized to 4 bits, without reading the weight;
    else None."""
    form = _form_of(reader, name)
    return _read_state(reader, name, form)[1] if form else None


def is_bitsandbytes_constant(name: str) -> bool:
    """Whether a checkpoint tensor is a quantization constant (scale, code table, ...), not a weight."""
    return (
        re.search(r"\.weight\.(nested_)?(absmax|quant_map|quant_state\.\w+)$|\.(SCB|weight_format)$", name)
        is not None
    )


def _form_of(reader: ShardReader, name: str) -> Literal["nf4", "fp4"] | None:
    forms: tuple[Literal["nf4", "fp4"], ...] = ("nf4", "fp4")
    return next((form for form in forms if f"{name}.quant_state.bitsandbytes__{form}" in reader), None)


def _read_state(
    reader: ShardReader, name: str, form: Literal["nf4", "fp4"]
) -> tuple[Quantization, tuple[int, int], Tensor]:
    """The JSON beside a 4-bit weight: quantization, shape, nested offset."""
    packed = reader.read(f"{name}.quant_state.bitsandbytes__{form}")
    try:
        state: dict[str, Any] = unpack_tensor_to_dict(packed)
        out_features, in_features = (int(size) for size in state["shape"])
        quantization = Quantization(form, "nested_offset" in state, int(state["blocksize"]))
        offset = torch.tensor(float(state.get("nested_offset", 0.0)))
    except (ValueError, TypeError, KeyError, OverflowError) as error:  # the last: an infinite size
        raise _damaged(reader, name, f"its quant_state does not parse ({error!r})") from error
    if (
        quantization.block_size not in (32, 64, 128, 256, 512, 1024, 2048, 4096)
        or state.get("quant_type") != form
        or not torch.isfinite(offset)
    ):
        raise _damaged(reader, name, f"its quant_state says {state}")
    if quantization.double_quant and (state.get("nested_blocksize"), state.get("nested_dtype")) != (
        256,
        "float32",
    ):
        raise _damaged(
            reader, name, f"its quant_state says {state}, where nested blocks of 256 float32 are needed"
        )
    return quantization, (out_features, in_features), offset


def _read_4bit(reader: ShardReader, name: str, form: Literal["nf4", "fp4"]) -> QuantizedWeight:
    quantization, shape, offset = _read_state(reader, name, form)
    code = reader.read(f"{name}.quant_map")
    if code.shape != (16,) or not torch.allclose(code, bnb.get_4bit_type(form, device="cpu"), atol=1e-6):
        raise _damaged(reader, name, f"its quant_map is not the {form} table")
    tensors = {
        "data": reader.read(name).reshape(-1).view(torch.uint8),  # other storage dtypes hold the same bytes
        "absmax": reader.read(f"{name}.absmax"),
    }
    if quantization.double_quant:
        tensors["nested_absmax"] = reader.read(f"{name}.nested_absmax")
        tensors["nested_offset"] = offset
        tensors["nested_code"] = reader.read(f"{name}.nested_quant_map")
    return QuantizedWeight(quantization, shape, tensors)


def _scale_name(name: str) -> str:
    """Name of the row scales of an int8 weight."""
    return name.removesuffix("weight") + "SCB"


def _read_int8(reader: ShardReader, name: str) -> QuantizedWeight:
    format_name = name + "_format"
    if format_name in reader and int(reader.read(format_name)) != 0:
        raise _damaged(
            reader, name, "its weight_format is not row-major, which old GPU-specific checkpoints had"
        )
    info = reader.info(name)
    if len(info.shape) != 2:
        raise _damaged(reader, name, f"it has the shape {list(info.shape)}")
    tensors = {"data": reader.read(name), "row_absmax": reader.read(_scale_name(name)).reshape(-1)}
    return QuantizedWeight(Quantization("int8"), (info.shape[0], info.shape[1]), tensors)


def _damaged(reader: ShardReader, name: str, what: str) -> BaseModelError:
    return BaseModelError(
        f"{reader.folder}: {name} is quantized by bitsandbytes but cannot be used: {what}. "
        "Download the checkpoint again, or use one that is not quantized."
    )
