"""The quantized base on disk: made once, checked when opened, made again when damaged, or not there."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import NF4, write_checkpoint
from torch import Tensor

from qlora_train.boundary import SPARE_DISK_BYTES
from qlora_train.device.compute import THE_CPU
from qlora_train.errors import BaseModelError, UserError
from qlora_train.model.base import MetaModel, read_config
from qlora_train.quant.formats import Quantization
from qlora_train.quant.quantize import quantize
from qlora_train.weights import quantized_cache
from qlora_train.weights.base_checkpoint import BaseCheckpoint
from qlora_train.weights.disk_file import page_aligned
from qlora_train.weights.load import load_base
from qlora_train.weights.quantized_cache import (
    EMBEDDING_FILE,
    HEAD_FILE,
    LAYERS_FILE,
    MANIFEST,
    PLAIN_FILE,
    QuantizedBase,
)
from qlora_train.weights.stores import FilePart

CPU = torch.device("cpu")
NUM_LAYERS = 2
OTHERS = (("nf4",), ("fp4", False, 128), ("int8",), ("none",))
QUANTIZATIONS = [NF4, *(Quantization(*arguments) for arguments in OTHERS)]
WEIGHTS = "model.safetensors"


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("original"), num_hidden_layers=NUM_LAYERS)


@pytest.fixture
def base(original: Path, tmp_path: Path) -> Path:
    """A checkpoint that a test may change."""
    return shutil.copytree(original, tmp_path / "base")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "cache"


def opened(
    root: Path,
    base: Path,
    quantization: Quantization = NF4,
    dtype: torch.dtype = torch.float32,
    log: Callable[[str], None] = lambda line: None,
) -> QuantizedBase:
    meta_model = MetaModel(read_config(base), dtype)
    return quantized_cache.open_quantized_base(root, base, meta_model, quantization, CPU, log)


def bytes_of(part: FilePart) -> Tensor:
    raw = part.path.read_bytes()[part.offset_bytes : part.offset_bytes + part.num_bytes]
    return torch.frombuffer(bytearray(raw), dtype=torch.uint8)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def names_in(root: Path) -> list[str]:
    return sorted(path.name for path in root.iterdir())


class Quantized(Exception):
    """A base was quantized where none should have been."""


@pytest.fixture
def no_quantization(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """After the call, quantizing a layer fails."""

    def refuse(*_: Any) -> None:
        raise Quantized

    return lambda: monkeypatch.setattr(quantized_cache.BaseCheckpoint, "quantize_layer", refuse)


def same_bytes(left: Tensor, right: Tensor) -> bool:
    left, right = left.reshape(-1), right.reshape(-1)
    return left.dtype == right.dtype and torch.equal(left.view(torch.uint8), right.view(torch.uint8))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("quantization", QUANTIZATIONS, ids=str)
def test_it_holds_what_quantization_each_weight_gives(
    original: Path, root: Path, quantization: Quantization, dtype: torch.dtype
) -> None:
    found = opened(root, original, quantization, dtype)
    weights = load_file(original / WEIGHTS)
    assert len(found.layouts) == NUM_LAYERS
    for layer, layout in enumerate(found.layouts):
        quantized = layout.weights(bytes_of(found.layer_buffer(layer)))
        assert len(quantized) == 7
        for name, ours in quantized.items():
            weight = weights[f"model.layers.{layer}.{name}.weight"]
            expected = quantize([weight], tuple(weight.shape), quantization, dtype=dtype)
            assert ours.tensors.keys() == expected.tensors.keys()
            for key, tensor in expected.tensors.items():
                assert same_bytes(ours.tensors[key], tensor), (name, key)
    for file_name, name in ((EMBEDDING_FILE, "model.embed_tokens.weight"), (HEAD_FILE, "lm_head.weight")):
        assert same_bytes(bytes_of(found.matrix(file_name)), weights[name].to(dtype).view(torch.uint8))
    plain = found.plain(CPU)
    assert plain.keys() == {name for name in weights if "norm" in name}
    assert all(same_bytes(plain[name], weights[name].to(dtype)) for name in plain)


def test_the_files_and_their_sizes(original: Path, root: Path) -> None:
    found = opened(root, original)
    assert names_in(root) == [found.folder.name]
    assert names_in(found.folder) == sorted([LAYERS_FILE, EMBEDDING_FILE, HEAD_FILE, PLAIN_FILE, MANIFEST])
    sizes = {name: len(content) for name, content in contents(found.folder).items()}
    assert sizes[LAYERS_FILE] == sum(page_aligned(layout.num_bytes) for layout in found.layouts)
    assert sizes[EMBEDDING_FILE] == sizes[HEAD_FILE] == 96 * 64 * 4
    assert found.num_bytes == sizes[LAYERS_FILE] + sizes[EMBEDDING_FILE] + sizes[HEAD_FILE]
    manifest = json.loads((found.folder / MANIFEST).read_text())
    assert {name: entry["num_bytes"] for name, entry in manifest["files"].items()} == {
        name: size for name, size in sizes.items() if name != MANIFEST
    }


def test_a_tied_matrix_is_there_once(tmp_path: Path, root: Path) -> None:
    base = write_checkpoint(tmp_path / "base", "llama-tied", num_hidden_layers=NUM_LAYERS)
    found = opened(root, base)
    assert names_in(found.folder) == sorted([LAYERS_FILE, EMBEDDING_FILE, PLAIN_FILE, MANIFEST])
    assert found.num_bytes == sum(page_aligned(layout.num_bytes) for layout in found.layouts) + 96 * 64 * 4


def test_a_second_start_reads_and_says_nothing(
    original: Path, root: Path, no_quantization: Callable[[], None]
) -> None:
    said: list[str] = []
    first = opened(root, original, log=said.append)
    assert len(said) == 1 and "quantizing the base, once" in said[0] and str(first.folder) in said[0]
    before = {path: path.stat().st_mtime_ns for path in first.folder.iterdir()}
    no_quantization()
    assert opened(root, original, log=said.append) == first
    assert len(said) == 1
    assert before == {path: path.stat().st_mtime_ns for path in first.folder.iterdir()}


def flip_a_byte(path: Path, position: int) -> None:
    content = bytearray(path.read_bytes())
    content[position] ^= 1
    path.write_bytes(content)


DAMAGES: dict[str, Callable[[Path], None]] = {
    "first byte of the layers": lambda folder: flip_a_byte(folder / LAYERS_FILE, 0),
    "last byte of the layers": lambda folder: flip_a_byte(folder / LAYERS_FILE, -1),
    "a byte of the embedding": lambda folder: flip_a_byte(folder / EMBEDDING_FILE, 777),
    "a byte of the head": lambda folder: flip_a_byte(folder / HEAD_FILE, 12_345),
    "a byte of the norms": lambda folder: flip_a_byte(folder / PLAIN_FILE, -2),
    "truncated": lambda folder: os.truncate(folder / LAYERS_FILE, 1000),
    "empty": lambda folder: os.truncate(folder / EMBEDDING_FILE, 0),
    "longer": lambda folder: os.truncate(folder / HEAD_FILE, 96 * 64 * 4 + 1),
    "no head": lambda folder: (folder / HEAD_FILE).unlink(),
    "no layers": lambda folder: (folder / LAYERS_FILE).unlink(),
    "no manifest": lambda folder: (folder / MANIFEST).unlink(),
    "empty manifest": lambda folder: os.truncate(folder / MANIFEST, 0),
    "half a manifest": lambda folder: os.truncate(folder / MANIFEST, 100),
    "bytes as manifest": lambda folder: (folder / MANIFEST).write_bytes(bytes(range(256))),
    "another json": lambda folder: (folder / MANIFEST).write_text("[1, 2]"),
    "a list of files": lambda folder: (folder / MANIFEST).write_text('{"files": ["layers.bin"]}'),
    "no files in it": lambda folder: (folder / MANIFEST).write_text('{"version": 1}'),
    "empty folder": lambda folder: [path.unlink() for path in folder.iterdir()] and None,
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_one_is_made_again(
    original: Path, root: Path, damage: str, no_quantization: Callable[[], None]
) -> None:
    found = opened(root, original)
    before = contents(found.folder)
    DAMAGES[damage](found.folder)
    assert contents(found.folder) != before
    said: list[str] = []
    assert opened(root, original, log=said.append) == found
    assert ["is damaged (" in line for line in said] == [True], said
    assert str(found.folder) in said[0]
    assert contents(found.folder) == before
    assert names_in(root) == [found.folder.name]
    no_quantization()
    opened(root, original)


@pytest.mark.parametrize("kept", [[], [EMBEDDING_FILE]], ids=str)
def test_a_manifest_that_lists_too_little_is_damage(
    original: Path, root: Path, kept: list[str], no_quantization: Callable[[], None]
) -> None:
    found = opened(root, original)
    manifest = json.loads((found.folder / MANIFEST).read_text())
    manifest["files"] = {name: manifest["files"][name] for name in kept}
    (found.folder / MANIFEST).write_text(json.dumps(manifest))
    no_quantization()
    with pytest.raises(Quantized):
        opened(root, original)


def rewrite_weights(base: Path) -> None:
    """Other numbers in a file of the same size."""
    size = (base / WEIGHTS).stat().st_size
    weights = load_file(base / WEIGHTS)
    changed = {name: weight + 1 for name, weight in weights.items()}
    save_file(changed, base / WEIGHTS, metadata={"format": "pt"})
    assert (base / WEIGHTS).stat().st_size == size
    touch(base)


def touch(base: Path) -> None:
    stat = (base / WEIGHTS).stat()
    os.utime(base / WEIGHTS, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))


def change_header(base: Path) -> None:
    """Size and time of change stay."""
    path = base / WEIGHTS
    stat = path.stat()
    content = bytearray(path.read_bytes())
    at = content.index(b'"format":"pt"')
    content[at : at + 13] = b'"format":"xx"'
    path.write_bytes(content)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))


def change_config(base: Path) -> None:
    path = base / "config.json"
    config = json.loads(path.read_text())
    config["rms_norm_eps"] = 3e-6
    path.write_text(json.dumps(config))


CHANGES: dict[str, Callable[[Path], None]] = {
    "weights": rewrite_weights,
    "time": touch,
    "header": change_header,
    "config": change_config,
    "another file": lambda base: save_file({"x": torch.zeros(1)}, base / "more.safetensors"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_base_is_another(base: Path, root: Path, change: str) -> None:
    before = opened(root, base)
    kept = contents(before.folder)
    CHANGES[change](base)
    after = opened(root, base)
    assert after.folder != before.folder and names_in(root) == sorted([before.folder.name, after.folder.name])
    assert contents(before.folder) == kept
    if change == "weights":
        assert contents(after.folder)[LAYERS_FILE] != kept[LAYERS_FILE]


def test_quantizations_and_dtypes_lie_beside_each_other(
    original: Path, root: Path, no_quantization: Callable[[], None]
) -> None:
    kinds = [(p, d) for p in QUANTIZATIONS for d in (torch.float32, torch.bfloat16)]
    kinds.append((Quantization("nf4", double_quant=True, block_size=128), torch.float16))
    folders = [opened(root, original, *kind).folder for kind in kinds]
    assert len(set(folders)) == len(kinds) and names_in(root) == sorted(f.name for f in folders)
    no_quantization()
    assert [opened(root, original, *kind).folder for kind in kinds] == folders


def test_what_does_not_matter_changes_nothing(
    base: Path, root: Path, no_quantization: Callable[[], None]
) -> None:
    before = opened(root, base)
    (base / "README.md").write_text("a card")
    (base / "tokenizer.json").write_text("{}")
    no_quantization()
    assert opened(root, base) == before


@pytest.mark.parametrize("where", ["quantize_layer", "matrix_rows", "plain"])
@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_a_broken_off_build_leaves_nothing(
    original: Path, root: Path, where: str, error: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []
    method = getattr(BaseCheckpoint, where)
    last_call = {"quantize_layer": NUM_LAYERS, "matrix_rows": 2, "plain": 1}[where]

    def abort(*args: Any) -> Any:
        calls.append(1)
        if len(calls) == last_call:
            raise error("full")
        return method(*args)

    monkeypatch.setattr(BaseCheckpoint, where, abort)
    with pytest.raises(error):
        opened(root, original)
    assert len(calls) == last_call and names_in(root) == []
    monkeypatch.undo()
    found = opened(root, original)
    before = contents(found.folder)
    flip_a_byte(found.folder / LAYERS_FILE, 3)
    calls.clear()
    monkeypatch.setattr(BaseCheckpoint, where, abort)
    with pytest.raises(error):
        opened(root, original)
    assert names_in(root) == [found.folder.name]  # still the damaged one
    monkeypatch.undo()
    opened(root, original)
    assert contents(found.folder) == before


def test_a_base_that_cannot_be_quantized_leaves_nothing(base: Path, root: Path) -> None:
    weights = load_file(base / WEIGHTS)
    weights["model.layers.1.mlp.down_proj.weight"][3, 5] = float("nan")
    save_file(weights, base / WEIGHTS)
    with pytest.raises(BaseModelError, match=r"layers\.1\.mlp\.down_proj"):
        opened(root, base)
    assert names_in(root) == []


def disk_with(free_bytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil._ntuple_diskusage(10**12, 10**12 - free_bytes, free_bytes)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)


def test_a_disk_that_is_too_small_is_refused_before_anything_is_quantized(
    original: Path, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    needed = opened(tmp_path / "elsewhere", original).num_bytes + SPARE_DISK_BYTES
    asked: list[int] = []
    method = BaseCheckpoint.quantize_layer
    monkeypatch.setattr(BaseCheckpoint, "quantize_layer", lambda *a: asked.append(1) or method(*a))
    disk_with(needed - 1, monkeypatch)
    said: list[str] = []
    with pytest.raises(UserError, match="QLORA_TRAIN_CACHE") as caught:
        opened(root, original, log=said.append)
    assert str(root) in str(caught.value) and "0.07 GB" in str(caught.value)
    assert asked == [] and said == [] and names_in(root) == []
    disk_with(needed, monkeypatch)
    opened(root, original)
    assert len(asked) == NUM_LAYERS
    disk_with(0, monkeypatch)
    opened(root, original)  # what is there needs no room


@pytest.mark.parametrize("other", [NF4, Quantization("int8")], ids=["the same", "another"])
def test_two_builds_in_one_root(
    original: Path, root: Path, tmp_path: Path, other: Quantization, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another process builds, from beginning to end, while this one is in the middle."""
    expected = {p: contents(opened(tmp_path / "alone", original, p).folder) for p in (NF4, other)}
    plain = BaseCheckpoint.plain
    others: list[QuantizedBase] = []

    def interrupted(self: BaseCheckpoint, device: torch.device) -> dict[str, Tensor]:
        if not others:
            others.append(QuantizedBase(root, ()))  # entered
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr("os.getpid", lambda: 1)  # as in another container
                others[0] = opened(root, original, other)
        return plain(self, device)

    monkeypatch.setattr(BaseCheckpoint, "plain", interrupted)
    ours = opened(root, original, NF4)
    assert contents(ours.folder) == expected[NF4] and contents(others[0].folder) == expected[other]
    assert names_in(root) == sorted({ours.folder.name, others[0].folder.name})


def test_the_fingerprint_says_what_the_quantized_base_holds(base: Path, root: Path, tmp_path: Path) -> None:
    """Straight from the checkpoint or through the cache; of the bytes, not of the files they came from."""

    def fingerprint(cache: Path | None, quantization: Quantization = NF4, dtype: Any = torch.float32) -> str:
        return load_base(base, quantization, dtype, THE_CPU, cache=cache).fingerprint

    first = fingerprint(root)
    others = [fingerprint(None, quantization) for quantization in QUANTIZATIONS[1:]]
    others.append(fingerprint(None, dtype=torch.bfloat16))
    touch(base)
    assert fingerprint(None) == fingerprint(root) == fingerprint(tmp_path / "elsewhere") == first
    rewrite_weights(base)
    others.append(fingerprint(None))
    assert len({first, *others}) == 1 + len(others)
