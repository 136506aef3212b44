"""`qlora-train cache list | clear`: lists and removes quantized bases and tokens that are kept. Imports
no torch."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from qlora_train.data.tokenized_examples import FOLDER_PREFIX, META
from qlora_train.errors import UserError
from qlora_train.files.folder_lock import OLD, PARTIAL, lock_folder, remove_if_free
from qlora_train.files.sealed_json import unseal
from qlora_train.weights.cache_key import MANIFEST, is_complete


@dataclass(frozen=True)
class CacheEntry:
    """One folder of the cache. contents: in words: the folder it was quantized from, the data whose tokens it
    holds, "leftover" (half-written or replaced) or "damaged". written: seconds since the epoch. is_in_use:
    locked by a process."""

    folder: Path
    num_bytes: int
    contents: str
    written: float
    is_in_use: bool

    def line(self) -> str:
        """The line that `cache list` prints."""
        size = f"{self.num_bytes / 1e9:8.2f} GB"
        when = time.strftime("%Y-%m-%d %H:%M", time.localtime(self.written))
        return f"{size}  {when}  {self.folder.name}  {self.contents}{'  (in use)' if self.is_in_use else ''}"


def list_cache(root: Path) -> list[CacheEntry]:
    """The quantized bases, tokens of data and leftovers below `root`, largest first."""
    folders = [path for path in root.iterdir() if path.is_dir()] if root.is_dir() else []
    entries = [_entry(folder) for folder in folders if _is_ours(folder)]
    return sorted(entries, key=lambda entry: (-entry.num_bytes, entry.folder.name))


def clear_cache(root: Path, names: Sequence[str] = ()) -> tuple[list[CacheEntry], list[CacheEntry]]:
    """Remove the named entries, all if none is named; returns (removed, kept because they are in use).

    Raises `UserError` for an unknown name, before anything is removed."""
    entries = {entry.folder.name: entry for entry in list_cache(root)}
    unknown = [name for name in names if name not in entries]
    if unknown:
        raise UserError(f"{root}: holds no {unknown[0]}; see qlora-train cache list")
    wanted = [entries[name] for name in names or entries]
    gone = [remove_if_free(entry.folder) for entry in wanted]
    return (
        [entry for entry, is_gone in zip(wanted, gone, strict=True) if is_gone],
        [entry for entry, is_gone in zip(wanted, gone, strict=True) if not is_gone],
    )


def _is_ours(folder: Path) -> bool:
    """Whether a folder below the root is a quantized base, tokens of data, or a leftover of one."""
    is_whole = (folder / MANIFEST).is_file() or folder.name.startswith(FOLDER_PREFIX)
    return is_whole or _is_leftover(folder)


def _is_leftover(folder: Path) -> bool:
    return PARTIAL in folder.name or OLD in folder.name


def _contents(folder: Path) -> str:
    """See `CacheEntry`."""
    if _is_leftover(folder):
        return "leftover"
    try:
        if is_complete(folder):
            return str(unseal(folder / MANIFEST)["base"])
        meta = json.loads((folder / META).read_bytes())
        if all((folder / name).stat().st_size == n for name, n in meta["num_bytes"].items()):
            return "tokens of " + ", ".join(name for name, _ in meta["facts"]["tables"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return "damaged"
    return "damaged"


def _entry(folder: Path) -> CacheEntry:
    files = [path for path in folder.rglob("*") if path.is_file()]
    lock = lock_folder(folder)
    if lock is not None:
        lock.close()
    return CacheEntry(
        folder,
        sum(path.stat().st_size for path in files),
        _contents(folder),
        folder.stat().st_mtime,
        lock is None,
    )
