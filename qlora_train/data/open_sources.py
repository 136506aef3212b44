"""All examples of some sources as tokens: read once, batch by batch, tokenised by as many processes as there
are processors, and, where the data are large, kept in the token cache.

    this process    files -> raw batches of 1,000 examples ..... parts in order -> arrays
    workers                        batch -> parsed examples -> text -> tokens -> part

Workers are forks: they share the tokenizer and everything imported with this process, so each costs some tens
of megabytes, and none is started for what this process does in a few seconds. A part comes back as arrays. At
most two batches a worker are on their way, so memory does not grow with the data.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from qlora_train.data.csv_table import CsvTable
from qlora_train.data.example_reader import TokenizedBatch, read_batch
from qlora_train.data.formats import resolve_format
from qlora_train.data.reading_progress import Told
from qlora_train.data.report import Reading
from qlora_train.data.sources import load_source
from qlora_train.data.tables import MAX_LISTED_PROBLEMS, Batch, ExampleTable
from qlora_train.data.tokenization import ExampleTokenizer
from qlora_train.data.tokenized_examples import ExamplesWriter, Facts, TokenizedExamples
from qlora_train.data.workers import in_processes, num_processors
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
        self._skips_bad_examples = data.on_bad_row == "skip"
        self.tables: list[ExampleTable] = []
        self.weights: list[float] = []
        for source in sources:
            tables = load_source(source)
            self.tables += tables
            self.weights += [source.weight] * len(tables)
        self._formats = [resolve_format(data, table) for table in self.tables]
        self._columns = [dict.fromkeys(table.columns) for table in self.tables]  # those met so far
        for table, example_format in zip(self.tables, self._formats, strict=True):
            table.ask_for(name for name in example_format.columns_read if name in table.columns)

    @property
    def formats(self) -> frozenset[str]:
        return frozenset(example_format.name for example_format in self._formats)

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
        writer, count, note_kinds = ExamplesWriter(folder), _Count(), dict[str, int]()
        try:
            for batch in self._batches(tokenizer):
                count.add(batch)
                if batch.problems and not self._skips_bad_examples:
                    raise DataError(count.problems_in_words())
                kinds = [note_kinds.setdefault(name, len(note_kinds)) for name in batch.note_names]
                writer.add({**batch.arrays, "note_kinds": np.array(kinds)})
                if len(batch.arrays["example_tables"]):
                    self._columns[batch.table] |= batch.columns
                progress(count.num_read, self._share_read)
            if not writer.num_documents:
                raise DataError(count.why_nothing_is_left(writer.num_examples))
            return writer.finish(
                Facts(
                    tables=tuple((table.name, table.unit) for table in self.tables),
                    weights=tuple(self.weights),
                    note_names=tuple(note_kinds),
                    reading=self._reading(count),
                )
            )
        finally:
            writer.close()

    def _batches(self, tokenizer: ExampleTokenizer) -> Iterator[TokenizedBatch]:
        def read(item: tuple[int, Batch]) -> TokenizedBatch:
            number, batch = item
            return read_batch(self.tables[number], number, self._formats[number], batch, tokenizer)

        batches = ((n, batch) for n, table in enumerate(self.tables) for batch in table.batches())
        first = list(islice(batches, SERIAL_BATCHES + 1))
        most = num_processors()
        is_worth_it = len(first) > SERIAL_BATCHES and most > 1
        if most and (is_worth_it or tokenizer.runs_templates):
            yield from in_processes(read, chain(first, batches), min(most, len(first)))
        else:
            yield from map(read, chain(first, batches))

    @property
    def _share_read(self) -> float:
        return sum(table.share_read for table in self.tables) / len(self.tables)

    def _reading(self, count: _Count) -> Reading:
        pairs = zip(self._formats, self._columns, strict=True)
        unread = [name for known, found in pairs for name in found if name not in known.columns_read]
        dialects = [(t.name, t.dialect.in_words) for t in self.tables if isinstance(t, CsvTable)]
        return Reading(
            num_empty=count.num_empty,
            num_rejected=count.num_rejected,
            num_skipped=count.num_problems,
            skipped=tuple(count.problems),
            unread_columns=tuple(dict.fromkeys(unread)),
            remarks=tuple(f"{name}: {words}" for name, words in dialects if words),
        )


class _Count:
    """What became of the examples of all batches so far; the first few problems in words."""

    def __init__(self) -> None:
        self.num_read = self.num_empty = self.num_rejected = self.num_problems = 0
        self.problems: list[str] = []

    def add(self, batch: TokenizedBatch) -> None:
        self.num_read += batch.num_read
        self.num_empty += batch.num_empty
        self.num_rejected += batch.num_rejected
        self.num_problems += len(batch.problems)
        self.problems += batch.problems[: MAX_LISTED_PROBLEMS - len(self.problems)]

    def problems_in_words(self) -> str:
        hint = "(data.on_bad_row: skip leaves such rows out)"
        if self.num_problems == 1:
            return f"{self.problems[0]} {hint}"
        more = self.num_problems - len(self.problems)
        tail = [f"... and {more} more"] if more else []
        head = f"{self.num_problems} of the first {self.num_read:,} rows cannot be used {hint}:"
        return "\n".join([head, *self.problems, *tail])

    def why_nothing_is_left(self, num_without_target: int) -> str:
        reasons = (
            (self.num_empty, "empty"),
            (self.num_rejected, "labelled as bad answers"),
            (self.num_problems, "unusable"),
            (num_without_target, "without a supervised token or too long"),
        )
        said = ", ".join(f"{number:,} {what}" for number, what in reasons if number)
        first = f" The first unusable one: {self.problems[0]}" if self.problems else ""
        advice = (
            " Conversations need assistant messages (or data.supervise: all), long rows a larger "
            "data.sequence_length."
        )
        return (
            f"No row of {self.num_read:,} can be trained on: {said}.{first}"
            f"{advice if num_without_target else ''}"
        )
