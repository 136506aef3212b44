"""Where a quantized base lies in the cache, and whether it is there: what `plan` may ask without torch.

The name of its folder is a fingerprint of what the bytes follow from: format version, quantization, compute
dtype, config.json, and of every weight file its name, size, times and number (inode) on the disk, its header,
and samples of its content (hashing 16 GB of weights at each start would cost more than the quantization
saves). Each alone can be fooled: a tool that restores times, a copy of another model of the same shape under
the same folder name, a filesystem that makes numbers up. What is inside is quantized_cache.py's business;
here a base counts as present when every file that its manifest lists has the size that is written there.
Their content is compared when the base is opened.
"""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import asdict
from pathlib import Path

from qlora_train.errors import UserError
from qlora_train.quant.formats import Quantization

CACHE_FORMAT = 5
MANIFEST = "manifest.json"
NUM_SAMPLES, SAMPLE_BYTES = 32, 8192  # of every weight file, spread evenly from its first byte to its last


def cache_root() -> Path:
    """The folder that holds all quantized bases."""
    named = os.environ.get("QLORA_TRAIN_CACHE")
    if named:
        return Path(named).expanduser()
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "qlora_train"
    except RuntimeError as error:
        raise UserError(
            "There is no home folder to keep quantized bases in: set QLORA_TRAIN_CACHE."
        ) from error


def quantized_folder(root: Path, base_folder: Path, quantization: Quantization, dtype: str) -> Path:
    """Where below `root` the quantized base is, or will be. dtype: the recipe's word for the compute
    dtype, as in "bfloat16"."""
    digest = hashlib.sha256()
    digest.update(json.dumps([CACHE_FORMAT, asdict(quantization), dtype]).encode())
    config = base_folder / "config.json"
    digest.update(config.read_bytes() if config.is_file() else b"")
    for path in sorted(base_folder.glob("*.safetensors")):
        if path.is_file():  # no dangling link of a pruned hub cache, and no pipe, which would be waited for
            digest.update(json.dumps([path.name, *_identity(path)]).encode())
    return root / f"{base_folder.name}-{quantization.format}-{digest.hexdigest()[:16]}"


def _identity(path: Path) -> list[int | str]:
    """What tells a weight file from any other: of its disk entry, and of its content."""
    stat = path.stat()
    hashed = hashlib.sha256()
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        hashed.update(file.read(min(length, stat.st_size)))
        last = max(0, stat.st_size - SAMPLE_BYTES)
        for i in range(NUM_SAMPLES):
            file.seek(last * i // (NUM_SAMPLES - 1))
            hashed.update(file.read(SAMPLE_BYTES))
    return [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino, hashed.hexdigest()]


def is_complete(folder: Path) -> bool:
    """Whether a quantized base is there, as far as names and sizes tell."""
    try:
        entries = json.loads((folder / MANIFEST).read_bytes())["files"]
        return all((folder / name).stat().st_size == entry["num_bytes"] for name, entry in entries.items())
    except (
        OSError,
        ValueError,
        KeyError,
        TypeError,
        AttributeError,
        RecursionError,
    ):  # not there, or damaged
        return False
