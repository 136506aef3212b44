"""Which quantized base is whose: weights that changed, copies, other processes, and manifests that lie."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import NF4, write_checkpoint
from torch import Tensor

from qlora_train.errors import UserError
from qlora_train.files.atomic_folder import atomic_folder
from qlora_train.files.hashed_file import FileEntry, entry_of
from qlora_train.files.sealed_json import seal, unseal
from qlora_train.model.base import MetaModel, read_config
from qlora_train.quant.formats import Quantization
from qlora_train.weights import cache_key, quantized_cache
from qlora_train.weights.base_checkpoint import BaseCheckpoint
from qlora_train.weights.cache_key import quantized_folder
from qlora_train.weights.quantized_cache import LAYERS_FILE, MANIFEST, QuantizedBase

WEIGHTS = "model.safetensors"
ROOT = Path("root")


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("original"), num_hidden_layers=2)


@pytest.fixture
def base(original: Path, tmp_path: Path) -> Path:
    """A checkpoint that a test may change."""
    return shutil.copytree(original, tmp_path / "base")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "cache"


def opened(root: Path, base: Path, log: Callable[[str], None] = lambda line: None) -> QuantizedBase:
    meta_model = MetaModel(read_config(base), torch.float32)
    return quantized_cache.open_quantized_base(root, base, meta_model, NF4, torch.device("cpu"), log)


def folder_of(base: Path) -> Path:
    return quantized_folder(ROOT, base, Quantization("nf4", True), "float32")


def change_content(base: Path) -> None:
    """Size, header and time of change stay, as after a tool that restores times."""
    path = base / WEIGHTS
    stat = path.stat()
    content = bytearray(path.read_bytes())
    middle = len(content) // 2
    content[middle : middle + 64] = bytes(byte ^ 0x80 for byte in content[middle : middle + 64])
    path.write_bytes(content)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))


def replace_by_a_copy(base: Path) -> None:
    path = base / WEIGHTS
    shutil.copy2(path, path.with_suffix(".copy"))
    path.with_suffix(".copy").replace(path)


def change_its_mode(base: Path) -> None:
    (base / WEIGHTS).chmod(0o600)


def add_a_hard_link(base: Path) -> None:
    (base / "another.name").hardlink_to(base / WEIGHTS)


@pytest.mark.parametrize("touch", [replace_by_a_copy, change_its_mode, add_a_hard_link])
def test_the_same_bytes_are_read_once_more_and_not_quantized_again(
    base: Path, root: Path, touch: Callable[[Path], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = opened(root, base)
    read: list[str] = []

    def counted(path: Path) -> FileEntry:
        read.append(path.name)
        return entry_of(path)

    monkeypatch.setattr(quantized_cache, "entry_of", counted)
    said: list[str] = []
    for times in (0, 1, 1):
        assert opened(root, base, said.append).folder == before.folder
        assert (read.count(WEIGHTS), said) == (times, [])
        if times == 0:
            touch(base)


def test_restored_times_hide_nothing(base: Path, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Even between the samples, which are of all bytes only where a file is small."""
    monkeypatch.setattr(cache_key, "SAMPLE_BYTES", 1)
    content = (base / WEIGHTS).read_bytes()
    middle, places = len(content) // 2, {(len(content) - 1) * i // 31 for i in range(32)}
    assert not places & set(range(middle, middle + 64))
    before = opened(root, base)
    fingerprint = before.fingerprint()
    change_content(base)
    said: list[str] = []
    after = opened(root, base, said.append)
    assert after.folder == before.folder and after.fingerprint() != fingerprint
    assert "the weights of the base have changed since" in said[0]
    assert quantized_cache.find_quantized_layers(root, base, MetaModel(read_config(base), torch.float32), NF4)
    change_content(base)  # back again
    assert not quantized_cache.find_quantized_layers(
        root, base, MetaModel(read_config(base), torch.float32), NF4
    )


@pytest.mark.parametrize("at", [0, 1 / 31, 0.5, 1.0])
def test_samples_tell_weights_apart_where_the_disk_entry_does_not(
    base: Path, at: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on filesystems that make numbers and times up."""
    path, content = base / WEIGHTS, bytearray(2**20)
    path.write_bytes(content)
    fixed, really = os.stat_result((0o100644, 7, 0, 1, 0, 0, len(content), 1, 1, 1)), Path.stat
    monkeypatch.setattr(Path, "stat", lambda self, **o: fixed if self.name == WEIGHTS else really(self, **o))
    before = folder_of(base)
    assert folder_of(base) == before
    place = int(at * (len(content) - 2**15))
    content[place : place + 2**15] = b"x" * 2**15
    path.write_bytes(content)
    assert folder_of(base) != before


@pytest.mark.parametrize("odd", ["dangling", "pipe", "folder", "loop"])
def test_an_odd_entry_beside_the_weights_is_not_read(base: Path, odd: str) -> None:
    before = folder_of(base)
    path = base / "odd.safetensors"
    if odd == "pipe":
        os.mkfifo(path)
    elif odd == "folder":
        path.mkdir()
    else:
        path.symlink_to(path if odd == "loop" else "nowhere")
    assert folder_of(base) == before


def test_a_build_in_another_container_is_left_alone(original: Path, root: Path) -> None:
    """Its process number means nothing here; its lock does."""
    with atomic_folder(root / "base-nf4-other") as live:
        (live / LAYERS_FILE).write_bytes(b"half")
        dead = root / "base-nf4-dead.partial-1"
        dead.mkdir()
        opened(root, original)
        assert (live / LAYERS_FILE).exists() and not dead.exists()


def test_who_is_second_keeps_what_the_first_made(
    original: Path, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = BaseCheckpoint.plain
    made: list[int] = []

    def overtaken(self: BaseCheckpoint, device: torch.device) -> dict[str, Tensor]:
        if not made:
            made.append(0)
            made[0] = opened(root, original).folder.stat().st_ino
        return plain(self, device)

    monkeypatch.setattr(BaseCheckpoint, "plain", overtaken)
    assert opened(root, original).folder.stat().st_ino == made[0]


def lists_another_file(folder: Path) -> None:
    manifest = unseal(folder / MANIFEST)
    manifest["files"]["../../other"] = {"num_bytes": 1, "xxh3_128": "x"}
    (folder / MANIFEST).write_text(seal(manifest))


def has_a_flipped_digit(folder: Path) -> None:
    text = (folder / MANIFEST).read_text()
    assert '"block_size": 64' in text
    (folder / MANIFEST).write_text(text.replace('"block_size": 64', '"block_size": 32'))


def has_a_pipe(folder: Path) -> None:
    (folder / LAYERS_FILE).unlink()
    os.mkfifo(folder / LAYERS_FILE)


def is_nested_deeply(folder: Path) -> None:
    (folder / MANIFEST).write_text('{"a":' * 10**5)


@pytest.mark.parametrize("damage", [lists_another_file, has_a_flipped_digit, has_a_pipe, is_nested_deeply])
def test_what_is_not_what_was_written_is_made_again(
    original: Path, root: Path, damage: Callable[[Path], None]
) -> None:
    found = opened(root, original)
    before = {path.name: path.read_bytes() for path in found.folder.iterdir()}
    damage(found.folder)
    said: list[str] = []
    opened(root, original, said.append)
    assert len(said) == 1 and "the quantized cache is damaged" in said[0]
    assert {path.name: path.read_bytes() for path in found.folder.iterdir()} == before


@pytest.mark.parametrize("place", ["file/cache", "/proc/cache"])
def test_a_root_that_cannot_be_written_is_named(original: Path, tmp_path: Path, place: str) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match=r"cache: quantized bases are kept here, but .*QLORA_TRAIN_CACHE"):
        opened(tmp_path / place, original)


def test_without_a_home_the_variable_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def homeless() -> Any:
        raise RuntimeError("Could not determine home directory.")

    for name in ("QLORA_TRAIN_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(Path, "home", homeless)
    with pytest.raises(UserError, match="QLORA_TRAIN_CACHE"):
        cache_key.cache_root()
    monkeypatch.setenv("QLORA_TRAIN_CACHE", "~root/x")
    assert cache_key.cache_root().is_absolute()


def test_where_the_root_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/someone")
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    monkeypatch.setenv("QLORA_TRAIN_CACHE", "/named")
    assert cache_key.cache_root() == Path("/named")
    monkeypatch.setenv("QLORA_TRAIN_CACHE", "")
    assert cache_key.cache_root() == Path("/xdg/qlora_train")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_key.cache_root() == Path("/home/someone/.cache/qlora_train")
