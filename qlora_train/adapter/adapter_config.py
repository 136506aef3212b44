"""Reads and writes PEFT's `adapter_config.json`, and matches an adapter's module paths with those of a base.

Imports no torch, so that `plan` can read the adapter that training continues. PEFT's format has many variants
(trained biases, saved embeddings, ...). One that needs more than A, B, a scaling, and DoRA's magnitudes or a
bias of B, per module is refused by name: loaded as plain LoRA it would silently be a different model.

PEFT names tensors `base_model.model.<path>.lora_A.weight`, with the path from the class that was trained.
Classes and tools differ: the same layer is `model.layers.0`, `layers.0`, `model.language_model.layers.0` or
`language_model.model.layers.0`. The parts before `layers` are wrappers of the text model or belong to another
tower (such as vision), so only known wrapper names are ignored.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import KW_ONLY, dataclass, field, replace
from pathlib import Path
from typing import Any

from qlora_train.boundary import read_json
from qlora_train.errors import BaseModelError
from qlora_train.recipe.module_patterns import by_pattern, last_name, matching_names, pattern_of

CONFIG_FILE = "adapter_config.json"
TENSOR_NAME = re.compile(
    r"(?:base_model\.model\.)?(?P<path>.+)"
    r"(?:\.lora_(?:(?P<letter>[AB])(?:\.default)?\.weight|(?P<row>B(?:\.default)?\.bias"
    r"|magnitude_vector(?:\.default)?(?:\.weight)?))"
    r"|(?P<rows>\.token_adapter\.trainable_tokens_delta(?:\.default)?))"
)
HEAD = "lm_head"
_WRAPPERS = ("base_model", "model", "language_model", "text_model")

# Keys of PEFT's LoraConfig that, when set, mean more than W + scaling * B A, or that with a magnitude.
UNSUPPORTED_KEYS = {
    "modules_to_save": "fully trained modules",
    "fan_in_fan_out": "transposed (Conv1D) weights",
    "layer_replication": "replicated layers",
    "alora_invocation_tokens": "activated LoRA",
    "use_qalora": "QALoRA",
    "use_bdlora": "block-diagonal LoRA",
    "arrow_config": "Arrow routing",
    "monteclora_config": "MonteCLoRA",
}
# Initialisations that also change the base weights, so that A and B fit no published checkpoint.
UNSUPPORTED_INITS = ("pissa", "olora", "corda", "loftq", "lora_ga")


@dataclass(frozen=True)
class AdapterConfig:
    """An adapter's config.

    target_modules: module name endings or whole paths. rank_pattern, alpha_pattern: rank and alpha by whole
    path; other modules have `rank` and `alpha`. layers: indices of the layers that target_modules apply to;
    None: all. target_parameters: name endings or whole paths of the experts' parameters that have LoRA
    parameters. token_ids: the tokens whose rows are trained, in embedding and head. auto_mapping: the class
    that the adapter is written for, as PEFT names it; None: a causal language model.
    """

    base_model: str
    rank: int
    alpha: float
    _: KW_ONLY
    dropout: float = 0.0
    target_modules: list[str] = field(default_factory=list)
    use_rslora: bool = False
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    layers: list[int] | None = None
    use_dora: bool = False
    target_parameters: list[str] = field(default_factory=list)
    lora_bias: bool = False
    auto_mapping: Mapping[str, str] | None = None
    token_ids: tuple[int, ...] = ()

    @property
    def scaling(self) -> float:
        """The s in W + s B A, for modules without a rank or alpha of their own."""
        return self._scaling(self.alpha, self.rank)

    def rank_of(self, path: str) -> int:
        return self.rank_pattern.get(path, self.rank)

    def alpha_of(self, path: str) -> float:
        return self.alpha_pattern.get(path, self.alpha)

    def scaling_of(self, path: str) -> float:
        """The s in W + s B A of a module."""
        return self._scaling(self.alpha_of(path), self.rank_of(path))

    def renamed(self, names: Mapping[str, str]) -> AdapterConfig:
        """The config with module paths replaced by `names[path]`; endings of parameters stay."""
        return replace(
            self,
            rank_pattern={names[path]: rank for path, rank in self.rank_pattern.items()},
            alpha_pattern={names[path]: alpha for path, alpha in self.alpha_pattern.items()},
            target_parameters=[names.get(path, path) for path in self.target_parameters],
        )

    def experts_of(self, paths: Iterable[str]) -> list[str]:
        """The paths that name parameters of experts."""
        return [path for path in paths if matching_names(path, self.target_parameters)]

    def _scaling(self, alpha: float, rank: int) -> float:
        return alpha / (math.sqrt(rank) if self.use_rslora else rank)


def read_json_config(folder: Path) -> dict[str, Any]:
    """The content of adapter_config.json."""
    return read_json(folder / CONFIG_FILE, BaseModelError, "Copy the adapter again.")


def read_adapter_config(
    folder: Path, raw: dict[str, Any], num_rows: Mapping[str, int], experts: Collection[str]
) -> AdapterConfig:
    """The config of an adapter whose A have these numbers of rows, by path.

    raw: `read_json_config`. experts: the paths that are experts' parameters, whose A have the rows of every
    expert; the config holds their paths as target_parameters. Raises `BaseModelError` for a folder that holds
    no such adapter, features beyond LoRA and DoRA, and ranks other than the config's.
    """
    found = {"use_dora": bool(raw.get("use_dora", False)), "lora_bias": bool(raw.get("lora_bias", False))}
    if any(found.values()) and (heads := [path for path in num_rows if last_name(path) == HEAD]):
        used = " and ".join(key for key in found if found[key])
        raise BaseModelError(
            f"{folder}: the adapter uses {used} on {heads[0]}; that is supported on the linears of decoder "
            "layers. Merge it into its base with peft, and train on the merged model."
        )
    _refuse_unsupported(folder, raw)
    try:
        rank, alpha = int(raw["r"]), _number(raw["lora_alpha"])
        rank_pattern = {str(k): int(v) for k, v in (raw.get("rank_pattern") or {}).items()}
        alpha_pattern = {str(k): _number(v) for k, v in (raw.get("alpha_pattern") or {}).items()}
        if min([rank, *rank_pattern.values()]) < 1:
            raise ValueError(f"r = {rank}")
        dropout = float(raw.get("lora_dropout", 0.0))
        alphas = {path: by_pattern(alpha_pattern, path, alpha) for path in num_rows}
        ranks = {path: by_pattern(rank_pattern, path, rank) for path in num_rows}
    except (KeyError, TypeError, ValueError, OverflowError, AttributeError) as error:
        raise BaseModelError(
            f"{folder / CONFIG_FILE}: r and lora_alpha must be numbers, rank_pattern and alpha_pattern map "
            f"module names to numbers ({error!r})."
        ) from error
    for path, rows in num_rows.items():
        if path in experts and rows % ranks[path]:
            raise BaseModelError(
                f"{folder}: A of {path} has {rows} rows, which is no multiple of the rank {ranks[path]} that "
                "its config says (r or rank_pattern)."
            )
        if path not in experts and rows != ranks[path]:
            raise BaseModelError(
                f"{folder}: A and B of {path} have rank {rows}, its config says {ranks[path]} (r or "
                "rank_pattern)."
            )
    return AdapterConfig(
        base_model=str(raw.get("base_model_name_or_path") or ""),
        rank=rank,
        alpha=alpha,
        dropout=dropout,
        target_modules=sorted({last_name(path) for path in ranks if path not in experts}),
        use_rslora=bool(raw.get("use_rslora", False)),
        rank_pattern={path: own for path, own in ranks.items() if own != rank},
        alpha_pattern={path: own for path, own in alphas.items() if own != alpha},
        use_dora=found["use_dora"],
        target_parameters=sorted(experts),
        token_ids=_token_ids(folder, raw.get("trainable_token_indices")),
        lora_bias=found["lora_bias"],
    )


def _token_ids(folder: Path, written: Any) -> tuple[int, ...]:
    """The tokens of `trainable_token_indices`: a list, or one for each module. Raises `BaseModelError` unless
    all modules have the same ones, in ascending order."""
    lists = list(written.values()) if isinstance(written, dict) else [written or []]
    ids = tuple(lists[0]) if lists and isinstance(lists[0], list) else ()
    is_list = all(type(number) is int and number >= 0 for number in ids) and list(ids) == sorted(set(ids))
    if not is_list or any(other != lists[0] for other in lists):
        raise BaseModelError(
            f"{folder / CONFIG_FILE}: trainable_token_indices must be one ascending list of token ids, the "
            "same for embedding and head. Merge the adapter into its base with peft, and train on the merged "
            "model."
        )
    return ids


def _number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(f"{value!r} is no finite number")
    return value


def match_modules(paths: Iterable[str], existing: Iterable[str]) -> dict[str, str]:
    """Adapter's module path -> path of the same module in this base; paths without one are left out."""
    by_core = {_core(name): name for name in existing}
    return {path: by_core[_core(path)] for path in paths if _core(path) in by_core}


def _core(path: str) -> str:
    """A path without leading wrapper names."""
    parts = path.split(".")
    while len(parts) > 1 and parts[0] in _WRAPPERS:
        parts.pop(0)
    return ".".join(parts)


def name_targets(trained: Iterable[str], existing: Iterable[str]) -> tuple[list[str], list[int] | None]:
    """`target_modules` and `layers_to_transform` that name the trained modules and no other.

    Endings ("q_proj") where every existing module of that name is trained, in all layers (None) or in the
    same ones; else whole paths. Sorted.
    """
    wanted, all_modules = set(trained), list(existing)
    endings = {last_name(path) for path in wanted}
    layers = {layer_of(path) for path in wanted}
    for chosen in (None, layers):
        named = {
            path
            for path in all_modules
            if last_name(path) in endings and (chosen is None or layer_of(path) in chosen)
        }
        if named == wanted and (chosen is None or None not in chosen):
            return sorted(endings), None if chosen is None else sorted(i for i in chosen if i is not None)
    partly = {last_name(path) for path in all_modules if path not in wanted}
    return sorted({path if last_name(path) in partly else last_name(path) for path in wanted}), None


def name_parameters(trained: Collection[str], existing: Iterable[str]) -> list[str]:
    """`target_parameters` that name the trained parameters of experts and no other: what follows the layer
    where those of all layers are trained, else whole paths. Sorted."""
    partly = {within_layer(path) for path in existing if path not in trained}
    return sorted({path if within_layer(path) in partly else within_layer(path) for path in trained})


def within_layer(path: str) -> str:
    """A path without its layer."""
    return re.sub(r"^(.*?\.)?layers\.\d+\.", "", path)


def layer_of(path: str) -> int | None:
    """The number of the decoder layer that a module belongs to; None: it is in no layer."""
    found = re.search(r"(?:^|\.)layers\.(\d+)\.", path)
    return int(found[1]) if found else None


def to_peft(config: AdapterConfig, paths: Iterable[str], row_paths: Iterable[str] = ()) -> dict[str, Any]:
    """The values of adapter_config.json, as PEFT writes them for LoRA. paths: the modules with LoRA
    parameters. row_paths: the embedding, and the head where it is not tied, if rows of tokens are trained."""
    trained = sorted(paths)
    ids = list(config.token_ids)
    return {
        "peft_type": "LORA",
        "task_type": None if config.auto_mapping else "CAUSAL_LM",
        "auto_mapping": config.auto_mapping,
        "base_model_name_or_path": config.base_model,
        "revision": None,
        "r": config.rank,
        "lora_alpha": config.alpha,
        "lora_dropout": config.dropout,
        "target_modules": list(config.target_modules),
        "target_parameters": list(config.target_parameters) or None,
        "use_rslora": config.use_rslora,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "modules_to_save": None,
        "layers_to_transform": config.layers,
        "layers_pattern": None,
        "rank_pattern": pattern_of({path: config.rank_of(path) for path in trained}, config.rank),
        "alpha_pattern": pattern_of({path: config.alpha_of(path) for path in trained}, config.alpha),
        "use_dora": config.use_dora,
        "trainable_token_indices": dict.fromkeys(sorted(row_paths), ids) if ids else None,
        "lora_bias": config.lora_bias,
    }


def _refuse_unsupported(folder: Path, raw: dict[str, Any]) -> None:
    """Raise `BaseModelError` for a config that means more than LoRA and DoRA."""
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
            f"{folder}: the adapter uses {', '.join(found)}; only LoRA parameters of linear layers are "
            "supported. Merge it into its base with peft, and train on the merged model."
        )
