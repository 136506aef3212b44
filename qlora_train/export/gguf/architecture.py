"""What llama.cpp calls a model: its architecture, metadata and tensor names, from config.json.

llama.cpp has one program per architecture and reads sizes from the file; whatever else a config can say is
fixed in that program. `Architecture` refuses a config that says otherwise, by name, so that no file is
written whose model would answer differently.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from gguf import MODEL_ARCH_NAMES, GGUFWriter, RopeScalingType, get_tensor_name_map
from torch import Tensor
from transformers import PretrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from qlora_train.errors import ExportError
from qlora_train.export.gguf.families import CAPS, FAMILIES, ROPE_SETTINGS

OTHER_WAY = "Export with --to merged and try llama.cpp's convert_hf_to_gguf.py on that folder."
ROPE_FACTORS = "rope_freqs.weight"
"""Tensor [head size / 2]: what each rotary frequency is divided by."""
NO_ROTATION = 1e30
"""Divisor of a frequency that is 0."""
_SUFFIXES = (".weight", ".bias", ".scale")
_RENAMED = {
    ".router.scale": ".router.proj.scale",
    ".router.per_expert_scale": ".experts.down_proj.scale",
    "_proj_bias": "_proj.bias",
}
"""Endings of parameters that llama.cpp calls after the weight beside them."""
_WITH_DIVISORS = ("llama3", "proportional")
"""Rotary embeddings that llama.cpp makes with a tensor of divisors."""
_ROPE_DEFAULTS = {
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "truncate": True,
    "mscale": 1.0,
    "partial_rotary_factor": 1.0,
}
_LAYERS_OF_GEMMA_27B = {"gemma2": 46, "gemma3_text": 62}
"""There llama.cpp scales attention by the hidden size per head, elsewhere by the head's own size."""


class Architecture:
    """llama.cpp's architecture for a config, its metadata and tensor names. context_length: tokens that the
    model may be used with. remarks: what llama.cpp does otherwise, as lines for the log."""

    def __init__(self, folder: Path, config: PretrainedConfig) -> None:
        """folder: named in messages. Raises `ExportError` for a config that llama.cpp has no architecture
        for."""
        self._folder, self.config = folder, config
        if config.model_type not in FAMILIES:
            known = ", ".join(FAMILIES)
            raise self._refusal(f"the family {config.model_type} (of {known})")
        self.family = FAMILIES[config.model_type]
        self._layers = [config] * config.num_hidden_layers
        if getattr(config, "is_heterogeneous", False):
            self._layers = list(config.per_layer_config)
        self._head_size = getattr(self._layers[-1], "head_dim", None) or (
            config.hidden_size // config.num_attention_heads
        )
        self._names = get_tensor_name_map(self.family.name, config.num_hidden_layers)
        self.remarks: list[str] = []
        self._rope = self._read_rope()
        self.context_length = self._read_context()
        self._refuse_what_is_fixed()

    @property
    def name(self) -> str:
        return str(MODEL_ARCH_NAMES[self.family.name])

    def tensor_name(self, parameter: str) -> str:
        """llama.cpp's name of a parameter of the family's class."""
        name = parameter
        for ending, other in _RENAMED.items():
            if name.endswith(ending):
                name = name.removesuffix(ending) + other
        name = name if name.endswith(_SUFFIXES) else f"{name}.weight"
        found = self._names.get_name(name, try_suffixes=_SUFFIXES)
        if found is None or (name.endswith(".bias") and not self.family.has_biases):
            raise self._refusal(f"the tensor {parameter}")
        return str(found)

    def num_rotated_heads(self, name: str) -> int:
        """The heads whose rows of a tensor change places; 0: the rows stay as they are."""
        projection = name.split(".")[-2] if self.family.pairs_rotate else ""
        heads = {"q_proj": "num_attention_heads", "k_proj": "num_key_value_heads"}.get(projection)
        return getattr(self.config, heads) if heads else 0

    def is_shifted_norm(self, name: str) -> bool:
        return self.family.adds_one and name.endswith("norm.weight")

    def rope_factors(self) -> Tensor | None:
        """The divisors of the rotary frequencies [head size / 2], for kinds in `_WITH_DIVISORS`."""
        kind = self._rope["rope_type"]
        if kind not in _WITH_DIVISORS:
            return None
        layer_type = "full_attention" if "full_attention" in self.config.rope_parameters else None
        scaled, _ = ROPE_INIT_FUNCTIONS[kind](self.config, torch.device("cpu"), layer_type=layer_type)
        steps = torch.arange(0, self._head_size, 2, dtype=torch.float64) / self._head_size
        return (self._rope["rope_theta"] ** -steps / scaled.double()).clamp(max=NO_ROTATION).float()

    def write_metadata(self, writer: GGUFWriter) -> None:
        config, kind = self.config, self._rope["rope_type"]
        writer.add_context_length(self.context_length)
        writer.add_embedding_length(config.hidden_size)
        writer.add_block_count(config.num_hidden_layers)
        writer.add_feed_forward_length(config.intermediate_size)
        writer.add_head_count(config.num_attention_heads)
        num_kv_heads = [layer.num_key_value_heads for layer in self._layers]
        writer.add_head_count_kv(num_kv_heads if self.family.sizes_by_layer else num_kv_heads[0])
        writer.add_key_length(self._head_size)
        writer.add_value_length(self._head_size)
        writer.add_layer_norm_rms_eps(config.rms_norm_eps)
        share = 1.0 if kind == "proportional" else self._rope.get("partial_rotary_factor", 1.0)
        writer.add_rope_dimension_count(int(self._head_size * share))
        writer.add_rope_freq_base(self._rope["rope_theta"])
        if kind in ("linear", "yarn"):
            writer.add_rope_scaling_type(RopeScalingType(kind))
            writer.add_rope_scaling_factor(self._rope["factor"])
        if kind == "yarn":
            length = self._rope["original_max_position_embeddings"]
            writer.add_rope_scaling_orig_ctx_len(length)
        if (beta := self._rope.get("llama_4_scaling_beta")) is not None:
            writer.add_attn_temperature_scale(beta)
            writer.add_attn_temperature_length(length)
            writer.add_rope_scaling_yarn_log_mul(self._rope["mscale_all_dim"])
        if self.family.full_every or self.family.sizes_by_layer:
            writer.add_sliding_window(config.sliding_window)
        if self.family.sizes_by_layer:
            self._write_sizes_of_sliding_layers(writer)
        if experts := getattr(config, "num_experts", None):
            writer.add_expert_count(experts)
            writer.add_expert_used_count(getattr(config, "top_k_experts", None) or config.num_experts_per_tok)
            size = getattr(config, "moe_intermediate_size", None) or config.intermediate_size
            writer.add_expert_feed_forward_length(size)
        optional: dict[str, Callable[[Any], None]] = {
            "attn_logit_softcapping": writer.add_attn_logit_softcapping,
            "final_logit_softcapping": writer.add_final_logit_softcapping,
            "logits_scaling": writer.add_logit_scale,
            "residual_multiplier": writer.add_residual_scale,
            "embedding_multiplier": writer.add_embedding_scale,
            "attention_multiplier": writer.add_attention_scale,
            "shared_expert_intermediate_size": writer.add_expert_shared_feed_forward_length,
        }
        for key, add in optional.items():
            if (value := getattr(config, key, None)) is not None:
                add(value)

    def _write_sizes_of_sliding_layers(self, writer: GGUFWriter) -> None:
        slides = [kind == "sliding_attention" for kind in self.config.layer_types]
        head_size = self._layers[slides.index(True)].head_dim
        writer.add_sliding_window_pattern(slides)
        writer.add_key_length_swa(head_size)
        writer.add_value_length_swa(head_size)
        writer.add_rope_dimension_count_swa(head_size)
        writer.add_rope_freq_base_swa(self.config.rope_parameters["sliding_attention"]["rope_theta"])
        writer.add_embedding_length_per_layer_input(0)

    def _read_rope(self) -> Mapping[str, Any]:
        """The rotary embedding of the layers that attend to everything. Raises `ExportError` for settings
        that a GGUF file has no place for."""
        given, family = dict(self.config.rope_parameters), self.family
        if "full_attention" in given:
            sliding, given = given["sliding_attention"], dict(given["full_attention"])
            theta = family.sliding_theta or given["rope_theta"]
            if (sliding.get("rope_type"), sliding["rope_theta"]) != ("default", theta):
                raise self._refusal(f"the rotary embedding {sliding} of layers with a sliding window")
        kind = given.setdefault("rope_type", "default")
        if kind not in family.ropes:
            raise self._refusal(f"the rotary embedding {kind}")
        stretch = 1.0 if "mscale_all_dim" in given else given.get("factor") or 1.0
        defaults = _ROPE_DEFAULTS | {"attention_factor": 1 + 0.1 * math.log(max(1.0, stretch))}
        known = {"rope_type", "rope_theta"} | ROPE_SETTINGS.get(kind, set())
        for key, value in given.items():
            is_family_s = key in family.rope and family.rope[key] in (None, value)
            is_default = value is None or value == defaults.get(key)
            if key not in known and not is_family_s and not is_default:
                raise self._refusal(f"the rotary embedding's {key}: {value}")
        if given.get("truncate", True) is False:
            self.remarks.append(
                "rotary embedding: llama.cpp rounds the bounds between which YaRN stretches positions, "
                "whoever converts this family; config.json has them unrounded (truncate: false)"
            )
        return given

    def _read_context(self) -> int:
        config = self.config
        length: int = config.max_position_embeddings
        kinds = getattr(config, "layer_types", None)
        window: int = getattr(config, "sliding_window", None) or length
        slides = window < length and (kinds is None or "sliding_attention" in kinds)
        if self.family.full_every or self.family.sizes_by_layer or not slides:
            return length
        self.remarks.append(
            f"context: {window:,} tokens, the model's sliding window, which llama.cpp does not have for this"
            f" family (config.json allows {length:,})"
        )
        return window

    def _refuse_what_is_fixed(self) -> None:
        config, family = self.config, self.family
        activation = getattr(config, "hidden_activation", None) or config.hidden_act
        if activation != family.activation:
            raise self._refusal(f"the activation {activation} in {config.model_type}")
        for key, value in family.fixed.items():
            if (found := getattr(config, key, value)) != value:
                raise self._refusal(f"{key} {found} in {config.model_type}")
        layers = range(1, config.num_hidden_layers + 1)
        if family.full_every:
            fixed = [f"{'sliding' if i % family.full_every else 'full'}_attention" for i in layers]
            if list(config.layer_types) != fixed:
                raise self._refusal("this order of layers with a sliding window")
            in_head = self._head_size
            if config.num_hidden_layers == _LAYERS_OF_GEMMA_27B.get(config.model_type):
                in_head = config.hidden_size // config.num_attention_heads
            if getattr(config, "query_pre_attn_scalar", in_head) != in_head:
                raise self._refusal(f"query_pre_attn_scalar {config.query_pre_attn_scalar}")
        caps = [key for key in CAPS if getattr(config, key, None) is not None]
        if tuple(caps) not in family.caps:
            raise self._refusal(f"{config.model_type} with caps on these logits alone: {caps}")
        if getattr(config, "use_bidirectional_attention", False) not in (False, None, "vision"):
            raise self._refusal("bidirectional attention")
        with_rope = [int(i % 4 != 0) for i in layers]
        if config.model_type == "smollm3" and list(config.no_rope_layers) != with_rope:
            raise self._refusal("this order of layers without rotary embedding (no_rope_layers)")

    def _refusal(self, what: str) -> ExportError:
        return ExportError(f"{self._folder}: {what} is not among what --to gguf can write. {OTHER_WAY}")
