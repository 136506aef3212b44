"""Rows as tokens: flat arrays, in memory or memory-mapped from the token cache.

    tokens            [N] int32     of all documents, one after another
    supervised        [N] bool
    document_starts   [D + 1]       document d is tokens[starts[d] : starts[d + 1]]
    document_rows     [D]           the row it is from
    document_targets  [D] int32     its supervised tokens
    row_tables        [R] int32     which table the row is from ...
    row_numbers       [R]           ... and its line or row number there
    row_keys          [R, 32] bytes its content's hash
    row_lengths       [R]           tokens of its longest text before anything was cut
    note_rows, note_kinds, note_amounts  [M]   what happened to which row (see `report.Note`)

A million rows of 100 tokens are 500 MB of tokens and masks and 60 MB of the rest. As arrays of a file they
are read where they lie: nothing is loaded at the start. What has been looked at counts as resident memory
until the system takes it back, so after every `_READ_BYTES` the pages are given back by hand (`madvise`):
they stay in the system's page cache.
"""

from __future__ import annotations

import hashlib
import json
import mmap
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import IO, Any

import numpy as np

from qlora_train.data.fitting import Document
from qlora_train.data.report import Reading

KEY_BYTES = 32
META = "meta.json"
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
    """What is known of all examples together. tables: (name, unit of its numbers) each. weights: of the
    tables' sources. note_names: of the kinds. digest: of the tokens and masks in order."""

    tables: tuple[tuple[str, str], ...] = ()
    weights: tuple[float, ...] = ()
    formats: tuple[str, ...] = ()
    note_names: tuple[str, ...] = ()
    reading: Reading = field(default_factory=Reading)
    digest: str = ""


class TokenizedExamples:
    """See the module docstring. `arrays`: by name."""

    def __init__(self, arrays: dict[str, np.ndarray], facts: Facts, maps: Sequence[mmap.mmap] = ()) -> None:
        self.facts = facts
        self.tokens, self.supervised = arrays["tokens"], arrays["supervised"]
        self.document_starts, self.document_examples = arrays["document_starts"], arrays["document_examples"]
        self.document_targets = arrays["document_targets"]
        self.example_tables, self.example_numbers = arrays["example_tables"], arrays["example_numbers"]
        self.example_keys, self.example_lengths = (
            arrays["example_keys"].reshape(-1, KEY_BYTES),
            arrays["example_lengths"],
        )
        self.note_examples, self.note_kinds = arrays["note_examples"], arrays["note_kinds"]
        self.note_amounts = arrays["note_amounts"]
        self._maps, self._num_bytes_read = maps, 0

    @staticmethod
    def of(documents: Sequence[Document]) -> TokenizedExamples:
        """Documents that are at hand, each an example."""
        number = len(documents)
        empty = np.zeros(0, dtype=np.int64)
        arrays = {
            "tokens": np.concatenate([d.token_ids for d in documents]).astype(np.int32),
            "supervised": np.concatenate([d.supervised for d in documents]),
            "document_starts": np.cumsum([0, *map(len, documents)]),
            "document_examples": np.arange(number),
            "document_targets": np.array([d.num_supervised for d in documents], dtype=np.int32),
            "example_tables": np.zeros(number, dtype=np.int32),
            "example_numbers": np.arange(1, number + 1),
            "example_keys": np.zeros(number * KEY_BYTES, dtype=np.uint8),
            "example_lengths": np.array([len(d) for d in documents], dtype=np.int64),
            "note_examples": empty,
            "note_kinds": empty.astype(np.int32),
            "note_amounts": empty,
        }
        writer = ExamplesWriter()
        writer.add(arrays)
        examples = writer.finish(Facts(tables=(("documents", "row"),), weights=(1.0,)))
        assert examples is not None
        return examples

    @staticmethod
    def opened(folder: Path) -> TokenizedExamples:
        """Those of a folder of the token cache, memory-mapped. Raises OSError or ValueError for a folder that
        is not complete."""
        meta = json.loads((folder / META).read_text(encoding="utf-8"))
        maps: list[mmap.mmap] = []
        arrays = {}
        for name, dtype in ARRAYS.items():
            file, size = folder / name, int(meta["sizes"][name])
            if file.stat().st_size != size * dtype.itemsize:
                raise ValueError(f"{file} is not complete")
            if not size:
                arrays[name] = np.zeros(0, dtype=dtype)
                continue
            with file.open("rb") as opened:
                maps.append(mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ))
            arrays[name] = np.frombuffer(maps[-1], dtype=dtype)
        return TokenizedExamples(arrays, _facts_of(meta["facts"]), maps)

    @property
    def num_examples(self) -> int:
        return len(self.example_tables)

    @property
    def num_documents(self) -> int:
        return len(self.document_examples)

    @property
    def document_lengths(self) -> np.ndarray:
        """int64 [D]."""
        return np.diff(self.document_starts)

    def document(self, index: int) -> Document:
        start, stop = int(self.document_starts[index]), int(self.document_starts[index + 1])
        self._num_bytes_read += (stop - start) * 5 + 2 * _PAGES_PER_FAULT
        if self._num_bytes_read > _READ_BYTES:
            self.give_pages_back()
        return Document(self.tokens[start:stop], self.supervised[start:stop])

    def give_pages_back(self) -> None:
        """What was read of mapped files is not resident any more."""
        self._num_bytes_read = 0
        for mapped in self._maps:
            if hasattr(mapped, "madvise"):
                mapped.madvise(mmap.MADV_DONTNEED)

    def describe_example(self, example: int) -> str:
        """Where it is from, in words."""
        name, unit = self.facts.tables[int(self.example_tables[example])]
        return f"{name} {unit} {int(self.example_numbers[example])}"


class ExamplesWriter:
    """Takes examples part by part; keeps them in memory, or writes them to files below `folder`."""

    def __init__(self, folder: Path | None = None) -> None:
        """Raises OSError where the folder cannot be made."""
        self._parts: dict[str, list[np.ndarray]] = {name: [] for name in ARRAYS}
        self._sizes = dict.fromkeys(ARRAYS, 0)
        self._files: dict[str, IO[bytes]] = {}
        self._folder = folder
        self._digests = {name: hashlib.sha256() for name in _DIGESTED}
        self.num_examples = self.num_documents = self.num_tokens = 0
        if folder is not None:
            folder.mkdir(parents=True)
            self._files = {name: (folder / name).open("wb") for name in ARRAYS}
        self._append("document_starts", np.zeros(1, dtype=np.int64))

    def add(self, arrays: dict[str, np.ndarray]) -> None:
        """The next examples. Starts, examples and notes in `arrays` count from the part's own first token and
        example."""
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
        array = np.ascontiguousarray(array, dtype=ARRAYS[name]).reshape(-1)
        self._sizes[name] += len(array)
        if name in _DIGESTED:
            self._digests[name].update(array.data)
        if self._folder is not None:
            self._files[name].write(array.data)
        else:
            self._parts[name].append(array)

    def finish(self, facts: Facts) -> TokenizedExamples | None:
        """The examples; None where they were written to files, which are now complete."""
        parts = "".join(digest.hexdigest() for digest in self._digests.values())
        facts = replace(facts, digest=hashlib.sha256(parts.encode()).hexdigest())
        if self._folder is None:
            return TokenizedExamples(
                {name: np.concatenate(parts) for name, parts in self._parts.items()}, facts
            )
        self.close()
        meta = {"sizes": self._sizes, "facts": _plain(facts)}
        (self._folder / META).write_text(json.dumps(meta), encoding="utf-8")
        return None

    def close(self) -> None:
        for file in self._files.values():
            file.close()


def _plain(facts: Facts) -> dict[str, Any]:
    return {**vars(facts), "reading": vars(facts.reading)}


def _facts_of(plain: dict[str, Any]) -> Facts:
    reading: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value for name, value in plain["reading"].items()
    }
    return Facts(
        tables=tuple((name, unit) for name, unit in plain["tables"]),
        weights=tuple(plain["weights"]),
        formats=tuple(plain["formats"]),
        note_names=tuple(plain["note_names"]),
        digest=plain["digest"],
        reading=Reading(**reading),
    )
