"""Where a packed base lies in the cache, and whether it is there: what `plan` may ask without torch.

The name of its folder is a fingerprint of what the bytes follow from: format version, packing, compute dtype,
config.json, and of every weight file its name, size, time of change and header (hashing 16 GB of weights at
each start would cost more than the packing saves). What is inside is packed_cache.py's business; here a base
counts as present when every file that its manifest lists has the size that is written there. Their content is
compared when the base is opened.
"""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path

VERSION = 3
MANIFEST = "manifest.json"
BLOCK_SIZE = 64


@dataclass(frozen=True)
class PackingKey:
    """`model/quantize.Packing` in plain values, field by field. block_size: numbers per absmax."""

    format: str
    double_quant: bool
    block_size: int = BLOCK_SIZE


def cache_root() -> Path:
    """The folder that holds all packed bases."""
    named = os.environ.get("QLORA_TRAIN_CACHE")
    if named:
        return Path(named)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "qlora_train"


def packed_folder(root: Path, base_folder: Path, packing: PackingKey, dtype: str) -> Path:
    """Where below `root` the packed base is, or will be. dtype: the recipe's word for the compute dtype."""
    digest = hashlib.sha256()
    digest.update(json.dumps([VERSION, asdict(packing), f"torch.{dtype}"]).encode())
    digest.update((base_folder / "config.json").read_bytes())
    for path in sorted(base_folder.glob("*.safetensors")):
        stat = path.stat()
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = file.read(min(length, stat.st_size))
        digest.update(f"{path.name} {stat.st_size} {stat.st_mtime_ns}".encode())
        digest.update(hashlib.sha256(header).digest())
    return root / f"{base_folder.name}-{packing.format}-{digest.hexdigest()[:16]}"


def is_complete(folder: Path) -> bool:
    """Whether a packed base is there, as far as names and sizes tell."""
    try:
        entries = json.loads((folder / MANIFEST).read_text())["files"]
        return all((folder / name).stat().st_size == entry["num_bytes"] for name, entry in entries.items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):  # not there, or damaged
        return False
