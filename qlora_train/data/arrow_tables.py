"""Rows of columnar data: .parquet, .arrow (also what `save_to_disk` writes), and splits of the hub.

Only the columns that were asked for are read: a date out of range in a column that nobody needs is no error,
and an image column is not unpacked. An object in a column has every key that any object there has, with null
where it had none; templates ask "is the key there", so such nulls are taken out again, at any depth.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from qlora_train.data.tables import (
    BATCH_EXAMPLES,
    Batch,
    ExampleProblem,
    ExampleTable,
    NumberedExample,
)
from qlora_train.errors import DataError

if TYPE_CHECKING:
    from datasets import Dataset
    from pyarrow import RecordBatch, Schema


@dataclass(frozen=True)
class ArrowBatch:
    """A record batch whose first example has the number `first` + 1."""

    first: int
    batch: RecordBatch

    def __iter__(self) -> Iterator[NumberedExample]:
        names = self.batch.schema.names
        values = [_as_list(name, column) for name, column in zip(names, self.batch, strict=True)]
        for number, cells in enumerate(zip(*values, strict=True), start=self.first + 1):
            problem = next((cell for cell in cells if isinstance(cell, ExampleProblem)), None)
            yield number, problem or dict(zip(names, cells, strict=True))


def _as_list(name: str, column: Any) -> list[Any]:
    """The column's values; a value that Python cannot hold (a date out of range) is an ExampleProblem."""
    from pyarrow import ArrowException

    unreadable = (ArrowException, ValueError, ArithmeticError, LookupError)
    try:
        return [without_nulls(value) for value in column.to_pylist()]
    except unreadable:
        return [_value(name, column, i, unreadable) for i in range(len(column))]


def _value(name: str, column: Any, index: int, unreadable: tuple[type[Exception], ...]) -> Any:
    try:
        return without_nulls(column[index].as_py())
    except unreadable as error:
        return ExampleProblem(f"cannot be read: its column {name!r} holds what Python cannot ({error}).")


def without_nulls(value: Any) -> Any:
    """Without the keys that are null, at any depth."""
    if isinstance(value, dict):
        return {key: without_nulls(item) for key, item in value.items() if item is not None}
    return [without_nulls(item) for item in value] if isinstance(value, list) else value


class ColumnarTable(ExampleTable):
    """A table whose columns are known from its schema."""

    _schema: Schema | None = None

    @property
    def columns(self) -> tuple[str, ...]:
        return tuple(self.schema.names)

    @property
    def is_empty(self) -> bool:
        with self._reading():
            return self._num_examples() == 0

    @property
    def first_example(self) -> str:
        return self.describe(1)

    @property
    def schema(self) -> Schema:
        if self._schema is None:
            with self._reading():
                self._schema = self._read_schema()
        return self._schema

    @abstractmethod
    def _read_schema(self) -> Schema: ...

    @abstractmethod
    def _num_examples(self) -> int: ...

    @abstractmethod
    def _record_batches(self, columns: list[str]) -> Iterable[RecordBatch]: ...

    def first_value(self, column: str) -> Any:
        if self.columns.count(column) != 1:
            return None
        with self._reading():
            batch = next(iter(self._record_batches([column])), None)
        examples = ArrowBatch(0, batch) if batch is not None else ()
        values = (example[column] for _, example in examples if isinstance(example, dict))
        return next((value for value in values if value is not None), None)

    def ask_for(self, columns: Iterable[str]) -> None:
        super().ask_for(columns)
        self._refuse_doubled()

    def _refuse_doubled(self) -> None:
        wanted = self.columns if self.asked_for is None else self.asked_for
        if doubled := [name for name in wanted if self.columns.count(name) > 1]:
            raise DataError(
                f"{self.name} has two columns of the name {doubled[0]!r}. Rename or drop one of them."
            )

    def _read(self) -> Iterator[Batch]:
        self._refuse_doubled()
        names = self.columns if self.asked_for is None else self.asked_for
        first = 0
        with self._reading():
            for batch in self._record_batches([name for name in names if name in self.columns]):
                yield ArrowBatch(first, batch)
                first += batch.num_rows
                self.share_read = first / self._num_examples()

    @contextmanager
    def _reading(self) -> Iterator[None]:
        from pyarrow import ArrowException

        try:
            yield
        except (ArrowException, OSError) as error:
            kind = self.name.rpartition(".")[2]
            raise DataError(f"{self.name} cannot be read as {kind}: {error}") from error


class ParquetTable(ColumnarTable):
    """A .parquet file."""

    def _read_schema(self) -> Schema:
        from pyarrow import parquet

        self._file = parquet.ParquetFile(self.name)
        return self._file.schema_arrow

    def _num_examples(self) -> int:
        _ = self.schema
        return int(self._file.metadata.num_rows)

    def _record_batches(self, columns: list[str]) -> Iterable[RecordBatch]:
        _ = self.schema
        return self._file.iter_batches(batch_size=BATCH_EXAMPLES, columns=columns)


class ArrowTable(ColumnarTable):
    """An .arrow file, as a stream (what `datasets` writes) or as a file with an index (Feather)."""

    def _read_schema(self) -> Schema:
        from pyarrow import OSFile, ipc

        with OSFile(self.name) as file:
            is_indexed = file.read(6) == b"ARROW1"
        source = OSFile(self.name)
        self._reader = ipc.open_file(source) if is_indexed else ipc.open_stream(source)
        return self._reader.schema

    @cached_property
    def _count(self) -> int:
        return sum(batch.num_rows for batch in self._record_batches([]))

    def _num_examples(self) -> int:
        return self._count

    def _record_batches(self, columns: list[str]) -> Iterator[RecordBatch]:
        _ = self.schema
        reader, self._schema = self._reader, None  # a stream is read once
        if hasattr(reader, "num_record_batches"):
            batches = map(reader.get_batch, range(reader.num_record_batches))
        else:
            batches = iter(reader)
        for batch in batches:
            chosen = batch.select(columns) if columns else batch
            for start in range(0, chosen.num_rows, BATCH_EXAMPLES):
                yield chosen.slice(start, BATCH_EXAMPLES)


class HubTable(ColumnarTable):
    """A split of a data set on the hub; the library keeps its examples on disk."""

    def __init__(self, name: str, dataset: Dataset) -> None:
        super().__init__(name)
        self.dataset = dataset

    def _read_schema(self) -> Schema:
        return self.dataset.features.arrow_schema

    def _num_examples(self) -> int:
        return len(self.dataset)

    def _record_batches(self, columns: list[str]) -> Iterator[RecordBatch]:
        chosen = self.dataset.select_columns(columns).with_format("arrow")
        for table in chosen.iter(batch_size=BATCH_EXAMPLES):
            yield from table.combine_chunks().to_batches()
