"""From a batch of raw rows to arrays of tokens: what a worker process does with each batch.

Nothing here depends on which rows came before, so batches can be worked on anywhere, in any order.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from qlora_train.data.content import Content, content_key
from qlora_train.data.formats import EmptyExample, ExampleFormat, RejectedExample
from qlora_train.data.tables import ExampleBatch, ExampleProblem, NumberedExample
from qlora_train.data.tokenization import ExampleTokenizer, TokenizedExample
from qlora_train.data.tokenized_examples import KEY_BYTES


@dataclass(frozen=True)
class OpenTable:
    """A table whose examples are about to be read: its number among all, its format, its name and unit."""

    number: int
    example_format: ExampleFormat
    name: str
    unit: str

    def describe(self, number: int) -> str:
        return f"{self.name} {self.unit} {number}"


@dataclass
class Part:
    """The examples of a batch. `arrays`: see `TokenizedExamples`, without note_kinds; `note_names` has them
    in words. `problems`: examples that cannot be used, in words. `columns`: names that occur."""

    arrays: dict[str, np.ndarray] = field(default_factory=dict)
    note_names: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    columns: list[str] = field(default_factory=list)
    num_read: int = 0
    num_empty: int = 0
    num_rejected: int = 0


def read_batch(table: OpenTable, batch: ExampleBatch, tokenizer: ExampleTokenizer) -> Part:
    """Parses, reads and tokenises a batch. Raises DataError for what is wrong with every example."""
    part = Part()
    read = _read_contents(table, batch, part)
    results = tokenizer.tokenize([content for _, content in read])
    examples: list[tuple[int, Content, TokenizedExample]] = []
    for (number, content), result in zip(read, results, strict=True):
        if isinstance(result, ExampleProblem):
            part.problems.append(f"{table.describe(number)}: {result}")
        else:
            examples.append((number, content, result))
    part.arrays = _arrays_of(table.number, examples, part.note_names)
    return part


def _read_contents(table: OpenTable, batch: ExampleBatch, part: Part) -> list[tuple[int, Content]]:
    contents = []
    columns: dict[str, None] = {}
    for number, example in batch:
        part.num_read += 1
        if isinstance(example, dict):
            columns.update(dict.fromkeys(example))
        try:
            contents.append((number, _content_of(table.example_format, (number, example))))
        except EmptyExample:
            part.num_empty += 1
        except RejectedExample:
            part.num_rejected += 1
        except ExampleProblem as problem:
            is_raw = isinstance(example, ExampleProblem)  # these go on from the name of the line
            part.problems.append(f"{table.describe(number)}{' ' if is_raw else ': '}{problem}")
    part.columns = list(columns)
    return contents


def _content_of(example_format: ExampleFormat, numbered: NumberedExample) -> Content:
    example = numbered[1]
    if isinstance(example, ExampleProblem):
        raise example
    return example_format.read(example)


def _arrays_of(
    table: int, examples: Sequence[tuple[int, Content, TokenizedExample]], note_names: list[str]
) -> dict[str, np.ndarray]:
    documents = [document for _, _, example in examples for document in example.documents]
    notes: list[tuple[int, int]] = []
    for index, (_, _, example) in enumerate(examples):
        for name, amount in Counter(example.notes).items():
            if amount:
                notes.append((index, amount))
                note_names.append(name)
    noted = np.array(notes, dtype=np.int64).reshape(-1, 2)
    keys = b"".join(content_key(content) for _, content, _ in examples)
    return {
        "tokens": np.concatenate([d.token_ids for d in documents]) if documents else np.zeros(0, np.int32),
        "supervised": np.concatenate([d.supervised for d in documents]) if documents else np.zeros(0, bool),
        "document_starts": np.cumsum([0, *map(len, documents)]),
        "document_examples": np.repeat(
            np.arange(len(examples)), [len(example.documents) for _, _, example in examples]
        ),
        "document_targets": np.array([document.num_supervised for document in documents], dtype=np.int32),
        "example_tables": np.full(len(examples), table, dtype=np.int32),
        "example_numbers": np.array([number for number, _, _ in examples], dtype=np.int64),
        "example_keys": np.frombuffer(keys, dtype=np.uint8).reshape(-1, KEY_BYTES),
        "example_lengths": np.array([example.num_tokens for _, _, example in examples], dtype=np.int64),
        "note_examples": noted[:, 0],
        "note_amounts": noted[:, 1],
    }
