"""Tables of columnar data: .parquet, .arrow (also what `save_to_disk` writes), and splits of the hub.

Only the columns that were asked for are read: a date out of range in a column that nobody needs is no error,
and an image column is not unpacked. An object in a column has every key that any object there has, with null
where it had none; templates ask "is the key there", so such nulls are taken out again, at any depth.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
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
    from pyarrow import NativeFile, RecordBatch, RecordBatchFileReader, RecordBatchReader, Schema


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
    """The value without the keys that are null, at any depth."""
    if isinstance(value, dict):
        return {key: without_nulls(item) for key, item in value.items() if item is not None}
    return [without_nulls(item) for item in value] if isinstance(value, list) else value


class ColumnarTable(ExampleTable):
    """A table whose columns are known from its schema."""

    schema: Schema

    @abstractmethod
    def _record_batches(self, columns: list[str]) -> Iterator[tuple[float, RecordBatch]]:
        """(share of the table that is read with it, batch) each; `columns` is what a batch must hold."""

    @property
    def columns(self) -> tuple[str, ...]:
        return tuple(self.schema.names)

    @property
    def is_empty(self) -> bool:
        with self._reading():
            return not any(batch.num_rows for _, batch in self._record_batches([]))

    @property
    def first_example(self) -> str:
        return self.describe(1)

    def first_value(self, column: str) -> Any:
        if self.columns.count(column) != 1:
            return None
        with self._reading():
            _, batch = next(self._record_batches([column]), (1.0, None))
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
            for share, batch in self._record_batches([name for name in names if name in self.columns]):
                self.share_read = share
                yield ArrowBatch(first, batch)
                first += batch.num_rows

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

    def __init__(self, name: str) -> None:
        from pyarrow import parquet

        super().__init__(name)
        with self._reading():
            self._file = parquet.ParquetFile(name)
        self.schema = self._file.schema_arrow

    def _record_batches(self, columns: list[str]) -> Iterator[tuple[float, RecordBatch]]:
        num_read, num_rows = 0, self._file.metadata.num_rows
        for batch in self._file.iter_batches(batch_size=BATCH_EXAMPLES, columns=columns):
            num_read += batch.num_rows
            yield num_read / num_rows, batch


class ArrowTable(ColumnarTable):
    """An .arrow file, as a stream (what `datasets` writes) or as a file with an index (Feather)."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        with self._reading():
            self.schema = self._opened()[1].schema

    def _opened(self) -> tuple[NativeFile, RecordBatchReader | RecordBatchFileReader]:
        from pyarrow import OSFile, ipc

        file = OSFile(self.name)
        is_indexed = file.read(6) == b"ARROW1"
        file.seek(0)
        return file, ipc.open_file(file) if is_indexed else ipc.open_stream(file)

    def _record_batches(self, columns: list[str]) -> Iterator[tuple[float, RecordBatch]]:
        file, reader = self._opened()
        if hasattr(reader, "num_record_batches"):
            batches = map(reader.get_batch, range(reader.num_record_batches))
        else:
            batches = iter(reader)
        for batch in batches:
            chosen = batch.select(columns) if columns else batch
            for start in range(0, chosen.num_rows, BATCH_EXAMPLES):
                yield file.tell() / file.size(), chosen.slice(start, BATCH_EXAMPLES)


class HubTable(ColumnarTable):
    """A split of a data set on the hub; the library keeps its examples on disk."""

    def __init__(self, name: str, dataset: Dataset) -> None:
        super().__init__(name)
        self.dataset, self.schema = dataset, dataset.features.arrow_schema

    @property
    def is_empty(self) -> bool:
        return len(self.dataset) == 0

    def _record_batches(self, columns: list[str]) -> Iterator[tuple[float, RecordBatch]]:
        num_read = 0
        chosen = self.dataset.select_columns(columns).with_format("arrow")
        for table in chosen.iter(batch_size=BATCH_EXAMPLES):
            num_read += table.num_rows
            for batch in table.combine_chunks().to_batches():
                yield num_read / len(self.dataset), batch
