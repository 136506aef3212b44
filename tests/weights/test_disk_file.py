"""Large reads past the page cache: the same bytes as any read, whatever is left over at their ends."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
import torch
from torch import Tensor

from qlora_train.device.compute import THE_CPU
from qlora_train.errors import QloraTrainError
from qlora_train.weights.disk_file import PAGE_BYTES, DiskFile
from qlora_train.weights.host_memory import HostMemory

FILE_BYTES = 10_007
BYTES = torch.randint(0, 256, (FILE_BYTES,), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "bytes.bin"
    path.write_bytes(BYTES.numpy().tobytes())
    return path


def test_reads_that_give_less_than_asked_are_continued(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    preadv = os.preadv  # as a network disk may give less

    def at_most_three_bytes(descriptor: int, buffers: list[memoryview], offset: int) -> int:
        return preadv(descriptor, [buffers[0][:3]], offset)

    disk, target = DiskFile(file), torch.zeros(50, dtype=torch.uint8)
    monkeypatch.setattr("qlora_train.weights.disk_file.os.preadv", at_most_three_bytes)
    disk.read(9, target)
    assert torch.equal(target, BYTES[9:59])


def aligned(num_bytes: int) -> Tensor:
    return HostMemory(THE_CPU).empty(num_bytes)  # begins at a page


@pytest.mark.parametrize("offset", [0, PAGE_BYTES, 2 * PAGE_BYTES])
@pytest.mark.parametrize("size", [1, PAGE_BYTES - 1, PAGE_BYTES, PAGE_BYTES + 1, FILE_BYTES - 2 * PAGE_BYTES])
def test_pages_are_read_past_the_cache_and_the_rest_is_not_forgotten(
    file: Path, offset: int, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk, preadv, direct_bytes = DiskFile(file), os.preadv, []

    def noting(descriptor: int, buffers: list[memoryview], at: int) -> int:
        if disk._direct is not None and descriptor == disk._direct.fileno():
            direct_bytes.append(len(buffers[0]))
        return preadv(descriptor, buffers, at)

    monkeypatch.setattr("qlora_train.weights.disk_file.os.preadv", noting)
    size = min(size, FILE_BYTES - offset)
    target = aligned(size)
    disk.read(offset, target)
    assert torch.equal(target, BYTES[offset : offset + size])
    if disk._direct is not None:  # not every filesystem can
        assert sum(direct_bytes) == size // PAGE_BYTES * PAGE_BYTES


def test_a_file_that_ends_inside_a_page_of_a_direct_read(file: Path) -> None:
    with pytest.raises(QloraTrainError, match="became shorter"):
        DiskFile(file).read(0, aligned(3 * PAGE_BYTES))


def test_a_filesystem_without_direct_reads(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    open_file = os.open

    def refusing(path: Path, flags: int) -> int:
        if flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, "Invalid argument")
        return open_file(path, flags)

    monkeypatch.setattr("qlora_train.weights.disk_file.os.open", refusing)
    disk, target = DiskFile(file), aligned(FILE_BYTES)
    assert disk._direct is None
    disk.read(0, target)
    assert torch.equal(target, BYTES)
