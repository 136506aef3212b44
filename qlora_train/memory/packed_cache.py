"""The packed base on disk: made once per base and packing, read as it is by every later start.

It is also the place that layers stream from when they do not fit into RAM.

    <cache>/<fingerprint>/manifest.json       version, packing, dtype, every file's size and hash
                          layers.bin          the slabs one after another, each from a whole page on
                          embedding.bin       [V, D] in the compute dtype
                          head.bin            where it is not tied: the same, or packed rows where the
                                              checkpoint has them so (model/packed_matrix.py)
                          plain.safetensors   norms and biases

The fingerprint covers what the bytes follow from (cache_key.py). A folder appears under its final name only
when complete and fsynced (model/atomic_folder.py). On opening every file is read through once and its hash
compared: a damaged cache is made again, with a line that says so. Two processes that need the same base at
once both make it; the first to finish keeps its place, as the bytes are the same.

Where: $QLORA_TRAIN_CACHE, else $XDG_CACHE_HOME/qlora_train, else ~/.cache/qlora_train. Without a cache
(`--no-cache`) the same files are made in a temporary folder that goes with the process.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors.torch import load_file
from torch import Tensor

from qlora_train.boundary import is_disk_failure, reason_of
from qlora_train.errors import UserError
from qlora_train.memory import cache_key
from qlora_train.memory.cache_key import MANIFEST, VERSION, PackingKey, is_complete
from qlora_train.memory.cache_key import cache_root as cache_root
from qlora_train.memory.disk_file import page_aligned
from qlora_train.memory.stores import FilePart
from qlora_train.model.atomic_folder import atomic_folder
from qlora_train.model.base import Skeleton
from qlora_train.model.checkpoint import BaseCheckpoint
from qlora_train.model.folder_lock import remove_leftovers
from qlora_train.model.hashed_file import FileEntry, HashingFile, entry_of
from qlora_train.model.packed_matrix import RowFormat
from qlora_train.model.quantize import Packing
from qlora_train.model.sealed_json import seal, unseal
from qlora_train.model.shards import tensor_bytes, write_tensors
from qlora_train.model.slab import SlabLayout

SPARE_DISK_BYTES = 64 * 2**20
LAYERS, EMBEDDING, HEAD, PLAIN = "layers.bin", "embedding.bin", "head.bin", "plain.safetensors"


class Weights(Protocol):
    """What a packed base is made of; see `BaseCheckpoint` (model/checkpoint.py), which is one."""

    @property
    def head_packing(self) -> Packing: ...

    def pack_layer(self, layer: int, layout: SlabLayout, slab: Tensor) -> None: ...

    def matrix_rows(self, name: str) -> Iterator[Tensor]: ...

    def plain(self, device: torch.device) -> dict[str, Tensor]: ...


@dataclass(frozen=True)
class PackedBase:
    """A complete packed base on disk."""

    folder: Path
    layouts: tuple[SlabLayout, ...]

    @property
    def num_bytes(self) -> int:
        """Of slabs, embedding and head."""
        entries = self._manifest()["files"]
        return sum(entries[name]["num_bytes"] for name in (LAYERS, EMBEDDING, HEAD) if name in entries)

    @property
    def head_packing(self) -> Packing:
        """How the head's rows are stored."""
        return Packing(**self._manifest()["head_packing"])

    def slab(self, layer: int) -> FilePart:
        """Where a layer's slab lies."""
        offset = sum(page_aligned(layout.num_bytes) for layout in self.layouts[:layer])
        return FilePart(self.folder / LAYERS, offset, self.layouts[layer].num_bytes)

    def matrix(self, file_name: str) -> FilePart:
        """EMBEDDING or HEAD."""
        path = self.folder / file_name
        return FilePart(path, 0, path.stat().st_size)

    def fingerprint(self) -> str:
        """Of the bytes of slabs, embedding and head, whatever files they were made from."""
        entries = self._manifest()["files"]
        return content_fingerprint(
            [entries[n]["xxh3_128"] for n in (LAYERS, EMBEDDING, HEAD) if n in entries]
        )

    def plain(self, device: torch.device) -> dict[str, Tensor]:
        """Norms and biases on the device."""
        return {name: tensor.to(device) for name, tensor in load_file(self.folder / PLAIN).items()}

    def _manifest(self) -> dict[str, Any]:
        return unseal(self.folder / MANIFEST)


def open_packed_base(
    root: Path,
    base_folder: Path,
    skeleton: Skeleton,
    packing: Packing,
    device: torch.device,
    say: Callable[[str], None],
    open_weights: Callable[[Path, Skeleton], AbstractContextManager[Weights]] = BaseCheckpoint,
) -> PackedBase:
    """The packed base below `root`, made if it is not there or damaged. device: packs.

    say: told what takes time or went wrong, a line each. open_weights: what a base that is not there is made
    of. Raises `BaseModelError` for a base that cannot be packed and `UserError` where the disk is too small
    or not to be written; nothing half-made is left.
    """
    layouts = tuple(skeleton.layouts(packing))
    folder = packed_folder(root, base_folder, skeleton, packing)
    base = PackedBase(folder, layouts)
    if folder.exists():
        damage = _damage(folder, skeleton)
        if damage is None:
            return base
        begins = f"the packed cache is damaged ({damage}); packing the base again"
    else:
        begins = "packing the base, once"
    with open_weights(base_folder, skeleton) as checkpoint:
        num_bytes = _total_bytes(skeleton, layouts, checkpoint.head_packing)
        make_root(root)
        remove_leftovers(root)
        _check_disk(root, num_bytes)
        say(f"{begins}: {num_bytes / 1e9:.2f} GB into {folder}")
        with contextlib.suppress(_MadeByAnother), atomic_folder(folder) as partial:
            _write(partial, checkpoint, skeleton, layouts, packing, device, base_folder)
            if folder.exists() and _damage(folder, skeleton) is None:
                raise _MadeByAnother
    return base


class _MadeByAnother(Exception):
    """Another process has made the same packed base meanwhile: ours is given up."""


def make_root(root: Path) -> None:
    """Make the folder that holds packed bases. Raises `UserError` where it cannot be written."""
    try:
        root.mkdir(parents=True, exist_ok=True)
        if os.access(root, os.W_OK | os.X_OK):
            return
        reason = "it may not be written to"
    except OSError as error:
        if is_disk_failure(error) and error.errno != errno.EROFS:
            raise
        reason = reason_of(error)
    raise UserError(
        f"{root}: packed bases are kept here, but {reason}. Set QLORA_TRAIN_CACHE to a folder of your own."
    )


def made_packed_base(
    root: Path, base_folder: Path, skeleton: Skeleton, packing: Packing
) -> PackedBase | None:
    """The packed base below `root` that another process has just opened: nothing is read through again. None
    where it is not there."""
    folder = packed_folder(root, base_folder, skeleton, packing)
    return PackedBase(folder, tuple(skeleton.layouts(packing))) if is_complete(folder) else None


def find_packed_layers(
    root: Path, base_folder: Path, skeleton: Skeleton, packing: Packing
) -> PackedBase | None:
    """The packed base below `root` for who reads nothing but its slabs, None where they are not there or
    damaged. Its other files are not read through."""
    folder = packed_folder(root, base_folder, skeleton, packing)
    damage = _damage(folder, skeleton, lambda name: name == LAYERS)
    return PackedBase(folder, tuple(skeleton.layouts(packing))) if damage is None else None


def _write(
    folder: Path,
    checkpoint: Weights,
    skeleton: Skeleton,
    layouts: tuple[SlabLayout, ...],
    packing: Packing,
    device: torch.device,
    base_folder: Path,
) -> None:
    entries: dict[str, FileEntry] = {}
    with _writing(folder / LAYERS, entries) as file:
        largest = max(page_aligned(layout.num_bytes) for layout in layouts)
        slab = torch.empty(largest, dtype=torch.uint8, device=device)
        for i, layout in enumerate(layouts):
            part = slab[: page_aligned(layout.num_bytes)].zero_()  # the gaps too: the same bytes every time
            checkpoint.pack_layer(i, layout, part[: layout.num_bytes])
            file.write(tensor_bytes(part.cpu()))
    matrices = {EMBEDDING: skeleton.embedding_name}
    if not skeleton.is_tied:
        matrices[HEAD] = skeleton.head_name
    for file_name, name in matrices.items():
        with _writing(folder / file_name, entries) as file:
            for rows in checkpoint.matrix_rows(name):
                file.write(tensor_bytes(rows))
    with _writing(folder / PLAIN, entries) as file:
        plain = checkpoint.plain(torch.device("cpu"))
        write_tensors(file, {name: plain[name] for name in sorted(plain)}, {})
    manifest = {
        "version": VERSION,
        "packing": asdict(packing),
        "head_packing": asdict(checkpoint.head_packing),
        "dtype": str(skeleton.dtype),
        "base": str(base_folder.absolute()),
        "files": entries,
    }
    (folder / MANIFEST).write_text(seal(manifest), encoding="utf-8")


def content_fingerprint(hashes: list[str]) -> str:
    """One short word for the content of layers, embedding and head."""
    return hashlib.sha256(" ".join(hashes).encode()).hexdigest()[:16]


@contextlib.contextmanager
def _writing(path: Path, entries: dict[str, FileEntry]) -> Iterator[HashingFile]:
    """A new file whose size and hash stand in `entries` afterwards."""
    with HashingFile(path) as file:
        yield file
    entries[path.name] = file.entry


def _damage(
    folder: Path, skeleton: Skeleton, is_checked: Callable[[str], bool] = lambda name: True
) -> str | None:
    """What is wrong with a packed base, or None. is_checked: the files that are read through."""
    needed = {LAYERS, EMBEDDING, PLAIN} | (set() if skeleton.is_tied else {HEAD})
    try:
        manifest = unseal(folder / MANIFEST)
        entries, _ = manifest["files"], Packing(**manifest["head_packing"])
        if entries.keys() != needed:
            return "its manifest does not list these files"
        for name, entry in entries.items():
            if not (folder / name).is_file():
                return f"{name} is not there"
            if is_checked(name) and entry_of(folder / name) != entry:
                return f"{name} is not what was written"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{type(error).__name__}: {error}"
    return None


def packed_folder(root: Path, base_folder: Path, skeleton: Skeleton, packing: Packing) -> Path:
    """Where below `root` the packed base is, or will be."""
    key = PackingKey(packing.format, packing.double_quant, packing.block_size)
    return cache_key.packed_folder(root, base_folder, key, str(skeleton.dtype).removeprefix("torch."))


def _total_bytes(skeleton: Skeleton, layouts: tuple[SlabLayout, ...], head_packing: Packing) -> int:
    rows, columns = skeleton.matrix_shape
    row_bytes = columns * skeleton.dtype.itemsize
    if not skeleton.is_tied:
        row_bytes += RowFormat(head_packing, columns, skeleton.dtype).row_bytes
    return sum(page_aligned(layout.num_bytes) for layout in layouts) + rows * row_bytes


def _check_disk(root: Path, num_bytes: int) -> None:
    free_bytes = shutil.disk_usage(root).free
    if free_bytes < num_bytes + SPARE_DISK_BYTES:
        raise UserError(
            f"{root}: the packed base needs {(num_bytes + SPARE_DISK_BYTES) / 1e9:.2f} GB, the disk has "
            f"{free_bytes / 1e9:.2f} GB free. Make room, or set QLORA_TRAIN_CACHE to another disk."
        )
