"""The names that a base's modules have in the class that other tools load it with.

A model of several parts (text and vision) trains here as its language model alone, whose layers are called
`model.layers.0`. Other tools load the class that config.json names (`architectures`), in which the same
layers are, for example, `model.language_model.layers.0`, beside parts whose linears may have the same last
names.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import transformers
from accelerate import init_empty_weights
from torch import nn
from transformers import PretrainedConfig

from qlora_train.adapter.adapter_config import HEAD, match_modules
from qlora_train.model.base import read_whole_config


@dataclass(frozen=True)
class ServedModel:
    """paths: the path in the class that is served, of every linear of the language model's layers, parameter
    of its experts, its embedding and its head. linears: paths of all linears there. auto_mapping: names the
    class in PEFT's config; None: it is the language model's own."""

    paths: dict[str, str]
    linears: list[str]
    auto_mapping: dict[str, str] | None = None


def served_model(base_folder: Path, adaptable: Iterable[str], matrices: Iterable[str] = ()) -> ServedModel:
    """The served model of a base. adaptable: paths of what may have LoRA parameters in the language model's
    layers. matrices: of its embedding, and of its head where it is not tied. A class that transformers does
    not have, or that names layers in another way, is taken for the language model's own."""
    linears = [*adaptable, HEAD]
    own = list(dict.fromkeys([*linears, *matrices]))
    config = read_whole_config(base_folder)
    served = _served_class(config)
    if served is not None:
        with init_empty_weights():
            model = served(config)
        linears_of_class = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
        embeddings = [name for name, module in model.named_modules() if isinstance(module, nn.Embedding)]
        parameters = [name for name, _ in model.named_parameters()]  # of experts
        paths = match_modules(own, [*linears_of_class, *embeddings, *parameters])
        if len(paths) == len(own):
            mapping = {"base_model_class": served.__name__, "parent_library": served.__module__}
            return ServedModel(paths, linears_of_class, mapping)
    return ServedModel({path: path for path in own}, linears)


def _served_class(config: PretrainedConfig) -> type[transformers.PreTrainedModel] | None:
    """The class of a model of several parts; None: config.json is of a language model, or names no class."""
    if config.get_text_config(decoder=True) is config:
        return None
    named = getattr(transformers, (config.architectures or [""])[0], None)
    return named if getattr(named, "config_class", None) is type(config) else None
