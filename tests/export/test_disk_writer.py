"""What `DiskWriter` puts on the disk, and what it says when it cannot."""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import random
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from qlora_train.export import disk_writer
from qlora_train.export.disk_writer import BUFFER_BYTES, DiskWriter
from qlora_train.weights.disk_file import PAGE_BYTES

SIZES = (0, 1, PAGE_BYTES - 1, PAGE_BYTES, BUFFER_BYTES - 1, BUFFER_BYTES, BUFFER_BYTES + 1)
Pwrite = Callable[[int, memoryview, int], int]


def is_direct(descriptor: int) -> bool:
    return bool(fcntl.fcntl(descriptor, fcntl.F_GETFL) & getattr(os, "O_DIRECT", 0))


def pieces_of(content: bytes) -> list[bytes]:
    lengths, pieces = random.Random(0), []
    while content:
        size = lengths.choice((1, 8, 1000, PAGE_BYTES, 3 * 2**20, 2 * BUFFER_BYTES))
        pieces.append(content[:size])
        content = content[size:]
    return pieces


def write(path: Path, content: bytes) -> None:
    with DiskWriter(path) as file:
        for piece in pieces_of(content):
            buffer = bytearray(piece)
            file.write(memoryview(buffer))
            buffer[:] = bytes(len(buffer))  # may be used again at once


@pytest.fixture(params=["as it is", "no direct writes", "refuses", "writes less", "writes no whole page"])
def system(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.pwrite

    def refusing(descriptor: int, memory: memoryview, offset: int) -> int:
        if is_direct(descriptor):
            raise OSError(errno.EINVAL, "not here")
        return real(descriptor, memory, offset)

    def whole_pages(descriptor: int, memory: memoryview, offset: int) -> int:
        return real(
            descriptor, memory[: max(PAGE_BYTES, len(memory) // 3 // PAGE_BYTES * PAGE_BYTES)], offset
        )

    def no_whole_page(descriptor: int, memory: memoryview, offset: int) -> int:
        return real(descriptor, memory[: len(memory) // 2 + 512 if len(memory) > 2**20 else 512], offset)

    if request.param == "no direct writes":
        monkeypatch.setattr(disk_writer, "_open_direct", lambda path: None)
    elif request.param != "as it is":
        ways = {"refuses": refusing, "writes less": whole_pages, "writes no whole page": no_whole_page}
        monkeypatch.setattr(os, "pwrite", ways[request.param])


@pytest.mark.parametrize("num_bytes", [*SIZES, 3 * BUFFER_BYTES + 4 * PAGE_BYTES + 17])
def test_bytes(tmp_path: Path, system: None, num_bytes: int) -> None:
    content = random.Random(num_bytes).randbytes(num_bytes)
    write(tmp_path / "file", content)
    assert (tmp_path / "file").read_bytes() == content
    assert not any("disk-writer" in thread.name for thread in threading.enumerate())


def test_whole_pages_go_past_the_page_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if not writes_directly(tmp_path):
        pytest.skip(f"the filesystem of {tmp_path} has no O_DIRECT")
    real, seen = os.pwrite, []

    def noting(descriptor: int, memory: memoryview, offset: int) -> int:
        seen.append((is_direct(descriptor), offset, len(memory)))
        return real(descriptor, memory, offset)

    monkeypatch.setattr(os, "pwrite", noting)
    write(tmp_path / "file", bytes(BUFFER_BYTES + PAGE_BYTES + 5))
    end = BUFFER_BYTES + PAGE_BYTES
    assert seen == [(True, 0, BUFFER_BYTES), (True, BUFFER_BYTES, PAGE_BYTES), (False, end, 5)]


def writes_directly(folder: Path) -> bool:
    (folder / "probe").touch()
    probe = disk_writer._open_direct(folder / "probe")
    if probe is None:
        return False
    with probe:
        return disk_writer._put_directly(probe, memoryview(mmap.mmap(-1, PAGE_BYTES)), 0) == PAGE_BYTES


def test_short_direct_writes_go_on_directly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if not writes_directly(tmp_path):
        pytest.skip(f"the filesystem of {tmp_path} has no O_DIRECT")
    real, seen = os.pwrite, []

    def short(descriptor: int, memory: memoryview, offset: int) -> int:
        seen.append((is_direct(descriptor), offset))
        return real(descriptor, memory[: BUFFER_BYTES // 2], offset)

    monkeypatch.setattr(os, "pwrite", short)
    write(tmp_path / "file", bytes(2 * BUFFER_BYTES))
    assert seen == [(True, i * BUFFER_BYTES // 2) for i in range(4)]


def test_who_refuses_is_not_asked_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, asked = os.pwrite, []

    def refusing(descriptor: int, memory: memoryview, offset: int) -> int:
        if is_direct(descriptor):
            asked.append(offset)
            raise OSError(errno.EINVAL, "not here")
        return real(descriptor, memory, offset)

    monkeypatch.setattr(os, "pwrite", refusing)
    write(tmp_path / "file", bytes(4 * BUFFER_BYTES))
    assert len(asked) <= 1


@pytest.mark.parametrize("num_buffers", [1, 2, 5])
def test_a_full_disk_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, num_buffers: int) -> None:
    """By a later `write` or on leaving; no thread stays."""
    real = os.pwrite

    def full(descriptor: int, memory: memoryview, offset: int) -> int:
        if offset >= (num_buffers - 1) * BUFFER_BYTES:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(descriptor, memory, offset)

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(OSError, match="No space left"):
        write(tmp_path / "file", bytes(num_buffers * BUFFER_BYTES))
    assert not any("disk-writer" in thread.name for thread in threading.enumerate())


def test_another_error_inside_stays_itself(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), DiskWriter(tmp_path / "file") as file:
        file.write(bytes(BUFFER_BYTES + 1))
        raise ZeroDivisionError
    assert file._file.closed and file._direct is None
