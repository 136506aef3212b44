"""Examples as tokens: flat arrays, in memory or memory-mapped from the token cache.

    tokens            [N] int32     of all documents, one after another
    supervised        [N] bool
    document_starts   [D + 1]       document d is tokens[starts[d] : starts[d + 1]]
    document_examples     [D]           the example it is from
    document_targets  [D] int32     its supervised tokens
    example_tables        [R] int32     which table the example is from ...
    example_numbers       [R]           ... and its line or example number there
    example_keys          [R, 32] bytes its content's hash
    example_lengths       [R]           tokens of its longest text before anything was cut
    note_examples, note_kinds, note_amounts  [M]   what happened to which example (see `report.Note`)

A million examples of 100 tokens are 500 MB of tokens and masks and 60 MB of the rest. As arrays of a file
they are read where they lie: nothing is loaded at the start. What has been looked at counts as resident
memory until the system takes it back, so after every `_READ_BYTES` the pages are given back by hand
(`madvise`): they stay in the system's page cache.
"""

from __future__ import annotations

import hashlib
import io
import json
import mmap
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import IO, Any

import numpy as np
from pydantic import TypeAdapter

from qlora_train.data.documents import Document
from qlora_train.data.report import Reading

KEY_BYTES = 32
META = "meta.json"
FOLDER_PREFIX = "tokens-"
"""Of the names of the token cache's folders."""
_DIGESTED = ("tokens", "supervised", "document_starts")
_READ_BYTES = 64 * 2**20
_PAGES_PER_FAULT = 2**16  # bytes that the system maps around a page that is touched
ARRAYS: dict[str, np.dtype[Any]] = {
    "tokens": np.dtype(np.int32),
    "supervised": np.dtype(np.bool_),
    "document_starts": np.dtype(np.int64),
    "document_examples": np.dtype(np.int64),
    "document_targets": np.dtype(np.int32),
    "example_tables": np.dtype(np.int32),
    "example_numbers": np.dtype(np.int64),
    "example_keys": np.dtype(np.uint8),
    "example_lengths": np.dtype(np.int64),
    "note_examples": np.dtype(np.int64),
    "note_kinds": np.dtype(np.int32),
    "note_amounts": np.dtype(np.int64),
}


@dataclass(frozen=True)
class Facts:
    """Facts about all examples together. tables: (name, unit of its numbers) each. weights: of the
    tables' sources. note_names: of the kinds. digest: of the tokens and masks in order."""

    tables: tuple[tuple[str, str], ...] = ()
    weights: tuple[float, ...] = ()
    note_names: tuple[str, ...] = ()
    reading: Reading = field(default_factory=Reading)
    digest: str = ""


_FACTS = TypeAdapter(Facts)


class TokenizedExamples:
    """Examples as arrays of tokens (see the module docstring). buffers: the bytes of each array."""

    def __init__(self, buffers: Mapping[str, bytes | mmap.mmap], facts: Facts) -> None:
        arrays = {name: np.frombuffer(buffers[name] or b"", dtype) for name, dtype in ARRAYS.items()}
        self.facts = facts
        self.tokens, self.supervised = arrays["tokens"], arrays["supervised"]
        self.document_starts, self.document_examples = arrays["document_starts"], arrays["document_examples"]
        self.document_targets = arrays["document_targets"]
        self.example_tables, self.example_numbers = arrays["example_tables"], arrays["example_numbers"]
        self.example_keys = arrays["example_keys"].reshape(-1, KEY_BYTES)
        self.example_lengths = arrays["example_lengths"]
        self.note_examples, self.note_kinds = arrays["note_examples"], arrays["note_kinds"]
        self.note_amounts = arrays["note_amounts"]
        self._maps = [buffer for buffer in buffers.values() if isinstance(buffer, mmap.mmap)]
        self._num_bytes_read = 0

    @staticmethod
    def opened(folder: Path) -> TokenizedExamples:
        """The examples of a folder of the token cache, memory-mapped. Raises OSError or ValueError for a
        folder that is not complete."""
        meta = json.loads((folder / META).read_text(encoding="utf-8"))
        buffers: dict[str, bytes | mmap.mmap] = {}
        for name in ARRAYS:
            with (folder / name).open("rb") as file:
                num_bytes = file.seek(0, os.SEEK_END)
                if num_bytes != meta["num_bytes"][name]:
                    raise ValueError(f"{folder / name} is not complete")
                buffers[name] = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if num_bytes else b""
        return TokenizedExamples(buffers, _FACTS.validate_python(meta["facts"]))

    @property
    def num_examples(self) -> int:
        return len(self.example_tables)

    @property
    def num_documents(self) -> int:
        return len(self.document_examples)

    @property
    def document_lengths(self) -> np.ndarray:
        """Tokens of each document, int64 [D]."""
        return np.diff(self.document_starts)

    def document(self, index: int) -> Document:
        start, stop = int(self.document_starts[index]), int(self.document_starts[index + 1])
        self._num_bytes_read += (stop - start) * 5 + 2 * _PAGES_PER_FAULT
        if self._num_bytes_read > _READ_BYTES:
            self.give_pages_back()
        return Document(self.tokens[start:stop], self.supervised[start:stop])

    def give_pages_back(self) -> None:
        """Gives the pages of mapped files that were read back to the system."""
        self._num_bytes_read = 0
        for mapped in self._maps:
            if hasattr(mapped, "madvise"):
                mapped.madvise(mmap.MADV_DONTNEED)

    def describe_example(self, example: int) -> str:
        """The place that an example is from, in words."""
        name, unit = self.facts.tables[int(self.example_tables[example])]
        return f"{name} {unit} {int(self.example_numbers[example])}"


class ExamplesWriter:
    """Takes examples batch by batch; keeps them in memory, or writes them to files below `folder`."""

    def __init__(self, folder: Path | None = None) -> None:
        """folder: an empty one."""
        self._folder = folder
        self._files: dict[str, IO[bytes]] = {
            name: io.BytesIO() if folder is None else (folder / name).open("wb") for name in ARRAYS
        }
        self._digests = {name: hashlib.sha256() for name in _DIGESTED}
        self.num_examples = self.num_documents = self.num_tokens = 0
        self._append("document_starts", np.zeros(1, dtype=np.int64))

    def add(self, arrays: dict[str, np.ndarray]) -> None:
        """Adds the next examples. Starts, examples and notes in `arrays` count from the part's own first
        token and example."""
        starts = arrays["document_starts"] + self.num_tokens
        moved = {
            "document_starts": starts[1:],
            "document_examples": arrays["document_examples"] + self.num_examples,
            "note_examples": arrays["note_examples"] + self.num_examples,
        }
        for name in ARRAYS:
            self._append(name, moved.get(name, arrays[name]))
        self.num_examples += len(arrays["example_tables"])
        self.num_documents += len(arrays["document_examples"])
        self.num_tokens = int(starts[-1])

    def _append(self, name: str, array: np.ndarray) -> None:
        content = np.ascontiguousarray(array, dtype=ARRAYS[name]).reshape(-1).data
        if name in _DIGESTED:
            self._digests[name].update(content)
        self._files[name].write(content)

    def finish(self, facts: Facts) -> TokenizedExamples | None:
        """The examples; None where they were written to files, which are now complete."""
        parts = "".join(digest.hexdigest() for digest in self._digests.values())
        facts = replace(facts, digest=hashlib.sha256(parts.encode()).hexdigest())
        if self._folder is None:
            buffers = {name: file.getvalue() for name, file in self._files.items()}  # type: ignore[attr-defined]
            return TokenizedExamples(buffers, facts)
        meta = {
            "num_bytes": {name: file.tell() for name, file in self._files.items()},
            "facts": _FACTS.dump_python(facts),
        }
        self.close()
        (self._folder / META).write_text(json.dumps(meta), encoding="utf-8")
        return None

    def close(self) -> None:
        for file in self._files.values():
            file.close()
