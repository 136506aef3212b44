"""Scores continuations of contexts: the log-likelihood of each, and whether greedy decoding would say it.

The model reads a continuation's tokens but the last, and scores are taken behind the tokens before each of
the continuation's. What is read is often the same for many (a question with four answers of a token each), or
the beginning of what is read for another: it is computed once, and scored for all. The rest is packed into
rows, as in training, where no document sees another.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch

from qlora_train.data.dataset import one_row
from qlora_train.data.documents import Document
from qlora_train.data.packing import pack_best_fit
from qlora_train.model.decoder import FrozenDecoder
from qlora_train.model.packed_tokens import PackedTokens
from qlora_train.model.rope_lengths import batches_by_table
from qlora_train.model.vocab_matrix import TokenIds
from qlora_train.walk.evaluate import token_scores

_SORTABLE = ">u4"  # bytes of such numbers are in the order of the numbers


@dataclass(frozen=True)
class Continuation:
    """Tokens of a context and what follows it, at least one each. num_scored: of what follows."""

    token_ids: Sequence[int]
    num_scored: int


@dataclass
class _Reading:
    """Tokens that the model reads once. places, labels, owners: of each score, the token that it is taken
    behind, the token to score, and the index of the continuation that it is for."""

    token_bytes: bytes
    places: list[int] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)
    owners: list[int] = field(default_factory=list)

    @property
    def token_ids(self) -> np.ndarray:
        return np.frombuffer(self.token_bytes, _SORTABLE)

    @property
    def size(self) -> int:
        """Its share of a row, which has room for as many scores as tokens."""
        return max(len(self.token_ids), len(self.labels))


def score(
    decoder: FrozenDecoder,
    continuations: Sequence[Continuation],
    row_tokens: int,
    on_scored: Callable[[int], object] = lambda number: None,
    *,
    group_size: int = 1,
) -> list[tuple[float, bool]]:
    """(log-likelihood in nats, whether greedy decoding would say it) of each continuation.

    row_tokens: of a packed row at most, no less than any continuation reads. on_scored: called with the
    number of token scores that are new. group_size: rows that pass the layers together. Raises
    `UnsupportedModelError` where a rotary table depends on the length (model/rope_lengths.py)."""
    log_likelihoods = np.zeros(len(continuations))
    is_greedy = np.ones(len(continuations), dtype=bool)
    rows = list(_rows(decoder, _readings(continuations, row_tokens), row_tokens))
    packed = (_pack(row, row_tokens, decoder.device.torch) for row in rows)
    for row, scores in zip(rows, token_scores(decoder, packed, group_size=group_size), strict=True):
        owners = np.concatenate([reading.owners for reading in row])
        np.subtract.at(log_likelihoods, owners, scores.losses.cpu().double().numpy())
        np.logical_and.at(is_greedy, owners, scores.is_greedy.cpu().numpy())
        on_scored(len(owners))
    return list(zip(log_likelihoods.tolist(), is_greedy.tolist(), strict=True))


def _readings(continuations: Sequence[Continuation], most_scores: int) -> list[_Reading]:
    """What there is to read: in descending order, what begins another comes right behind that one."""
    read = [np.asarray(c.token_ids[:-1], dtype=_SORTABLE).tobytes() for c in continuations]
    readings: list[_Reading] = []
    for i in sorted(range(len(read)), key=read.__getitem__, reverse=True):
        number = continuations[i].num_scored
        last = readings[-1] if readings else None
        if (
            last is None
            or not last.token_bytes.startswith(read[i])
            or len(last.labels) + number > most_scores
        ):
            last = _Reading(read[i])
            readings.append(last)
        stop = len(continuations[i].token_ids) - 1
        last.places += range(stop - number, stop)
        last.labels += continuations[i].token_ids[stop + 1 - number :]
        last.owners += [i] * number
    return readings


def _rows(decoder: FrozenDecoder, readings: list[_Reading], row_tokens: int) -> Iterator[list[_Reading]]:
    """The readings that are packed together."""
    lengths = [len(reading.token_ids) for reading in readings]
    for members in batches_by_table(decoder.config, lengths, 0):
        sizes = np.array([readings[i].size for i in members], dtype=np.int64)
        bins = pack_best_fit(sizes, row_tokens)
        yield from ([readings[members[j]] for j in bins[b]] for b in range(len(bins)))


def _pack(row: list[_Reading], row_tokens: int, device: torch.device) -> PackedTokens:
    documents = [Document(of.token_ids, np.zeros(len(of.token_ids), dtype=bool)) for of in row]
    starts = np.cumsum([0, *map(len, documents)])
    places = [np.array(of.places) + start for of, start in zip(row, starts, strict=False)]
    labels = np.concatenate([of.labels for of in row])
    return replace(
        PackedTokens.from_host(one_row(documents, row_tokens), device),
        supervised=torch.from_numpy(np.concatenate(places)).to(device),
        label_ids=TokenIds.of(labels, device),
    )
