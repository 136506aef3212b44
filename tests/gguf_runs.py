"""Runs on tiny models of the families that llama.cpp has, to be exported as GGUF files."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from gguf_tokenizers import byte_level_bpe
from mxfp4_bases import write_mxfp4_base
from tiny_models import random_model, tiny_config
from tiny_runs import recipe_values, write_recipe, write_rows
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from qlora_train.adapter.adapter_config import AdapterConfig, name_parameters
from qlora_train.adapter.adapter_files import save_adapter
from qlora_train.model.base import MetaModel
from qlora_train.model.expert_lora import expert_stacks

CHATS = [
    {
        "messages": [
            {"role": "user", "content": f"Add {i} and 1."},
            {"role": "assistant", "content": str(i + 1)},
        ]
    }
    for i in range(30)
]
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 16}
TOKEN_IDS = [(7 * i) % 90 + 3 for i in range(40)]  # beyond windows of 8, original contexts of 16
GEMMA2 = {"head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 8}
_GEMMA4 = {
    "num_hidden_layers": 4,
    "global_head_dim": 32,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
}
_CAPS = {"attn_logit_softcapping": 1.0, "final_logit_softcapping": 2.0}  # that bite in a tiny model
_OLMO3 = {
    "sliding_window": 8,
    "num_hidden_layers": 4,
    "rope_parameters": {
        "full_attention": YARN | {"attention_factor": 1 + 0.1 * math.log(4.0)},
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
    },
}
_MINISTRAL3 = {"mscale": 1.0, "mscale_all_dim": 1.0, "llama_4_scaling_beta": 0.1}
# Rounding does not change which are chosen, and rows are a multiple of a block.
_EVERY_EXPERT = {"norm_topk_prob": True, "num_experts_per_tok": 10, "moe_intermediate_size": 64}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama with biases, tied": (
        "llama",
        {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True},
    ),
    "llama 3": ("llama3-rope", {"head_dim": 24}),
    "linear rope": ("llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}}),
    "mistral": ("mistral", {"sliding_window": 64}),
    "smollm3": ("smollm3", {"num_hidden_layers": 4, "no_rope_layers": [1, 1, 1, 0]}),
    "qwen2": ("qwen2", {}),
    "qwen2 yarn": ("qwen2", {"rope_parameters": YARN}),
    "qwen3": ("qwen3", {"tie_word_embeddings": True}),
    "phi3": ("phi3", {}),
    "olmo2": ("olmo2", {}),
    "olmo3": ("olmo3", _OLMO3),
    "arcee": ("arcee", {}),
    "ernie4_5": ("ernie4_5", {}),
    "exaone4": ("exaone4", {"sliding_window": None, "layer_types": ["full_attention"] * 3}),
    "ministral": ("ministral", {"sliding_window": 64, "head_dim": 16}),
    "ministral3": ("ministral3", {"rope_parameters": YARN | _MINISTRAL3, "head_dim": 24}),
    "glm": ("glm", {"head_dim": 16, "attention_bias": True}),
    "glm4": ("glm4", {"head_dim": 16, "attention_bias": True}),
    "seed_oss": ("seed_oss", {}),
    "granite": ("granite", {}),
    "gemma": ("gemma", {"tie_word_embeddings": True}),
    "gemma2": ("gemma2", GEMMA2 | {"tie_word_embeddings": True} | _CAPS),
    "gemma4": ("gemma4_text", _GEMMA4 | {"tie_word_embeddings": True, "final_logit_softcapping": 2.0}),
    "gemma4 with experts": ("gemma4_text+experts", _GEMMA4),
    "gemma4, every expert": (
        "gemma4_text+experts",
        _GEMMA4 | {"top_k_experts": 6, "moe_intermediate_size": 64, "intermediate_size": 96},
    ),
    "gpt_oss, every expert": (
        "gpt_oss",
        {"rope_parameters": YARN, "num_experts_per_tok": 6, "intermediate_size": 96},
    ),
    "gpt_oss": ("gpt_oss", {"rope_parameters": YARN}),
    "qwen2_moe": ("qwen2_moe", {}),
    "qwen3_moe, every expert": ("qwen3_moe", _EVERY_EXPERT),
    "qwen3_moe": ("qwen3_moe", {"norm_topk_prob": True}),
    "olmoe": ("olmoe", {"num_key_value_heads": 4}),
    "mixtral": ("mixtral", {"sliding_window": None}),
    "gemma3": ("gemma3_text", GEMMA2 | {"num_hidden_layers": 7, "tie_word_embeddings": True}),
}


def write_run(
    folder: Path,
    family: str = "llama",
    tokenizer: PreTrainedTokenizerFast | None = None,
    rows: list[dict[str, Any]] = CHATS,
    data: dict[str, Any] | None = None,
    quantization: str = "none",
    save_original_format: bool = True,
    in_mxfp4: bool = False,
    trained: str = "",
    **changes: Any,
) -> Path:
    """A base with a tokenizer, data, and an adapter on all linears and experts, or on those whose path ends
    with `trained`. in_mxfp4: experts of gpt_oss are stored so."""
    tokenizer = tokenizer or byte_level_bpe()
    model = random_model(tiny_config(family, vocab_size=len(tokenizer) + 3, **changes))
    for name, buffer in model.named_buffers():
        if "layer_scalar" in name:
            buffer.fill_(0.7)
    if in_mxfp4:
        write_mxfp4_base(folder / "base", **model.config.to_diff_dict())
    else:
        model.save_pretrained(folder / "base", save_original_format=save_original_format)
    tokenizer.save_pretrained(folder / "base")
    write_rows(folder / "rows.jsonl", rows)
    run = folder / "run"
    run.mkdir()
    sections = {"data": {"eval": 0.5} | (data or {}), "model": {"quantization": quantization}}
    values = recipe_values(folder / "base", folder / "rows.jsonl", run, **sections)
    write_recipe(run / "recipe.yaml", values)
    generator = torch.Generator().manual_seed(2)
    lora = {
        name: (
            torch.randn(4, module.in_features, generator=generator) * 0.1,
            torch.randn(module.out_features, 4, generator=generator) * 0.1,
        )
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and "layers" in name and name.endswith(trained)
    }
    existing = expert_stacks(MetaModel(model.config, torch.float32).model)
    stacks = {path: stack for path, stack in existing.items() if path.endswith(trained)}
    for path, stack in stacks.items():
        num_rows = stack.num_matrices * 4
        lora[path] = (
            torch.randn(num_rows, stack.in_features, generator=generator) * 0.1,
            torch.randn(stack.out_features, num_rows, generator=generator) * 0.1,
        )
    config = AdapterConfig("base", 4, 8, target_parameters=name_parameters(stacks, existing))
    save_adapter(run / "adapter", config, lora)
    return run


def log_probabilities(folder: Path, **options: Any) -> Tensor:
    """transformers' own, of the token after `TOKEN_IDS`."""
    model = AutoModelForCausalLM.from_pretrained(folder, **options).eval()
    with torch.no_grad():
        return torch.log_softmax(model(torch.tensor([TOKEN_IDS])).logits[0, -1].float(), -1)
