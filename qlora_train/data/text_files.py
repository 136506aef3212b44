"""One text file, packed or not, as numbered lines of UTF-8.

How a file is packed is told by its first bytes, not by its name: gzip, bzip2, xz and Zstandard (which pyarrow
brings) are unpacked while they are read, so a .jsonl that somebody has gzipped reads as one.

Bytes that are not UTF-8 do not end the reading: they arrive as lone surrogates (`surrogateescape`), so that
the line they are on can be named, and skipped where examples may be.
"""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import os
import re
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import IO

from qlora_train.errors import DataError

PACKED_SUFFIXES = (".gz", ".bz2", ".xz", ".zst")
_UNDECODED = re.compile("[\udc80-\udcff]")
_GZIP, _BZIP2, _XZ, _ZSTD = b"\x1f\x8b", b"BZh", b"\xfd7zXZ\x00", b"\x28\xb5\x2f\xfd"
MAX_CHARACTERS = 2**30
"""Of one line, or one value in a file: a few bytes, packed, may unpack to more than any memory."""
_LINES_BETWEEN_WORDS = 1000
_UTF16_MARKS = ("\udcff\udcfe", "\udcfe\udcff")


def data_suffix(path: Path) -> str:
    """The suffix that tells the kind of the data, in lower case: .jsonl of rows.jsonl.gz."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if len(suffixes) > 1 and suffixes[-1] in PACKED_SUFFIXES:
        return suffixes[-2]
    return suffixes[-1] if suffixes else ""


def numbered_lines(
    path: str, read_on: Callable[[float], None] = lambda share: None
) -> Iterator[tuple[int, str]]:
    """The lines of a file, (number from 1, line with its end) each. Bytes that are no UTF-8 are left for
    `undecoded`. read_on: told now and then which share of the file has been read. Raises DataError for a
    file that cannot be opened or unpacked.
    """
    with _reading(path), open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size or 1
        text = io.TextIOWrapper(_unpacked(file), encoding="utf-8-sig", errors="surrogateescape", newline="")
        lines = iter(partial(text.readline, MAX_CHARACTERS), "")
        for number, line in enumerate(lines, start=1):
            if len(line) == MAX_CHARACTERS:
                raise DataError(f"{path} line {number} is longer than {MAX_CHARACTERS:,} characters.")
            if number % _LINES_BETWEEN_WORDS == 0 and file.seekable():
                read_on(min(file.tell() / size, 1.0))
            yield number, line
        read_on(1.0)


def undecoded(line: str) -> str | None:
    """The problem of a line that holds bytes that are not UTF-8; None for a good one."""
    if line.isascii() or not (found := _UNDECODED.search(line)):
        return None
    if line.startswith(_UTF16_MARKS):
        return "is UTF-16, not UTF-8: save the file as UTF-8 (iconv -f utf-16 -t utf-8 OLD > NEW)."
    byte = ord(found[0]) - 0xDC00
    place = found.start() + 1
    return (
        f"is not UTF-8: its character {place} is the byte 0x{byte:02x}. Save the file as UTF-8 "
        "(from Windows: iconv -f cp1252 -t utf-8 OLD > NEW)."
    )


@contextmanager
def _reading(path: str) -> Iterator[None]:
    """Turns the errors of damaged archives and unreadable files into a DataError."""
    try:
        yield
    except (EOFError, zlib.error, lzma.LZMAError) as error:
        raise DataError(f"{path} cannot be unpacked: {error}.") from error
    except OSError as error:  # those of damaged archives have no strerror
        what = "read" if error.strerror else "unpacked"
        raise DataError(f"{path} cannot be {what}: {error.strerror or error}.") from error


def _unpacked(file: io.BufferedReader) -> IO[bytes]:
    first = file.peek(6)[:6]
    if first.startswith(_GZIP):
        return gzip.GzipFile(fileobj=file)  # type: ignore[return-value]
    if first.startswith(_BZIP2):
        return bz2.BZ2File(file)
    if first.startswith(_XZ):
        return lzma.LZMAFile(file)
    if first.startswith(_ZSTD):
        import pyarrow

        return io.BufferedReader(pyarrow.input_stream(file, compression="zstd"))
    return file
