"""Writes an answer to the terminal as its tokens come."""

from __future__ import annotations

from collections.abc import Callable

from transformers import PreTrainedTokenizerBase

_UNFINISHED = "\ufffd"  # decoding of an incomplete multi-byte character


class TextStream:
    """Writes text as tokens come. A character may span tokens, so the whole answer is decoded again for each
    token, and only its new, complete characters are written.

    transformers' TextStreamer restarts after a newline, where SentencePiece tokenizers lose a space of
    indentation; tokenizers' DecodeStream raises at bytes that are no character."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, write: Callable[[str], None]) -> None:
        self._tokenizer, self._write = tokenizer, write
        self._tokens: list[int] = []
        self._num_written = 0

    def add(self, token: int) -> None:
        """Write the characters that this token completes."""
        self._tokens.append(token)
        text = self.text
        if not text.endswith(_UNFINISHED):
            new = text[self._num_written :]
            self._num_written = len(text)
            self._write(new)

    def finish(self) -> None:
        """Write the remaining text, complete or not."""
        self._write(self.text[self._num_written :])

    @property
    def text(self) -> str:
        """The answer so far."""
        return str(self._tokenizer.decode(self._tokens, skip_special_tokens=True))
