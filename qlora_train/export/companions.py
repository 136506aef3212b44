"""Writes the files beside merged weights: config, tokenizer, templates, licence, model card.

Files of the base's folder that other tools and people need are copied by name; weights, their indices, code
and adapter files are not. A file is copied only if it really lies in the base, or in the hub cache that the
base's own links lead to, so that a link in a download cannot put a private file into a published folder.

`auto_map` in a JSON file names code (`modeling_x.Model`) to be run in place of transformers' own. The code is
not copied, so the key is removed: with it, tools that trust remote code would miss the file; without it they
load the class that was trained here.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from qlora_train.boundary import read_json
from qlora_train.errors import BaseModelError
from qlora_train.model.base_folder import ADAPTER_FILES, MERGED_KEY, read_plain_config
from qlora_train.quant.formats import Quantization

TEMPLATES = "additional_chat_templates"
LICENSES = re.compile(r"(LICEN[CS]E|NOTICE|COPYING|USE_POLICY|AUTHORS)[^/]*", re.IGNORECASE)
COPIED = re.compile(
    rf".*\.(json|jinja|model|txt|tiktoken|md)|tokenizer\..*|{TEMPLATES}/.*|{LICENSES.pattern}",
    re.IGNORECASE,
)
_NOT_COPIED = {"config.json", *ADAPTER_FILES, "quantize_config.json", "quantization_config.json"}

_NOT_MERGED = ("quantization_config", "auto_map", "_name_or_path")  # the last is a path of somebody's machine


def copy_companions(
    base_folder: Path, folder: Path, log: Callable[[str], None], copied: re.Pattern[str] = COPIED
) -> None:
    """Copy the companion files of the base into `folder`. log: called with a line for each file that is left
    out because it lies outside the base. copied: their names in it."""
    within = _homes(base_folder)
    for path in [*sorted(base_folder.iterdir()), *_templates(base_folder)]:
        name = path.relative_to(base_folder)
        if not path.is_file() or not _is_companion(name, copied):
            continue
        if not any(path.resolve().is_relative_to(home) for home in within):
            log(f"not copied: {name}, a link to a file outside the base ({path.resolve()})")
            continue
        target = folder / name
        target.parent.mkdir(exist_ok=True)
        shutil.copyfile(path, target)
        if path.suffix == ".json":
            _leave_out_code(target)


def write_tokenizer(tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write a tokenizer with added tokens over the base's own."""
    for name in tokenizer.save_pretrained(folder):
        if name.endswith(".json"):
            _leave_out_code(Path(name))


def _is_companion(name: Path, copied: re.Pattern[str]) -> bool:
    """Whether a file of the base is copied, by its name in the base."""
    if name.name in _NOT_COPIED or name.name.endswith(".index.json"):
        return False
    return copied.fullmatch(name.as_posix()) is not None


def _templates(base_folder: Path) -> Iterator[Path]:
    if (base_folder / TEMPLATES).is_dir():
        yield from sorted((base_folder / TEMPLATES).iterdir())


def _homes(base_folder: Path) -> list[Path]:
    """The folders that files of the base may really lie in: its own and, for a snapshot in the hub cache
    (models--x/snapshots/commit), the blobs beside it."""
    folder = base_folder.resolve()
    is_snapshot = folder.parent.name == "snapshots" and folder.parent.parent.name.startswith("models--")
    return [folder, folder.parent.parent / "blobs"] if is_snapshot else [folder]


def _leave_out_code(file: Path) -> None:
    """Remove `auto_map` from a JSON file."""
    try:
        content = json.loads(file.read_bytes())
    except (ValueError, RecursionError):  # not valid JSON: left as it is
        return
    if isinstance(content, dict) and "auto_map" in content:
        del content["auto_map"]
        file.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", "utf-8")


def merged_config(
    config: Mapping[str, Any],
    dtype: torch.dtype,
    quantization: Quantization | None,
    *,
    unties_head: bool,
    vocabulary_size: int,
) -> str:
    """The text of config.json. quantization: of the weights that were merged onto; None: the original ones.
    unties_head: the head is no longer the embedding's matrix. vocabulary_size: rows of the embedding."""
    # transformers 5 calls it dtype, most other tools still read torch_dtype
    name = str(dtype).removeprefix("torch.")
    kept = {key: value for key, value in config.items() if key not in _NOT_MERGED}
    if unties_head:
        kept["tie_word_embeddings"] = False
    for part in (kept, kept.get("text_config")):
        if isinstance(part, dict) and "vocab_size" in part:
            part["vocab_size"] = max(part["vocab_size"], vocabulary_size)
    mark: dict[str, Any] = {"merged_onto": "original"}
    if quantization is not None and quantization.is_quantized:
        mark = {"merged_onto": "dequantized", "quantization": quantization.format}
    return json.dumps(kept | {"dtype": name, "torch_dtype": name, MERGED_KEY: mark}, indent=2) + "\n"


def list_end_ids(folder: Path, end_ids: Sequence[int]) -> None:
    """Add tokens to eos_token_id in generation_config.json, beside those listed there or in config.json."""
    file = folder / "generation_config.json"
    config = read_json(file, BaseModelError, "Download it again, or remove it.") if file.exists() else {}
    model_config = read_plain_config(folder)
    listed = config.get("eos_token_id", model_config.get("eos_token_id"))
    listed = listed if isinstance(listed, list) else [] if listed is None else [listed]
    if new := [token for token in dict.fromkeys(end_ids) if token not in listed]:
        file.write_text(json.dumps(config | {"eos_token_id": [*listed, *new]}, indent=2) + "\n", "utf-8")
