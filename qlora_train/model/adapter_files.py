"""LoRA adapters on disk, in PEFT's format: `adapter_config.json` and `adapter_model.safetensors`.

An adapter adds scaling * B A to some weights W [out, in] of the base, with A [rank, in], B [out, rank] and
scaling = alpha / rank (rsLoRA: alpha / sqrt(rank)). PEFT names the two tensors of the module at `path`
`base_model.model.<path>.lora_A.weight` and `...lora_B.weight`, path counted from the CausalLM.

Written without peft, which would need the whole model in memory to save the few megabytes beside it. PEFT's
format has many variants (DoRA, saved embeddings, ranks by pattern, ...): one that would need more than A, B
and a single scaling is refused by name, because loading it as plain LoRA would give a different model
without a word.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qlora_train.boundary import read_json
from qlora_train.errors import BaseModelError
from qlora_train.model.atomic_folder import atomic_folder
from qlora_train.model.shards import ShardReader, write_tensors

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
PREFIX = "base_model.model."
SUFFIXES = (".lora_A.weight", ".lora_B.weight")

Factors = dict[str, tuple[Tensor, Tensor]]

# Keys of PEFT's LoraConfig that, when set, mean more than W + scaling * B A.
UNSUPPORTED_KEYS = {
    "use_dora": "DoRA",
    "lora_bias": "a bias in the LoRA factors",
    "modules_to_save": "fully trained modules",
    "rank_pattern": "ranks that differ by module",
    "alpha_pattern": "alphas that differ by module",
    "fan_in_fan_out": "transposed (Conv1D) weights",
    "layer_replication": "replicated layers",
    "trainable_token_indices": "trained token embeddings",
    "target_parameters": "LoRA on parameters instead of modules",
    "alora_invocation_tokens": "activated LoRA",
    "use_qalora": "QALoRA",
    "use_bdlora": "block-diagonal LoRA",
    "arrow_config": "Arrow routing",
    "monteclora_config": "MonteCLoRA",
}
# Initialisations that also change the base weights, so that the factors fit no published checkpoint.
UNSUPPORTED_INITS = ("pissa", "olora", "corda", "loftq", "lora_ga")


@dataclass(frozen=True)
class AdapterConfig:
    """What an adapter's config says. `target_modules` are module name endings or whole paths."""

    base_model: str
    rank: int
    alpha: float
    dropout: float = 0.0
    target_modules: list[str] = field(default_factory=list)
    use_rslora: bool = False

    @property
    def scaling(self) -> float:
        """The factor of B A in the merged weight."""
        return self.alpha / (math.sqrt(self.rank) if self.use_rslora else self.rank)


def shortest_names(trained: Iterable[str], existing: Iterable[str]) -> list[str]:
    """`target_modules` that name the trained modules and no other: the last part of a path ("q_proj") where
    every existing module of that name is trained, else whole paths. Sorted.
    """
    paths = set(trained)
    partly = {_last_part(path) for path in existing if path not in paths}
    return sorted({path if _last_part(path) in partly else _last_part(path) for path in paths})


def _last_part(path: str) -> str:
    return path.rpartition(".")[2]


def save_adapter(folder: Path, config: AdapterConfig, factors: Mapping[str, tuple[Tensor, Tensor]]) -> None:
    """Write (or wholly replace) an adapter folder; the same input gives the same bytes.

    `factors`: module path inside the CausalLM, such as "model.layers.0.self_attn.q_proj" -> (A [rank, in],
    B [out, rank]). They are stored in fp32.
    """
    tensors: dict[str, Tensor] = {}
    for path in sorted(factors):
        for suffix, factor in zip(SUFFIXES, factors[path], strict=True):
            tensors[PREFIX + path + suffix] = (
                factor.detach().to(device="cpu", dtype=torch.float32).contiguous()
            )
    with atomic_folder(Path(folder)) as partial:
        (partial / CONFIG_FILE).write_text(
            json.dumps(_to_peft(config), indent=2, sort_keys=True) + "\n", "utf-8"
        )
        with open(partial / WEIGHTS_FILE, "wb") as file:
            write_tensors(file, tensors, {"format": "pt"})


def load_adapter(folder: Path) -> tuple[AdapterConfig, Factors]:
    """Read an adapter that this package or peft wrote: its config and {module path: (A [rank, in], B [out,
    rank])}, fp32.

    Raises `BaseModelError` for a folder that holds no such adapter, and for features beyond plain LoRA, by
    name.
    """
    folder = Path(folder)
    raw = _read_config(folder)
    _refuse_unsupported(folder, raw)
    if not (folder / WEIGHTS_FILE).is_file():
        if (folder / "adapter_model.bin").is_file():
            raise BaseModelError(
                f"{folder}: the adapter is in pickle format (adapter_model.bin), which can run code when"
                " loaded and is refused. Load it once with peft where you trust it and save it again: that"
                f" writes {WEIGHTS_FILE}."
            )
        raise BaseModelError(f"{folder}: {CONFIG_FILE} is there, but {WEIGHTS_FILE} is missing.")
    try:
        rank, alpha = int(raw["r"]), raw["lora_alpha"]
        base_model, dropout = (
            str(raw.get("base_model_name_or_path") or ""),
            float(raw.get("lora_dropout", 0.0)),
        )
        use_rslora, targets = bool(raw.get("use_rslora", False)), raw.get("target_modules")
        if rank < 1 or isinstance(alpha, bool) or not isinstance(alpha, (int, float)):
            raise ValueError(f"r = {rank}, lora_alpha = {alpha!r}")
    except (KeyError, TypeError, ValueError) as error:
        raise BaseModelError(
            f"{folder / CONFIG_FILE}: r and lora_alpha must be numbers ({error!r})."
        ) from error
    factors = _read_factors(folder, rank)
    if not isinstance(targets, list):  # peft also takes a regular expression: the factors say what it matched
        targets = {_last_part(path) for path in factors}
    config = AdapterConfig(base_model, rank, alpha, dropout, sorted(targets), use_rslora)
    return config, factors


def _to_peft(config: AdapterConfig) -> dict[str, Any]:
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": config.base_model,
        "revision": None,
        "r": config.rank,
        "lora_alpha": config.alpha,
        "lora_dropout": config.dropout,
        "target_modules": list(config.target_modules),
        "use_rslora": config.use_rslora,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "modules_to_save": None,
        "layers_to_transform": None,
        "layers_pattern": None,
        "rank_pattern": {},
        "alpha_pattern": {},
        "use_dora": False,
    }


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG_FILE
    if not path.is_file():
        raise BaseModelError(f"{folder}: no adapter here: {CONFIG_FILE} is missing.")
    return read_json(path, BaseModelError, "Copy the adapter again.")


def _refuse_unsupported(folder: Path, raw: dict[str, Any]) -> None:
    found = [f"{meaning} ({key})" for key, meaning in UNSUPPORTED_KEYS.items() if raw.get(key)]
    if raw.get("peft_type") != "LORA":
        found.append(f"the method {raw.get('peft_type')} (peft_type)")
    if raw.get("bias", "none") != "none":
        found.append(f"trained biases (bias: {raw['bias']})")
    init = str(raw.get("init_lora_weights", "")).lower()
    if init.startswith(UNSUPPORTED_INITS):
        found.append(f"an initialisation that changes the base weights (init_lora_weights: {init})")
    if found:
        raise BaseModelError(
            f"{folder}: the adapter uses {', '.join(found)}; only plain LoRA is supported. "
            "Merge it into its base with peft, and train on the merged model."
        )


def _read_factors(folder: Path, rank: int) -> Factors:
    with ShardReader(folder, single_file=WEIGHTS_FILE) as reader:
        names = reader.names()
        if strange := [name for name in names if not (name.startswith(PREFIX) and name.endswith(SUFFIXES))]:
            raise BaseModelError(
                f"{folder}: {WEIGHTS_FILE} holds {strange[0]} (and {len(strange) - 1} more like it), which"
                " plain LoRA does not have."
            )
        paths = dict.fromkeys(name.removeprefix(PREFIX).rsplit(".lora_", 1)[0] for name in names)
        factors: Factors = {}
        for path in paths:
            a, b = (reader.read(PREFIX + path + suffix) for suffix in SUFFIXES)
            if a.ndim != 2 or b.ndim != 2 or a.shape[0] != rank or b.shape[1] != rank:
                raise BaseModelError(
                    f"{folder}: the factors of {path} have the shapes {list(a.shape)} and {list(b.shape)};"
                    f" with the config's r = {rank} they must be [{rank}, in] and [out, {rank}]."
                )
            if not (a.is_floating_point() and b.is_floating_point()):
                raise BaseModelError(f"{folder}: the factors of {path} are {a.dtype}, no real numbers.")
            if not (torch.isfinite(a).all() and torch.isfinite(b).all()):
                raise BaseModelError(
                    f"{folder}: the factors of {path} hold values that are not finite. Copy the "
                    "adapter again, or train it anew."
                )
            factors[path] = (a.float(), b.float())
    if not factors:
        raise BaseModelError(f"{folder}: {WEIGHTS_FILE} holds no factors.")
    return factors
