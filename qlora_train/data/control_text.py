"""Text of special tokens inside what people wrote: `</s>` in an answer about HTML or tokenizers.

A tokenizer takes the text "</s>" for the token EOS wherever it stands. In a rendered conversation only the
template may say control tokens: the same text in a message is content, and tokenised as such, or an example
could end a turn in the middle of it. (In `text` and `prompt_completion` examples there is no telling them
apart, and people do write templates by hand there: they stay tokens, and are counted.)

How, without knowing the template: a mark, one character that no text has, goes behind the first character of
each such text in the messages, which are then rendered. Now the tokenizer finds the template's own control
tokens only. They cut the text into runs, which a tokenizer treats apart from each other; the runs that hold a
mark are tokenised again without it, with special tokens switched off (`split_special_tokens`). Not all
tokenizers and templates can do that (one strips the mark, another asks what a content is, a third tokenises a
run alone differently than behind a control token). Each of these is checked, and where it fails the example
is tokenised as it is and counted.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import numpy as np

from qlora_train.data.tokenizer import special_token_ids
from qlora_train.data.tokenizing import Encoded, encode

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_MARK = "\ue001"


class ControlText:
    """Finds the text of one tokenizer's special tokens, and tokenises around it."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._special_ids = np.array(sorted(special_token_ids(tokenizer)), dtype=np.int64)
        texts = [str(tokenizer.convert_ids_to_tokens(int(token))) for token in self._special_ids]
        # One of a single character has no place for a mark.
        longest_first = sorted((text for text in texts if len(text) > 1), key=len, reverse=True)
        self._pattern = re.compile("|".join(map(re.escape, longest_first)) or "(?!)")

    def is_in(self, value: Any) -> bool:
        """Whether a text, or any text inside lists and objects, holds the text of a special token."""
        if isinstance(value, dict):
            return any(map(self.is_in, value.values()))
        if isinstance(value, list | tuple):
            return any(map(self.is_in, value))
        return isinstance(value, str) and self._pattern.search(value) is not None

    def mark(self, value: Any) -> Any:
        """A text, or all texts inside lists and objects, with marks."""
        if isinstance(value, str):
            return self._pattern.sub(lambda found: found[0][0] + _MARK + found[0][1:], value)
        if isinstance(value, dict):
            return {key: self.mark(item) for key, item in value.items()}
        return type(value)(map(self.mark, value)) if isinstance(value, list | tuple) else value

    def is_marked(self, text: str) -> bool:
        return _MARK in text

    def encode(self, marked_text: str) -> Encoded | None:
        """Tokens of the text without its marks; positions are those of the characters with their marks. None
        where that cannot be done exactly.
        """
        whole = self._encode(marked_text)
        is_special = np.isin(whole.token_ids, self._special_ids)
        pieces: list[Encoded] = []
        first = position = 0  # token and character behind the last control token
        for index in [*np.flatnonzero(is_special).tolist(), len(is_special)]:
            at_end = index == len(is_special)
            start, end = (len(marked_text),) * 2 if at_end else (whole.starts[index], whole.ends[index])
            if _MARK in marked_text[start:end]:
                return None  # the tokenizer dropped the mark and took the text for the token
            run = Encoded(*(column[first:index] for column in whole))
            if _MARK in marked_text[position:start]:
                again = self._without_marks(marked_text[position:start], run.token_ids)
                if again is None:
                    return None
                run = Encoded(again.token_ids, again.starts + position, again.ends + position)
            pieces.append(run)
            if not at_end:
                pieces.append(Encoded(*(column[index : index + 1] for column in whole)))
            first, position = index + 1, int(end)
        return Encoded(*(np.concatenate(columns) for columns in zip(*pieces, strict=True)))

    def _without_marks(self, marked_run: str, token_ids: np.ndarray) -> Encoded | None:
        """The tokens of a run between control tokens; `token_ids`: what it was, with marks, in its place."""
        if not np.array_equal(self._encode(marked_run).token_ids, token_ids):
            return None  # alone it is not what it is in its place
        run = self._encode(without_marks(marked_run), split_special_tokens=True)
        if np.isin(run.token_ids, self._special_ids).any():
            return None
        places = _places_of_unmarked(marked_run)
        return Encoded(run.token_ids, places[run.starts], places[np.maximum(run.ends, 1) - 1] + 1)

    def _encode(self, text: str, **options: bool) -> Encoded:
        return encode(self._tokenizer, [text], **options)[0]


def without_marks(text: str) -> str:
    return text.replace(_MARK, "")


def _places_of_unmarked(text: str) -> np.ndarray:
    """Positions, int64: where in the text each of its characters without the marks stands, and its end."""
    return np.array([i for i, character in enumerate(text) if character != _MARK] + [len(text)])
