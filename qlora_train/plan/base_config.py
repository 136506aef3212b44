"""Finds config.json of a base model: in a folder, the hub's cache, the known models, or on the hub.

Imports no torch."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qlora_train.errors import BaseModelError
from qlora_train.files.hub import require_folder_or_id
from qlora_train.model.base_folder import read_plain_config
from qlora_train.plan.known_models import KNOWN, PUBLISHERS


def find_base_folder(base: str, revision: str | None = None) -> Path | None:
    """The local folder of `model.base`: the one it names, or its snapshot in the hub's cache; else None."""
    folder = Path(base)
    if folder.is_dir():
        return folder
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        found = try_to_load_from_cache(base, "config.json", revision=revision)
    except HFValidationError:  # a path, or a name that nothing on the hub can have
        return None
    return Path(found).parent if isinstance(found, str) else None


def find_config(base: str, revision: str | None = None) -> Mapping[str, Any]:
    """The config of `model.base` without downloading anything; empty where it is not on this machine."""
    folder = find_base_folder(base, revision)
    return read_plain_config(folder) if folder is not None else known_config(base)


def fetch_config(base: str, revision: str | None) -> Path:
    """Download config.json alone into the hub's cache and return its folder. Raises `BaseModelError` where
    there is no such model, or no network."""
    from huggingface_hub import hf_hub_download

    require_folder_or_id(base)
    try:
        return Path(hf_hub_download(base, "config.json", revision=revision)).parent
    except (OSError, ValueError) as error:  # the hub's own errors are OSErrors
        reason = (str(error).strip() or type(error).__name__).split("\n")[0]
        raise BaseModelError(
            f"model.base: {base} is neither a folder, nor in the hub's cache, nor a known model, and its "
            f"config.json cannot be fetched from the hub ({reason}). Offline, put the model's config.json "
            "into a folder and plan with model.base=FOLDER."
        ) from error


def known_config(base: str) -> Mapping[str, Any]:
    """The values in `KNOWN` for a hub id of those who published the model, or for its name alone; else empty:
    another organisation's model of that name may have other sizes."""
    organisation = base.rpartition("/")[0].lower()
    return KNOWN.get(known_name(base), {}) if organisation in PUBLISHERS or not organisation else {}


def known_name(base: str) -> str:
    """The key in `KNOWN` of a hub id: small letters, without organisation and marks such as "-instruct"."""
    name = base.rpartition("/")[2].lower()
    name = re.sub(r"^meta-", "", name)
    name = re.sub(r"-(instruct|chat|base|hf|it|pt|coder|math|\d{4})(?=-|$)", "", name)
    return re.sub(r"^(tinyllama-1\.1b)-.*", r"\1", name)
