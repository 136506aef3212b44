"""The meta model of a frozen base: built from its config, with quantized linears in place of nn.Linear.

All parameters are on the meta device (no bytes); only the small computed buffers (rotary frequencies,
embedding scales) are real. Each nn.Linear of a decoder layer becomes a `FrozenLinear`, which asks a
`WeightStore` for its weight. `MetaModel` lists what the checkpoint has to provide: per layer the linears'
weights (quantized into a layer buffer), embedding and head (rows in the compute dtype), and plain parameters
(norms, biases). weights/base_checkpoint.py reads them, weights/load.py decides where they are placed.

Embedding and head stay unquantized, as in QLoRA (arXiv:2305.14314) and PEFT, unless the checkpoint has the
head quantized (quantized_matrix.py); a tied matrix exists once.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from copy import deepcopy
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from qlora_train.adapter.pissa import principal_ranks
from qlora_train.boundary import parsing
from qlora_train.device.compute import ComputeDevice
from qlora_train.errors import BaseModelError, UnsupportedModelError
from qlora_train.model import attention
from qlora_train.model.base_folder import CONFIG_REMEDY, kept_quantization, read_plain_config
from qlora_train.model.decoder import FrozenDecoder, final_norm_name
from qlora_train.model.expert_lora import expert_stacks
from qlora_train.model.frozen_experts import NAME as EXPERTS_NAME
from qlora_train.model.frozen_experts import FrozenExperts, freeze_experts, is_experts
from qlora_train.model.layer_buffer import LayerBufferLayout, LayerShapes
from qlora_train.model.linear import FrozenLinear
from qlora_train.model.vocab_matrix import VocabMatrix
from qlora_train.model.weight_store import WeightStore
from qlora_train.quant.formats import Quantization
from qlora_train.recipe import LoraSection

Decoder = TypeVar("Decoder", bound=FrozenDecoder)
_MOST = {
    "num_hidden_layers": 10**3,
    "hidden_size": 10**6,
    "intermediate_size": 10**7,
    "num_attention_heads": 10**4,
    "num_key_value_heads": 10**4,
    "head_dim": 10**4,
    "vocab_size": 10**8,
    "max_position_embeddings": 10**9,
    "num_experts": 10**4,
    "num_local_experts": 10**4,
    "n_routed_experts": 10**4,
}
"""Sizes in a config.json beyond any model's."""
MAX_PLAIN_SHARE = 1 / 16
"""Of a layer's quantized numbers: the most that one other matrix of it may have."""


def read_config(folder: Path) -> PretrainedConfig:
    """The config of the base's language model, from its config.json. Raises `BaseModelError` if that is
    missing, invalid, or of a family that transformers does not know."""
    file = folder / "config.json"
    config = _text_part(read_whole_config(folder))
    pad_id, vocabulary_size = getattr(config, "pad_token_id", None), getattr(config, "vocab_size", None)
    if isinstance(pad_id, int) and isinstance(vocabulary_size, int) and pad_id >= vocabulary_size:
        raise BaseModelError(
            f"{file}: pad_token_id {pad_id} has no row in the embedding, which has "
            f"{vocabulary_size} (vocab_size). Set it to null, or to a token of the vocabulary."
        )
    return config


def read_whole_config(folder: Path) -> PretrainedConfig:
    """`read_config` with the other parts of a model of several parts."""
    file = folder / "config.json"
    values = read_plain_config(folder)
    _check_sizes(file, values)
    if isinstance(values.get("text_config"), dict):
        _check_sizes(file, values["text_config"])
    with parsing(file, BaseModelError, CONFIG_REMEDY):
        config: PretrainedConfig = AutoConfig.from_pretrained(
            folder, trust_remote_code=False, local_files_only=True
        )
    return config


def _text_part(whole: PretrainedConfig) -> PretrainedConfig:
    """The config of the language model in a model of several parts (text and vision), or the whole."""
    text: PretrainedConfig = whole.get_text_config(decoder=True)
    if text is not whole:
        for name in ("tie_word_embeddings", "quantization_config"):  # said of the whole
            if hasattr(whole, name):
                setattr(text, name, getattr(whole, name))
    return text


def _check_sizes(file: Path, values: Mapping[str, Any]) -> None:
    """Raise `BaseModelError` for sizes that no model has, before a model is built: one of 10^6 layers takes
    minutes and all memory even without weights."""
    for name, most in _MOST.items():
        size = values.get(name)
        if size is not None and not (type(size) is int and 1 <= size <= most):
            raise BaseModelError(
                f"{file}: {name} is {str(size)[:40]}, not a whole number from 1 to {most}. {CONFIG_REMEDY}"
            )


def empty_model(config: PretrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    """Build the causal LM of this config with packed attention: parameters on the meta device, buffers real.

    Raises `UnsupportedModelError` unless its decoder has embed_tokens, layers and norm."""
    known_as = f"{config.model_type} as config.json has it"
    with (
        parsing(known_as, UnsupportedModelError, "transformers has no causal language model for it."),
        init_empty_weights(include_buffers=False),
    ):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(
            deepcopy(config),
            dtype=dtype,
            attn_implementation=attention.NAME,
            experts_implementation=EXPERTS_NAME,
        )
    _check_decoder(model)
    tie_head(model)
    return model


def _check_decoder(model: PreTrainedModel) -> None:
    """Refuse what cannot be walked layer by layer: a decoder must be an embedding, layers and a norm."""
    family, decoder = model.config.model_type, model.get_decoder()
    if not hasattr(decoder, "layers"):
        raise UnsupportedModelError(f"{family}: not a LLaMA-class decoder (embedding, layers, norm)")
    final_norm_name(decoder)
    tables = [child for child in decoder.children() if isinstance(child, nn.Embedding)]
    if any(table is not model.get_input_embeddings() for table in tables):
        raise UnsupportedModelError(f"{family}: its layers look up token ids in an embedding of their own")
    if getattr(model.config, "num_kv_shared_layers", 0):
        raise UnsupportedModelError(f"{family}: its layers share keys and values with each other")


def tie_head(model: PreTrainedModel) -> None:
    """Make head and embedding one parameter where the config says so: it is read and counted once."""
    if model.config.tie_word_embeddings:
        model.get_output_embeddings().weight = model.get_input_embeddings().weight


def adaptable_names(config: PretrainedConfig) -> tuple[list[str], list[str]]:
    """(module paths of the linears of all decoder layers, paths of experts' parameters), in module order."""
    model = empty_model(config, torch.float32)
    swap_linears(model)
    linears = [module.name for module in model.modules() if isinstance(module, FrozenLinear)]
    return linears, list(expert_stacks(model))


class MetaModel:
    """A model without weights, with `FrozenLinear`s in its decoder layers, and the list of weights it needs.

    layer_paths: module path of every decoder layer. embedding_name, head_name: parameter names (equal where
    tied). own_head_name: the head's where it is not tied. plain_shapes: every other parameter outside the
    layer buffers, and buffers that checkpoints hold (stored_buffers: their names). lora: the recipe's section
    of the run that the weights are for; with PiSSA, principal_ranks says what is taken out of them, in
    factors of factor_bytes (adapter/pissa.py). Raises `UnsupportedModelError` where layers hold large
    matrices that are neither linears nor experts.
    """

    def __init__(self, config: PretrainedConfig, dtype: torch.dtype, lora: LoraSection | None = None) -> None:
        self.model = empty_model(config, dtype)
        self.dtype = dtype
        prefix = swap_linears(self.model)
        num_layers = len(self.model.get_decoder().layers)
        self.layer_paths = tuple(f"{prefix}.{i}" for i in range(num_layers))
        self.lora = lora
        linears = (module for module in self.model.modules() if isinstance(module, FrozenLinear))
        shapes = {linear.name: (linear.out_features, linear.in_features) for linear in linears}
        self.principal_ranks = principal_ranks(lora, shapes)
        self.factor_bytes = sum(4 * rank * sum(shapes[path]) for path, rank in self.principal_ranks.items())
        names = {id(p): name for name, p in reversed(list(self.model.named_parameters()))}
        self.embedding_name = names[id(self.model.get_input_embeddings().weight)]
        self.head_name = names[id(self.model.get_output_embeddings().weight)]
        head = self.model.get_output_embeddings()
        self.own_head_name = next(f"{name}.weight" for name, m in self.model.named_modules() if m is head)
        matrices = {self.embedding_name, self.head_name}
        self.plain_shapes = {
            name: tuple(p.shape) for name, p in self.model.named_parameters() if name not in matrices
        }
        parameters = dict(self.model.named_parameters(remove_duplicate=False))
        self.stored_buffers = {name for name in self.model.state_dict() if name not in parameters}
        self.plain_shapes |= {name: tuple(self.model.get_buffer(name).shape) for name in self.stored_buffers}

    @cached_property
    def _layer_shapes(self) -> list[LayerShapes]:
        return [layer_shapes(self.model.get_submodule(path)) for path in self.layer_paths]

    def layer_shapes(self, layer: int) -> LayerShapes:
        """Sizes of a layer's quantized weights, in module order."""
        return self._layer_shapes[layer]

    def plain_dtype(self, name: str) -> torch.dtype:
        """The dtype of a parameter or buffer of `plain_shapes`: the compute dtype, or fp32 where the family
        says so, as transformers loads it (some routers)."""
        return torch.float32 if self.keeps_fp32(name) else self.dtype

    def keeps_fp32(self, name: str) -> bool:
        """Whether transformers loads this parameter in fp32 beside others in 16 bits of either kind."""
        always_fp32 = self.model._keep_in_fp32_modules_strict or ()
        return any(re.search(rf"(^|\.){re.escape(part)}(\.|$)", name) for part in always_fp32)

    @property
    def is_tied(self) -> bool:
        return self.embedding_name == self.head_name

    @property
    def matrix_shape(self) -> tuple[int, int]:
        """(V, D) of the embedding."""
        rows, columns = self.model.get_parameter(self.embedding_name).shape
        return rows, columns

    def parameter_name(self, layer: int, weight: str) -> str:
        """The name in transformers' model of a layer's quantized weight."""
        name = f"{self.layer_paths[layer]}.{weight}"
        return f"{name}.weight" if weight in dict(self.layer_shapes(layer).linears) else name

    def layouts(self, quantization: Quantization) -> list[LayerBufferLayout]:
        """The layer buffer of every layer; layers of equal shapes share one object."""
        known: dict[LayerShapes, LayerBufferLayout] = {}
        shapes = [self.layer_shapes(i) for i in range(len(self.layer_paths))]
        for layer in shapes:
            known.setdefault(layer, layer.layout(quantization, self.dtype))
        return [known[layer] for layer in shapes]

    def materialize(
        self,
        source: WeightStore,
        plain: dict[str, Tensor],
        embedding: VocabMatrix,
        head: VocabMatrix,
        device: ComputeDevice,
    ) -> FrozenDecoder:
        """Return the decoder with these weights on `device`; the meta model cannot be used afterwards.

        source: of the quantized linears. plain: the parameters of `plain_shapes` by name."""
        return self.materialize_as(FrozenDecoder, source, plain, embedding, head, device)

    def materialize_as(
        self,
        kind: type[Decoder],
        source: WeightStore,
        plain: dict[str, Tensor],
        embedding: VocabMatrix,
        head: VocabMatrix,
        device: ComputeDevice,
    ) -> Decoder:
        """`materialize` as an instance of `kind`, a subclass of `FrozenDecoder`."""
        for name in self.plain_shapes:
            owner, _, attribute = name.rpartition(".")
            value = plain[name]
            if name not in self.stored_buffers:
                value = nn.Parameter(value, requires_grad=False)
            setattr(self.model.get_submodule(owner), attribute, value)
        for module in self.model.modules():
            if isinstance(module, FrozenLinear | FrozenExperts):
                module.source = source
            for name, buffer in module.named_buffers(recurse=False):
                setattr(module, name, buffer.to(device.torch))
        return kind(self.model, source, embedding, head, self.dtype, device)


def quantization_config(config: PretrainedConfig) -> Mapping[str, Any]:
    """What a config says of how the checkpoint is quantized."""
    stored = getattr(config, "quantization_config", None)
    return stored if isinstance(stored, Mapping) else getattr(stored, "to_dict", dict)()


def layer_shapes(layer: nn.Module) -> LayerShapes:
    """Sizes of a layer's quantized weights, in module order."""
    linears, experts, expert_quantization = [], [], None
    for name, module in layer.named_modules():
        if isinstance(module, FrozenLinear):
            linears.append((name, (module.out_features, module.in_features)))
        elif isinstance(module, FrozenExperts):
            path, expert_quantization = name.removesuffix(".frozen"), module.kept
            experts += [
                (f"{path}.{matrix}", shape, module.num_experts)
                for matrix, shape in module.stacked_shapes().items()
            ]
    return LayerShapes(tuple(linears), tuple(experts), expert_quantization)


def swap_linears(model: PreTrainedModel) -> str:
    """Replace every nn.Linear in the decoder layers by a FrozenLinear, and experts' weights by FrozenExperts;
    returns the layers' module path.

    Refuses layers with large matrices besides: what is small (routers, convolutions) stays unquantized."""
    layers = model.get_decoder().layers
    path = next(name for name, module in model.named_modules() if module is layers)
    sizes = dict.fromkeys(range(len(layers)), 0)
    expert_quantization = kept_quantization(quantization_config(model.config))
    for name, module in list(layers.named_modules()):
        layer = int(name.partition(".")[0] or 0)
        if is_experts(module):
            experts = freeze_experts(f"{path}.{name}", module, expert_quantization)
            sizes[layer] += sum(rows * columns for rows, columns in experts.stacked_shapes().values())
        if type(module) is not nn.Linear:
            continue
        sizes[layer] += module.in_features * module.out_features
        linear = FrozenLinear(f"{path}.{name}", module.in_features, module.out_features)
        linear.bias = module.bias
        parent, _, attribute = name.rpartition(".")
        setattr(layers.get_submodule(parent), attribute, linear)
    surplus = [
        f"{name}.{attribute}"
        for name, module in layers.named_modules()
        for attribute, p in module.named_parameters(recurse=False)
        if p.dim() > 1
        and not type(module).__name__.endswith("Norm")  # Cohere's has a row per head
        and p.numel() > MAX_PLAIN_SHARE * sizes[int(name.partition(".")[0])]
    ]
    if surplus:
        raise UnsupportedModelError(
            f"{model.config.model_type}: its layers hold weights that are not linear layers "
            f"({surplus[0].split('.', 1)[-1]}), "
            "which qlora_train cannot quantize"
        )
    return path
