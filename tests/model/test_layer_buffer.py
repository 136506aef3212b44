"""Slabs: where each tensor lies, and that the views are the quantized tensors."""

from __future__ import annotations

import pytest
import torch
from tiny_models import NF4, tiny_config
from torch import Tensor

from qlora_train.model.base import MetaModel
from qlora_train.model.layer_buffer import ALIGNMENT_BYTES, LayerBufferLayout, aligned
from qlora_train.quant.formats import Quantization
from qlora_train.quant.quantize import quantize
from qlora_train.quant.weight import quantized_layout

QUANTIZATIONS = [
    NF4,
    Quantization("nf4"),
    Quantization("fp4", True, 128),
    Quantization("int8"),
    Quantization("none"),
]
DTYPES = [torch.float32, torch.bfloat16]
SHAPES = {"self_attn.q_proj": (13, 130), "mlp.up_proj": (1, 1), "mlp.down_proj": (300, 70), "tiny": (3, 7)}


def weight_of(name: str) -> Tensor:
    return torch.randn(SHAPES[name], generator=torch.Generator().manual_seed(len(name)))


def same_bytes(left: Tensor, right: Tensor) -> bool:
    left, right = left.reshape(-1), right.reshape(-1)
    return left.dtype == right.dtype and torch.equal(left.view(torch.uint8), right.view(torch.uint8))


def filled(layout: LayerBufferLayout, layer_buffer: Tensor, dtype: torch.dtype) -> None:
    for name, weight in layout.weights(layer_buffer).items():
        quantize([weight_of(name)], weight.shape, layout.quantization, "cpu", dtype, name, out=weight.tensors)


def test_alignment() -> None:
    sizes = [0, 1, 63, 64, 65, 1000]
    assert [aligned(size) for size in sizes] == [0, 64, 64, 64, 128, 1024]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("quantization", QUANTIZATIONS, ids=str)
def test_every_tensor_has_its_own_aligned_place(quantization: Quantization, dtype: torch.dtype) -> None:
    layout = LayerBufferLayout.of(SHAPES, quantization, dtype)
    expected = [
        (weight, tensor, *place)
        for weight, shape in SHAPES.items()
        for tensor, place in quantized_layout(quantization, shape, dtype).items()
    ]
    assert [(e.weight, e.tensor, e.dtype, e.shape) for e in layout.entries] == expected
    end = 0
    for entry in layout.entries:
        assert entry.offset_bytes % ALIGNMENT_BYTES == 0
        assert 0 <= entry.offset_bytes - end < ALIGNMENT_BYTES  # nothing overlaps, little is lost
        end = entry.offset_bytes + entry.num_bytes
        assert entry.num_bytes == torch.empty(entry.shape, dtype=entry.dtype).nbytes
    assert 0 <= layout.num_bytes - end < ALIGNMENT_BYTES and layout.num_bytes % ALIGNMENT_BYTES == 0


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("quantization", QUANTIZATIONS, ids=str)
@pytest.mark.parametrize("spare_bytes", [0, 1, 777])
def test_the_views_are_the_quantized_weights(
    quantization: Quantization, dtype: torch.dtype, spare_bytes: int
) -> None:
    layout = LayerBufferLayout.of(SHAPES, quantization, dtype)
    layer_buffer = torch.full((layout.num_bytes + spare_bytes,), 0xFF, dtype=torch.uint8)
    filled(layout, layer_buffer, dtype)
    assert bool((layer_buffer[layout.num_bytes :] == 0xFF).all())
    moved = layer_buffer[: layout.num_bytes].clone()  # one copy moves a layer
    weights = layout.weights(moved)
    assert list(weights) == list(SHAPES)
    for name, ours in weights.items():
        expected = quantize([weight_of(name)], SHAPES[name], quantization, dtype=dtype)
        assert (ours.quantization, ours.shape) == (quantization, SHAPES[name])
        assert ours.num_bytes == expected.num_bytes and list(ours.tensors) == list(expected.tensors)
        for key, tensor in expected.tensors.items():
            assert ours.tensors[key].shape == tensor.shape and same_bytes(ours.tensors[key], tensor)
            assert ours.tensors[key].untyped_storage().data_ptr() == moved.data_ptr()
        assert torch.equal(ours.dequantize(dtype), expected.dequantize(dtype))


def test_views_follow_what_the_buffer_holds() -> None:
    """A slot is used again for the next layer; views made once show it."""
    layout = LayerBufferLayout.of(SHAPES, NF4, torch.float32)
    first = torch.zeros(layout.num_bytes, dtype=torch.uint8)
    filled(layout, first, torch.float32)
    slot = torch.full((layout.num_bytes + 64,), 0xFF, dtype=torch.uint8)
    weights = layout.weights(slot)
    assert weights["tiny"].dequantize(torch.float32).isnan().any()
    slot[: layout.num_bytes] = first
    expected = layout.weights(first)
    for name, weight in weights.items():
        assert torch.equal(weight.dequantize(torch.float32), expected[name].dequantize(torch.float32))


@pytest.mark.parametrize(
    "layer_buffer", [torch.zeros(3, dtype=torch.uint8), torch.zeros(10**6)], ids=["short", "float"]
)
def test_a_slab_that_is_none(layer_buffer: Tensor) -> None:
    with pytest.raises(AssertionError):
        LayerBufferLayout.of(SHAPES, NF4, torch.float32).weights(layer_buffer)


def test_equal_shapes_have_equal_layouts() -> None:
    one = LayerBufferLayout.of(SHAPES, NF4, torch.float32)
    assert one == LayerBufferLayout.of(dict(SHAPES), NF4, torch.float32)
    assert hash(one) == hash(LayerBufferLayout.of(dict(SHAPES), NF4, torch.float32))
    others = [
        LayerBufferLayout.of(SHAPES, Quantization("nf4"), torch.float32),
        LayerBufferLayout.of(SHAPES | {"tiny": (7, 3)}, NF4, torch.float32),  # the same bytes, transposed
        LayerBufferLayout.of(dict(reversed(SHAPES.items())), NF4, torch.float32),
        LayerBufferLayout.of({f"x.{name}": shape for name, shape in SHAPES.items()}, NF4, torch.float32),
    ]
    assert len({one, *others}) == 1 + len(others)


@pytest.mark.parametrize("quantization", QUANTIZATIONS, ids=str)
def test_layers_of_a_model_share_one_layout(quantization: Quantization) -> None:
    meta_model = MetaModel(tiny_config("llama"), torch.bfloat16)
    layouts = meta_model.layouts(quantization)
    assert len(layouts) == 3 and all(layout is layouts[0] for layout in layouts)
    assert dict(layouts[0].shapes) == dict(meta_model.layer_shapes(0).items())


def test_layers_of_unequal_shapes_do_not() -> None:
    meta_model = MetaModel(tiny_config("llama"), torch.bfloat16)
    meta_model.model.get_submodule(f"{meta_model.layer_paths[1]}.mlp.up_proj").out_features = 111
    first, second, third = meta_model.layouts(NF4)
    assert first is third and second != first
    assert dict(second.shapes)["mlp.up_proj"] == (111, 64)
