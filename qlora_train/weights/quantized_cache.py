"""The quantized base on disk: written once per base and quantization, read by every later start.

Layers that do not fit into RAM stream from these files.

    <cache>/<fingerprint>/manifest.json       version, quantization, dtype, every file's size and hash,
                                              those of the weight files, and their stamps
                          layers.bin          the layer buffers one after another, each starting at a page
                          embedding.bin       [V, D] in the compute dtype
                          head.bin            unless tied: the same, or quantized rows if the checkpoint
                                              has them (model/quantized_matrix.py)
                          plain.safetensors   norms and biases
                          factors.safetensors with PiSSA: what was taken out of the weights (adapter/pissa.py)

The fingerprint covers what determines the bytes (cache_key.py). A folder gets its final name only when
complete and fsynced (files/atomic_folder.py). On opening, the hash of every file is verified, and that the
weight files are those it was made from (`_is_made_from`); a damaged cache is logged and made again. Two
processes that need the same base at once both make it; the folder of the first to finish stays, as the bytes
are the same.

Cache folder: $QLORA_TRAIN_CACHE, else $XDG_CACHE_HOME/qlora_train, else ~/.cache/qlora_train. Without a cache
(`--no-cache`) the same files are made in a temporary folder that is removed when the process ends.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors.torch import load_file
from torch import Tensor

from qlora_train.boundary import is_disk_failure, reason_of, require_free_disk
from qlora_train.device.compute_dtype import dtype_name
from qlora_train.errors import UserError
from qlora_train.files.atomic_file import replace_text
from qlora_train.files.atomic_folder import MadeByAnother, atomic_folder
from qlora_train.files.folder_lock import remove_leftovers
from qlora_train.files.hashed_file import FileEntry, HashingFile, entry_of
from qlora_train.files.sealed_json import seal, unseal
from qlora_train.files.shards import tensor_bytes, write_tensors
from qlora_train.model.base import MetaModel
from qlora_train.model.layer_buffer import LayerBufferLayout
from qlora_train.model.quantized_matrix import RowLayout
from qlora_train.quant.formats import Quantization
from qlora_train.weights.base_checkpoint import BaseCheckpoint
from qlora_train.weights.cache_key import (
    CACHE_FORMAT,
    MANIFEST,
    is_complete,
    quantized_folder,
    stamp_of,
    weight_files,
)
from qlora_train.weights.disk_file import page_aligned
from qlora_train.weights.stores import FilePart

LAYERS_FILE, EMBEDDING_FILE, HEAD_FILE, PLAIN_FILE, FACTORS_FILE = (
    "layers.bin",
    "embedding.bin",
    "head.bin",
    "plain.safetensors",
    "factors.safetensors",
)


class Weights(Protocol):
    """The source of a quantized base's weights, such as `BaseCheckpoint` (weights/base_checkpoint.py)."""

    factors: dict[str, tuple[Tensor, Tensor]]

    @property
    def head_quantization(self) -> Quantization: ...

    def quantize_layer(self, layer: int, layout: LayerBufferLayout, layer_buffer: Tensor) -> None: ...

    def matrix_rows(self, name: str) -> Iterator[Tensor]: ...

    def plain(self, device: torch.device) -> dict[str, Tensor]: ...


@dataclass(frozen=True)
class QuantizedBase:
    """A complete quantized base on disk."""

    folder: Path
    layouts: tuple[LayerBufferLayout, ...]

    @property
    def num_bytes(self) -> int:
        """Bytes of layer buffers, embedding and head together."""
        entries = self._manifest()["files"]
        return sum(
            entries[name]["num_bytes"] for name in (LAYERS_FILE, EMBEDDING_FILE, HEAD_FILE) if name in entries
        )

    @property
    def head_quantization(self) -> Quantization:
        """Quantization of the head's stored rows."""
        return Quantization(**self._manifest()["head_quantization"])

    def layer_buffer(self, layer: int) -> FilePart:
        """The part of the layers file that holds a layer's buffer."""
        offset = sum(page_aligned(layout.num_bytes) for layout in self.layouts[:layer])
        return FilePart(self.folder / LAYERS_FILE, offset, self.layouts[layer].num_bytes)

    def matrix(self, file_name: str) -> FilePart:
        """The whole of EMBEDDING_FILE or HEAD_FILE."""
        path = self.folder / file_name
        return FilePart(path, 0, path.stat().st_size)

    def fingerprint(self) -> str:
        """Fingerprint of the bytes of layer buffers, embedding and head, whatever files they were made
        from."""
        entries = self._manifest()["files"]
        return content_fingerprint(
            [entries[n]["xxh3_128"] for n in (LAYERS_FILE, EMBEDDING_FILE, HEAD_FILE) if n in entries]
        )

    def plain(self, device: torch.device) -> dict[str, Tensor]:
        """Norms and biases on the device."""
        return {name: tensor.to(device) for name, tensor in load_file(self.folder / PLAIN_FILE).items()}

    def factors(self) -> dict[str, tuple[Tensor, Tensor]]:
        """The factors of PiSSA by linear, in pages of their file; empty without it."""
        file = self.folder / FACTORS_FILE
        tensors = load_file(file) if file.is_file() else {}
        paths = [name.removesuffix(".A") for name in tensors if name.endswith(".A")]
        return {path: (tensors[f"{path}.A"], tensors[f"{path}.B"]) for path in paths}

    def _manifest(self) -> dict[str, Any]:
        return unseal(self.folder / MANIFEST)


def open_quantized_base(
    root: Path,
    base_folder: Path,
    meta_model: MetaModel,
    quantization: Quantization,
    device: torch.device,
    log: Callable[[str], None],
    open_weights: Callable[[Path, MetaModel], AbstractContextManager[Weights]] = BaseCheckpoint,
) -> QuantizedBase:
    """Open the quantized base below `root`; make it if it is missing or damaged. device: quantizes it.

    log: called with a line for each slow operation or damaged cache. open_weights: opens the source of the
    weights. Raises `BaseModelError` for a base that cannot be quantized and `UserError` if the disk is too
    small or not writable; nothing half-written is left.
    """
    layouts = tuple(meta_model.layouts(quantization))
    folder = _folder(root, base_folder, meta_model, quantization)
    base = QuantizedBase(folder, layouts)
    if folder.exists():
        damage = _damage(folder, base_folder, meta_model)
        if damage is None:
            return base
        begins = f"the quantized cache is damaged ({damage}); quantizing the base again"
    else:
        begins = "quantizing the base, once"
    with open_weights(base_folder, meta_model) as checkpoint:
        num_bytes = _total_bytes(meta_model, layouts, checkpoint.head_quantization)
        make_root(root)
        remove_leftovers(root)
        require_free_disk(
            root, num_bytes, "the quantized base", UserError, "set QLORA_TRAIN_CACHE to another disk"
        )
        log(f"{begins}: {num_bytes / 1e9:.2f} GB into {folder}")
        with atomic_folder(folder) as partial:
            _write(partial, checkpoint, meta_model, layouts, quantization, device, base_folder)
            if folder.exists() and _damage(folder, base_folder, meta_model) is None:
                raise MadeByAnother
    return base


def make_root(root: Path) -> None:
    """Make the folder that holds quantized bases. Raises `UserError` where it cannot be written."""
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
        f"{root}: quantized bases are kept here, but {reason}. Set QLORA_TRAIN_CACHE to a folder of your own."
    )


def made_quantized_base(
    root: Path, base_folder: Path, meta_model: MetaModel, quantization: Quantization
) -> QuantizedBase | None:
    """The quantized base below `root` that another process has just verified, without verifying it again;
    None if there is none."""
    folder = _folder(root, base_folder, meta_model, quantization)
    return QuantizedBase(folder, tuple(meta_model.layouts(quantization))) if is_complete(folder) else None


def find_quantized_layers(
    root: Path, base_folder: Path, meta_model: MetaModel, quantization: Quantization
) -> QuantizedBase | None:
    """The quantized base below `root` for callers that read only its layer buffers; None if these are missing
    or damaged. The content of its other files is not verified."""
    folder = _folder(root, base_folder, meta_model, quantization)
    damage = _damage(folder, base_folder, meta_model, lambda name: name == LAYERS_FILE)
    return QuantizedBase(folder, tuple(meta_model.layouts(quantization))) if damage is None else None


def _write(
    folder: Path,
    checkpoint: Weights,
    meta_model: MetaModel,
    layouts: tuple[LayerBufferLayout, ...],
    quantization: Quantization,
    device: torch.device,
    base_folder: Path,
) -> None:
    entries: dict[str, FileEntry] = {}
    made_from = {"stamps": [stamp_of(base_folder)], "weight_files": _entries_of(base_folder)}
    with _writing(folder / LAYERS_FILE, entries) as file:
        largest = max(page_aligned(layout.num_bytes) for layout in layouts)
        layer_buffer = torch.empty(largest, dtype=torch.uint8, device=device)
        for i, layout in enumerate(layouts):
            part = layer_buffer[: page_aligned(layout.num_bytes)].zero_()  # padding too: deterministic bytes
            checkpoint.quantize_layer(i, layout, part[: layout.num_bytes])
            file.write(tensor_bytes(part.cpu()))
    matrices = {EMBEDDING_FILE: meta_model.embedding_name}
    if not meta_model.is_tied:
        matrices[HEAD_FILE] = meta_model.head_name
    for file_name, name in matrices.items():
        with _writing(folder / file_name, entries) as file:
            for rows in checkpoint.matrix_rows(name):
                file.write(tensor_bytes(rows))
    with _writing(folder / PLAIN_FILE, entries) as file:
        plain = checkpoint.plain(torch.device("cpu"))
        write_tensors(file, {name: plain[name] for name in sorted(plain)}, {})
    if meta_model.principal_ranks:
        with _writing(folder / FACTORS_FILE, entries) as file:
            pairs = checkpoint.factors.items()
            factors = {f"{path}.{key}": t for path, ab in pairs for key, t in zip("AB", ab, strict=True)}
            write_tensors(file, factors, {})
    manifest = {
        "version": CACHE_FORMAT,
        "quantization": asdict(quantization),
        "head_quantization": asdict(checkpoint.head_quantization),
        "dtype": str(meta_model.dtype),
        "base": str(base_folder.absolute()),
        "files": entries,
        **made_from,
    }
    (folder / MANIFEST).write_text(seal(manifest), encoding="utf-8")


def content_fingerprint(hashes: list[str]) -> str:
    """Fingerprint (16 hex digits) of the hashes of layers, embedding and head."""
    return hashlib.sha256(" ".join(hashes).encode()).hexdigest()[:16]


@contextlib.contextmanager
def _writing(path: Path, entries: dict[str, FileEntry]) -> Iterator[HashingFile]:
    """A new file, whose size and hash are added to `entries` when it is closed."""
    with HashingFile(path) as file:
        yield file
    entries[path.name] = file.entry


def _damage(
    folder: Path,
    base_folder: Path,
    meta_model: MetaModel,
    is_checked: Callable[[str], bool] = lambda name: True,
) -> str | None:
    """What is wrong with a quantized base, or None. is_checked: whether the hash of a file is verified."""
    needed = {LAYERS_FILE, EMBEDDING_FILE, PLAIN_FILE} | (set() if meta_model.is_tied else {HEAD_FILE})
    needed |= {FACTORS_FILE} if meta_model.principal_ranks else set()
    try:
        manifest = unseal(folder / MANIFEST)
        entries, _ = manifest["files"], Quantization(**manifest["head_quantization"])
        if entries.keys() != needed:
            return "its manifest does not list these files"
        if not _is_made_from(folder, manifest, base_folder):
            return "the weights of the base have changed since"
        for name, entry in entries.items():
            if not (folder / name).is_file():
                return f"{name} is not there"
            if is_checked(name) and entry_of(folder / name) != entry:
                return f"{name} is not what was written"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{type(error).__name__}: {error}"
    return None


def _is_made_from(folder: Path, manifest: dict[str, Any], base_folder: Path) -> bool:
    """Whether a quantized base was made from the bytes of these weight files. All are read where their stamp
    is new: after a chmod, as a copy, or after a change in place whose time was set back."""
    stamp = stamp_of(base_folder)
    if stamp in manifest["stamps"]:
        return True
    if _entries_of(base_folder) != manifest["weight_files"]:
        return False
    with contextlib.suppress(OSError):  # a cache that may only be read: the next start reads them again
        seen = seal(manifest | {"stamps": [*manifest["stamps"], stamp]})
        replace_text(folder / MANIFEST, seen, is_shared=True)
    return True


def _entries_of(base_folder: Path) -> dict[str, FileEntry]:
    """Size and hash of every weight file."""
    return {path.name: entry_of(path) for path in weight_files(base_folder)}


def _folder(root: Path, base_folder: Path, meta_model: MetaModel, quantization: Quantization) -> Path:
    return quantized_folder(root, base_folder, quantization, dtype_name(meta_model.dtype), meta_model.lora)


def _total_bytes(
    meta_model: MetaModel, layouts: tuple[LayerBufferLayout, ...], head_quantization: Quantization
) -> int:
    rows, columns = meta_model.matrix_shape
    row_bytes = columns * meta_model.dtype.itemsize
    if not meta_model.is_tied:
        row_bytes += RowLayout(head_quantization, columns, meta_model.dtype).row_bytes
    layers = sum(page_aligned(layout.num_bytes) for layout in layouts)
    return layers + rows * row_bytes + meta_model.factor_bytes
