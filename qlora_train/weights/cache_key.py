"""The cache folder of a quantized base, and whether it is complete. Does not import torch.

The folder's name contains a fingerprint of everything that determines the bytes: format version,
quantization, compute dtype, config.json, and of every weight file its name, size, time of change, header,
and samples of its content (hashing 16 GB of weights at each start would cost more time than the cache saves).
What these miss, a few bytes changed in place by a tool that restores times, changes the files' stamp: it is
compared when the base is opened, and where it is new, all bytes are (quantized_cache.py). Here a base counts
as complete when every file in its manifest has the size listed there.
"""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import asdict
from pathlib import Path

from qlora_train.errors import UserError
from qlora_train.quant.formats import Quantization
from qlora_train.recipe import LoraSection

CACHE_FORMAT = 6
MANIFEST = "manifest.json"
_DECIDES_RESIDUAL = {
    "init_lora_weights",
    "rank",
    "rank_pattern",
    "target_modules",
    "exclude_modules",
    "layers_to_transform",
}
NUM_SAMPLES, SAMPLE_BYTES = 32, 8192  # of every weight file, spread evenly from its first byte to its last


def cache_root() -> Path:
    """The folder that holds all quantized bases. Raises `UserError` without a home folder."""
    named = os.environ.get("QLORA_TRAIN_CACHE")
    if named:
        return Path(named).expanduser()
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "qlora_train"
    except RuntimeError as error:
        raise UserError(
            "There is no home folder to keep quantized bases in: set QLORA_TRAIN_CACHE."
        ) from error


def quantized_folder(
    root: Path, base_folder: Path, quantization: Quantization, dtype: str, lora: LoraSection | None = None
) -> Path:
    """The folder below `root` of a quantized base, which need not exist. dtype: the compute dtype as the
    recipe spells it, such as "bfloat16". lora: of the run; with PiSSA it decides what is left of weights."""
    digest = hashlib.sha256()
    digest.update(json.dumps([CACHE_FORMAT, asdict(quantization), dtype]).encode())
    digest.update(residual_key(lora).encode())
    config = base_folder / "config.json"
    digest.update(config.read_bytes() if config.is_file() else b"")
    for path in weight_files(base_folder):
        digest.update(json.dumps([path.name, *_identity(path)]).encode())
    return root / f"{base_folder.name}-{quantization.format}-{digest.hexdigest()[:16]}"


def weight_files(base_folder: Path) -> list[Path]:
    """A base's weight files: no dangling link of a pruned hub cache, no pipe, which would be waited for."""
    return [path for path in sorted(base_folder.glob("*.safetensors")) if path.is_file()]


def stamp_of(base_folder: Path) -> list[list[int]]:
    """Numbers of the weight files' disk entries that are new after every write, and after a chmod or as a
    copy."""
    stats = [path.stat() for path in weight_files(base_folder)]
    return [[stat.st_ctime_ns, stat.st_ino] for stat in stats]


def residual_key(lora: LoraSection | None) -> str:
    """What decides which part of which weight PiSSA takes out of a base; empty: none of any."""
    if lora is None or lora.init_lora_weights is True:
        return ""
    return lora.model_dump_json(include=_DECIDES_RESIDUAL)


def _identity(path: Path) -> list[int | str]:
    """Values that identify a weight file: size, time of change, hash of header and samples."""
    stat = path.stat()
    hashed = hashlib.sha256()
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        hashed.update(file.read(min(length, stat.st_size)))
        last = max(0, stat.st_size - SAMPLE_BYTES)
        for i in range(NUM_SAMPLES):
            file.seek(last * i // (NUM_SAMPLES - 1))
            hashed.update(file.read(SAMPLE_BYTES))
    return [stat.st_size, stat.st_mtime_ns, hashed.hexdigest()]


def is_complete(folder: Path) -> bool:
    """Whether a folder holds a quantized base, judged by the names and sizes in its manifest."""
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
