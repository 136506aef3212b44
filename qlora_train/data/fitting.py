"""A text of tokens -> documents of at most sequence_length tokens, as `data.too_long` says.

    cut      the beginning of the prompt goes first (of a conversation: of what was asked, so that system
             prompt and headers stay). Where the answer is too long alone, the end goes, and of the prompt
             what is above half of the sequence; of a conversation whose first answer fits, only the end
    drop     the example is left out, which is not decided here
    split    the prompt is cut where the answer fits then; else consecutive pieces, each behind BOS or the
             token before it, so that every token is a target as often as in the example: once. Plain texts,
             which have no prompt, are always split

Conversations are cut and split between exchanges, where they have several, before they come here (see
`long_chats`).

Token 0 of a document is never supervised: nothing predicts it. What is cut is counted, by tokens.
"""

from __future__ import annotations

from typing import Literal

import numpy as np

from qlora_train.data.documents import Document, Text
from qlora_train.data.notes import Note, Notes

TooLong = Literal["cut", "drop", "split"]


def fit(text: Text, sequence_length: int, too_long: TooLong, notes: Notes) -> list[Document]:
    """The text as documents; `notes` counts what had to be done, in the notes' own units."""
    document = text.document
    if len(document) > sequence_length:
        assert too_long != "drop", "the row was left out"
        if too_long == "split":
            return _split(text, sequence_length, notes)
        document = _cut(text, sequence_length, notes)
    return [document] if document.num_supervised else []


def _cut(text: Text, sequence_length: int, notes: Notes) -> Document:
    document = text.document
    excess = len(document) - sequence_length
    spare = _places(text, sequence_length)
    num_answers = int(np.count_nonzero(np.diff(document.supervised.astype(np.int8)) == 1))
    if excess > len(spare):  # an answer loses its end whatever is cut before it: the question says what it is
        fits = num_answers > 1 and _end_of_first_answer(document) <= sequence_length
        spare = spare[: 0 if fits else max(text.num_prompt - sequence_length // 2, 0)]
    shorter = _without(document, spare[:excess], notes)
    if num_lost := len(shorter) - sequence_length:
        notes[Note.ANSWER_CUT] += num_lost
    return Document(shorter.token_ids[:sequence_length], shorter.supervised[:sequence_length])


def _without(document: Document, places: np.ndarray, notes: Notes) -> Document:
    """The document without these tokens of its prompt."""
    if len(places):
        notes[Note.PROMPT_CUT] += len(places)
    supervised = np.delete(document.supervised, places)
    supervised[0] = False
    return Document(np.delete(document.token_ids, places), supervised)


def _places(text: Text, sequence_length: int) -> np.ndarray:
    """Positions of the tokens that a cut may take, the first ones first. One of the prompt always stays: the
    answer's first token is predicted from it."""
    places = text.cuttable
    if places is not None:
        fits = len(text.document) - len(places) <= sequence_length
        if not fits and text.num_prompt - len(places) > sequence_length // 2:  # little room for the answer
            places = None
    if places is None:
        places = np.arange(text.num_before, text.num_prompt)
    return places if len(places) < text.num_prompt else places[:-1]


def _end_of_first_answer(document: Document) -> int:
    supervised = np.flatnonzero(document.supervised)
    gaps = np.flatnonzero(np.diff(supervised) > 1)
    last = supervised[gaps[0]] if len(gaps) else supervised[-1] if len(supervised) else -1
    return int(last) + 1


def _split(text: Text, sequence_length: int, notes: Notes) -> list[Document]:
    """Pieces of sequence_length - 1 new tokens behind one token of context: BOS, or the token before them.
    Pieces without a target are left out. The prompt is not worth a piece of its own: it is cut where the rest
    fits then, else to half of the first piece."""
    excess = len(text.document) - sequence_length
    spare = _places(text, sequence_length)
    num_cut = excess if excess <= len(spare) else max(text.num_prompt - sequence_length // 2, 0)
    document = _without(text.document, spare[:num_cut], notes)
    token_ids, step = document.token_ids, sequence_length - 1
    if len(token_ids) <= sequence_length:
        return [document] if document.num_supervised else []
    pieces = []
    for first in range(1, len(token_ids), step):
        head = token_ids[:1] if text.num_before else token_ids[first - 1 : first]
        supervised = np.concatenate([[False], document.supervised[first : first + step]])
        pieces.append(Document(np.concatenate([head, token_ids[first : first + step]]), supervised))
    pieces = [piece for piece in pieces if piece.num_supervised]
    notes[Note.SPLIT] += len(pieces)
    return pieces
