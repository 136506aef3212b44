"""Against peft on bitsandbytes' layers (4 bits) or dequantized weights (int8, none): the same gradients."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from tiny_models import (
    EXPERT_FAMILIES,
    VOCABULARY_SIZE,
    load_tiny,
    packed_row,
    resident_plan,
    write_checkpoint,
)
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from qlora_train.adapter.adapter_config import within_layer
from qlora_train.adapter.expert_parameters import stored_paths
from qlora_train.adapter.lora_targets import choose_targets
from qlora_train.model.attention import NAME
from qlora_train.model.decoder import FrozenDecoder
from qlora_train.model.lora_parameters import LoraParameters
from qlora_train.quant.formats import Quantization
from qlora_train.recipe import LoraSection
from qlora_train.walk.layer_walk import LayerWalk
from qlora_train.weights.execution_plan import ActivationPolicy

TOLERANCE = 1e-5
LENGTHS = [21, 4, 30]
RANK, SCALING = 4, 2.0  # as load_tiny has them
QUANTIZATIONS = [
    Quantization("nf4"),
    Quantization("nf4", double_quant=True),
    Quantization("fp4"),
    Quantization("fp4", double_quant=True),
    Quantization("int8"),
    Quantization("none"),
]


def quantized_by_bitsandbytes(linear: nn.Linear, quantization: Quantization) -> bnb.nn.Linear4bit:
    """The library's own layer; moving it "to the cpu" makes it quantize its weight."""
    layer = bnb.nn.Linear4bit(
        linear.in_features,
        linear.out_features,
        bias=linear.bias is not None,
        compute_dtype=torch.float32,
        compress_statistics=quantization.double_quant,
        quant_type=quantization.format,
    )
    layer.weight = bnb.nn.Params4bit(
        linear.weight.data.clone(),
        requires_grad=False,
        compress_statistics=quantization.double_quant,
        quant_type=quantization.format,
    )
    if linear.bias is not None:
        layer.bias = nn.Parameter(linear.bias.data.clone(), requires_grad=False)
    return layer.to("cpu")


def quantised_model(folder: Path, decoder: FrozenDecoder, quantization: Quantization) -> PreTrainedModel:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation=NAME).eval()
    for name, frozen in decoder.linears.items():
        linear = model.get_submodule(name)
        if quantization.is_4bit:
            layer = quantized_by_bitsandbytes(linear, quantization)
            data = frozen.source.quantized[name].tensors["data"]
            assert torch.equal(layer.weight.data.view(-1), data), f"{name}: not the bytes of bitsandbytes"
            model.set_submodule(name, layer)
        else:
            linear.weight.data = frozen.source.dequantize(name, torch.float32).clone()
    return model


def adapted(model: PreTrainedModel, lora: LoraParameters) -> nn.Module:
    targets = sorted({name.rpartition(".")[2] for name in lora.names})
    config = LoraConfig(r=RANK, lora_alpha=int(SCALING * RANK), target_modules=targets, lora_dropout=0.0)
    wrapped = get_peft_model(model, config)
    for name, (a, b) in lora.views(lora.masters).items():
        layer = wrapped.get_submodule(f"base_model.model.{name}")
        layer.lora_A["default"].weight.data.copy_(a)
        layer.lora_B["default"].weight.data.copy_(b)
    return wrapped


def relative(ours: Tensor, theirs: Tensor) -> float:
    difference = float((ours - theirs).norm())
    return difference and difference / float(theirs.norm())


@pytest.mark.parametrize("family", ["llama", "qwen2"])
@pytest.mark.parametrize(
    "quantization", QUANTIZATIONS, ids=lambda p: p.format + ("-double" if p.double_quant else "")
)
def test_loss_and_gradients_equal_pefts(tmp_path: Path, family: str, quantization: Quantization) -> None:
    # Widths in whole blocks of 64: otherwise the library's CPU kernel mixes up the blocks' absmax.
    folder = write_checkpoint(tmp_path, family, intermediate_size=128)
    decoder, lora = load_tiny(folder, quantization)
    wrapped = adapted(quantised_model(folder, decoder, quantization), lora)
    check_one_step(decoder, lora, wrapped)


CHOICES: dict[str, dict[str, Any]] = {
    "ranks": {
        "target_modules": r".*_proj",
        "exclude_modules": ["layers.2.mlp.down_proj", "o_proj"],
        "rank_pattern": {r"layers\.1\..*(q|gate)_proj": 8, "v_proj": 2, "k_proj": 2, "q_proj": 2},
        "alpha_pattern": {"up_proj": 3, r"layers\.0\..*": 20},
    },
    "rank stabilized, some layers": {
        "target_modules": ["q_proj", "k_proj", "v_proj", "up_proj"],
        "layers_to_transform": (0, 2),
        "rank_pattern": {"k_proj": 9},
        "use_rslora": True,
    },
}


@pytest.mark.parametrize("reference", [False, True], ids=["fused", "reference"])
@pytest.mark.parametrize("name", CHOICES)
def test_a_mix_of_ranks_gives_pefts_gradients(tmp_path: Path, name: str, reference: bool) -> None:
    """q, k and v have one rank in some layers, where their A are stacked, and several ranks in others."""
    keys, quantization = CHOICES[name], Quantization("nf4")
    folder = write_checkpoint(tmp_path, "llama", intermediate_size=128)
    decoder, _ = load_tiny(folder, quantization)
    for linear in decoder.linears.values():
        linear.lora = None
    section = LoraSection(rank=RANK, alpha=6, **keys)
    config = LoraConfig(r=RANK, lora_alpha=6, init_lora_weights=False, **keys)
    wrapped = get_peft_model(quantised_model(folder, decoder, quantization), config)
    chosen = choose_targets(section, decoder.linears)
    root = 0.5 if section.use_rslora else 1
    lora = LoraParameters(
        {path: decoder.linears[path] for path in chosen},
        rank={path: target.rank for path, target in chosen.items()},
        scaling={path: target.alpha / target.rank**root for path, target in chosen.items()},
        dropout=0.0, seed=0, dtype=torch.float32, device="cpu",
    )  # fmt: skip
    assert len(set(lora.ranks.values())) > 1
    for path, (a, b) in lora.views(lora.masters).items():
        layer = wrapped.get_submodule(f"base_model.model.{path}")
        a.copy_(layer.lora_A["default"].weight.data)
        b.copy_(layer.lora_B["default"].weight.data)
    if not reference:
        decoder.fuse(norms=True, mlps=True, qkv=True)
    check_one_step(decoder, lora, wrapped, reference=reference)


def check_one_step(
    decoder: FrozenDecoder,
    lora: LoraParameters,
    wrapped: nn.Module,
    *,
    reference: bool = False,
    policy: ActivationPolicy = ActivationPolicy.RECOMPUTE,
    apart: bool = False,
    tolerance: float = TOLERANCE,
    vocabulary: int = VOCABULARY_SIZE,
) -> None:
    """Loss and gradients of one step are those of PEFT's model with the same LoRA parameters. apart: that
    runs each document alone."""
    trainable = [name for name, p in wrapped.named_parameters() if p.requires_grad]
    assert len(trainable) == sum(map(len, lora.views(lora.masters).values()))
    wrapped.zero_grad()
    lora.gradient.zero_()
    tokens = packed_row(LENGTHS, vocabulary=vocabulary)
    if apart:
        parts = tokens.token_ids.split(LENGTHS, dim=1)
        logits = torch.cat([wrapped(input_ids=ids, use_cache=False).logits[0] for ids in parts])
    else:
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
    walk = LayerWalk(decoder, lora, resident_plan(*[policy] * len(decoder.layers)), reference=reference)
    loss_sum = walk.accumulate([tokens], seed=0, step=1, num_supervised=num_supervised)
    torch.testing.assert_close(loss_sum / num_supervised, loss.detach(), rtol=TOLERANCE, atol=0)
    for name, tensors in lora.views(lora.gradient).items():
        for ours, theirs in zip(tensors, weights_of(layer_of(wrapped, decoder, name)), strict=True):
            assert relative(ours, theirs.grad) <= tolerance, name


def layer_of(wrapped: nn.Module, decoder: FrozenDecoder, name: str) -> nn.Module:
    """PEFT's layer with the LoRA parameters of this name."""
    experts = stored_paths(path for path in decoder.stacks if decoder.stacks[path].lora is not None)
    return wrapped.get_submodule(f"base_model.model.{experts.get(name, name)}")


def weights_of(layer: nn.Module) -> list[Tensor]:
    """A, B and, with DoRA, m of PEFT's linear, or the bias of B; the rows of an embedding or head."""
    if hasattr(layer, "token_adapter"):
        return [layer.token_adapter.trainable_tokens_delta["default"]]
    parts = [layer.lora_A, layer.lora_B, layer.lora_magnitude_vector]
    bias = layer.lora_B["default"].bias
    return [part["default"].weight for part in parts if part] + ([] if bias is None else [bias])


@pytest.mark.parametrize("reference", [False, True], ids=["fused", "reference"])
@pytest.mark.parametrize("policy", [ActivationPolicy.KEEP, ActivationPolicy.RECOMPUTE])
@pytest.mark.parametrize("quantization", [Quantization("nf4"), Quantization("none")], ids=str)
@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_dora_is_pefts_for_two_steps(
    tmp_path: Path, family: str, quantization: Quantization, policy: ActivationPolicy, reference: bool
) -> None:
    """m begins as PEFT's; loss and gradients are PEFT's, also after large steps, with other row norms."""
    folder = write_checkpoint(tmp_path, family, intermediate_size=128)
    decoder, _ = load_tiny(folder, quantization)
    config = LoraConfig(r=RANK, lora_alpha=int(SCALING * RANK), target_modules="all-linear", use_dora=True)
    wrapped = get_peft_model(quantised_model(folder, decoder, quantization), config)
    lora = LoraParameters(
        decoder.linears, rank=RANK, scaling=SCALING, dropout=0.0, seed=0, dtype=torch.float32, device="cpu",
        use_dora=True,
    )  # fmt: skip
    if not reference:
        decoder.fuse(norms=True, mlps=True, qkv=True)
    layers = {name: wrapped.get_submodule(f"base_model.model.{name}") for name in lora.names}
    for name, (a, *_) in lora.views(lora.masters).items():
        layers[name].lora_A["default"].weight.data.copy_(a)
    check_one_step(decoder, lora, wrapped, reference=reference, policy=policy)
    for name, (_, _, m) in lora.views(lora.masters).items():
        torch.testing.assert_close(m, weights_of(layers[name])[2].data, rtol=1e-6, atol=0)
    generator = torch.Generator().manual_seed(7)
    for _ in range(2):
        for name, tensors in lora.views(lora.masters).items():
            for ours, theirs in zip(tensors, weights_of(layers[name]), strict=True):
                change = 0.1 * torch.randn(ours.shape, generator=generator)
                ours.add_(change)
                theirs.data.add_(change)
        lora.refresh_working()
        check_one_step(decoder, lora, wrapped, reference=reference, policy=policy)


CHOSEN: dict[str, dict[str, Any]] = {
    "experts alone": {"target_modules": []},
    "beside attention, rank stabilized": {
        "target_modules": ["q_proj", "v_proj"],
        "rank_pattern": {r"layers\.1\..*experts.*": 5, "experts.down_proj": 2, "v_proj": 3},
        "alpha_pattern": {"experts.gate_up_proj": 3},
        "use_rslora": True,
    },
}


@pytest.mark.parametrize("reference", [False, True], ids=["fused", "reference"])
@pytest.mark.parametrize("policy", [ActivationPolicy.KEEP, ActivationPolicy.RECOMPUTE])
@pytest.mark.parametrize(
    ("family", "name"),
    [
        (family, "experts alone")
        for family in (*EXPERT_FAMILIES, "nemotron_h", "lfm2_moe", "gemma4_text+experts", "qwen3_5_moe_text")
    ]
    + [(family, "beside attention, rank stabilized") for family in ("qwen3_moe", "mixtral", "gpt_oss")],
)
def test_lora_on_experts_is_pefts(
    tmp_path: Path, family: str, name: str, policy: ActivationPolicy, reference: bool
) -> None:
    """No number of experts is a rank: an order of ranks and experts that is not PEFT's would not pass.
    (Gemma-4's gradients of linears are as far apart as those of its experts.)"""
    folder, keys = write_checkpoint(tmp_path, family), CHOSEN[name]
    decoder, _ = load_tiny(folder, Quantization("none"))
    for linear in decoder.linears.values():
        linear.lora = None
    parameters = sorted({within_layer(path) for path in decoder.stacks})
    section = LoraSection(rank=RANK, alpha=6, target_parameters=tuple(parameters), **keys)
    chosen = choose_targets(section, decoder.linears, decoder.stacks)
    root = 0.5 if section.use_rslora else 1
    lora = LoraParameters(
        {path: decoder.adaptable[path] for path in chosen},
        rank={path: target.rank for path, target in chosen.items()},
        scaling={path: target.alpha / target.rank**root for path, target in chosen.items()},
        dropout=0.0, seed=0, dtype=torch.float32, device="cpu",
    )  # fmt: skip
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager", experts_implementation="eager"
    ).eval()
    config = LoraConfig(r=RANK, lora_alpha=6, init_lora_weights=False, target_parameters=parameters, **keys)
    wrapped = get_peft_model(model, config)
    for path, pair in lora.views(lora.masters).items():
        for ours, theirs in zip(pair, weights_of(layer_of(wrapped, decoder, path)), strict=True):
            ours.copy_(theirs.data)
    if not reference:
        decoder.fuse(norms=True, mlps=True, qkv=True)
    check_one_step(
        decoder,
        lora,
        wrapped,
        reference=reference,
        policy=policy,
        apart=True,
        tolerance=3e-5 if "gemma4" in family else TOLERANCE,
    )


@pytest.mark.parametrize("reference", [False, True], ids=["fused", "reference"])
@pytest.mark.parametrize("policy", [ActivationPolicy.KEEP, ActivationPolicy.RECOMPUTE])
@pytest.mark.parametrize("family", ["llama", "llama-tied", "gemma", "granite"])
def test_rows_of_tokens_have_pefts_gradients(
    tmp_path: Path, family: str, policy: ActivationPolicy, reference: bool
) -> None:
    """Also where the family scales its embedding (gemma, granite) or its logits (granite)."""
    quantization = Quantization("nf4")
    ids = (5, 79, 80, VOCABULARY_SIZE, VOCABULARY_SIZE + 1)  # in several tiles of the head, and new ones
    folder = write_checkpoint(tmp_path, family, intermediate_size=128)
    decoder, lora = load_tiny(folder, quantization, token_ids=ids)
    model = quantised_model(folder, decoder, quantization)
    model.resize_token_embeddings(VOCABULARY_SIZE + 2, mean_resizing=False)
    config = LoraConfig(
        r=RANK,
        lora_alpha=int(SCALING * RANK),
        target_modules=sorted({name.rpartition(".")[2] for name in lora.names}),
        trainable_token_indices={path: list(ids) for path in decoder.matrix_paths},
    )
    wrapped = get_peft_model(model, config)
    for path, tensors in lora.views(lora.masters).items():
        layer = wrapped.get_submodule(f"base_model.model.{path}")
        for ours, theirs in zip(tensors, weights_of(layer), strict=True):
            theirs.data.copy_(ours)
    if not reference:
        decoder.fuse(norms=True, mlps=True, qkv=True)
    check_one_step(decoder, lora, wrapped, reference=reference, policy=policy, vocabulary=VOCABULARY_SIZE + 2)


@pytest.mark.parametrize("reference", [False, True], ids=["fused", "reference"])
@pytest.mark.parametrize("policy", [ActivationPolicy.KEEP, ActivationPolicy.RECOMPUTE])
@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_the_bias_of_b_is_pefts(
    tmp_path: Path, family: str, policy: ActivationPolicy, reference: bool
) -> None:
    folder = write_checkpoint(tmp_path, family, intermediate_size=128)
    decoder, _ = load_tiny(folder, Quantization("nf4"))
    config = LoraConfig(r=RANK, lora_alpha=int(SCALING * RANK), target_modules="all-linear", lora_bias=True)
    wrapped = get_peft_model(quantised_model(folder, decoder, Quantization("nf4")), config)
    lora = LoraParameters(
        decoder.linears, rank=RANK, scaling=SCALING, dropout=0.0, seed=0, dtype=torch.float32, device="cpu",
        lora_bias=True,
    )  # fmt: skip
    if not reference:
        decoder.fuse(norms=True, mlps=True, qkv=True)
    generator = torch.Generator().manual_seed(7)
    for name, (_, b, bias) in lora.views(lora.masters).items():
        assert not b.any() and not bias.any()
        layer = wrapped.get_submodule(f"base_model.model.{name}")
        for ours, theirs in zip(lora.views(lora.masters)[name], weights_of(layer), strict=True):
            ours.copy_(0.1 * torch.randn(ours.shape, generator=generator))
            theirs.data.copy_(ours)
    lora.refresh_working()
    check_one_step(decoder, lora, wrapped, reference=reference, policy=policy)
