"""A model's shape: all that the plan needs to know of it. From a config.json, or a table of known models.

No transformers and no torch: a config.json is plain JSON, and the families that the byte model replays
exactly are told apart by a few facts (which norms, which biases, fused or separate linears). For another
LLaMA-class family the same keys give an estimate, and the plan says that it is one; the start-up probe of
`train`, not this table, decides whether a family can be trained.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from qlora_train.errors import UserError

QkNorm = Literal["none", "per_head", "whole"]
EXACT_FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "smollm3", "phi3", "gemma", "granite")
"""Replayed operation by operation and held to the meter by tests."""
_QKV_BIASES = ("qwen2", "starcoder2")
_POST_NORMS = ("gemma2", "gemma3_text", "glm4")
_ONLY_POST_NORMS = ("olmo2", "olmo3", "exaone4")
_QK_NORMS: dict[str, QkNorm] = {
    "qwen3": "per_head",
    "gemma3_text": "per_head",
    "exaone4": "per_head",
    "apertus": "per_head",
    "olmo2": "whole",
    "olmo3": "whole",
}
_FUSED = ("phi3", "glm4")


@dataclass(frozen=True)
class ModelShape:
    """Sizes of a LLaMA-class decoder.

    windows: per layer, how many tokens back a query sees (None: all). num_norms: per layer, over the hidden
    size; only_post_norms: they stand behind attention and MLP, not before. scales_residual: what is added to
    the residual is multiplied by a number. is_fused: one linear for q, k, v and one for gate and up.
    is_exact: the byte model replays this family's operations; otherwise what follows is an estimate.
    """

    model_type: str
    hidden: int
    intermediate: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocabulary: int
    is_tied: bool
    max_positions: int
    windows: tuple[int | None, ...]
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    qk_norm: QkNorm = "none"
    num_norms: int = 2
    only_post_norms: bool = False
    scales_residual: bool = False
    is_fused: bool = False
    is_exact: bool = True

    @property
    def q_width(self) -> int:
        return self.num_heads * self.head_dim

    @property
    def kv_width(self) -> int:
        return self.num_kv_heads * self.head_dim

    def linear_shapes(self) -> dict[str, tuple[int, int]]:
        """Name within a layer -> (out, in)."""
        d, q, kv, i = self.hidden, self.q_width, self.kv_width, self.intermediate
        if self.is_fused:
            return {
                "self_attn.o_proj": (d, q),
                "self_attn.qkv_proj": (q + 2 * kv, d),
                "mlp.gate_up_proj": (2 * i, d),
                "mlp.down_proj": (d, i),
            }
        return {
            "self_attn.q_proj": (q, d),
            "self_attn.k_proj": (kv, d),
            "self_attn.v_proj": (kv, d),
            "self_attn.o_proj": (d, q),
            "mlp.gate_proj": (i, d),
            "mlp.up_proj": (i, d),
            "mlp.down_proj": (d, i),
        }

    @property
    def layer_parameters(self) -> int:
        """Numbers in the linears of one layer."""
        return sum(rows * columns for rows, columns in self.linear_shapes().values())

    @property
    def matrix_parameters(self) -> int:
        """Numbers in the embedding, which is also the head's size."""
        return self.vocabulary * self.hidden

    @property
    def plain_parameters(self) -> int:
        """Numbers in norms and biases, of all layers and the final norm."""
        norms = self.num_norms * self.hidden
        norms += {"none": 0, "per_head": 2 * self.head_dim, "whole": self.q_width + self.kv_width}[
            self.qk_norm
        ]
        biases = self.qkv_bias * (self.q_width + 2 * self.kv_width) + self.output_bias * self.hidden
        biases += self.mlp_bias * (2 * self.intermediate + self.hidden)
        return self.num_layers * (norms + biases) + self.hidden

    @property
    def num_parameters(self) -> int:
        num_matrices = 1 if self.is_tied else 2
        return (
            self.num_layers * self.layer_parameters
            + num_matrices * self.matrix_parameters
            + self.plain_parameters
        )


def shape_from_config(values: Mapping[str, Any], where: str = "config.json") -> ModelShape:
    """The shape that a config.json tells. Raises `UserError`, saying `where`, if it lacks a size."""
    family = str(values.get("model_type", ""))
    try:
        hidden, num_heads = int(values["hidden_size"]), int(values["num_attention_heads"])
        num_layers = int(values["num_hidden_layers"])
        shape = ModelShape(
            model_type=family,
            hidden=hidden,
            intermediate=int(values["intermediate_size"]),
            num_layers=num_layers,
            num_heads=num_heads,
            num_kv_heads=int(values.get("num_key_value_heads") or num_heads),
            head_dim=int(values.get("head_dim") or _default_head_dim(family, hidden, num_heads)),
            vocabulary=int(values["vocab_size"]),
            is_tied=bool(values.get("tie_word_embeddings", _tied_by_default(family))),
            max_positions=int(values.get("max_position_embeddings", 2048)),
            windows=_windows(family, values, num_layers),
        )
    except (KeyError, TypeError, ValueError, ZeroDivisionError) as error:
        raise UserError(
            f"{where}: cannot be planned with: {error!r}. It must be the config.json of a LLaMA-class model "
            "(hidden_size, intermediate_size, num_hidden_layers, num_attention_heads, vocab_size)."
        ) from error
    bias = bool(values.get("attention_bias", False))
    return replace(
        shape,
        qkv_bias=bias or family in _QKV_BIASES,
        output_bias=bias and family not in _QKV_BIASES,
        mlp_bias=bool(values.get("mlp_bias", False)),
        qk_norm=_QK_NORMS.get(family, "none"),
        num_norms=4 if family in _POST_NORMS else 2,
        only_post_norms=family in _ONLY_POST_NORMS,
        scales_residual=family == "granite",
        is_fused=family in _FUSED,
        is_exact=family in EXACT_FAMILIES,
    )


def _default_head_dim(family: str, hidden: int, num_heads: int) -> int:
    return {"qwen3": 128, "gemma": 256, "gemma2": 256, "gemma3_text": 256}.get(family, hidden // num_heads)


def _tied_by_default(family: str) -> bool:
    return family.startswith(("gemma", "smollm3"))


def _windows(family: str, values: Mapping[str, Any], num_layers: int) -> tuple[int | None, ...]:
    """The sliding window of every layer."""
    window = values.get("sliding_window")
    if window is None or (family in ("qwen2", "qwen3") and not values.get("use_sliding_window", False)):
        return (None,) * num_layers
    kinds = values.get("layer_types")
    if kinds is not None:
        return tuple(int(window) if kind == "sliding_attention" else None for kind in kinds)
    full_below = int(values.get("max_window_layers", 0)) if family in ("qwen2", "qwen3") else 0
    return tuple(int(window) if i >= full_below else None for i in range(num_layers))


def find_shape(base: str, revision: str | None = None) -> ModelShape:
    """The shape of `model.base`: of a folder's config.json, of a hub snapshot that is already here, or of a
    known model. Raises `UserError` where none of them is."""
    folder = Path(base)
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise UserError(
                f"{folder}: no config.json. model.base must be a folder with config.json and safetensors "
                "weights (for a plan the config.json alone is enough)."
            )
        return _read(folder / "config.json")
    cached = _cached_config(base, revision)
    if cached is not None:
        return _read(cached)
    known = known_shape(base)
    if known is None:
        raise UserError(
            f"model.base: {base} is neither a folder, nor in the hub cache, nor one of the known models "
            f"({', '.join(KNOWN)}). Make a folder with its config.json and plan with model.base=FOLDER."
        )
    return known


def _read(config: Path) -> ModelShape:
    try:
        values = json.loads(config.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(
            f"{config}: is not JSON ({error}). Download the model's config.json again."
        ) from error
    if not isinstance(values, dict):
        raise UserError(f"{config}: is not the config.json of a model.")
    return shape_from_config(values, str(config))


def _cached_config(base: str, revision: str | None) -> Path | None:
    """config.json of the snapshot that the hub's own cache holds of `base`, if it does."""
    home = os.environ.get("HF_HOME") or Path.home() / ".cache" / "huggingface"
    hub = Path(os.environ.get("HF_HUB_CACHE") or Path(home) / "hub")
    folder = hub / f"models--{base.replace('/', '--')}"
    reference = folder / "refs" / (revision or "main")
    commit = reference.read_text().strip() if reference.is_file() else (revision or "")
    config = folder / "snapshots" / commit / "config.json"
    return config if commit and config.is_file() else None


def known_shape(base: str) -> ModelShape | None:
    """The shape of a known model by its hub id, whoever hosts it, base or instruct; None if it is none."""
    name = base.rpartition("/")[2].lower()
    name = re.sub(r"^meta-", "", name)
    name = re.sub(r"-(instruct|chat|base|hf|it|unsloth|bnb|4bit|coder|math|\d{4})(?=-|$)", "", name)
    name = re.sub(r"^(tinyllama-1\.1b)-.*", r"\1", name)
    return KNOWN.get(name)


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
    head_dim: int | None = None,
    tied: bool = False,
    window: int | None = None,
) -> ModelShape:
    return shape_from_config(
        {
            "model_type": family,
            "hidden_size": hidden,
            "intermediate_size": intermediate,
            "num_hidden_layers": num_layers,
            "num_attention_heads": num_heads,
            "num_key_value_heads": num_kv_heads,
            "head_dim": head_dim,
            "vocab_size": vocabulary,
            "max_position_embeddings": max_positions,
            "tie_word_embeddings": tied,
            "sliding_window": window,
        }
    )


_LLAMA_8B = (4096, 14336, 32, 32, 8, 128256)
_LLAMA_70B = (8192, 28672, 80, 64, 8, 128256)
KNOWN: dict[str, ModelShape] = {
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
    "tinyllama-1.1b": _known("llama", 2048, 5632, 22, 32, 4, 32000, 2048),
    "smollm2-135m": _known("llama", 576, 1536, 30, 9, 3, 49152, 8192, tied=True),
    "smollm2-360m": _known("llama", 960, 2560, 32, 15, 5, 49152, 8192, tied=True),
    "smollm2-1.7b": _known("llama", 2048, 8192, 24, 32, 32, 49152, 8192, tied=True),
}
"""Hub name without organisation and without what marks a chat variant, in small letters."""
