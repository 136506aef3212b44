"""Finds a base model's files: in a folder, or downloaded from the hub.

`model.base` is a folder, or a hub id whose safetensors, config and tokenizer files are downloaded (never
pickles) and pinned to a commit.
"""

from __future__ import annotations

from pathlib import Path

from qlora_train.errors import BaseModelError

_FILES = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]


def resolve_base(base: str, revision: str | None) -> tuple[Path, str | None]:
    """The local folder of a base and, for a hub id, the commit it resolved to.

    Raises `BaseModelError` for a missing folder or a hub id that cannot be fetched.
    """
    folder = Path(base)
    if folder.is_dir():
        if revision is not None:
            raise BaseModelError(
                f"model.revision is {revision}, but model.base is the local folder {base}: remove "
                "the revision"
            )
        return folder, None
    require_folder_or_id(base)

    from huggingface_hub import snapshot_download

    try:
        folder = Path(snapshot_download(base, revision=revision, allow_patterns=_FILES))
    except (OSError, ValueError) as error:  # the hub's own errors are OSErrors
        reason = str(error).strip().split("\n")[0]
        raise BaseModelError(
            f"model.base: there is no folder {base}, and as a hub id it cannot be fetched ({reason})"
        ) from error
    return folder, folder.name


def require_folder_or_id(base: str) -> None:
    """Raise `BaseModelError` for a base that is no folder and cannot be an id on the hub."""
    is_path = Path(base).is_absolute() or base.startswith(".") or base.count("/") > 1
    if is_path and not Path(base).is_dir():
        raise BaseModelError(f"model.base: there is no folder {base}")
