"""Tables: the examples of one file or hub split, which remember where they come from.

    .jsonl .json        `json_tables`     examples are named by their line; those of a list by their number
    .csv .tsv           `csv_table`       examples are named by their first line; every field is text
    .txt                here              a line is an example
    .parquet .arrow     `arrow_tables`    examples are named by their number
    hub split           `arrow_tables`    the `datasets` library

A value stays what the file says. A reader that infers one type per column (as pandas does, and the JSON and
CSV builders of `datasets`) turns a column of ISO dates into timestamps and "NA" into nothing, and forgets the
line numbers. Importing pandas would cost every run 90 MB besides.

A table is opened once and scanned once, batch by batch, and never held: the first batch (`head`) tells which
columns there are, and then is the beginning of the scan. A batch is raw (lines, Arrow data), so that it can
be pickled and parsed elsewhere, by a worker process. Columns that nobody asked for are not turned into
values.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from typing import Any

from qlora_train.data.text_files import numbered_lines, undecoded

Example = dict[str, Any]
BATCH_EXAMPLES = 1000
_BATCH_CHARACTERS = 2**24  # beyond which a batch is not filled up: it is tokenised at once
MAX_LISTED_PROBLEMS = 5
_MAX_LISTED_NAMES, _MAX_NAME = 50, 60


class ExampleProblem(Exception):
    """An example that cannot be used, in words. Where examples are read it is counted, or becomes a
    DataError."""


NumberedExample = tuple[int, Example | ExampleProblem]


Batch = Iterable[NumberedExample]
"""Some examples of a table. One that is not parsed yet (lines, Arrow data) is parsed while it is iterated."""


class ExampleTable(ABC):
    """The examples of one file or hub split. `name`: path or id. `unit`: what the numbers of examples count,
    "line" or "row". `rows_under`: the key of the list that the file's rows are in, if there is one."""

    unit = "row"
    rows_under: str | None = None

    def __init__(self, name: str) -> None:
        self.name = name
        self.asked_for: tuple[str, ...] | None = None
        self.share_read = 0.0  # of the file, so far
        self._begun: tuple[list[NumberedExample], Iterator[Batch]] | None = None

    @abstractmethod
    def _read(self) -> Iterator[Batch]:
        """Opens the file and scans it."""

    def batches(self) -> Iterator[Batch]:
        """All examples, in order. The first time this goes on from `head`; later the file is read anew."""
        first, rest = self._begin()
        self._begun = None
        return chain([first], rest)

    @property
    def head(self) -> Sequence[NumberedExample]:
        """The examples of the first batch."""
        return self._begin()[0]

    @property
    def is_empty(self) -> bool:
        return not self.head

    @property
    def first_example(self) -> str:
        """The place of the first example, in words."""
        return self.describe(next((number for number, _ in self.head), 1))

    @property
    def columns(self) -> tuple[str, ...]:
        """Column names, in order of first appearance, as far as the head tells."""
        return tuple(
            dict.fromkeys(name for _, example in self.head if isinstance(example, dict) for name in example)
        )

    def first_value(self, column: str) -> Any:
        """The first value in the head that is not null; None where there is none."""
        values = (example.get(column) for _, example in self.head if isinstance(example, dict))
        return next((value for value in values if value is not None), None)

    def ask_for(self, columns: Iterable[str]) -> None:
        """Asks for columns: from here on examples need hold only these columns. Raises DataError for one
        whose name is doubled."""
        self.asked_for = tuple(columns)

    def describe(self, number: int) -> str:
        return f"{self.name} {self.unit} {number}"

    def _lines(self) -> Iterator[tuple[int, str]]:
        """The numbered lines of a text file."""

        def read_on(share: float) -> None:
            self.share_read = share

        return numbered_lines(self.name, read_on)

    def _begin(self) -> tuple[list[NumberedExample], Iterator[Batch]]:
        if self._begun is None:
            rest = self._read()
            self._begun = list(next(rest, ())), rest
        return self._begun


class TextTable(ExampleTable):
    """A .txt file: every line is an example with one column, `text`."""

    unit = "line"

    @property
    def columns(self) -> tuple[str, ...]:
        return ("text",)

    def _read(self) -> Iterator[Batch]:
        return batched(map(_text_example, self._lines()))


def _text_example(numbered: tuple[int, str]) -> NumberedExample:
    number, line = numbered
    problem = undecoded(line)
    return number, ExampleProblem(problem) if problem else {"text": line.rstrip("\r\n")}


def batched(items: Iterable[tuple[int, Any]]) -> Iterator[list[Any]]:
    """Lists of `BATCH_EXAMPLES` numbered lines or examples, the last one shorter, and of fewer long ones."""
    batch, num_characters = [], 0
    for item in items:
        batch.append(item)
        num_characters += _num_characters(item[1])
        if len(batch) == BATCH_EXAMPLES or num_characters > _BATCH_CHARACTERS:
            yield batch
            batch, num_characters = [], 0
    if batch:
        yield batch


def _num_characters(item: str | Example | ExampleProblem) -> int:
    """Of a line, or of the texts of an example."""
    if isinstance(item, str):
        return len(item)
    return sum(len(text) for text in item.values() if isinstance(text, str)) if isinstance(item, dict) else 0


def type_name(value: Any) -> str:
    """The name of a value's type, as JSON calls it."""
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


def listed(names: Iterable[str]) -> str:
    """Names for a message: the first ones, shortened."""
    known = list(names)
    first = [
        name if len(name) <= _MAX_NAME else f"{name[:_MAX_NAME]}..." for name in known[:_MAX_LISTED_NAMES]
    ]
    more = [f"{len(known) - len(first):,} more"] if len(known) > len(first) else []
    return ", ".join([*first, *more]) or "none"


def first_line(error: BaseException) -> str:
    """The first line of an error's message; its type where it has none."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
