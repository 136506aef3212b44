"""Reads and writes LoRA adapters in PEFT's format: `adapter_config.json` and `adapter_model.safetensors`.

An adapter adds s B A to some weights W [out, in] of the base, with A [rank, in], B [out, rank] and
s = alpha / rank (rsLoRA: alpha / sqrt(rank)); rank and alpha may be a module's own. PEFT names the two
tensors of the module at `path` `base_model.model.<path>.lora_A.weight` and `...lora_B.weight`, path counted
from the CausalLM. Weights of experts have longer A and B (expert_parameters.py). With DoRA there is a third,
the magnitudes m [out] (model/magnitude.py): `...lora_magnitude_vector`; with `lora_bias` it is the bias of B
[out]: `...lora_B.bias`. Trained rows [n, D] of n tokens in embedding and head are
`base_model.model.<path>.token_adapter.trainable_tokens_delta`: rows, in spite of the name, no differences.

peft itself would need the whole model in memory to save an adapter. For variants of other tools, and what is
refused, see adapter_config.py.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qlora_train.adapter.adapter_config import (
    CONFIG_FILE,
    HEAD,
    TENSOR_NAME,
    AdapterConfig,
    match_modules,
    read_adapter_config,
    read_json_config,
    to_peft,
)
from qlora_train.adapter.expert_parameters import parameter_paths, stored_paths
from qlora_train.errors import BaseModelError
from qlora_train.files.atomic_folder import atomic_folder
from qlora_train.files.shards import ShardReader, write_tensors

WEIGHTS_FILE = "adapter_model.safetensors"
PREFIX = "base_model.model."
HEAD_COPY = f"{HEAD}.base_layer.weight"
"""Name of the copy of the base's head that PEFT saves beside an adapter of the head."""
SUFFIXES = {
    "A": ".lora_A.weight",
    "B": ".lora_B.weight",
    "m": ".lora_magnitude_vector",
    "bias": ".lora_B.bias",
    "rows": ".token_adapter.trainable_tokens_delta",
}

LoraPairs = dict[str, tuple[Tensor, ...]]
"""Module path -> (A [rank, in], B [out, rank]), with DoRA (A, B, m [out]), with biases (A, B, bias [out]), or
(trained rows [n, D],);
parameter path of E experts -> (A [E rank, in], B [out, rank E])."""


def save_adapter(
    folder: Path,
    config: AdapterConfig,
    lora: Mapping[str, tuple[Tensor, ...]],
    other_files: Mapping[str, str] | None = None,
) -> None:
    """Write (or replace as a whole) an adapter folder; the same input gives the same bytes.

    lora: by module path inside the CausalLM, such as "model.layers.0.self_attn.q_proj"; with m or bias if the
    config has them; rows of the config's tokens; stored in fp32. other_files: name -> text of files to write
    beside them.
    """
    tensors: dict[str, Tensor] = {}
    nested = stored_paths(config.experts_of(lora))
    for path in sorted(lora):
        parts = parts_of(config) if len(lora[path]) > 1 else ["rows"]
        for part, matrix in zip(parts, lora[path], strict=True):
            tensors[PREFIX + nested.get(path, path) + SUFFIXES[part]] = (
                matrix.detach().to(device="cpu", dtype=torch.float32).contiguous()
            )
    row_paths = [path for path in lora if len(lora[path]) == 1]
    values = to_peft(config, lora.keys() - row_paths, row_paths)
    with atomic_folder(Path(folder)) as partial:
        (partial / CONFIG_FILE).write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", "utf-8")
        for name, content in (other_files or {}).items():
            (partial / name).write_text(content, "utf-8")
        with open(partial / WEIGHTS_FILE, "wb") as file:
            write_tensors(file, tensors, {"format": "pt"})


def parts_of(config: AdapterConfig) -> list[str]:
    """The tensors of every module, as `SUFFIXES` has them."""
    parts = ["A", "B"]
    if config.use_dora:
        parts.append("m")
    if config.lora_bias:
        parts.append("bias")
    return parts


def load_adapter(folder: Path) -> tuple[AdapterConfig, LoraPairs]:
    """Read an adapter that this package, peft or another tool wrote: its config and its tensors in fp32, with
    paths as they are written there.

    Raises `BaseModelError` for a folder that holds no such adapter, and for features beyond LoRA and DoRA, by
    name.
    """
    folder = Path(folder)
    with _open(folder) as reader:
        names_by_path, raw, experts = _names_by_path(reader)
        lora = {path: _read(reader, path, names) for path, names in names_by_path.items()}
    adapted = {path: tensors for path, tensors in lora.items() if len(tensors) > 1}
    config = read_adapter_config(folder, raw, {path: len(a) for path, (a, *_) in adapted.items()}, experts)
    found = {len(lora[path][0]) for path in lora.keys() - adapted.keys()} or {0}
    if found != {len(config.token_ids)}:
        raise BaseModelError(
            f"{folder}: the config has {len(config.token_ids)} trainable_token_indices, {WEIGHTS_FILE} holds "
            f"rows of {max(found)} tokens. Copy the adapter again."
        )
    for path in adapted:
        for key, part in (("use_dora", "m"), ("lora_bias", "bias")):
            if (part in names_by_path[path]) != getattr(config, key):
                says, holds = str(getattr(config, key)).lower(), "no" if getattr(config, key) else "a"
                raise BaseModelError(
                    f"{folder}: the config says {key}: {says}, and {WEIGHTS_FILE} holds {holds} "
                    f"{SUFFIXES[part].removeprefix('.')} of {path}. Copy the adapter again."
                )
    return config, lora


def load_fitting(folder: Path, existing: Iterable[str]) -> tuple[AdapterConfig, LoraPairs]:
    """`load_adapter` with the module paths of this base. Raises `BaseModelError` where the base lacks a
    module of the adapter."""
    config, lora = load_adapter(folder)
    names = match_modules(lora, existing)
    if strange := [path for path in lora if path not in names]:
        raise BaseModelError(
            f"{folder}: the adapter has LoRA parameters for {strange[0]} (and {len(strange) - 1} more "
            "modules), which this base does not have. Is it the base that the adapter was trained on?"
        )
    return config.renamed(names), {names[path]: pair for path, pair in lora.items()}


def head_copy(folder: Path) -> Tensor | None:
    """The copy of the base's head that PEFT saved with an adapter; None: there is none."""
    with _open(folder) as reader:
        name = next((name for name in reader.names() if name.endswith(HEAD_COPY)), None)
        return None if name is None else reader.read(name)


def adapter_shapes(folder: Path) -> tuple[AdapterConfig, dict[str, tuple[int, int]]]:
    """The config and {module path: (in, out)}, without reading A and B."""
    with _open(folder) as reader:
        names_by_path, raw, experts = _names_by_path(reader)
        shapes = {
            path: [reader.info(pair[letter]).shape for letter in "AB"]
            for path, pair in names_by_path.items()
            if "A" in pair
        }
    config = read_adapter_config(folder, raw, {path: a[0] for path, (a, _) in shapes.items()}, experts)
    return config, {path: (a[1], b[0]) for path, (a, b) in shapes.items()}


def _open(folder: Path) -> ShardReader:
    """A reader of the adapter's tensors. Raises `BaseModelError` where a file is missing or pickled."""
    if not (folder / CONFIG_FILE).is_file():
        raise BaseModelError(f"{folder}: no adapter here: {CONFIG_FILE} is missing.")
    if not (folder / WEIGHTS_FILE).is_file():
        if (folder / "adapter_model.bin").is_file():
            raise BaseModelError(
                f"{folder}: the adapter is in pickle format (adapter_model.bin), which can run code when"
                " loaded and is refused. Load it once with peft where you trust it and save it again: that"
                f" writes {WEIGHTS_FILE}."
            )
        raise BaseModelError(f"{folder}: {CONFIG_FILE} is there, but {WEIGHTS_FILE} is missing.")
    return ShardReader(folder, single_file=WEIGHTS_FILE)


def _read(reader: ShardReader, path: str, names: Mapping[str, str]) -> tuple[Tensor, ...]:
    """The tensors of one module in fp32. names: the module's entry of `_names_by_path`. Raises
    `BaseModelError` for odd ones."""
    folder = reader.folder
    tensors = [reader.read(names[part]) for part in SUFFIXES if part in names]
    if len(tensors) > 1:
        _check_shapes(folder, path, SUFFIXES["m" if "m" in names else "bias"], *tensors)
    for tensor in tensors:
        if not tensor.is_floating_point():
            raise BaseModelError(f"{folder}: the tensors of {path} are {tensor.dtype}, no real numbers.")
        if not torch.isfinite(tensor).all():
            raise BaseModelError(
                f"{folder}: the tensors of {path} hold values that are not finite. Copy the "
                "adapter again, or train it anew."
            )
    return tuple(tensor.float() for tensor in tensors)


def _check_shapes(folder: Path, path: str, suffix: str, a: Tensor, b: Tensor, *third: Tensor) -> None:
    """Raise `BaseModelError` unless A, B and m or bias fit each other. suffix: the ending of the third's
    name."""
    if a.ndim != 2 or b.ndim != 2 or a.shape[0] != b.shape[1]:
        raise BaseModelError(
            f"{folder}: A and B of {path} have the shapes {list(a.shape)} and {list(b.shape)};"
            " they must be [rank, in] and [out, rank]."
        )
    if third and third[0].shape != b.shape[:1]:
        raise BaseModelError(
            f"{folder}: the {suffix.removeprefix('.')} of {path} has the shape {list(third[0].shape)}; it "
            f"must be [{len(b)}], a number for every row of B."
        )


def _names_by_path(
    reader: ShardReader,
) -> tuple[dict[str, dict[str, str]], dict[str, Any], frozenset[str]]:
    """(path -> {"A": tensor name, "B": tensor name}, with DoRA "m", with lora_bias "bias" too, or {"rows":
    tensor name}; the content of the config; the paths that are parameters of experts)."""
    found: dict[str, dict[str, str]] = {}
    for name in reader.names():
        if name.endswith(HEAD_COPY):
            continue
        parts = TENSOR_NAME.fullmatch(name)
        if parts is None:
            raise BaseModelError(
                f"{reader.folder}: {WEIGHTS_FILE} holds {name}, which neither LoRA nor DoRA has."
            )
        part = parts["letter"] or ("rows" if parts["rows"] else "bias" if name.endswith(".bias") else "m")
        found.setdefault(parts["path"], {})[part] = name
    if not any("A" in pair for pair in found.values()):
        raise BaseModelError(f"{reader.folder}: {WEIGHTS_FILE} holds no LoRA parameters.")
    if both := [path for path, pair in found.items() if {"A", "rows"} <= pair.keys()]:
        raise BaseModelError(
            f"{reader.folder}: the adapter has LoRA parameters and trained rows of tokens on {both[0]}. "
            "Merge it into its base with peft, and train on the merged model."
        )
    if halves := [
        path for path, pair in found.items() if not {"A", "B"} <= pair.keys() and "rows" not in pair
    ]:
        raise BaseModelError(f"{reader.folder}: {WEIGHTS_FILE} holds only one of A and B of {halves[0]}.")
    raw = read_json_config(reader.folder)
    try:
        experts = parameter_paths(found, raw.get("target_parameters"))
    except BaseModelError as error:
        raise BaseModelError(f"{reader.folder}: {error}") from error
    by_path = {experts.get(path, path): names for path, names in found.items()}
    return by_path, raw, frozenset(experts.values())
