"""The packed data set: bins in an order that can be resumed anywhere, handed out as flat micro-batches.

The order is a pure function. Position p of the data order (p counts bins from the start of training, over
all epochs) is bin `order(seed, p // num_bins)[p % num_bins]`, so a resumed run needs one number to continue
at the next bin. The shuffle sorts by Philox words keyed with (seed, epoch): a counter-based generator's raw
words are fixed for all numpy versions, which numpy does not promise for `permutation`.

A micro-batch is ONE sequence of T tokens, the bins one after another without what is empty in them:

    tokens     a b c d | e f | g h i j k | . . .     a bin of 6 tokens and one of 5; `.` is a dummy tail
    position   0 1 2 3 | 0 1 | 0 1 2 3 4 | 0 1 2
    labels     b c d - | f - | h i j k - | - - -     `-` is -100: unsupervised, or no next token

T is at most len(positions) x sequence_length, which is what memory is planned for. Tokens that are nobody's
would be computed for nothing, so there are only as many as bring T to the next of a few lengths
(`padded_length`), four to each doubling: few shapes, which allocators and compiled kernels like, and less
than a quarter of dummies at most. What a token contributes does not depend on T: its document, its labels and
its dropout masks, which are keyed by bin and place in the bin, stay the same.

Labels are shifted here, once: labels[t] is what the model should say after token t.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache

import numpy as np

from qlora_train.data.documents import Document
from qlora_train.data.packing import Bins, one_per_bin, pack_best_fit
from qlora_train.data.report import DatasetReport, Reading
from qlora_train.data.tokenized_examples import TokenizedExamples
from qlora_train.micro_batch import IGNORED_LABEL, MicroBatch
from qlora_train.units import ceil_div

DUMMY_ID = 0
"""Dummy tokens are a document of their own and have no loss: any id of the vocabulary does."""
_LEAST_TOKENS = 16
_MAX_POSITIONS, _MAX_EPOCHS = 10**7, 1000  # that are shuffled ahead, in seconds


def padded_length(num_tokens: np.ndarray, limit: int) -> np.ndarray:
    """The length T of a micro-batch of that many tokens, for each: the next of 16, 20, 24, 28, 32, 40, 48,
    ... (4 to 7 times a power of two), and never more than `limit`, what full bins would be."""
    number = np.maximum(num_tokens, _LEAST_TOKENS)
    _, bit_length = np.frexp((number - 1).astype(np.float64))
    step = 1 << np.maximum(bit_length.astype(np.int64) - 3, 2)
    return np.minimum(-(-number // step) * step, limit)


@lru_cache(maxsize=4)
def epoch_order(seed: int, epoch: int, num_bins: int) -> np.ndarray:
    """A permutation of range(num_bins), int64: a pure function of its arguments."""
    words = np.random.Philox(key=np.array([seed, epoch], dtype=np.uint64)).random_raw(num_bins)
    order = np.argsort(words, kind="stable")
    order.setflags(write=False)
    return order


class PackedDataset:
    """Documents in bins. Documents are counted in example order, before any shuffle; `bins` are of these."""

    def __init__(
        self,
        examples: TokenizedExamples,
        *,
        sequence_length: int,
        packing: bool,
        seed: int,
        shuffle: bool,
        times: np.ndarray | None = None,
        reading: Reading | None = None,
        num_examples_also_in_train: int = 0,
    ) -> None:
        """times: how often each example is in an epoch, int64 [R]; None: once. reading: what to report of the
        files; None: nothing."""
        self.examples = examples
        self._times = np.ones(examples.num_examples, dtype=np.int64) if times is None else times
        # The documents of this side: indices into `examples`, each as often as its example.
        self._documents = np.repeat(
            np.arange(examples.num_documents), self._times[examples.document_examples]
        )
        self.lengths = examples.document_lengths[self._documents]
        self.bins: Bins = (
            pack_best_fit(self.lengths, sequence_length) if packing else one_per_bin(len(self.lengths))
        )
        self.sequence_length = sequence_length
        self._seed, self._shuffle = seed, shuffle
        self._as_packed = np.arange(len(self.bins))
        self._bin_tokens = self.bins.sums(self.lengths)
        self._bin_targets = self.bins.sums(examples.document_targets[self._documents])
        self.report = self._report(packing, reading or Reading(), num_examples_also_in_train)

    def _report(self, packing: bool, reading: Reading, num_examples_also_in_train: int) -> DatasetReport:
        examples = self.examples
        noted = self._times[examples.note_examples] > 0
        names = examples.facts.note_names
        kinds = examples.note_kinds[noted]
        amounts = (examples.note_amounts * self._times[examples.note_examples])[noted]
        number = np.bincount(kinds, minlength=len(names)).tolist()
        total = np.bincount(kinds, weights=amounts, minlength=len(names)).astype(int).tolist()
        return DatasetReport(
            num_examples=int(np.count_nonzero(self._times)),
            num_documents=len(self._documents),
            num_tokens=int(self._bin_tokens.sum()),
            num_supervised=int(self._bin_targets.sum()),
            num_bins=len(self.bins),
            sequence_length=self.sequence_length,
            packing=packing,
            notes=dict(zip(names, number, strict=True)),
            amounts=dict(zip(names, total, strict=True)),
            reading=reading,
            num_examples_also_in_train=num_examples_also_in_train,
        )

    @property
    def num_bins(self) -> int:
        return len(self.bins)

    @property
    def is_of_example(self) -> np.ndarray:
        """Mask of the examples that are on this side, bool [R]."""
        return self._times > 0

    @property
    def documents(self) -> list[Document]:
        """All documents of this side, in example order, as arrays: for data that fit in memory."""
        return [self.document(index) for index in range(len(self._documents))]

    def document(self, index: int) -> Document:
        return self.examples.document(int(self._documents[index]))

    def example_of(self, index: int) -> int:
        """The example, in `examples`, that a document is from."""
        return int(self.examples.document_examples[self._documents[index]])

    def bin_at(self, position: int) -> int:
        """The bin at a position of the data order: shuffled anew in every epoch (train) or as packed
        (eval).
        """
        epoch, place = divmod(position, self.num_bins)
        return int(self._order(epoch)[place])

    def _order(self, epoch: int) -> np.ndarray:
        return epoch_order(self._seed, epoch, self.num_bins) if self._shuffle else self._as_packed

    def num_supervised(self, positions: Sequence[int | None]) -> int:
        """Supervised tokens of the bins at these positions, without building them."""
        return sum(int(self._bin_targets[self.bin_at(p)]) for p in positions if p is not None)

    def num_tokens(self, positions: Sequence[int | None]) -> int:
        """Tokens of the documents in the bins at these positions, dummies not counted."""
        return sum(int(self._bin_tokens[self.bin_at(p)]) for p in positions if p is not None)

    def most_documents(self, micro_batch_size: int, num_positions: int) -> int:
        """The largest number of documents in any micro-batch of the first `num_positions` positions; a dummy
        tail counts as one. Of very many positions, the largest in any micro-batch that there could be."""
        limit = micro_batch_size * self.sequence_length
        in_bins = np.diff(self.bins.starts)
        if num_positions > min(_MAX_POSITIONS, _MAX_EPOCHS * self.num_bins):
            repeats = ceil_div(micro_batch_size, self.num_bins)  # a micro-batch may be of several epochs
            return int(np.sort(np.tile(in_bins, repeats))[-micro_batch_size:].sum()) + 1

        def most_in(groups: np.ndarray) -> int:
            tokens = self._bin_tokens[groups].sum(axis=1)
            has_tail = padded_length(tokens, limit) > tokens
            return int((in_bins[groups].sum(axis=1) + has_tail).max(initial=0))

        most, begun = 0, self._as_packed[:0]
        for epoch in range(ceil_div(num_positions, self.num_bins)):
            order = self._order(epoch)[: num_positions - epoch * self.num_bins]
            begun = np.concatenate([begun, order])
            whole, begun = np.split(begun, [len(begun) // micro_batch_size * micro_batch_size])
            most = max(most, most_in(whole.reshape(-1, micro_batch_size)))
        return max(most, most_in(begun[None]))

    def fingerprint(self) -> str:
        """A hash of every token, mask and bin: two data sets with the same one train the same way."""
        digest = hashlib.sha256(f"{self.sequence_length} {self.examples.facts.digest}".encode())
        for array in (self._documents, self.bins.starts, self.bins.documents):
            digest.update(np.ascontiguousarray(array, dtype=np.int64).data)
        return digest.hexdigest()

    def micro_batch(self, positions: Sequence[int | None]) -> MicroBatch:
        """The bins at these positions as one flat sequence; None is an empty bin (nothing but dummies)."""
        by_bin = [[] if p is None else self.bins[self.bin_at(p)].tolist() for p in positions]
        documents = [self.document(index) for of_bin in by_bin for index in of_bin]
        row = one_row(documents, len(positions) * self.sequence_length)
        bin_tokens = [self.num_tokens([position]) for position in positions]
        num_tokens = sum(bin_tokens)
        row.row_ids[:num_tokens] = np.repeat([-1 if p is None else p for p in positions], bin_tokens)
        token_offsets = row.token_offsets % self.sequence_length
        bin_starts = np.cumsum([0, *bin_tokens[:-1]])
        token_offsets[:num_tokens] = row.token_offsets[:num_tokens] - np.repeat(bin_starts, bin_tokens)
        return replace(row, token_offsets=token_offsets)


def one_row(documents: Sequence[Document], limit: int) -> MicroBatch:
    """Documents as one flat sequence, which is nobody's bin, with a tail of dummies up to the next of the few
    lengths, at most `limit`."""
    num_tokens = sum(map(len, documents))
    size = int(padded_length(np.array(num_tokens), limit))
    if num_dummies := size - num_tokens:
        dummies = Document(np.full(num_dummies, DUMMY_ID), np.zeros(num_dummies, dtype=bool))
        documents = [*documents, dummies]
    lengths = [len(document) for document in documents]
    bounds = np.cumsum([0, *lengths])
    places = np.arange(size, dtype=np.int64)
    token_ids = np.concatenate([d.token_ids for d in documents]).astype(np.int64)
    supervised = np.concatenate([d.supervised for d in documents])
    labels = np.full(size, IGNORED_LABEL, dtype=np.int64)
    labels[:-1] = np.where(supervised[1:], token_ids[1:], IGNORED_LABEL)
    return MicroBatch(
        token_ids=token_ids,
        position_ids=places - np.repeat(bounds[:-1], lengths),
        labels=labels,
        cu_seqlens=bounds.astype(np.int32),
        row_ids=np.full(size, -1, dtype=np.int64),
        token_offsets=places,
    )
