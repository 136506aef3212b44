"""One file or hub split as rows that remember where they come from.

Every table is opened by the `datasets` library (its Arrow cache keeps rows on disk, not in memory), but
text-like files are read as *lines of text* and parsed here, not by the library's JSON reader: that one
infers one type per column (a column of ISO dates becomes timestamps, a mixed column is recoded) and forgets
the line numbers. As lines, a value stays what the file says and row i of the table is physical line i + 1
of the file. For the same reason every column of a CSV is read as text, and "NA" or "null" stay the words
they are.

A row is addressed by (table, index); `describe(index)` turns that into words for a message, and does the
counting of lines only then.
"""

from __future__ import annotations

import csv
import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from qlora_train.errors import DataError

if TYPE_CHECKING:
    from datasets import Dataset

Row = dict[str, Any]
_READ_ROWS = 1000  # rows taken from Arrow at a time
MAX_LISTED_PROBLEMS = 5
csv.field_size_limit(2**31 - 1)  # the module's own 128 KiB are less than a long document


class RowTable(ABC):
    """Rows of one file or hub split; `name` is its path or id. Iterating gives (index, row)."""

    def __init__(self, name: str, dataset: Dataset) -> None:
        self.name = name
        self.dataset = dataset

    @abstractmethod
    def __iter__(self) -> Iterator[tuple[int, Row]]: ...

    @cached_property
    def columns(self) -> tuple[str, ...]:
        """All column names that occur, in order of first appearance."""
        return tuple(self.dataset.column_names)

    def describe(self, index: int) -> str:
        return f"{self.name} row {index + 1}"

    def _batches(self) -> Iterator[tuple[int, dict[str, list[Any]]]]:
        for number, batch in enumerate(self.dataset.iter(batch_size=_READ_ROWS)):
            yield number * _READ_ROWS, batch

    def _lines(self) -> Iterator[tuple[int, str]]:
        """(index, line) of a table opened as text, blank lines left out."""
        for first, batch in self._batches():
            for index, line in enumerate(batch["text"], start=first):
                if line and not line.isspace():
                    yield index, line


class Origin(NamedTuple):
    """Where a row is from."""

    table: RowTable
    row_index: int

    def describe(self) -> str:
        return self.table.describe(self.row_index)


class ColumnTable(RowTable):
    """Parquet files and hub splits: rows have no lines, only numbers (from 1)."""

    def __iter__(self) -> Iterator[tuple[int, Row]]:
        for first, batch in self._batches():
            names = list(batch)
            for index, values in enumerate(zip(*batch.values(), strict=True), start=first):
                yield index, dict(zip(names, values, strict=True))


class CsvTable(ColumnTable):
    """A CSV file with a header line; a record may span several lines, it is named by its first."""

    def describe(self, index: int) -> str:
        with open(self.name, encoding="utf-8-sig", newline="") as file:
            reader = csv.reader(file)
            starts = [0]
            records: list[int] = []
            for record in reader:
                if record:  # blank lines are no records
                    records.append(starts[-1] + 1)
                starts.append(reader.line_num)
        return f"{self.name} line {records[index + 1]}"  # records[0] is the header


class TextTable(RowTable):
    """A .txt file: every line that is not blank is a row with one column, `text`."""

    @cached_property
    def columns(self) -> tuple[str, ...]:
        return ("text",)

    def __iter__(self) -> Iterator[tuple[int, Row]]:
        return ((index, {"text": line}) for index, line in self._lines())

    def describe(self, index: int) -> str:
        return f"{self.name} line {index + 1}"


class JsonLinesTable(RowTable):
    """One JSON object a line; blank lines are skipped."""

    def __iter__(self) -> Iterator[tuple[int, Row]]:
        for index, line in self._lines():
            try:
                row = json.loads(line)
            except ValueError as error:
                raise DataError(f"{self.describe(index)} is not valid JSON: {error}") from error
            yield index, _object(row, self.describe, index)

    @cached_property
    def columns(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(name for _, row in self for name in row))

    def describe(self, index: int) -> str:
        return f"{self.name} line {index + 1}"


class JsonTable(RowTable):
    """A .json file that holds one list of objects. It is parsed at once, so it must fit in memory."""

    @cached_property
    def _text(self) -> str:
        return "\n".join(line for _, batch in self._batches() for line in batch["text"])

    @cached_property
    def _rows(self) -> list[Any]:
        try:
            rows = json.loads(self._text)
        except json.JSONDecodeError as error:
            raise DataError(f"{self.name} line {error.lineno} is not valid JSON: {error}") from error
        assert isinstance(rows, list), "a text that begins with '['"
        return rows

    def __iter__(self) -> Iterator[tuple[int, Row]]:
        for index, row in enumerate(self._rows):
            yield index, _object(row, self.describe, index)

    @cached_property
    def columns(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(name for _, row in self for name in row))

    def describe(self, index: int) -> str:
        decoder, text = json.JSONDecoder(), self._text
        position = text.index("[") + 1
        for _ in range(index):
            position = decoder.raw_decode(text, _skip_space(text, position))[1]
            position = text.index(",", position) + 1
        return f"{self.name} line {text.count(chr(10), 0, _skip_space(text, position)) + 1}"


def _skip_space(text: str, position: int) -> int:
    while text[position].isspace():
        position += 1
    return position


def _object(row: Any, describe: Callable[[int], str], index: int) -> Row:
    if not isinstance(row, dict):
        raise DataError(
            f"{describe(index)} holds {type_name(row)} where a row (a JSON object) is needed. A data file "
            "is a list of objects in a .json file, or one object a line."
        )
    return row


def type_name(value: Any) -> str:
    """What JSON calls it."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "a boolean"
    if isinstance(value, int | float):
        return "a number"
    if isinstance(value, str):
        return "a string"
    if isinstance(value, list | tuple):
        return "a list"
    return "an object" if isinstance(value, dict) else f"a {type(value).__name__}"


class RowProblems:
    """Gathers what is wrong with rows, so that one error names the first few at once."""

    def __init__(self) -> None:
        self._listed: list[str] = []
        self._num_rows = 0

    def add(self, origin: Origin, problem: str) -> None:
        self._num_rows += 1
        if len(self._listed) < MAX_LISTED_PROBLEMS:
            self._listed.append(f"{origin.describe()}: {problem}")

    def raise_if_any(self) -> None:
        if not self._num_rows:
            return
        if self._num_rows == 1:
            raise DataError(self._listed[0])
        more = self._num_rows - len(self._listed)
        tail = [f"... and {more} more"] if more else []
        raise DataError("\n".join([f"{self._num_rows} rows cannot be used:", *self._listed, *tail]))


def check_csv_header(path: Path) -> tuple[str, ...]:
    """The column names of a CSV file; a column without one (such as the index that pandas writes) is called
    by its number. Raises DataError where the header is missing, a name doubled or the data do not match.
    """
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            records = (record for record in csv.reader(file) if record)
            header = next(records, [])
            first = next(records, None)
    except (csv.Error, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read as CSV in UTF-8: {error}") from error
    if not header:
        raise DataError(f"{path} is empty: it needs a header line and at least one row.")
    if first is None:
        raise DataError(f"{path} holds no rows, only a header.")
    doubled = sorted({name for name, after in pairwise(sorted(header)) if name == after and name})
    if doubled:
        raise DataError(f"{path} line 1 names the column {doubled[0]!r} twice. Rename one of them.")
    if len(first) > len(header):
        raise DataError(
            f"{path}: the header names {len(header)} columns, the first row has {len(first)} fields. Quote "
            'fields that hold a comma ("like, this") or complete the header.'
        )
    return tuple(name or f"column {number}" for number, name in enumerate(header, start=1))
