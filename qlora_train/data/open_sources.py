"""All rows of some sources as tokens: read once, batch by batch, tokenised by as many processes as there are
processors, and, where the data are large, kept in the token cache.

    this process    files -> raw batches of 1,000 rows ..... parts in order -> arrays
    workers                        batch -> parsed rows -> text -> tokens -> part

Workers are forks: they share the tokenizer and everything imported with this process, so each costs some tens
of megabytes, and none is started for what this process does in a few seconds. A part comes back as arrays. At
most two batches a worker are on their way, so memory does not grow with the data.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from qlora_train.data.csv_table import CsvTable
from qlora_train.data.example_reader import OpenTable, Part, read_batch
from qlora_train.data.formats import resolve_format
from qlora_train.data.reading_progress import Told
from qlora_train.data.report import Reading
from qlora_train.data.sources import load_source
from qlora_train.data.tables import MAX_LISTED_PROBLEMS, ExampleBatch, ExampleTable
from qlora_train.data.tokenization import ExampleTokenizer
from qlora_train.data.tokenized_examples import ExamplesWriter, Facts, TokenizedExamples
from qlora_train.data.workers import Workers, num_processors
from qlora_train.errors import DataError

if TYPE_CHECKING:
    from qlora_train.recipe import DataSection, DataSource

SERIAL_BATCHES = 4
"""Batches that this process works on alone."""


class OpenSources:
    """Sources whose files are open and whose formats are known; what they hold is read by `tokenized`, once.

    Raises DataError for what is missing, unreadable or of no format.
    """

    def __init__(self, sources: Sequence[DataSource], data: DataSection) -> None:
        self._data = data
        self.tables: list[ExampleTable] = []
        self.weights: list[float] = []
        for source in sources:
            tables = load_source(source)
            self.tables += tables
            self.weights += [source.weight] * len(tables)
        self._open = [
            OpenTable(number, resolve_format(data, table), table.name, table.unit)
            for number, table in enumerate(self.tables)
        ]
        self._all_columns = [table.columns for table in self.tables]
        for table, opened in zip(self.tables, self._open, strict=True):
            table.ask_for(name for name in opened.example_format.columns_read if name in table.columns)

    @property
    def formats(self) -> frozenset[str]:
        return frozenset(opened.example_format.name for opened in self._open)

    def tokenized(
        self,
        tokenizer: ExampleTokenizer,
        *,
        folder: Path | None = None,
        progress: Told = lambda num_examples, share: None,
    ) -> TokenizedExamples | None:
        """All examples. folder: where to write them instead of keeping them in memory. progress: told now and
        then how far reading is.

        Raises DataError for examples that cannot be used, unless `data.on_bad_row` skips them.
        """
        gathering = _Gathering(self._data.on_bad_row == "skip", ExamplesWriter(folder))
        try:
            for part in self._parts(tokenizer):
                gathering.add(part)
                progress(gathering.num_read, self._share_read)
            return gathering.finish(self._facts(gathering))
        finally:
            gathering.writer.close()

    def _parts(self, tokenizer: ExampleTokenizer) -> Iterator[Part]:
        batches = self._batches()
        first = list(islice(batches, SERIAL_BATCHES + 1))
        if len(first) <= SERIAL_BATCHES or num_processors() == 1:
            for table, batch in first:
                yield read_batch(table, batch, tokenizer)
            for table, batch in batches:
                yield read_batch(table, batch, tokenizer)
            return
        with Workers(lambda item: read_batch(item[0], item[1], tokenizer)) as workers:
            yield from workers.map(first)
            yield from workers.map(batches)

    def _batches(self) -> Iterator[tuple[OpenTable, ExampleBatch]]:
        for opened, table in zip(self._open, self.tables, strict=True):
            for batch in table.batches():
                yield opened, batch

    @property
    def _share_read(self) -> float:
        return sum(table.share_read for table in self.tables) / len(self.tables)

    def _facts(self, gathering: _Gathering) -> Facts:
        unread: dict[str, None] = {}
        for opened, known in zip(self._open, self._all_columns, strict=True):
            found = {**dict.fromkeys(known), **gathering.columns.get(opened.number, {})}
            unread |= dict.fromkeys(name for name in found if name not in opened.example_format.columns_read)
        remarks = [
            f"{table.name}: {table.dialect.in_words}"
            for table in self.tables
            if isinstance(table, CsvTable) and table.dialect.in_words
        ]
        return Facts(
            tables=tuple((opened.name, opened.unit) for opened in self._open),
            weights=tuple(self.weights),
            formats=tuple(opened.example_format.name for opened in self._open),
            note_names=tuple(gathering.note_kinds),
            reading=Reading(
                num_empty=gathering.num_empty,
                num_rejected=gathering.num_rejected,
                num_skipped=gathering.num_problems,
                skipped=tuple(gathering.problems),
                unread_columns=tuple(unread),
                remarks=tuple(remarks),
            ),
        )


class _Gathering:
    """Adds up parts."""

    def __init__(self, skips_bad_examples: bool, writer: ExamplesWriter) -> None:
        self._skips_bad_examples, self.writer = skips_bad_examples, writer
        self.note_kinds: dict[str, int] = {}
        self.problems: list[str] = []
        self.num_problems = self.num_read = self.num_empty = self.num_rejected = 0
        self.columns: dict[int, dict[str, None]] = {}

    def add(self, part: Part) -> None:
        """Raises DataError for problems that are not skipped, naming the first ones of the batch at once."""
        self.num_read += part.num_read
        self.num_empty += part.num_empty
        self.num_rejected += part.num_rejected
        self.num_problems += len(part.problems)
        self.problems += part.problems[: MAX_LISTED_PROBLEMS - len(self.problems)]
        if part.problems and not self._skips_bad_examples:
            raise DataError(self._problems_in_words())
        kinds = [self.note_kinds.setdefault(name, len(self.note_kinds)) for name in part.note_names]
        self.writer.add({**part.arrays, "note_kinds": np.array(kinds, dtype=np.int32)})
        if len(part.arrays["example_tables"]):
            table = int(part.arrays["example_tables"][0])
            self.columns.setdefault(table, {}).update(dict.fromkeys(part.columns))

    def finish(self, facts: Facts) -> TokenizedExamples | None:
        if not self.writer.num_documents:
            raise DataError(self._why_nothing_is_left())
        return self.writer.finish(facts)

    def _problems_in_words(self) -> str:
        hint = "(data.on_bad_row: skip leaves such rows out)"
        if self.num_problems == 1:
            return f"{self.problems[0]} {hint}"
        more = self.num_problems - len(self.problems)
        tail = [f"... and {more} more"] if more else []
        head = f"{self.num_problems} of the first {self.num_read:,} rows cannot be used {hint}:"
        return "\n".join([head, *self.problems, *tail])

    def _why_nothing_is_left(self) -> str:
        reasons = [
            f"{number:,} {what}"
            for number, what in (
                (self.num_empty, "are empty"),
                (self.num_rejected, "are labelled as bad answers"),
                (self.num_problems, "cannot be used"),
                (self.writer.num_examples, "have no supervised token or are too long"),
            )
            if number
        ]
        first = f" The first that cannot be used: {self.problems[0]}" if self.problems else ""
        return (
            f"None of the {self.num_read:,} rows can be trained on: {', '.join(reasons)}. Conversations need "
            f"assistant messages, or set data.supervise: all.{first}"
        )
