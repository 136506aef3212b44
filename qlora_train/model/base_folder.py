"""Checks of a base model's folder before loading, the same for `plan`, `train`, `generate` and `export`.

Imports no torch, since `plan` does not. Refused are folders that would load as a model other than expected:
with an adapter beside the weights, which transformers applies silently if peft is installed; with merged
weights that lie on a quantization grid and would be rounded back to it; with weights in a quantized format
that is not supported.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qlora_train.boundary import read_json
from qlora_train.errors import BaseModelError
from qlora_train.quant.formats import MXFP4, UNQUANTIZED, FormatName, Quantization

CONFIG_REMEDY = "Download the model's config.json again."
ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")
READABLE_METHODS = ("bitsandbytes", "fp8", "fbgemm_fp8", "mxfp4")
"""quant_method in a config.json: who has quantized weights that can be read."""
MERGED_KEY = "qlora_train"
"""Key in a merged folder's config.json: {"merged_onto": "original" | "dequantized", "quantization": ...}."""


def read_plain_config(folder: Path) -> dict[str, Any]:
    """The values in config.json, unchanged. Raises `BaseModelError` if it is missing or no JSON object."""
    path = folder / "config.json"
    if not path.is_file():
        if (folder / ADAPTER_FILES[0]).is_file():
            raise BaseModelError(
                f"{folder}: is an adapter, not a base model: it holds {ADAPTER_FILES[0]} and no config.json. "
                "Name the model it was trained on as model.base, and the adapter as lora.init_from."
            )
        raise BaseModelError(
            f"{folder}: no config.json. model.base must be a folder with config.json and safetensors weights."
        )
    return read_json(path, BaseModelError, CONFIG_REMEDY)


def stored_quantization(stored: Mapping[str, Any]) -> Quantization:
    """The quantization of a checkpoint's linears, from its quantization_config (bitsandbytes' keys)."""
    if stored.get("load_in_8bit"):
        return Quantization("int8")
    if stored.get("load_in_4bit"):
        form: FormatName = "nf4" if stored.get("bnb_4bit_quant_type") == "nf4" else "fp4"
        return Quantization(form, bool(stored.get("bnb_4bit_use_double_quant")))
    return UNQUANTIZED


def kept_quantization(stored: Mapping[str, Any]) -> Quantization | None:
    """How a checkpoint's experts are quantized, from its quantization_config, if training keeps them so."""
    return MXFP4 if stored.get("quant_method") == "mxfp4" else None


def check_base(folder: Path, quantization: str = "none", *, needs_originals: bool = False) -> None:
    """Raise `BaseModelError` unless the folder is a supported base. quantization: `model.quantization`.
    needs_originals: it must hold unquantized weights, for PiSSA."""
    config = read_plain_config(folder)
    stored = config.get("quantization_config") or {}
    if needs_originals and stored_quantization(stored).is_quantized:
        raise no_originals(str(folder))
    _refuse_adapter(folder)
    _refuse_dangling_weights(folder)
    _refuse_other_formats(folder, config)
    _refuse_requantizing(folder, config, quantization)


def no_originals(where: str) -> BaseModelError:
    return BaseModelError(
        f"{where}: is already quantized by bitsandbytes, and lora.init_lora_weights: pissa decomposes the "
        "original weights. Take the same model in 16 bits, or leave init_lora_weights out."
    )


def _refuse_adapter(folder: Path) -> None:
    found = [name for name in ADAPTER_FILES if (folder / name).is_file()]
    if found:
        raise BaseModelError(
            f"{folder}: holds an adapter beside the base ({', '.join(found)}). Other tools would apply it, "
            "here it would be left out. Move it to a folder of its own (and name that as lora.init_from to "
            "train it further), or merge it into the base first."
        )


def _refuse_dangling_weights(folder: Path) -> None:
    """Refuse broken links: a plan needs no weights, but these are a download that was deleted."""
    gone = sorted(path.name for path in folder.glob("*.safetensors") if not path.exists())
    if gone:
        raise BaseModelError(
            f"{folder}: {gone[0]} is a link to a file that is no longer there (a pruned hub cache?). "
            "Download the model again."
        )


def _refuse_other_formats(folder: Path, config: dict[str, Any]) -> None:
    """Refuse weights that are quantized in a format that is not read."""
    stored = config.get("quantization_config") or config.get("compression_config")
    method = stored.get("quant_method", "bitsandbytes") if isinstance(stored, dict) else "bitsandbytes"
    if method not in READABLE_METHODS:
        raise BaseModelError(
            f"{folder}: its weights are quantized by {method}, which is not read here ("
            f"{', '.join(READABLE_METHODS)} are). Take the repository with the same model's weights in 16 "
            "bits, usually the same name without an ending such as -AWQ: model.quantization quantizes them "
            "here."
        )


def _refuse_requantizing(folder: Path, config: dict[str, Any], quantization: str) -> None:
    mark = config.get(MERGED_KEY)
    if quantization == "none" or not isinstance(mark, dict) or mark.get("merged_onto") != "dequantized":
        return
    raise BaseModelError(
        f"{folder}: its weights were merged onto dequantized {mark.get('quantization')} weights. Quantizing "
        "them again would round most of the adapter away: the result is the base without it. Use "
        "model.quantization: none, or export the run again with --base original, whose weights can be "
        "quantized."
    )
