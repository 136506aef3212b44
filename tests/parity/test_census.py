"""What is trainable, what has which dtype, and that training never touches a quantized byte."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
import torch
from tiny_models import load_tiny, packed_row, resident_plan, write_checkpoint
from torch import Tensor, nn

from qlora_train.device.compute import THE_CPU
from qlora_train.model.decoder import FrozenDecoder
from qlora_train.model.linear import LinearLora
from qlora_train.quant.formats import Quantization
from qlora_train.walk.layer_walk import LayerWalk
from qlora_train.walk.optimizer import FlatOptimizer
from qlora_train.weights.execution_plan import ActivationPolicy

QUANTIZATIONS = [
    Quantization("nf4", double_quant=True),
    Quantization("fp4"),
    Quantization("int8"),
    Quantization("none"),
]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def modules(decoder: FrozenDecoder) -> nn.ModuleList:
    """Everything the computation consists of."""
    return nn.ModuleList([decoder._causal_lm, decoder._decoder, *decoder.layers, decoder.norm])


def quantized_tensors(decoder: FrozenDecoder) -> dict[str, Tensor]:
    quantized = next(iter(decoder.linears.values())).source.quantized
    return {f"{name}.{key}": t for name, weight in quantized.items() for key, t in weight.tensors.items()}


def sha256(tensors: dict[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(name.encode())
        digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "gemma"])
def test_exactly_the_factors_are_trainable(tmp_path: Path, family: str) -> None:
    decoder, lora = load_tiny(write_checkpoint(tmp_path, family))
    parameters = {id(p): p for p in modules(decoder).parameters()}
    trainable = {key for key, p in parameters.items() if p.requires_grad}
    attached = [m for m in modules(decoder).modules() if isinstance(m, LinearLora)]
    assert trainable == {id(p) for m in attached for p in (m.A, m.B)}
    assert len(attached) == len(decoder.linears) == len(lora.names) == 3 * 7
    num_trainable = sum(parameters[key].numel() for key in trainable)
    assert num_trainable == lora.masters.numel()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("quantization", QUANTIZATIONS, ids=lambda p: p.format)
def test_every_tensor_has_the_dtype_of_the_design(
    tmp_path: Path, quantization: Quantization, dtype: torch.dtype
) -> None:
    decoder, lora = load_tiny(write_checkpoint(tmp_path, "qwen2"), quantization, dtype)
    whole = modules(decoder)
    frozen = {name: p for name, p in whole.named_parameters() if not p.requires_grad}
    kinds = {name.rpartition(".")[0].rpartition(".")[2] for name in frozen}
    assert kinds >= {"embed_tokens", "input_layernorm", "post_attention_layernorm", "q_proj"}
    assert decoder.embedding.weight.dtype == decoder.head.weight.dtype == dtype
    assert decoder.embedding.weight.shape == (96, 64)
    assert not any(name.endswith("proj.weight") for name in frozen)  # quantized weights are not parameters
    assert {p.dtype for p in frozen.values()} == {dtype}
    buffers = dict(whole.named_buffers())
    assert any("inv_freq" in name for name in buffers)
    assert {b.dtype for b in buffers.values()} == {torch.float32}
    assert {m.A.dtype for m in whole.modules() if isinstance(m, LinearLora)} == {dtype}
    assert lora.working.dtype == dtype
    assert lora.masters.dtype == lora.gradient.dtype == torch.float32

    data = {"nf4": torch.uint8, "fp4": torch.uint8, "int8": torch.int8, "none": dtype}[quantization.format]
    absmax = torch.uint8 if quantization.double_quant else torch.float32
    for name, tensor in quantized_tensors(decoder).items():
        key = name.rpartition(".")[2]
        assert tensor.dtype == {"data": data, "absmax": absmax}.get(key, torch.float32), name
        assert not tensor.requires_grad and not isinstance(tensor, nn.Parameter), name


@pytest.mark.parametrize("optimizer_name", ["adamw", "paged_adamw_8bit"])
@pytest.mark.parametrize("quantization", QUANTIZATIONS, ids=lambda p: p.format)
def test_training_changes_the_factors_and_nothing_else(
    tmp_path: Path, quantization: Quantization, optimizer_name: str
) -> None:
    decoder, lora = load_tiny(write_checkpoint(tmp_path, "qwen2"), quantization, torch.bfloat16, dropout=0.1)
    frozen = {name: p for name, p in modules(decoder).named_parameters() if not p.requires_grad}
    rest = frozen | dict(modules(decoder).named_buffers())
    quantized_before, rest_before = sha256(quantized_tensors(decoder)), sha256(rest)
    masters_before = lora.masters.clone()

    optimizer = FlatOptimizer(optimizer_name, lora, THE_CPU, lora_b_lr_ratio=1.0, weight_decay=0.0)
    policy = (ActivationPolicy.RECOMPUTE, ActivationPolicy.KEEP, ActivationPolicy.RECOMPUTE)
    walk = LayerWalk(decoder, lora, resident_plan(*policy), reference=False)
    tokens = packed_row([21, 30, 4])
    losses = []
    for step in range(1, 4):
        lora.gradient.zero_()
        losses.append(walk.accumulate([tokens], seed=0, step=step, num_supervised=len(tokens.supervised)))
        optimizer.step(2e-2)

    assert losses[-1] < losses[0]
    assert (lora.masters != masters_before).float().mean() > 0.99
    assert torch.equal(lora.working, lora.masters.to(torch.bfloat16))
    assert sha256(quantized_tensors(decoder)) == quantized_before
    assert sha256(rest) == rest_before


@pytest.mark.parametrize("tied", [True, False])
def test_a_tied_matrix_exists_once(tmp_path: Path, tied: bool) -> None:
    decoder, _ = load_tiny(write_checkpoint(tmp_path, "llama", tie_word_embeddings=tied))
    assert (decoder.head is decoder.embedding) is tied
    shape = decoder.head.weight.shape
    assert not any(p.shape == shape for p in modules(decoder).parameters())  # no other copy
