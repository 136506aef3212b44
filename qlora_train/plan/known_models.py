"""Sizes of known models, as in their config.json: for plans before anything is downloaded."""

from __future__ import annotations

from typing import Any

PUBLISHERS = frozenset(
    {
        "allenai",
        "google",
        "huggingfacetb",
        "meta-llama",
        "microsoft",
        "mistralai",
        "openai",
        "qwen",
        "tinyllama",
    }
    | {"unsloth"}  # copies of these under the same names
)
"""Organisations on the hub, in small letters, whose models of these names have these sizes."""


def _known(
    family: str,
    hidden: int,
    intermediate: int,
    num_layers: int,
    num_heads: int,
    num_kv_heads: int,
    vocabulary: int,
    max_positions: int,
    *,
    tied: bool = False,
    window: int | None = None,
    **others: Any,
) -> dict[str, Any]:
    """The values of config.json that decide sizes. window: of sliding attention, in tokens."""
    return {
        "model_type": family,
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": num_layers,
        "num_attention_heads": num_heads,
        "num_key_value_heads": num_kv_heads,
        "vocab_size": vocabulary,
        "max_position_embeddings": max_positions,
        "tie_word_embeddings": tied,
        "sliding_window": window,
    } | others


_LLAMA_8B = (4096, 14336, 32, 32, 8, 128256)
_GEMMA_3: Any = {"tied": True, "head_dim": 256}
_GEMMA_4: Any = _GEMMA_3 | {
    "window": 1024,
    "global_head_dim": 512,
    "attention_k_eq_v": True,
    "hidden_size_per_layer_input": 0,
}
_LLAMA_70B = (8192, 28672, 80, 64, 8, 128256)
KNOWN: dict[str, dict[str, Any]] = {
    "llama-2-7b": _known("llama", 4096, 11008, 32, 32, 32, 32000, 4096),
    "llama-2-13b": _known("llama", 5120, 13824, 40, 40, 40, 32000, 4096),
    "llama-2-70b": _known("llama", 8192, 28672, 80, 64, 8, 32000, 4096),
    "llama-3-8b": _known("llama", *_LLAMA_8B, 8192),
    "llama-3-70b": _known("llama", *_LLAMA_70B, 8192),
    "llama-3.1-8b": _known("llama", *_LLAMA_8B, 131072),
    "llama-3.1-70b": _known("llama", *_LLAMA_70B, 131072),
    "llama-3.1-405b": _known("llama", 16384, 53248, 126, 128, 8, 128256, 131072),
    "llama-3.2-1b": _known("llama", 2048, 8192, 16, 32, 8, 128256, 131072, tied=True),
    "llama-3.2-3b": _known("llama", 3072, 8192, 28, 24, 8, 128256, 131072, tied=True),
    "llama-3.3-70b": _known("llama", *_LLAMA_70B, 131072),
    "mistral-7b-v0.1": _known("mistral", 4096, 14336, 32, 32, 8, 32000, 32768, window=4096),
    "mistral-7b-v0.2": _known("mistral", 4096, 14336, 32, 32, 8, 32000, 32768),
    "mistral-7b-v0.3": _known("mistral", 4096, 14336, 32, 32, 8, 32768, 32768),
    "mistral-nemo": _known("mistral", 5120, 14336, 40, 32, 8, 131072, 131072, head_dim=128),
    "mistral-small-24b": _known("mistral", 5120, 32768, 40, 32, 8, 131072, 32768, head_dim=128),
    "qwen2.5-0.5b": _known("qwen2", 896, 4864, 24, 14, 2, 151936, 32768, tied=True),
    "qwen2.5-1.5b": _known("qwen2", 1536, 8960, 28, 12, 2, 151936, 131072, tied=True),
    "qwen2.5-3b": _known("qwen2", 2048, 11008, 36, 16, 2, 151936, 32768, tied=True),
    "qwen2.5-7b": _known("qwen2", 3584, 18944, 28, 28, 4, 152064, 131072),
    "qwen2.5-14b": _known("qwen2", 5120, 13824, 48, 40, 8, 152064, 131072),
    "qwen2.5-32b": _known("qwen2", 5120, 27648, 64, 40, 8, 152064, 131072),
    "qwen2.5-72b": _known("qwen2", 8192, 29568, 80, 64, 8, 152064, 131072),
    "qwen3-0.6b": _known("qwen3", 1024, 3072, 28, 16, 8, 151936, 40960, tied=True),
    "qwen3-1.7b": _known("qwen3", 2048, 6144, 28, 16, 8, 151936, 40960, tied=True),
    "qwen3-4b": _known("qwen3", 2560, 9728, 36, 32, 8, 151936, 40960, tied=True),
    "qwen3-8b": _known("qwen3", 4096, 12288, 36, 32, 8, 151936, 40960),
    "qwen3-14b": _known("qwen3", 5120, 17408, 40, 40, 8, 151936, 40960),
    "qwen3-32b": _known("qwen3", 5120, 25600, 64, 64, 8, 151936, 40960),
    "qwen3-30b-a3b": _known(
        "qwen3_moe",
        2048,
        6144,
        48,
        32,
        4,
        151936,
        40960,
        head_dim=128,
        num_experts=128,
        num_experts_per_tok=8,
        moe_intermediate_size=768,
    ),  # fmt: skip
    "gpt-oss-20b": _known(
        "gpt_oss",
        2880,
        2880,
        24,
        64,
        8,
        201088,
        131072,
        window=128,
        head_dim=64,
        num_local_experts=32,
        num_experts_per_tok=4,
        quantization_config={"quant_method": "mxfp4"},
    ),  # fmt: skip
    "gemma-3-1b": _known("gemma3_text", 1152, 6912, 26, 4, 1, 262144, 32768, window=512, **_GEMMA_3),
    "gemma-3-4b": _known("gemma3_text", 2560, 10240, 34, 8, 4, 262208, 131072, window=1024, **_GEMMA_3),
    "gemma-3-12b": _known("gemma3_text", 3840, 15360, 48, 16, 8, 262208, 131072, window=1024, **_GEMMA_3),
    "gemma-3-27b": _known(
        "gemma3_text", 5376, 21504, 62, 32, 16, 262208, 131072, window=1024, tied=True, head_dim=128
    ),
    "gemma-4-26b-a4b": _known(
        "gemma4_text",
        2816,
        2112,
        30,
        16,
        8,
        262144,
        262144,
        num_global_key_value_heads=2,
        enable_moe_block=True,
        num_experts=128,
        top_k_experts=8,
        moe_intermediate_size=704,
        **_GEMMA_4,
    ),  # fmt: skip
    "gemma-4-31b": _known(
        "gemma4_text", 5376, 21504, 60, 32, 16, 262144, 262144, num_global_key_value_heads=4, **_GEMMA_4
    ),
    "phi-4": _known("phi3", 5120, 17920, 40, 40, 10, 100352, 16384),
    "mixtral-8x7b-v0.1": _known(
        "mixtral", 4096, 14336, 32, 32, 8, 32000, 32768, num_local_experts=8, num_experts_per_tok=2
    ),
    "olmoe-1b-7b-0924": _known(
        "olmoe", 2048, 1024, 16, 16, 16, 50304, 4096, num_experts=64, num_experts_per_tok=8
    ),
    "tinyllama-1.1b": _known("llama", 2048, 5632, 22, 32, 4, 32000, 2048),
    "smollm3-3b": _known("smollm3", 2048, 11008, 36, 16, 4, 128256, 65536, tied=True),
    "smollm2-135m": _known("llama", 576, 1536, 30, 9, 3, 49152, 8192, tied=True),
    "smollm2-360m": _known("llama", 960, 2560, 32, 15, 5, 49152, 8192, tied=True),
    "smollm2-1.7b": _known("llama", 2048, 8192, 24, 32, 32, 49152, 8192, tied=True),
}
"""Config by hub name, without organisation and marks of chat variants, in small letters (`known_name`). Of
models of text and vision the language model, which is what is trained."""
