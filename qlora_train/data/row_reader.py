"""From a batch of raw rows to arrays of tokens: what a worker process does with each batch.

Nothing here depends on which rows came before, so batches can be worked on anywhere, in any order.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from qlora_train.data.content import Content, content_key
from qlora_train.data.formats import EmptyRow, RejectedRow, RowFormat
from qlora_train.data.tables import NumberedRow, RowBatch, RowProblem
from qlora_train.data.tokenization import RowTokenizer, TokenizedRow
from qlora_train.data.tokenized_rows import KEY_BYTES


@dataclass(frozen=True)
class OpenTable:
    """A table whose rows are about to be read: its number among all, its format, its name and unit."""

    number: int
    row_format: RowFormat
    name: str
    unit: str

    def describe(self, number: int) -> str:
        return f"{self.name} {self.unit} {number}"


@dataclass
class Part:
    """The rows of a batch. `arrays`: see `TokenizedRows`, without note_kinds; `note_names` has them in words.
    `problems`: rows that cannot be used, in words. `columns`: names that occur."""

    arrays: dict[str, np.ndarray] = field(default_factory=dict)
    note_names: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    columns: list[str] = field(default_factory=list)
    num_read: int = 0
    num_empty: int = 0
    num_rejected: int = 0


def read_batch(table: OpenTable, batch: RowBatch, tokenizer: RowTokenizer) -> Part:
    """Parses, reads and tokenises a batch. Raises DataError for what is wrong with every row."""
    part = Part()
    read = _read_contents(table, batch, part)
    results = tokenizer.tokenize([content for _, content in read])
    rows: list[tuple[int, Content, TokenizedRow]] = []
    for (number, content), result in zip(read, results, strict=True):
        if isinstance(result, RowProblem):
            part.problems.append(f"{table.describe(number)}: {result}")
        else:
            rows.append((number, content, result))
    part.arrays = _arrays_of(table.number, rows, part.note_names)
    return part


def _read_contents(table: OpenTable, batch: RowBatch, part: Part) -> list[tuple[int, Content]]:
    contents = []
    columns: dict[str, None] = {}
    for number, row in batch:
        part.num_read += 1
        if isinstance(row, dict):
            columns.update(dict.fromkeys(row))
        try:
            contents.append((number, _content_of(table.row_format, (number, row))))
        except EmptyRow:
            part.num_empty += 1
        except RejectedRow:
            part.num_rejected += 1
        except RowProblem as problem:
            is_raw = isinstance(row, RowProblem)  # these go on from the name of the line
            part.problems.append(f"{table.describe(number)}{' ' if is_raw else ': '}{problem}")
    part.columns = list(columns)
    return contents


def _content_of(row_format: RowFormat, numbered: NumberedRow) -> Content:
    row = numbered[1]
    if isinstance(row, RowProblem):
        raise row
    return row_format.read(row)


def _arrays_of(
    table: int, rows: Sequence[tuple[int, Content, TokenizedRow]], note_names: list[str]
) -> dict[str, np.ndarray]:
    documents = [document for _, _, row in rows for document in row.documents]
    notes: list[tuple[int, int]] = []
    for index, (_, _, row) in enumerate(rows):
        for name, amount in Counter(row.notes).items():
            if amount:
                notes.append((index, amount))
                note_names.append(name)
    noted = np.array(notes, dtype=np.int64).reshape(-1, 2)
    keys = b"".join(content_key(content) for _, content, _ in rows)
    return {
        "tokens": np.concatenate([d.token_ids for d in documents]) if documents else np.zeros(0, np.int32),
        "supervised": np.concatenate([d.supervised for d in documents]) if documents else np.zeros(0, bool),
        "document_starts": np.cumsum([0, *map(len, documents)]),
        "document_rows": np.repeat(np.arange(len(rows)), [len(row.documents) for _, _, row in rows]),
        "document_targets": np.array([document.num_supervised for document in documents], dtype=np.int32),
        "row_tables": np.full(len(rows), table, dtype=np.int32),
        "row_numbers": np.array([number for number, _, _ in rows], dtype=np.int64),
        "row_keys": np.frombuffer(keys, dtype=np.uint8).reshape(-1, KEY_BYTES),
        "row_lengths": np.array([row.num_tokens for _, _, row in rows], dtype=np.int64),
        "note_rows": noted[:, 0],
        "note_amounts": noted[:, 1],
    }
