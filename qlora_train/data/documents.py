"""Documents, and the texts that become documents: tokens, and beside each whether it is supervised.

Before a text stands what the tokenizer itself puts there (BOS, for most), at most one BOS: the template of a
conversation may write it, too. EOS follows where nothing else ends an answer. Token 0 of a document is never
supervised: nothing predicts it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from qlora_train.data.tokenizer import BosRule
from qlora_train.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Document:
    """Tokens that are one sequence for the model. token_ids int32 [n]; supervised bool [n]: token i is a
    target. supervised[0] is always False."""

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

    num_prompt: tokens before the first answer. num_before: the first of these, which belong to the tokenizer
    (BOS) and stay. shift: places that its tokens moved by what was put before them, or dropped. written: how
    a conversation's text was made, for `chat_tokens`. cuttable: the tokens that may be cut, int64, ascending;
    None: all others.
    """

    document: Document
    num_prompt: int
    num_before: int
    num_answers: int
    shift: int
    written: Any = None
    cuttable: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.document)


class TextEnds:
    """Puts before and behind the tokens of a text what one tokenizer's texts begin and end with.

    supervises_all: every token but the first is a target, not only the answers.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, *, supervises_all: bool) -> None:
        self._bos, self._eos_id = BosRule(tokenizer), tokenizer.eos_token_id
        self._supervises_all = supervises_all

    def text(
        self, ids: np.ndarray, answers: Sequence[tuple[int, int]], *, adds_eos: bool, written: Any = None
    ) -> Text:
        """The finished text. answers: (first token, past the last) of each, the last one first. Raises
        DataError for a tokenizer without EOS, where one is to be added."""
        supervised = np.full(len(ids), self._supervises_all)
        for first, last in answers:
            supervised[first:last] = True
        if adds_eos and self._eos_id is None:
            raise DataError(
                "The tokenizer defines no EOS token, so answers could never end. Set eos_token in it."
            )
        if adds_eos and not (len(ids) and int(ids[-1]) == self._eos_id):
            ids, supervised = np.append(ids, np.int32(self._eos_id)), np.append(supervised, True)
        num_drop, before = self._bos.to_drop_and_add(ids.tolist())
        ids = np.concatenate([before, ids[num_drop:]]).astype(np.int32)
        in_front = np.full(len(before), self._supervises_all)
        supervised = np.concatenate([in_front, supervised[num_drop:]])
        supervised[:1] = False
        shift = len(before) - num_drop
        begins_with_bos = len(ids) > 0 and int(ids[0]) == self._bos.bos_id
        return Text(
            Document(ids, supervised),
            num_prompt=min(first for first, _ in answers) + shift,
            num_before=max(len(before), int(begins_with_bos)),
            num_answers=len(answers),
            shift=shift,
            written=written,
        )
