"""Sizes of a model for planning: its linears, vocabulary and norms, read from transformers' meta model.

The meta model is built from the config without weights, and probed as `train` does: a model that `train`
refuses is refused by a plan with the same message. The config comes from a folder, the hub's cache or a table
of known models, so that a plan can be made before anything is downloaded.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from math import prod

import torch
from transformers import AutoConfig, PretrainedConfig

from qlora_train.errors import UnsupportedModelError
from qlora_train.model.base import MetaModel, quantization_config, read_config
from qlora_train.model.base_folder import stored_quantization
from qlora_train.model.expert_lora import expert_stacks
from qlora_train.model.layer_buffer import LayerShapes
from qlora_train.model.probe import ProbeResult, probe
from qlora_train.model.quantized_matrix import RowLayout
from qlora_train.plan.base_config import fetch_config, find_base_folder, known_config
from qlora_train.quant.formats import UNQUANTIZED, Quantization


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    """Sizes of a decoder. config, config_text: where they are from, as JSON too. layers: of every layer the
    sizes of its weights. layer_paths: module paths of the layers. expert_shapes: path of each parameter of
    experts -> (out, in, number of experts). experts_per_token: that a token goes
    through, in each layer that has experts. plain_parameters: numbers in norms, biases, routers.
    head_quantization: how the checkpoint has quantized the head. probed: what the start-up probe found."""

    config: PretrainedConfig = field(repr=False, compare=False)
    config_text: str = field(repr=False)
    layers: tuple[LayerShapes, ...]
    layer_paths: tuple[str, ...]
    expert_shapes: dict[str, tuple[int, int, int]]
    experts_per_token: int
    vocabulary: int
    hidden: int
    is_tied: bool
    plain_parameters: int
    head_quantization: Quantization
    probed: ProbeResult

    def __hash__(self) -> int:
        return hash(self.config_text)

    @property
    def model_type(self) -> str:
        return str(self.config.model_type)

    @property
    def num_layers(self) -> int:
        return len(self.layers)

    @property
    def max_positions(self) -> int:
        return int(getattr(self.config, "max_position_embeddings", None) or 2048)

    @property
    def num_heads(self) -> int:
        return int(self.config.num_attention_heads)

    @cached_property
    def num_kv_heads(self) -> int:
        return _largest(self.config, "num_key_value_heads") or self.num_heads

    @cached_property
    def head_dim(self) -> int:
        return _largest(self.config, "head_dim") or self.hidden // self.num_heads

    @property
    def has_softcap(self) -> bool:
        """Whether attention scores are capped with tanh."""
        return getattr(self.config, "attn_logit_softcapping", None) is not None

    @property
    def q_width(self) -> int:
        return self.num_heads * self.head_dim

    @cached_property
    def linear_shapes(self) -> dict[str, tuple[int, int]]:
        """Module path -> (out, in), of all layers."""
        return {
            f"{path}.{name}": shape
            for path, layer in zip(self.layer_paths, self.layers, strict=True)
            for name, shape in layer.linears
        }

    @cached_property
    def adaptable_shapes(self) -> dict[str, tuple[int, int, int]]:
        """Of all that may have LoRA parameters: path -> (out, in, number of matrices)."""
        return {path: (*shape, 1) for path, shape in self.linear_shapes.items()} | self.expert_shapes

    @property
    def skippable_parameters(self) -> int:
        """Numbers that a token is multiplied by where recomputation may skip it, in a layer on average."""
        skippable = self.probed.skippable
        linears = sum(
            prod(shape) for layer in self.layers for name, shape in layer.linears if name in skippable
        )
        down = sum(
            self._active(shape, number)
            for layer in self.layers
            for name, shape, number in layer.experts
            if name.endswith(".down_proj") and name.removesuffix(".down_proj") in skippable
        )
        return (linears + down) // self.num_layers

    @property
    def expert_hidden_parameters(self) -> int:
        """Numbers of experts' first matrices that a token is multiplied by, in a layer on average. Experts
        save x alone, so backward multiplies by these again."""
        firsts = sum(
            self._active(shape, number)
            for layer in self.layers
            for name, shape, number in layer.experts
            if not name.endswith(".down_proj")
        )
        return firsts // self.num_layers

    @cached_property
    def quantized_parameters(self) -> int:
        """Numbers in the linears and experts of all layers."""
        return sum(prod(shape) for layer in self.layers for _, shape in layer.items())

    @property
    def layer_parameters(self) -> int:
        """Quantized numbers of one layer, on average."""
        return self.quantized_parameters // self.num_layers

    @property
    def keeps_experts(self) -> bool:
        """Experts stay quantized as the checkpoint has them, whatever `model.quantization` is."""
        return any(layer.kept is not None for layer in self.layers)

    @cached_property
    def active_outputs(self) -> int:
        """Numbers that a token's linears and experts put out, in a layer on average."""
        linears = sum(shape[0] for layer in self.layers for _, shape in layer.linears)
        experts = sum(
            self._active((shape[0], 1), number) for layer in self.layers for _, shape, number in layer.experts
        )
        return (linears + experts) // self.num_layers

    @cached_property
    def linear_parameters(self) -> int:
        """Of those, the numbers that are not experts'."""
        return sum(prod(shape) for layer in self.layers for _, shape in layer.linears) // self.num_layers

    @cached_property
    def active_parameters(self) -> int:
        """Numbers of one layer that a token is multiplied by, on average."""
        experts = sum(
            self._active(shape, number) for layer in self.layers for _, shape, number in layer.experts
        )
        return self.linear_parameters + experts // self.num_layers

    def _active(self, shape: tuple[int, int], num_experts: int) -> int:
        return prod(shape) * min(self.experts_per_token, num_experts) // num_experts

    @property
    def matrix_parameters(self) -> int:
        """Numbers in the embedding; the head has as many."""
        return self.vocabulary * self.hidden

    @property
    def num_parameters(self) -> int:
        return (
            self.quantized_parameters
            + (1 if self.is_tied else 2) * self.matrix_parameters
            + self.plain_parameters
        )

    def head_format(self, dtype: torch.dtype) -> RowLayout:
        """The storage format of the head's rows."""
        return RowLayout(self.head_quantization, self.hidden, dtype)


def _largest(config: PretrainedConfig, name: str) -> int:
    """A size of all layers, or the largest where layers have their own; 0 where config.json has none."""
    layers = config.per_layer_config if getattr(config, "is_heterogeneous", False) else [config]
    return max(int(getattr(layer, name, None) or 0) for layer in layers)


def shape_of(config: PretrainedConfig) -> ModelShape:
    """Raises `UnsupportedModelError` for a family that cannot be trained."""
    return _shape_of(_Config(config.to_json_string(use_diff=False), config))


@dataclass(frozen=True)
class _Config:
    """A config, equal to others of the same text."""

    text: str
    config: PretrainedConfig = field(compare=False)


@lru_cache(maxsize=16)
def _shape_of(known_by: _Config) -> ModelShape:
    config, text = known_by.config, known_by.text
    probed = probe(config)
    meta_model = MetaModel(config, torch.bfloat16)
    vocabulary, hidden = meta_model.matrix_shape
    layers = tuple(meta_model.layer_shapes(i) for i in range(len(meta_model.layer_paths)))
    if any(layer.experts for layer in layers) and not probed.has_experts:
        raise UnsupportedModelError(
            f"{config.model_type} is not supported: the start-up probe did not reach its experts"
        )
    return ModelShape(
        config=config,
        config_text=text,
        layers=layers,
        layer_paths=meta_model.layer_paths,
        expert_shapes={
            path: (stack.out_features, stack.in_features, stack.num_matrices)
            for path, stack in expert_stacks(meta_model.model).items()
        },
        experts_per_token=_experts_per_token(config),
        vocabulary=vocabulary,
        hidden=hidden,
        is_tied=meta_model.is_tied,
        plain_parameters=sum(prod(shape) for shape in meta_model.plain_shapes.values()),
        head_quantization=UNQUANTIZED if meta_model.is_tied else _head_quantization(config, hidden),
        probed=probed,
    )


def _experts_per_token(config: PretrainedConfig) -> int:
    """By the names that families give it; 0 without experts."""
    names = ("num_experts_per_tok", "num_experts_per_token", "moe_k", "moe_topk", "top_k_experts")
    found = (getattr(config, name, None) for name in names)
    return next((number for number in found if isinstance(number, int)), 0)


def _head_quantization(config: PretrainedConfig, hidden: int) -> Quantization:
    """The quantization of an untied head's rows in a checkpoint with this quantization_config. bitsandbytes
    leaves the head unquantized unless it is told which other modules to skip."""
    stored = quantization_config(config)
    skipped = stored.get("llm_int8_skip_modules")
    if not stored or skipped is None or any("lm_head".endswith(str(name)) for name in skipped):
        return UNQUANTIZED
    return stored_quantization(stored).by_row(hidden)


def find_shape(base: str, revision: str | None = None) -> ModelShape:
    """The sizes of `model.base`, from a folder's config.json, a known model, or the hub. Raises `UserError`
    where none of them has it."""
    folder = find_base_folder(base, revision)
    known = known_shape(base) if folder is None else None
    return known or shape_of(read_config(folder or fetch_config(base, revision)))


def known_shape(base: str) -> ModelShape | None:
    """The sizes of a known model by its hub id, whatever the chat variant; else None."""
    values = known_config(base)
    return shape_of(AutoConfig.for_model(**values)) if values else None
