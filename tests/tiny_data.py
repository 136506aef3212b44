"""Examples as files hold them, conversations in short, and packed data sets of documents that are at hand."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import chain

import numpy as np

from qlora_train.data.content import Chat
from qlora_train.data.dataset import PackedDataset
from qlora_train.data.documents import Document
from qlora_train.data.example_reader import arrays_of
from qlora_train.data.tables import Example, ExampleProblem, ExampleTable
from qlora_train.data.tokenization import TokenizedExample
from qlora_train.data.tokenized_examples import KEY_BYTES, ExamplesWriter, Facts
from qlora_train.errors import DataError


def examples_in(table: ExampleTable) -> Iterator[tuple[int, Example]]:
    """(number, example) of each. Raises DataError for one that cannot be parsed."""
    for number, example in chain.from_iterable(table.batches()):
        if isinstance(example, ExampleProblem):
            raise DataError(f"{table.describe(number)} {example}")
        yield number, example


def chat(*turns: str) -> Chat:
    """Turns as "u:text", "a:text", "s:text"."""
    roles = {"u": "user", "a": "assistant", "s": "system"}
    return Chat(tuple({"role": roles[turn[0]], "content": turn[2:]} for turn in turns))


def packed(
    documents: Sequence[Document], *, length: int, packing: bool, seed: int, shuffle: bool
) -> PackedDataset:
    """Each document is an example."""
    examples = [
        (number, bytes(KEY_BYTES), TokenizedExample([document], len(document)))
        for number, document in enumerate(documents, start=1)
    ]
    writer = ExamplesWriter()
    arrays, _ = arrays_of(0, examples)
    writer.add({**arrays, "note_kinds": np.zeros(0)})
    tokenized = writer.finish(Facts(tables=(("documents", "row"),), weights=(1.0,)))
    assert tokenized is not None
    return PackedDataset(tokenized, sequence_length=length, packing=packing, seed=seed, shuffle=shuffle)
