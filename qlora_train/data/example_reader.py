"""From a batch of examples to arrays of tokens: what a worker process does with each batch.

Nothing here depends on which examples came before, so batches can be worked on anywhere, in any order.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from qlora_train.data.content import content_key
from qlora_train.data.formats import EmptyExample, ExampleFormat, RejectedExample
from qlora_train.data.tables import Batch, ExampleProblem, ExampleTable
from qlora_train.data.tokenization import ExampleTokenizer, TokenizedExample


@dataclass
class TokenizedBatch:
    """The examples of a batch of one table. `arrays`: see `TokenizedExamples`, without note_kinds, which
    `note_names` has in words. `problems`: examples that cannot be used, in words. `columns`: names that
    occur.
    """

    table: int
    arrays: dict[str, np.ndarray] = field(default_factory=dict)
    note_names: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    columns: dict[str, None] = field(default_factory=dict)
    num_read: int = 0
    num_empty: int = 0
    num_rejected: int = 0


def read_batch(
    table: ExampleTable, number: int, example_format: ExampleFormat, batch: Batch, tokenizer: ExampleTokenizer
) -> TokenizedBatch:
    """Parses, reads and tokenises a batch. number: of the table, among all. Raises DataError for what is
    wrong with every example."""
    found = TokenizedBatch(number)
    contents = []
    for place, example in batch:
        found.num_read += 1
        if isinstance(example, ExampleProblem):  # goes on from the name of the line
            found.problems.append(f"{table.describe(place)} {example}")
            continue
        found.columns.update(dict.fromkeys(example))
        try:
            contents.append((place, example_format.read(example)))
        except EmptyExample:
            found.num_empty += 1
        except RejectedExample:
            found.num_rejected += 1
        except ExampleProblem as problem:
            found.problems.append(f"{table.describe(place)}: {problem}")
    kept = []
    results = tokenizer.tokenize([content for _, content in contents])
    for (place, content), result in zip(contents, results, strict=True):
        if isinstance(result, ExampleProblem):
            found.problems.append(f"{table.describe(place)}: {result}")
        else:
            kept.append((place, content_key(content), result))
    found.arrays, found.note_names = arrays_of(number, kept)
    return found


def arrays_of(
    table: int, examples: Sequence[tuple[int, bytes, TokenizedExample]]
) -> tuple[dict[str, np.ndarray], list[str]]:
    """The arrays and note names of `TokenizedBatch`. examples: (place in the table, content key, tokens)
    each."""
    places, keys, tokenized = zip(*examples, strict=True) if examples else ((), (), ())
    documents = [document for example in tokenized for document in example.documents]
    notes = [
        (index, name, amount)
        for index, example in enumerate(tokenized)
        for name, amount in example.notes.items()
        if amount
    ]
    number = len(examples)
    arrays = {
        "tokens": np.concatenate([np.zeros(0, np.int32), *(d.token_ids for d in documents)]),
        "supervised": np.concatenate([np.zeros(0, bool), *(d.supervised for d in documents)]),
        "document_starts": np.cumsum([0, *map(len, documents)]),
        "document_examples": np.repeat(np.arange(number), [len(each.documents) for each in tokenized]),
        "document_targets": np.array([document.num_supervised for document in documents]),
        "example_tables": np.full(number, table),
        "example_numbers": np.array(places),
        "example_keys": np.frombuffer(b"".join(keys), dtype=np.uint8),
        "example_lengths": np.array([each.num_tokens for each in tokenized]),
        "note_examples": np.array([index for index, _, _ in notes], dtype=np.int64),
        "note_amounts": np.array([amount for _, _, amount in notes]),
    }
    return arrays, [name for _, name, _ in notes]
