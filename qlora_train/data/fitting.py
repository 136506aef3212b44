"""A text of tokens -> documents of at most sequence_length tokens, as `data.too_long` says.

    cut      the beginning of the prompt goes first: what is between its head (BOS, system prompt, the role of
             the question) and the answer's own header, from the left; where that is not enough, the end. Of a
             conversation whose first answer fits with its prompt, only the end goes. A plain text, which has
             no prompt, is cut into pieces, and nothing of it is lost
    drop     the row is left out
    split    consecutive pieces, each behind BOS or the token before it, so that every token is a target as
             often as in the row: once. Conversations are split between exchanges before they come here

Token 0 of a document is never supervised: nothing predicts it. What is cut is counted, by tokens.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Literal

import numpy as np

from qlora_train.data.report import Note

TooLong = Literal["cut", "drop", "split"]


@dataclass(frozen=True)
class Document:
    """token_ids int32 [n]; supervised bool [n]: token i is a target. supervised[0] is always False."""

    token_ids: np.ndarray
    supervised: np.ndarray

    def __len__(self) -> int:
        return len(self.token_ids)

    @property
    def num_supervised(self) -> int:
        return int(np.count_nonzero(self.supervised))


@dataclass(frozen=True)
class Text:
    """A document that may be too long.

    num_head: tokens at its beginning that a cut keeps. num_prompt: tokens before the first answer.
    num_header: the last of these, which a cut keeps too. A text without a prompt has none of them.
    """

    document: Document
    num_prompt: int = 0
    num_head: int = 0
    num_header: int = 0
    is_plain: bool = False


def fit(text: Text, sequence_length: int, too_long: TooLong, notes: Counter[str]) -> list[Document]:
    """The text as documents; `notes` counts what had to be done, in the notes' own units."""
    document = text.document
    if len(document) <= sequence_length:
        return [document] if document.num_supervised else []
    if too_long == "drop":
        notes[Note.TOO_LONG] += len(document)
        return []
    if too_long == "split" or text.is_plain:
        pieces = _split(document, sequence_length, has_head=text.num_head > 0)
        notes[Note.SPLIT] += len(pieces)
        return pieces
    return [kept for kept in [_cut(text, sequence_length, notes)] if kept.num_supervised]


def _cut(text: Text, sequence_length: int, notes: Counter[str]) -> Document:
    document = text.document
    excess = len(document) - sequence_length
    first, num_header = text.num_head, text.num_header
    if first + num_header > sequence_length // 2:  # too much to keep
        first, num_header = min(first, 1), 0
    spare = max(text.num_prompt - max(first + num_header, 1), 0)
    num_answers = int(np.count_nonzero(np.diff(document.supervised.astype(np.int8)) == 1))
    first_answer_end = _end_of_first_answer(document)
    if excess > spare and num_answers > 1 and first_answer_end <= sequence_length:
        spare = 0
    from_prompt = min(excess, spare)
    kept = np.r_[0:first, first + from_prompt : len(document)][:sequence_length]
    if from_prompt:
        notes[Note.PROMPT_CUT] += from_prompt
    if from_prompt < excess:
        notes[Note.ANSWER_CUT] += excess - from_prompt
    supervised = document.supervised[kept]
    supervised[0] = False
    return Document(document.token_ids[kept], supervised)


def _end_of_first_answer(document: Document) -> int:
    supervised = np.flatnonzero(document.supervised)
    gaps = np.flatnonzero(np.diff(supervised) > 1)
    last = supervised[gaps[0]] if len(gaps) else supervised[-1] if len(supervised) else -1
    return int(last) + 1


def _split(document: Document, sequence_length: int, *, has_head: bool) -> list[Document]:
    """Pieces of sequence_length - 1 new tokens behind one token of context: BOS, or the token before them.
    Pieces without a target are left out."""
    token_ids, step = document.token_ids, sequence_length - 1
    pieces = []
    for first in range(1, len(token_ids), step):
        head = token_ids[:1] if has_head else token_ids[first - 1 : first]
        supervised = np.concatenate([[False], document.supervised[first : first + step]])
        pieces.append(Document(np.concatenate([head, token_ids[first : first + step]]), supervised))
    return [piece for piece in pieces if piece.num_supervised]
