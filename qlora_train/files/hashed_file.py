"""Hashes files while they are written, so that a later start can detect damage.

XXH3-128 is several times faster than a disk; it guards against accidents, not attacks.
"""

from __future__ import annotations

from pathlib import Path
from typing import BinaryIO

import xxhash

READ_BYTES = 16 * 2**20

FileEntry = dict[str, int | str]
"""Size and hash of a file: {"num_bytes": ..., "xxh3_128": ...}."""


class HashingFile:
    """A new file that is hashed as it is written. A context manager; read `entry` when all is written."""

    def __init__(self, path: Path) -> None:
        self._file: BinaryIO = path.open("wb")
        self._hash = xxhash.xxh3_128()
        self._num_bytes = 0

    def write(self, data: bytes | memoryview) -> None:
        self._file.write(data)
        self._hash.update(data)
        self._num_bytes += len(data)

    @property
    def entry(self) -> FileEntry:
        return {"num_bytes": self._num_bytes, "xxh3_128": self._hash.hexdigest()}

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> HashingFile:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def entry_of(path: Path) -> FileEntry:
    """Size and hash of an existing file."""
    hashed, num_bytes = xxhash.xxh3_128(), 0
    buffer = bytearray(READ_BYTES)
    with path.open("rb", buffering=0) as file:
        while num_read := file.readinto(buffer):
            hashed.update(memoryview(buffer)[:num_read])
            num_bytes += num_read
    return {"num_bytes": num_bytes, "xxh3_128": hashed.hexdigest()}
