"""The packed data set: bins in an order that can be resumed anywhere, handed out as flat micro-batches.

The order is a pure function. Position p of the data order (p counts bins from the start of training, over
all epochs) is bin `order(seed, p // num_bins)[p % num_bins]`, so a resumed run needs one number to continue
at the next bin. The shuffle sorts by Philox words keyed with (seed, epoch): a counter-based generator's raw
words are fixed for all numpy versions, which numpy does not promise for `permutation`.

A micro-batch is ONE row of len(positions) x sequence_length tokens:

    tokens     a b c d | e f | . . | g h i j k | . . .      two bins of 8; `.` is a dummy tail
    position   0 1 2 3 | 0 1 | 0 1 | 0 1 2 3 4 | 0 1 2
    labels     b c d - | f - | - - | h i j k - | - - -      `-` is -100: unsupervised, or no next token

Labels are shifted here, once: labels[t] is what the model should say after token t.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np

from qlora_train.data.chat import ChatFormat
from qlora_train.data.formats import Chat, Example, content_key, read_examples
from qlora_train.data.packing import Bin, one_per_bin, pack_best_fit
from qlora_train.data.report import DatasetReport
from qlora_train.data.sources import load_tables
from qlora_train.data.split import split_by_content
from qlora_train.data.tables import Origin
from qlora_train.data.tokenization import Document, TokenizedRows, tokenize_examples
from qlora_train.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from qlora_train.recipe import DataSection

IGNORED_LABEL = -100


@dataclass(frozen=True)
class MicroBatch:
    """One flat row of T = len(positions) x sequence_length tokens.

    token_ids, position_ids, labels int64 [T]; cu_seqlens int32 [documents + 1], dummy tails included;
    supervised_positions int64 [S], where labels are not -100; row_ids int64 [T], the position in the data
    order of the token's bin (-1: an empty bin); token_offsets int64 [T], 0 .. sequence_length - 1 within
    the bin; num_tokens counts no dummies.
    """

    token_ids: np.ndarray
    position_ids: np.ndarray
    labels: np.ndarray
    cu_seqlens: np.ndarray
    supervised_positions: np.ndarray
    row_ids: np.ndarray
    token_offsets: np.ndarray
    num_tokens: int
    num_supervised: int


@lru_cache(maxsize=4)
def epoch_order(seed: int, epoch: int, num_bins: int) -> np.ndarray:
    """A permutation of range(num_bins), int64: a pure function of its arguments."""
    words = np.random.Philox(key=np.array([seed, epoch], dtype=np.uint64)).random_raw(num_bins)
    order = np.argsort(words, kind="stable")
    order.setflags(write=False)
    return order


class PackedDataset:
    """Documents in bins. `documents`, `origins` and `bins` are in row order, before any shuffle."""

    def __init__(
        self,
        rows: TokenizedRows,
        *,
        sequence_length: int,
        packing: bool,
        pad_id: int,
        seed: int,
        shuffle: bool,
        num_rows_also_in_train: int = 0,
    ) -> None:
        self.documents: list[Document] = rows.documents
        self.origins: list[Origin] = rows.origins
        lengths = [len(document) for document in rows.documents]
        self.bins: list[Bin] = pack_best_fit(lengths, sequence_length) if packing else one_per_bin(lengths)
        self.sequence_length = sequence_length
        self.report = DatasetReport(
            rows.counts,
            len(self.bins),
            sequence_length,
            num_rows_also_in_train,
            notes=rows.notes,
            amounts=rows.amounts,
            remarks=rows.remarks,
        )
        self._pad_id = pad_id
        self._seed = seed
        self._shuffle = shuffle
        self._as_packed = np.arange(len(self.bins))
        self._num_supervised = [sum(self.documents[i].num_supervised for i in each) for each in self.bins]

    @property
    def num_bins(self) -> int:
        return len(self.bins)

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
        return sum(self._num_supervised[self.bin_at(p)] for p in positions if p is not None)

    def num_tokens(self, positions: Sequence[int | None]) -> int:
        """Tokens of the documents in the bins at these positions, dummies not counted."""
        bins = [self.bins[self.bin_at(p)] for p in positions if p is not None]
        return sum(len(self.documents[i]) for each in bins for i in each)

    def most_documents(self, micro_batch_size: int, num_positions: int) -> int:
        """In any micro-batch of the first `num_positions` positions; what is left of a bin counts as one."""
        num_tokens = [sum(len(self.documents[i]) for i in each) for each in self.bins]
        parts = zip(self.bins, num_tokens, strict=True)
        counts = np.array([len(each) + (number < self.sequence_length) for each, number in parts])
        most, begun = 0, counts[:0]
        for epoch in range(-(-num_positions // self.num_bins)):
            order = self._order(epoch)[: num_positions - epoch * self.num_bins]
            begun = np.concatenate([begun, counts[order]])
            whole, begun = np.split(begun, [len(begun) // micro_batch_size * micro_batch_size])
            most = max(most, whole.reshape(-1, micro_batch_size).sum(axis=1).max(initial=0))
        return max(int(most), int(begun.sum()) + micro_batch_size - len(begun))

    def fingerprint(self) -> str:
        """A hash of every token, mask and bin: two data sets with the same one train the same way."""
        digest = hashlib.sha256(str((self.sequence_length, self.bins)).encode())
        for document in self.documents:
            digest.update(document.token_ids.tobytes())
            digest.update(document.supervised.tobytes())
        return digest.hexdigest()

    def micro_batch(self, positions: Sequence[int | None]) -> MicroBatch:
        """The bins at these positions as one flat row; None is an empty bin (all dummy, nothing
        supervised).
        """
        length = self.sequence_length
        size = len(positions) * length
        token_ids = np.full(size, self._pad_id, dtype=np.int64)
        position_ids = np.empty(size, dtype=np.int64)
        labels = np.full(size, IGNORED_LABEL, dtype=np.int64)
        bounds = [0]
        num_tokens = 0
        for number, position in enumerate(positions):
            at, end = number * length, (number + 1) * length
            for index in self.bins[self.bin_at(position)] if position is not None else ():
                document = self.documents[index]
                stop = at + len(document)
                token_ids[at:stop] = document.token_ids
                position_ids[at:stop] = np.arange(len(document))
                labels[at : stop - 1] = np.where(
                    document.supervised[1:], document.token_ids[1:], IGNORED_LABEL
                )
                bounds.append(stop)
                num_tokens += len(document)
                at = stop
            if at < end:
                position_ids[at:end] = np.arange(end - at)
                bounds.append(end)
        supervised_positions = np.flatnonzero(labels != IGNORED_LABEL)
        row_ids = np.array([-1 if p is None else p for p in positions], dtype=np.int64)
        return MicroBatch(
            token_ids=token_ids,
            position_ids=position_ids,
            labels=labels,
            cu_seqlens=np.array(bounds, dtype=np.int32),
            supervised_positions=supervised_positions,
            row_ids=np.repeat(row_ids, length),
            token_offsets=np.tile(np.arange(length, dtype=np.int64), len(positions)),
            num_tokens=num_tokens,
            num_supervised=len(supervised_positions),
        )


def build_dataset(
    data: DataSection, tokenizer: PreTrainedTokenizerBase, *, seed: int, stop_ids: Sequence[int] = ()
) -> tuple[PackedDataset, PackedDataset | None]:
    """Reads, tokenises and packs `data.train` and `data.eval`: (train, eval or None).

    stop_ids: what the model's generation_config.json says ends an answer; empty where it has none.

    `data.eval` as a share is split off the training rows by content (see `split`); as sources it is read
    with the same format and columns, and rows that are also in train are counted. Raises DataError for
    every kind of bad data.
    """
    train = read_examples(load_tables(data.train), data)
    evaluation: list[Example] = []
    num_also_in_train = 0
    if isinstance(data.eval, float):
        train, evaluation = split_by_content(train, data.eval, seed)
    elif data.eval is not None:
        evaluation = read_examples(load_tables(data.eval), data)
        seen = {content_key(example.content) for example in train}
        num_also_in_train = sum(content_key(example.content) in seen for example in evaluation)

    chat_format = _chat_format([*train, *evaluation], data, tokenizer, stop_ids)

    def pack(examples: list[Example], shuffle: bool, num_rows_also_in_train: int = 0) -> PackedDataset:
        rows = tokenize_examples(
            examples,
            tokenizer,
            sequence_length=data.sequence_length,
            supervise=data.supervise,
            chat_format=chat_format,
        )
        return PackedDataset(
            rows,
            sequence_length=data.sequence_length,
            packing=data.packing,
            pad_id=_pad_id(tokenizer),
            seed=seed,
            shuffle=shuffle,
            num_rows_also_in_train=num_rows_also_in_train,
        )

    return pack(train, True), pack(evaluation, False, num_also_in_train) if evaluation else None


def _chat_format(
    examples: Sequence[Example],
    data: DataSection,
    tokenizer: PreTrainedTokenizerBase,
    stop_ids: Sequence[int],
) -> ChatFormat | None:
    """How the rows' conversations are written; None where there are none."""
    if any(isinstance(example.content, Chat) for example in examples):
        return ChatFormat(
            tokenizer, stop_ids, options=data.chat_template_kwargs, open_thought=data.open_thought
        )
    if data.chat_template_kwargs:
        raise DataError(
            "data.chat_template_kwargs is for conversations, and no row is one: remove it, or use the format "
            "messages or alpaca."
        )
    return None


def _pad_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The dummy tokens' id: they are a document of their own and have no loss, any id of the vocabulary
    does.
    """
    candidates = (tokenizer.pad_token_id, tokenizer.eos_token_id)
    return next((token for token in candidates if token is not None), 0)
