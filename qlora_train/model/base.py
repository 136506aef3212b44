"""Load the frozen base: config -> meta-device model -> packed linears, without ever holding the 16-bit model.

The model is built from its config with all parameters on the meta device (no bytes); only the small computed
buffers (rotary frequencies, embedding scales) are real. Then the checkpoint is read a few rows at a time:
each nn.Linear of a decoder layer becomes a `FrozenLinear` whose weight is packed on the compute device;
norms, biases, embedding and head are read in the compute dtype, with no fp32 upcasts. Peak: packed size, plus
one block of rows (64 MiB), plus the quantiser's scratch (64 MiB). transformers' own loader first materialises
16-bit weights.

Embedding and head stay unpacked, as in QLoRA (arXiv:2305.14314) and PEFT; a tied matrix exists once.
"""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from qlora_train.errors import BaseModelError, UnsupportedModelError
from qlora_train.model import attention
from qlora_train.model.decoder import FrozenDecoder
from qlora_train.model.linear import FrozenLinear
from qlora_train.model.quantize import PackedWeight, Packing, pack, read_bitsandbytes_weight
from qlora_train.model.shards import ShardReader


class ResidentWeights:
    """A `WeightSource` whose packed weights all stay on the compute device."""

    def __init__(self) -> None:
        self.packed: dict[str, PackedWeight] = {}

    def unpack(self, name: str, dtype: torch.dtype) -> Tensor:
        return self.packed[name].unpack(dtype)

    @property
    def num_bytes(self) -> int:
        return sum(weight.num_bytes for weight in self.packed.values())


def read_config(folder: Path) -> PretrainedConfig:
    """The base's config. Raises `BaseModelError` if there is none or transformers does not know the
    family."""
    if not (folder / "config.json").is_file():
        raise BaseModelError(
            f"{folder}: no config.json. model.base must be a folder with config.json and safetensors weights."
        )
    try:
        return AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    except (ValueError, OSError, KeyError) as error:
        raise BaseModelError(f"{folder / 'config.json'}: transformers cannot read it ({error})") from error


def empty_model(config: PretrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    """The causal LM of this config with packed attention, parameters on the meta device, buffers real."""
    try:
        with init_empty_weights(include_buffers=False):
            model: PreTrainedModel = AutoModelForCausalLM.from_config(
                deepcopy(config), dtype=dtype, attn_implementation=attention.NAME
            )
    except ValueError as error:
        raise UnsupportedModelError(
            f"{config.model_type}: transformers has no causal language model for it ({error})"
        ) from error
    decoder = model.get_decoder()
    if not all(hasattr(decoder, part) for part in ("layers", "embed_tokens", "norm")):
        raise UnsupportedModelError(
            f"{config.model_type}: not a LLaMA-class decoder (embed_tokens, layers, norm)"
        )
    tie_head(model)
    return model


def load_base(folder: Path, packing: Packing, dtype: torch.dtype, device: torch.device) -> FrozenDecoder:
    """Read and pack a base model.

    folder: with config.json and safetensors. packing: of the decoder layers' linears. dtype: of everything
    else and of the computation. Raises `BaseModelError` for missing, surplus, misshapen or differently packed
    tensors.
    """
    model = empty_model(read_config(folder), dtype)
    source = ResidentWeights()
    swap_linears(model, source)
    with ShardReader(folder) as reader:
        names = _CheckpointNames(reader, model, folder)
        linears = [m for m in model.modules() if isinstance(m, FrozenLinear)]
        for linear in linears:
            name = names.find(f"{linear.name}.weight")
            source.packed[linear.name] = _read_packed(reader, name, linear, packing, dtype, device)
        for name, parameter in list(model.named_parameters()):
            _set_parameter(model, name, _read_plain(reader, names.find(name), parameter.shape, dtype, device))
        names.refuse_unused()
    tie_head(model)
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, buffer.to(device))
    return FrozenDecoder(model, dtype, device)


def swap_linears(model: PreTrainedModel, source: ResidentWeights) -> None:
    """Replace every nn.Linear in the decoder layers by a FrozenLinear; refuse layers with other weight
    matrices."""
    layers = model.get_decoder().layers
    prefix = next(name for name, module in model.named_modules() if module is layers)
    for name, module in list(layers.named_modules()):
        if type(module) is not nn.Linear:
            continue
        linear = FrozenLinear(f"{prefix}.{name}", module.in_features, module.out_features, source)
        linear.bias = module.bias
        parent, _, attribute = name.rpartition(".")
        setattr(layers.get_submodule(parent), attribute, linear)
    surplus = [name for name, p in layers.named_parameters() if p.dim() > 1]
    if surplus:
        raise UnsupportedModelError(
            f"{model.config.model_type}: its layers hold weights that are not linear layers "
            f"({surplus[0].split('.', 1)[-1]}), "
            "such as fused experts, which qlora_train cannot pack"
        )


def tie_head(model: PreTrainedModel) -> None:
    """Let the head be the embedding matrix where the config says so: one parameter, read and counted once."""
    if model.config.tie_word_embeddings:
        model.get_output_embeddings().weight = model.get_input_embeddings().weight


def _set_parameter(model: PreTrainedModel, name: str, value: Tensor) -> None:
    module_name, _, attribute = name.rpartition(".")
    setattr(model.get_submodule(module_name), attribute, nn.Parameter(value, requires_grad=False))


def _read_packed(
    reader: ShardReader,
    name: str,
    linear: FrozenLinear,
    packing: Packing,
    dtype: torch.dtype,
    device: torch.device,
) -> PackedWeight:
    shape = (linear.out_features, linear.in_features)
    already = read_bitsandbytes_weight(reader, name, device)
    if already is not None:
        if already.packing != packing:
            raise BaseModelError(
                f"{name}: the checkpoint is already packed as {_describe(already.packing)}, the "
                "recipe asks for "
                f"{_describe(packing)}. Set model.quantization and model.double_quant to what the "
                "checkpoint has."
            )
        found = already.shape
    else:
        found = reader.info(name).shape  # type: ignore[assignment]
    if found != shape:
        raise BaseModelError(f"{name} is {list(found)} in the checkpoint, config.json needs {list(shape)}")
    if already is not None:
        return already
    return pack((rows for _, _, rows in reader.row_blocks(name)), shape, packing, device, dtype, name)


def _describe(packing: Packing) -> str:
    double = " with double quantisation" if packing.double_quant else ""
    return f"{packing.format}{double}" + (f", block size {packing.block_size}" if packing.is_4bit else "")


def _read_plain(
    reader: ShardReader, name: str, shape: torch.Size, dtype: torch.dtype, device: torch.device
) -> Tensor:
    found = reader.info(name).shape
    if found != tuple(shape):
        raise BaseModelError(f"{name} is {list(found)} in the checkpoint, config.json needs {list(shape)}")
    value = torch.empty(shape, dtype=dtype, device=device)
    for start, stop, rows in reader.row_blocks(name):
        value[start:stop] = rows
    return value


class _CheckpointNames:
    """Finds a parameter in the checkpoint, with or without the base model's prefix, and notes what was
    used."""

    def __init__(self, reader: ShardReader, model: PreTrainedModel, folder: Path) -> None:
        self._reader, self._folder = reader, folder
        self._prefix = model.base_model_prefix + "."
        self._used: set[str] = set()
        if model.config.tie_word_embeddings:
            self._used.add("lm_head.weight")  # where a file holds it all the same, the config's word counts

    def find(self, name: str) -> str:
        for candidate in (name, name.removeprefix(self._prefix)):
            if candidate in self._reader:
                self._used.add(candidate)
                return candidate
        raise BaseModelError(
            f"{self._folder}: the checkpoint has no tensor {name}, which config.json calls for"
        )

    def refuse_unused(self) -> None:
        """A weight that nothing reads means a config that is not this checkpoint's."""
        weights = [
            n for n in self._reader.names() if n.endswith((".weight", ".bias")) and n not in self._used
        ]
        if weights:
            raise BaseModelError(
                f"{self._folder}: the checkpoint holds {len(weights)} weights that config.json has "
                "no place for "
                f"(such as {weights[0]}). Check that config.json belongs to these weights."
            )
