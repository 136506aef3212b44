"""Against peft on bitsandbytes' layers (4 bits) or unpacked weights (int8, none): the same gradients."""

from __future__ import annotations

from pathlib import Path

import bitsandbytes as bnb
import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from tiny_models import load_tiny, packed_row, resident_plan, write_checkpoint
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from qlora_train.memory.execution import Activation
from qlora_train.model.attention import NAME
from qlora_train.model.decoder import FrozenDecoder
from qlora_train.model.factors import FactorBuffers
from qlora_train.model.quantize import Packing
from qlora_train.train.walk import LayerWalk

TOLERANCE = 1e-5
RANK, SCALING = 4, 2.0  # as load_tiny has them
PACKINGS = [
    Packing("nf4"),
    Packing("nf4", double_quant=True),
    Packing("fp4"),
    Packing("fp4", double_quant=True),
    Packing("int8"),
    Packing("none"),
]


def packed_by_bitsandbytes(linear: nn.Linear, packing: Packing) -> bnb.nn.Linear4bit:
    """The library's own layer; moving it "to the cpu" makes it quantise its weight."""
    layer = bnb.nn.Linear4bit(
        linear.in_features,
        linear.out_features,
        bias=linear.bias is not None,
        compute_dtype=torch.float32,
        compress_statistics=packing.double_quant,
        quant_type=packing.format,
    )
    layer.weight = bnb.nn.Params4bit(
        linear.weight.data.clone(),
        requires_grad=False,
        compress_statistics=packing.double_quant,
        quant_type=packing.format,
    )
    if linear.bias is not None:
        layer.bias = nn.Parameter(linear.bias.data.clone(), requires_grad=False)
    return layer.to("cpu")


def quantised_model(folder: Path, decoder: FrozenDecoder, packing: Packing) -> PreTrainedModel:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation=NAME).eval()
    for name, frozen in decoder.linears.items():
        linear = model.get_submodule(name)
        if packing.is_4bit:
            layer = packed_by_bitsandbytes(linear, packing)
            data = frozen.source.packed[name].tensors["data"]
            assert torch.equal(layer.weight.data.view(-1), data), f"{name}: not the bytes of bitsandbytes"
            model.set_submodule(name, layer)
        else:
            linear.weight.data = frozen.source.unpack(name, torch.float32).clone()
    return model


def adapted(model: PreTrainedModel, factors: FactorBuffers) -> nn.Module:
    targets = sorted({name.rpartition(".")[2] for name in factors.names})
    config = LoraConfig(r=RANK, lora_alpha=int(SCALING * RANK), target_modules=targets, lora_dropout=0.0)
    wrapped = get_peft_model(model, config)
    for name, (a, b) in factors.views(factors.masters).items():
        layer = wrapped.get_submodule(f"base_model.model.{name}")
        layer.lora_A["default"].weight.data.copy_(a)
        layer.lora_B["default"].weight.data.copy_(b)
    return wrapped


def relative(ours: Tensor, theirs: Tensor) -> float:
    return float((ours - theirs).norm() / theirs.norm())


@pytest.mark.parametrize("family", ["llama", "qwen2"])
@pytest.mark.parametrize("packing", PACKINGS, ids=lambda p: p.format + ("-double" if p.double_quant else ""))
def test_loss_and_gradients_equal_pefts(tmp_path: Path, family: str, packing: Packing) -> None:
    # Widths in whole blocks of 64: otherwise the library's CPU kernel mixes up the blocks' absmax.
    folder = write_checkpoint(tmp_path, family, intermediate_size=128)
    decoder, factors = load_tiny(folder, packing)
    wrapped = adapted(quantised_model(folder, decoder, packing), factors)
    trainable = [name for name, p in wrapped.named_parameters() if p.requires_grad]
    assert len(trainable) == 2 * len(factors.names)

    tokens = packed_row([21, 4, 30])
    logits = wrapped(
        input_ids=tokens.token_ids,
        position_ids=tokens.position_ids,
        documents=tokens.documents,
        use_cache=False,
    ).logits[0]
    loss = F.cross_entropy(
        logits, tokens.labels, ignore_index=-100
    )  # the library's mean over supervised tokens
    loss.backward()

    num_supervised = len(tokens.supervised)
    walk = LayerWalk(decoder, factors, resident_plan(*[Activation.RECOMPUTE] * 3), reference=False)
    loss_sum = walk.accumulate([tokens], seed=0, step=1, num_supervised=num_supervised)
    torch.testing.assert_close(loss_sum / num_supervised, loss.detach(), rtol=TOLERANCE, atol=0)
    for name, (a, b) in factors.views(factors.gradient).items():
        layer = wrapped.get_submodule(f"base_model.model.{name}")
        assert relative(a, layer.lora_A["default"].weight.grad) <= TOLERANCE, name
        assert relative(b, layer.lora_B["default"].weight.grad) <= TOLERANCE, name
