"""What `DiskWriter` puts on the disk, and what it says when it cannot."""

from __future__ import annotations

import errno
import fcntl
import os
import random
from collections.abc import Callable
from pathlib import Path

import pytest

from qlora_train.export import disk_writer
from qlora_train.export.disk_writer import BUFFER_BYTES, DiskWriter
from qlora_train.memory.disk_file import PAGE_BYTES

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


@pytest.fixture(params=["as it is", "no direct writes", "refuses direct writes", "short writes"])
def system(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.pwrite

    def refusing(descriptor: int, memory: memoryview, offset: int) -> int:
        if is_direct(descriptor):
            raise OSError(errno.EINVAL, "not here")
        return real(descriptor, memory, offset)

    def short(descriptor: int, memory: memoryview, offset: int) -> int:
        return real(descriptor, memory[: max(PAGE_BYTES, len(memory) // 3)], offset)

    if request.param == "no direct writes":
        monkeypatch.setattr(disk_writer, "_open_direct", lambda path: None)
    elif request.param != "as it is":
        monkeypatch.setattr(os, "pwrite", refusing if request.param.startswith("refuses") else short)


@pytest.mark.parametrize("num_bytes", [*SIZES, 3 * BUFFER_BYTES + 4 * PAGE_BYTES + 17])
def test_bytes(tmp_path: Path, system: None, num_bytes: int) -> None:
    content = random.Random(num_bytes).randbytes(num_bytes)
    write(tmp_path / "file", content)
    assert (tmp_path / "file").read_bytes() == content


def test_whole_pages_go_past_the_page_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    probe = disk_writer._open_direct(_made(tmp_path / "probe"))
    if probe is None:
        pytest.skip(f"the filesystem of {tmp_path} has no O_DIRECT")
    probe.close()
    real, seen = os.pwrite, []

    def noting(descriptor: int, memory: memoryview, offset: int) -> int:
        seen.append((is_direct(descriptor), offset, len(memory)))
        return real(descriptor, memory, offset)

    monkeypatch.setattr(os, "pwrite", noting)
    write(tmp_path / "file", bytes(BUFFER_BYTES + PAGE_BYTES + 5))
    end = BUFFER_BYTES + PAGE_BYTES
    assert seen == [(True, 0, BUFFER_BYTES), (True, BUFFER_BYTES, PAGE_BYTES), (False, end, 5)]


def _made(path: Path) -> Path:
    path.touch()
    return path


@pytest.mark.parametrize("num_buffers", [1, 2, 5])
def test_a_full_disk_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, num_buffers: int) -> None:
    """By a later `write` or on leaving, and the thread has ended."""
    real = os.pwrite

    def full(descriptor: int, memory: memoryview, offset: int) -> int:
        if offset >= (num_buffers - 1) * BUFFER_BYTES:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(descriptor, memory, offset)

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(OSError, match="No space left"):
        write(tmp_path / "file", bytes(num_buffers * BUFFER_BYTES))


def test_another_error_inside_stays_itself(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), DiskWriter(tmp_path / "file") as file:
        file.write(bytes(BUFFER_BYTES + 1))
        raise ZeroDivisionError
