"""CSV and TSV files, read strictly: a quote that is never closed is an error, not a very long field.

The standard library's reader in strict mode does the work; here is what it does not know:

    separator   of a .csv: the comma, unless the header has none and splits as evenly as the first example at
                semicolons, tabs or bars; of a .tsv: the tab
    escapes     a quote inside a quoted field is doubled ("") by the standard (RFC 4180); writers that put a
                backslash before it (\\") are recognised by a quote that could not stand there otherwise
    columns     a column without a name (such as the index that pandas writes) is called by its number
    records     one shorter than the header has empty texts at its end; a longer one cannot be used

Every field is text. A record may span several lines and is named by its first.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain, zip_longest
from pathlib import Path

from qlora_train.data.tables import (
    Batch,
    ExampleProblem,
    ExampleTable,
    NumberedExample,
    batched,
)
from qlora_train.data.text_files import data_suffix, undecoded
from qlora_train.errors import DataError

csv.field_size_limit(2**27)  # the module's own 128 KiB are less than a long document
_SAMPLE_LINES = 1000
_SEPARATORS = {";": "semicolon", "\t": "tab", "|": "bar", ",": "comma"}
_BACKSLASHED_QUOTE = re.compile(r"""(?<!\\)(?:\\\\)*\\"[^",;|\t\r\n]""")
_BACKSLASHED = re.compile(r"""\\([\\"])""")


@dataclass(frozen=True)
class Dialect:
    """How fields are separated and quotes escaped."""

    separator: str = ","
    backslashes: bool = False

    @property
    def in_words(self) -> str | None:
        """The settings that are not as everybody expects; None if all are."""
        parts = [] if self.separator == "," else [f"fields separated by {_SEPARATORS[self.separator]}s"]
        parts += ['quotes escaped with a backslash (\\")'] if self.backslashes else []
        return " and ".join(parts) or None


class CsvTable(ExampleTable):
    """A .csv or .tsv file."""

    unit = "line"
    dialect = Dialect()

    @property
    def columns(self) -> tuple[str, ...]:
        _ = self.head
        return self._header

    def _read(self) -> Iterator[Batch]:
        lines = self._lines()
        sample = [numbered for numbered, _ in zip(lines, range(_SAMPLE_LINES), strict=False)]
        is_tsv = data_suffix(Path(self.name)) == ".tsv"
        self.dialect = Dialect("\t") if is_tsv else _dialect_of([line for _, line in sample])
        records = self._records(chain(sample, lines))
        _, header = next(records, (1, []))
        if isinstance(header, ExampleProblem):
            raise DataError(f"{self.name} line 1 {header}")
        if not header:
            raise DataError(f"{self.name} is empty: it needs a header line and at least one row.")
        self._header = tuple(name or f"column {number}" for number, name in enumerate(header, start=1))
        return batched(self._examples(records))

    def _examples(
        self, records: Iterator[tuple[int, list[str] | ExampleProblem]]
    ) -> Iterator[NumberedExample]:
        names = self._header
        for line, record in records:
            if isinstance(record, ExampleProblem):
                yield line, record
            elif len(record) > len(names):
                problem = (
                    f"has {len(record)} fields, the header names {len(names)} columns. Quote fields that "
                    f'hold a {_SEPARATORS[self.dialect.separator]} ("like this").'
                )
                yield line, ExampleProblem(problem)
            else:
                yield line, dict(zip_longest(names, record, fillvalue=""))

    def ask_for(self, columns: Iterable[str]) -> None:
        super().ask_for(columns)
        if doubled := [name for name in self.asked_for or () if self.columns.count(name) > 1]:
            raise DataError(f"{self.name} names the column {doubled[0]!r} twice. Rename one of them.")

    def _records(self, lines: Iterator[tuple[int, str]]) -> Iterator[tuple[int, list[str] | ExampleProblem]]:
        """The records of the file, (first line, fields) each; blank lines are no records."""
        source = _Lines(lines, unescape=self.dialect.backslashes)
        reader = csv.reader(source, delimiter=self.dialect.separator, strict=True)
        while True:
            source.begin_record()
            try:
                record = next(reader, None)
            except csv.Error as error:
                raise DataError(self._in_words(error, source)) from error
            if record is None:
                return
            if source.problem is not None:
                yield source.first, source.problem
            elif record:
                yield source.first, record

    def _in_words(self, error: csv.Error, source: _Lines) -> str:
        begin = f"{self.name} cannot be read as CSV: the record that begins in line {source.first}"
        if "unexpected end of data" in str(error):
            return f"{begin} holds a quote that is never closed. Close it, or double a quote that is text."
        if "expected after" in str(error):
            return (
                f"{begin} has text behind a closing quote in line {source.last}. A quote inside a quoted "
                'field is written twice ("").'
            )
        return f"{begin} is damaged: {error}."


class _Lines:
    """Feeds the reader, and knows which lines the record at hand is made of."""

    def __init__(self, lines: Iterator[tuple[int, str]], *, unescape: bool) -> None:
        self._lines, self._unescape = lines, unescape
        self.first = self.last = 1
        self.problem: ExampleProblem | None = None

    def begin_record(self) -> None:
        self._is_first, self.problem = True, None

    def __iter__(self) -> _Lines:
        return self

    def __next__(self) -> str:
        self.last, line = next(self._lines)
        if self._is_first:
            self.first, self._is_first = self.last, False
        if problem := undecoded(line):
            self.problem = self.problem or ExampleProblem(
                problem if self.last == self.first else f"(its line {self.last}) {problem}"
            )
        return _BACKSLASHED.sub(_unescaped, line) if self._unescape else line


def _unescaped(found: re.Match[str]) -> str:
    return '""' if found[1] == '"' else "\\"


def _dialect_of(lines: list[str]) -> Dialect:
    backslashes = any(map(_BACKSLASHED_QUOTE.search, lines))
    filled = [line for line in lines if not line.isspace()]
    header = filled[0] if filled else ""
    for separator in _SEPARATORS if "," not in header else ():
        if separator not in header:
            continue
        try:
            first = [record for record in csv.reader(filled, delimiter=separator) if record][:2]
        except csv.Error:
            continue
        if len(first) < 2 or len(first[0]) == len(first[1]):
            return Dialect(separator, backslashes)
    return Dialect(",", backslashes)
