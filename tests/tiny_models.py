"""Tiny random checkpoints and packed rows for tests, from transformers' own configs: no downloads."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel

from qlora_train.device.compute import THE_CPU
from qlora_train.micro_batch import MicroBatch
from qlora_train.model.attention import NAME
from qlora_train.model.base import read_config
from qlora_train.model.decoder import FrozenDecoder
from qlora_train.model.lora_parameters import LoraParameters
from qlora_train.model.packed_tokens import PackedTokens
from qlora_train.model.probe import probe
from qlora_train.quant.formats import Quantization
from qlora_train.weights.execution_plan import ActivationPolicy, ExecutionPlan, everything_resident
from qlora_train.weights.load import load_base

VOCABULARY_SIZE = 96
NF4 = Quantization("nf4", double_quant=True)

_LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}

# What each family is tested with beyond the common sizes; the comment says what it brings.
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),  # untied
    "llama-tied": ("llama", {"tie_word_embeddings": True}),
    "llama3-rope": (
        "llama",
        {"rope_parameters": _LLAMA3_ROPE, "max_position_embeddings": 128},
    ),  # rows of 48 > 16
    "mistral": ("mistral", {"sliding_window": 8}),  # documents 3x the window and more
    "qwen2": ("qwen2", {}),  # biases on q, k, v
    "qwen2-window": ("qwen2", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}),
    "qwen3": ("qwen3", {"head_dim": 24}),  # q and k norms, heads wider than hidden / heads
    "phi3": ("phi3", {"sliding_window": None}),  # fused qkv and gate_up
    "gemma": ("gemma", {"head_dim": 16}),  # scaled embedding, GeGLU, norms of 1 + w
    "smollm3": ("smollm3", {"no_rope_layers": [1, 0, 1]}),  # a layer without rotary embedding
    "granite": (
        "granite",
        {
            "embedding_multiplier": 3.0,
            "attention_multiplier": 0.2,
            "residual_multiplier": 0.4,
            "logits_scaling": 2.5,
        },
    ),
}

_SMALL_EXPERTS: dict[str, Any] = {"num_experts_per_tok": 2, "moe_intermediate_size": 48}
_LATENT: dict[str, Any] = {
    "q_lora_rank": 32, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 16, "v_head_dim": 16,
    "num_key_value_heads": 4,
}  # fmt: skip
# Mixtures of experts; the numbers of experts are no rank of any test.
EXPERT_FAMILIES: dict[str, dict[str, Any]] = {
    "qwen3_moe": {"num_experts": 10, "head_dim": 16} | _SMALL_EXPERTS,
    "qwen2_moe": {"num_experts": 10, "shared_expert_intermediate_size": 48} | _SMALL_EXPERTS,
    "mixtral": {"num_local_experts": 6},  # w1, w2, w3 on disk
    "olmoe": {"num_experts": 10, "num_experts_per_tok": 3},
    "glm4_moe": {"n_routed_experts": 10, "head_dim": 16, "first_k_dense_replace": 1} | _SMALL_EXPERTS,
    "glm4_moe_lite": {"n_routed_experts": 10} | _LATENT | _SMALL_EXPERTS,
    "deepseek_v3": {"n_routed_experts": 16, "n_group": 4, "topk_group": 2, "first_k_dense_replace": 1}
    | _LATENT
    | _SMALL_EXPERTS,  # a correction of the router that is a buffer
    "ernie4_5_moe": {"moe_num_experts": 10, "moe_k": 3, "moe_intermediate_size": 48},
    "gpt_oss": {
        "num_local_experts": 6,
        "num_experts_per_tok": 3,
        "head_dim": 16,
        "sliding_window": 8,
    },  # sinks
    "granitemoe": {"num_local_experts": 6, "num_experts_per_tok": 3},
    "minimax_m2": {"num_local_experts": 6, "num_experts_per_tok": 3, "head_dim": 16, "rotary_dim": 8},
}

_GATED_DELTA: dict[str, Any] = {
    "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 16,
    "linear_value_head_dim": 16, "head_dim": 16, "layer_types": ["linear_attention", "full_attention"] * 2,
    "num_hidden_layers": 4,
}  # fmt: skip
_MOE = {"num_experts": 6, "shared_expert_intermediate_size": 48} | _SMALL_EXPERTS
# Layers with a memory, and Gemma-4, whose layers have heads of two sizes.
HYBRID_FAMILIES: dict[str, dict[str, Any]] = {
    "qwen3_5_text": _GATED_DELTA,
    "qwen3_5_moe_text": _GATED_DELTA | _MOE,
    "qwen3_next": _GATED_DELTA | _MOE,
    "lfm2": {"layer_types": ["conv", "full_attention", "conv"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention", "conv"], "num_dense_layers": 1} | _MOE,
    "granitemoehybrid": {
        "layer_types": ["mamba", "attention", "mamba"], "num_local_experts": 6, "num_experts_per_tok": 2,
        "mamba_n_heads": 4, "mamba_d_head": 32, "mamba_d_state": 16,
    },
    "nemotron_h": {
        "layers_block_type": ["mamba", "attention", "moe"], "mamba_num_heads": 4, "mamba_head_dim": 16,
        "ssm_state_size": 16, "n_groups": 2, "n_routed_experts": 6, "moe_intermediate_size": 48,
        "head_dim": 16,
    },
    "gemma4_text": {"hidden_size_per_layer_input": 0, "head_dim": 16, "sliding_window": 8},
    "gemma4_text+experts": {
        "hidden_size_per_layer_input": 0, "head_dim": 16, "sliding_window": 8, "enable_moe_block": True,
        "num_experts": 6, "top_k_experts": 2, "moe_intermediate_size": 48,
        "num_global_key_value_heads": 1, "attention_k_eq_v": True,  # as 26B-A4B: layers differ in their heads
    },
}  # fmt: skip
OTHER_FAMILIES = EXPERT_FAMILIES | HYBRID_FAMILIES


def tiny_config(family: str, **changes: Any) -> Any:
    """A 3-layer config of a family in FAMILIES (or any model type of transformers; `type+variant`)."""
    model_type, extra = FAMILIES.get(family, (family.partition("+")[0], OTHER_FAMILIES.get(family, {})))
    options: dict[str, Any] = {
        "vocab_size": VOCABULARY_SIZE,
        "hidden_size": 64,
        "intermediate_size": 112,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "tie_word_embeddings": False,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    return CONFIG_MAPPING[model_type](**(options | extra | changes))


def random_model(config: Any, seed: int = 0) -> PreTrainedModel:
    """A model of this config in fp32 with random weights, random norm weights and random biases."""
    torch.manual_seed(seed)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    for name, parameter in model.named_parameters():
        with torch.no_grad():
            if parameter.dim() == 1:
                parameter.normal_(1.0 if "norm" in name else 0.0, 0.2)
            else:
                parameter.normal_(0.0, 0.08)
    return model


def write_checkpoint(folder: Path, family: str = "llama", seed: int = 0, **changes: Any) -> Path:
    """Save a tiny random model of the family as fp32 safetensors."""
    random_model(tiny_config(family, **changes), seed).save_pretrained(folder)
    return folder


def quantize_with_head(plain: Path, folder: Path, quantization: Quantization) -> Path:
    """Let transformers and bitsandbytes quantize the checkpoint `plain`, its head too, into `folder`."""
    kinds: dict[str, Any] = {"load_in_8bit": True}
    if quantization.is_4bit:
        kinds = {
            "load_in_4bit": True,
            "bnb_4bit_quant_type": quantization.format,
            "bnb_4bit_use_double_quant": quantization.double_quant,
        }
    asked = BitsAndBytesConfig(llm_int8_skip_modules=["nothing"], **kinds)
    model = AutoModelForCausalLM.from_pretrained(
        plain, quantization_config=asked, dtype=torch.float32, device_map="cpu"
    )
    model.save_pretrained(folder)
    return folder


def load_tiny(
    folder: Path,
    quantization: Quantization = NF4,
    dtype: torch.dtype = torch.float32,
    *,
    rank: int = 4,
    dropout: float = 0.0,
    seed: int = 0,
    plan: ExecutionPlan | None = None,
    use_dora: bool = False,
    experts: bool = False,
    token_ids: tuple[int, ...] = (),
) -> tuple[FrozenDecoder, LoraParameters]:
    """Load a checkpoint with random factors (B too, so that every gradient is non-zero) on all linears, and
    on experts if asked for, and random rows of the tokens `token_ids`."""
    decoder = load_base(folder, quantization, dtype, THE_CPU, plan=plan, poison=True)
    decoder.skippable = _skippable(str(folder))
    lora = LoraParameters(
        decoder.adaptable if experts else decoder.linears, rank=rank, scaling=2.0, dropout=dropout,
        seed=seed, dtype=dtype, device="cpu", use_dora=use_dora,
        token_rows={path: torch.zeros(len(token_ids), decoder.config.hidden_size)
                    for path in decoder.matrix_paths if token_ids},
    )  # fmt: skip
    if token_ids:
        rows = (lora.token_rows(flat) for flat in (lora.working, lora.gradient))
        decoder.set_token_rows(token_ids, *rows)
    generator = torch.Generator().manual_seed(seed + 1)
    factors = lora.masters[: len(lora.masters) - len(lora.row_norms)]
    factors.copy_(0.1 * torch.randn(factors.shape, generator=generator))
    lora.refresh_working()
    return decoder, lora


@cache
def _skippable(folder: str) -> tuple[str, ...]:
    return probe(read_config(Path(folder))).skippable


def resident_plan(*activations: ActivationPolicy, **changes: Any) -> ExecutionPlan:
    """Everything on the device, several tiles and blocks in the loss; one policy per layer."""
    plan = everything_resident(len(activations))
    return replace(plan, **({"activations": activations, "loss_tokens": 16, "head_tile_rows": 40} | changes))


def packed_row(
    lengths: list[int],
    seed: int = 0,
    first_row: int = 0,
    unsupervised: int = 2,
    vocabulary: int = VOCABULARY_SIZE,
) -> PackedTokens:
    """Random documents of these lengths in one row; the first `unsupervised` tokens of each are a prompt."""
    rng = np.random.default_rng(seed)
    total = sum(lengths)
    token_ids = rng.integers(3, vocabulary, total)
    labels = np.full(total, -100)
    start = 0
    for length in lengths:
        first_label = start + min(unsupervised, length - 1)
        labels[first_label : start + length - 1] = token_ids[first_label + 1 : start + length]
        start += length
    return PackedTokens.from_host(
        MicroBatch(
            token_ids=token_ids,
            position_ids=np.concatenate([np.arange(n) for n in lengths]),
            labels=labels,
            cu_seqlens=np.cumsum([0, *lengths]),
            row_ids=np.full(total, first_row),
            token_offsets=np.arange(total),
        ),
        "cpu",
    )


class DequantizedLinear(nn.Linear):
    """nn.Linear plus LoRA in plain autograd: y = x W^T + b + s (x A^T) B^T, the yardstick of the parity
    tests."""

    a: nn.Parameter
    b: nn.Parameter
    scaling: float

    def forward(self, x: Tensor) -> Tensor:
        y = nn.functional.linear(x, self.weight, self.bias)
        return y + nn.functional.linear(nn.functional.linear(x, self.a), self.b) * self.scaling


def library_model(
    folder: Path, decoder: FrozenDecoder, lora: LoraParameters, dtype: torch.dtype, attention: str = NAME
) -> PreTrainedModel:
    """transformers' own model of the checkpoint, with the dequantized weights and the factors of `decoder` in
    plain linears; what bitsandbytes has quantized besides, it dequantizes."""
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, attn_implementation=attention, device_map="cpu"
    )
    if hasattr(model, "hf_quantizer"):
        model.dequantize()
        for parameter in model.parameters():  # the library leaves the others as they are stored
            parameter.data = parameter.data.to(dtype)
    model.eval().requires_grad_(False)
    working = lora.views(lora.working)
    for name, frozen in decoder.linears.items():
        linear = model.get_submodule(name)
        assert isinstance(linear, nn.Linear)
        linear.weight.data = frozen.source.dequantize(name, dtype).clone()
        if name in working:
            linear.__class__ = DequantizedLinear
            assert isinstance(linear, DequantizedLinear)
            linear.a = nn.Parameter(working[name][0].clone())
            linear.b = nn.Parameter(working[name][1].clone())
            linear.scaling = lora.scaling
    return model


def autograd_gradients(
    model: nn.Module, lora: LoraParameters, tokens: PackedTokens, num_supervised: int
) -> tuple[Tensor, dict[str, tuple[Tensor, Tensor]]]:
    """Loss sum and factor gradients by one graph through the whole library model."""
    for parameter in model.parameters():
        parameter.grad = None
    logits = model(
        input_ids=tokens.token_ids,
        position_ids=tokens.position_ids,
        documents=tokens.documents,
        use_cache=False,
    ).logits
    loss_sum = F.cross_entropy(logits[0].float(), tokens.labels, ignore_index=-100, reduction="sum")
    (loss_sum / num_supervised).backward()
    pairs = {
        name: (model.get_submodule(name).a.grad, model.get_submodule(name).b.grad) for name in lora.names
    }
    return loss_sum.detach(), pairs


def flat(gradients: dict[str, tuple[Tensor, Tensor]]) -> Tensor:
    return torch.cat([part.flatten() for pair in gradients.values() for part in pair])
