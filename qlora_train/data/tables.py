"""One file or hub split as rows that remember where they come from.

    .jsonl .json .txt   lines of text, parsed here           row i is physical line i + 1 of the file
    .csv                records of the standard library's reader, every field as text
    .parquet            batches of pyarrow                    rows have numbers, no lines
    hub split           the `datasets` library

A value stays what the file says. A reader that infers one type per column (as pandas does, and the JSON and
CSV builders of `datasets`) turns a column of ISO dates into timestamps and "NA" into nothing, and forgets the
line numbers. Importing pandas would cost every run 90 MB besides.

Rows are read anew at each iteration, never held (but for a .json list, which is parsed at once). A row is
addressed by (table, index); `describe(index)` turns that into words for a message, and does the counting of
lines only then.
"""

from __future__ import annotations

import csv
import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from functools import cached_property
from itertools import pairwise, zip_longest
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

    def __init__(self, name: str) -> None:
        self.name = name

    @abstractmethod
    def __iter__(self) -> Iterator[tuple[int, Row]]: ...

    @cached_property
    @abstractmethod
    def columns(self) -> tuple[str, ...]:
        """All column names that occur, in order of first appearance."""

    def describe(self, index: int) -> str:
        return f"{self.name} row {index + 1}"


class Origin(NamedTuple):
    """Where a row is from."""

    table: RowTable
    row_index: int

    def describe(self) -> str:
        return self.table.describe(self.row_index)


class HubTable(RowTable):
    """A split of a data set on the hub; the library keeps its rows on disk."""

    def __init__(self, name: str, dataset: Dataset) -> None:
        super().__init__(name)
        self._dataset = dataset

    def __iter__(self) -> Iterator[tuple[int, Row]]:
        return enumerate(self._dataset)

    @cached_property
    def columns(self) -> tuple[str, ...]:
        return tuple(self._dataset.column_names)


class ParquetTable(RowTable):
    """A .parquet file, read in batches of rows."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        _ = self.columns  # reads the footer: what is no parquet file is refused at once

    def __iter__(self) -> Iterator[tuple[int, Row]]:
        from pyarrow import ArrowException, parquet

        index = 0
        try:
            with parquet.ParquetFile(self.name) as file:
                for batch in file.iter_batches(batch_size=_READ_ROWS):
                    for row in batch.to_pylist():
                        yield index, row
                        index += 1
        except ArrowException as error:
            raise DataError(f"{self.name} cannot be read as parquet: {error}") from error

    @cached_property
    def columns(self) -> tuple[str, ...]:
        from pyarrow import ArrowException, parquet

        try:
            return tuple(parquet.read_schema(self.name).names)
        except ArrowException as error:
            raise DataError(f"{self.name} cannot be read as parquet: {error}") from error


class CsvTable(RowTable):
    """A CSV file with a header line; a record may span several lines, it is named by its first. A record
    shorter than the header has empty texts at its end."""

    @cached_property
    def columns(self) -> tuple[str, ...]:
        return check_csv_header(Path(self.name))

    def __iter__(self) -> Iterator[tuple[int, Row]]:
        names = self.columns
        for index, (line, record) in enumerate(self._records()):
            if len(record) > len(names):
                raise DataError(
                    f"{self.name} cannot be read as csv: line {line} has {len(record)} fields, the header "
                    f'names {len(names)} columns. Quote fields that hold a comma ("like, this").'
                )
            yield index, dict(zip_longest(names, record, fillvalue=""))

    def describe(self, index: int) -> str:
        lines = (line for number, (line, _) in enumerate(self._records()) if number == index)
        return f"{self.name} line {next(lines)}"

    def _records(self) -> Iterator[tuple[int, list[str]]]:
        """(first line, fields) of each record after the header; blank lines are no records."""
        try:
            with open(self.name, encoding="utf-8-sig", newline="") as file:
                reader = csv.reader(file)
                line, header_is_over = 1, False
                for record in reader:
                    if record and header_is_over:
                        yield line, record
                    header_is_over = header_is_over or bool(record)
                    line = reader.line_num + 1
        except (csv.Error, UnicodeDecodeError) as error:
            raise DataError(f"{self.name} cannot be read as csv in UTF-8: {error}") from error


class LineTable(RowTable):
    """A file read as lines of text."""

    def describe(self, index: int) -> str:
        return f"{self.name} line {index + 1}"

    def _lines(self) -> Iterator[tuple[int, str]]:
        """(index, line), blank lines left out."""
        try:
            with open(self.name, encoding="utf-8-sig") as file:
                for index, line in enumerate(file):
                    if not line.isspace():
                        yield index, line.rstrip("\n")
        except UnicodeDecodeError as error:
            raise DataError(f"{self.name} cannot be read as text in UTF-8: {error}") from error


class TextTable(LineTable):
    """A .txt file: every line that is not blank is a row with one column, `text`."""

    @cached_property
    def columns(self) -> tuple[str, ...]:
        return ("text",)

    def __iter__(self) -> Iterator[tuple[int, Row]]:
        return ((index, {"text": line}) for index, line in self._lines())


class JsonLinesTable(LineTable):
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


class JsonTable(LineTable):
    """A .json file that holds one list of objects. It is parsed at once, so it must fit in memory."""

    @cached_property
    def _text(self) -> str:
        return Path(self.name).read_text(encoding="utf-8-sig")

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

    @staticmethod
    def is_list(path: Path) -> bool:
        """Whether the file holds a list; the hub's .json files often hold one object a line."""
        lines = TextTable(str(path))
        return next((row["text"] for _, row in lines), "").lstrip().startswith("[")


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
