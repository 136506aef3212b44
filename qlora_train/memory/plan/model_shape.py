"""A model's shape: all that the plan needs to know of it. From a config.json, or a table of known models.

No transformers and no torch: a config.json is plain JSON, and what a family's code adds to it is a table
(families.py). For a family that is not in it the same keys give an estimate, and the plan says that it is
one; the start-up probe of `train`, not this table, decides whether a family can be trained.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from qlora_train.errors import UserError
from qlora_train.memory.plan.families import FAMILIES, UNKNOWN, Bias, Family
from qlora_train.memory.plan.packed_sizes import BLOCK_SIZE, Format
from qlora_train.model.base_folder import read_plain_config

_MAX_SIZE = 2**31 - 1  # what kernels can index
_MAX_LAYERS = 10_000  # each gets a line in the plan


@dataclass(frozen=True)
class ModelShape:
    """Sizes of a LLaMA-class decoder.

    family: what its code adds. windows: per layer, how many tokens back a query sees (None: all). has_silu:
    the MLP's activation is SiLU. has_softcap: attention scores are capped with tanh. num_logit_steps: what
    is done to logits one after another: 1 for a scale, 3 for a cap. head_format: how the checkpoint has
    packed the head. The rest is what the config says, or the family where it says nothing.
    """

    model_type: str
    family: Family
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
    has_silu: bool = True
    has_softcap: bool = False
    num_logit_steps: int = 0
    head_format: Format = "none"

    @property
    def is_known(self) -> bool:
        """Names and shapes of its linears are those of the model."""
        return self.model_type in FAMILIES

    @property
    def is_exact(self) -> bool:
        """The byte model replays this family's operations; otherwise what follows is an estimate."""
        return self.family.is_exact

    @property
    def norms_transposed_heads(self) -> bool:
        """Queries and keys go through norms when heads are outside tokens."""
        return self.family.fuses_norms and self.family.qk_norm in ("per_transposed_head", "per_rotated_head")

    @property
    def q_width(self) -> int:
        return self.num_heads * self.head_dim

    @property
    def kv_width(self) -> int:
        return self.num_kv_heads * self.head_dim

    def linear_shapes(self) -> dict[str, tuple[int, int]]:
        """Name within a layer -> (out, in)."""
        d, q, kv, i = self.hidden, self.q_width, self.kv_width, self.intermediate
        shapes = {"self_attn.q_proj": (q, d), "self_attn.k_proj": (kv, d), "self_attn.v_proj": (kv, d)}
        if self.family.fuses_qkv:
            shapes = {"self_attn.qkv_proj": (q + 2 * kv, d)}
        shapes["self_attn.o_proj"] = (d, d if self.family.square_output else q)
        *inner, down = self.family.mlp
        width = 2 * i if self.family.fuses_gate else i
        return shapes | {f"mlp.{name}": (width, d) for name in inner} | {f"mlp.{down}": (d, i)}

    @property
    def tail_name(self) -> str:
        """The linear that a layer runs last."""
        return f"mlp.{self.family.mlp[-1]}"

    @property
    def may_skip_tail(self) -> bool:
        """Its output goes straight into the residual sum: recomputation need not know its value."""
        return not self.family.only_post_norms and self.family.num_norms <= 2

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
        norm = self.family.norm_weights * self.hidden
        per_layer = self.family.num_norms * norm + self.family.activation_numbers
        qk_norm = {"none": 0, "whole": self.q_width + self.kv_width}
        per_layer += qk_norm.get(self.family.qk_norm, 2 * self.head_dim)
        per_layer += self.qkv_bias * (self.q_width + 2 * self.kv_width) + self.output_bias * self.hidden
        num_inner = (len(self.family.mlp) - 1) * (2 if self.family.fuses_gate else 1)
        per_layer += self.mlp_bias * (num_inner * self.intermediate + self.hidden)
        return self.num_layers * per_layer + norm

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
    model_type = str(values.get("model_type", ""))
    family = _as_configured(FAMILIES.get(model_type, UNKNOWN), values)
    try:
        hidden, num_heads = _size(values, "hidden_size"), _size(values, "num_attention_heads")
        num_layers = _size(values, "num_hidden_layers", most=_MAX_LAYERS)
        is_tied = bool(values.get("tie_word_embeddings", family.is_tied))
        return ModelShape(
            model_type=model_type,
            family=family,
            hidden=hidden,
            intermediate=_size(values, "intermediate_size"),
            num_layers=num_layers,
            num_heads=num_heads,
            num_kv_heads=_size(values, "num_key_value_heads", family.kv_heads or num_heads, null=num_heads),
            head_dim=_size(
                values, "head_dim", family.head_dim or hidden // num_heads, null=hidden // num_heads
            ),
            vocabulary=_size(values, "vocab_size"),
            is_tied=is_tied,
            max_positions=_size(values, "max_position_embeddings", 2048),
            windows=_windows(family, values, num_layers),
            qkv_bias=_bias(family.qkv_bias, values),
            output_bias=_bias(family.output_bias, values),
            mlp_bias=_bias(family.mlp_bias, values),
            has_silu=_activation(family, values) in ("silu", "swish"),
            has_softcap=values.get("attn_logit_softcapping", family.caps_scores or None) is not None,
            num_logit_steps=_num_logit_steps(family, values),
            head_format="none" if is_tied else _head_format(values.get("quantization_config"), hidden),
        )
    except (KeyError, TypeError, ValueError, ArithmeticError) as error:
        raise UserError(
            f"{where}: cannot be planned with: {error!r}. It must be the config.json of a LLaMA-class model "
            "(hidden_size, intermediate_size, num_hidden_layers, num_attention_heads, vocab_size)."
        ) from error


def _size(
    values: Mapping[str, Any],
    key: str,
    absent: int | None = None,
    *,
    null: int | None = None,
    most: int = _MAX_SIZE,
) -> int:
    """A size of the config: `absent` where the key is missing, `null` where it says nothing. Raises KeyError
    where it is missing and must not be, ValueError for what is no size."""
    value = values[key] if absent is None else values.get(key, absent)
    value = null if value is None else value
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= most:
        raise ValueError(f"{key} must be a whole number from 1 to {most:,}, not {str(value)[:40]}")
    return value


def _as_configured(family: Family, values: Mapping[str, Any]) -> Family:
    """Rare options that are counted, but not replayed."""
    if values.get("use_qk_norm"):  # cohere
        return replace(family, qk_norm="per_head", is_exact=False)
    return replace(family, is_exact=False) if values.get("clip_qkv") is not None else family  # olmo


def _bias(rule: Bias, values: Mapping[str, Any]) -> bool:
    return rule if isinstance(rule, bool) else bool(values.get(*rule))


def _num_logit_steps(family: Family, values: Mapping[str, Any]) -> int:
    if values.get("final_logit_softcapping", family.caps_scores or None) is not None:
        return 3
    return int(family.scales_logits)


def _activation(family: Family, values: Mapping[str, Any]) -> str:
    """Some families call the key otherwise."""
    return values.get("hidden_activation") or values.get("hidden_act") or family.activation


def _head_format(stored: Mapping[str, Any] | None, hidden: int) -> Format:
    """How a checkpoint with this quantization_config stores the rows of an untied head. bitsandbytes leaves
    the head unpacked unless told what else to skip; 4-bit rows that are not whole blocks are unpacked at
    load."""
    if stored and not isinstance(stored, Mapping):
        raise TypeError("quantization_config is no mapping")
    skipped = (stored or {}).get("llm_int8_skip_modules")
    if not stored or skipped is None or any("lm_head".endswith(str(name)) for name in skipped):
        return "none"
    if stored.get("load_in_8bit"):
        return "int8"
    if not stored.get("load_in_4bit") or hidden % BLOCK_SIZE:
        return "none"
    return "nf4" if stored.get("bnb_4bit_quant_type") == "nf4" else "fp4"


def _windows(family: Family, values: Mapping[str, Any], num_layers: int) -> tuple[int | None, ...]:
    """The sliding window of every layer."""
    window = values.get("sliding_window", family.window)
    asked = family.windows in ("all", "listed") or bool(values.get("use_sliding_window"))
    if family.windows == "none" or window is None or not asked:
        return (None,) * num_layers
    kinds = values.get("layer_types")
    if family.windows == "all":
        slides = [True] * num_layers
    elif kinds is not None:
        slides = [kind == "sliding_attention" for kind in kinds]
    elif family.windows == "after":
        slides = [i >= int(values.get("max_window_layers", 28)) for i in range(num_layers)]
    elif family.windows == "without_rope":
        slides = [not has_rope for has_rope in _ropes(values, num_layers)]
    else:
        pattern = values.get("sliding_window_pattern") if family.reads_pattern else None
        every = pattern or family.full_every
        slides = [every is None or (i + 1) % int(every) != 0 for i in range(num_layers)]
    if len(slides) != num_layers:
        raise ValueError(f"the layers are listed for {len(slides)} layers, there are {num_layers}")
    return tuple(int(window) if slides_here else None for slides_here in slides)


def _ropes(values: Mapping[str, Any], num_layers: int) -> list[bool]:
    """Which layers of a smollm3 have a rotary embedding."""
    listed = values.get("no_rope_layers")
    if listed is not None:
        return [bool(has_rope) for has_rope in listed]
    every = int(values.get("no_rope_layer_interval", 4))
    return [(i + 1) % every != 0 for i in range(num_layers)]


def find_base_folder(base: str, revision: str | None = None) -> Path | None:
    """The folder of `model.base`: itself, or the snapshot that the hub's own cache holds; None if neither."""
    folder = Path(base)
    return folder if folder.is_dir() else _snapshot(base, revision)


def find_shape(base: str, revision: str | None = None) -> ModelShape:
    """The shape of `model.base`: of a folder's config.json, of a hub snapshot that is already here, or of a
    known model. Raises `UserError` where none of them is."""
    folder = find_base_folder(base, revision)
    if folder is not None:
        return shape_from_config(read_plain_config(folder), str(folder / "config.json"))
    known = known_shape(base)
    if known is None:
        raise UserError(
            f"model.base: {base} is neither a folder, nor in the hub cache, nor one of the known models "
            f"({', '.join(KNOWN)}). Make a folder with its config.json and plan with model.base=FOLDER."
        )
    return known


def _snapshot(base: str, revision: str | None) -> Path | None:
    """The snapshot that the hub's own cache holds of `base`, if one with a config.json is there."""
    home = os.environ.get("HF_HOME") or Path.home() / ".cache" / "huggingface"
    hub = Path(os.environ.get("HF_HUB_CACHE") or Path(home) / "hub")
    folder = hub / f"models--{base.replace('/', '--')}"
    reference = folder / "refs" / (revision or "main")
    commit = reference.read_text(encoding="utf-8").strip() if reference.is_file() else (revision or "")
    snapshot = folder / "snapshots" / commit
    return snapshot if commit and (snapshot / "config.json").is_file() else None


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
    tied: bool = False,
    window: int | None = None,
) -> ModelShape:
    values = {
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
    }
    return shape_from_config(values)


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
