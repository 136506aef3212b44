"""Texts -> token ids with edges: where a prompt ends, whatever tokens would join there.

Generation is handed tok(P), the tokens of the prompt alone, and must go on from them. Tokenising P + A as one
text can join what stands on both sides of the edge: "assistant\\n" and "\\nHello" share a "\\n\\n" that
generation never meets. So a text's ids are

    tok(P + A)           where that begins with tok(P)
    tok(P) + tok(A)      elsewhere, tok(A) being A's tokens in the middle of a text

Tokenising every prompt again to compare would double the work. An added token (all control tokens are) cuts a
text in two that a tokenizer treats apart, so only what stands between the last of them and the edge has to be
looked at again: "assistant\\n", the same for all examples. A token that swallows white space around it
(rstrip) covers the edge, and is the prompt's: tok(P) ends in it, too.
"""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np

from qlora_train.data.control_text import ControlText
from qlora_train.data.tokenizing import Encoded, encode

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_MAX_REMEMBERED = 256  # ends of prompts; those of conversations are few
_NUM_ANCHORS = 4  # added tokens that are tried in front of an answer


class CannotEncode(Exception):
    """A text whose quoted control tokens cannot be told from real ones."""


class TextEncoder:
    """One tokenizer's view of texts with edges. control_text: whose marks the texts hold; positions count
    characters with their marks. None: texts without marks."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, control_text: ControlText | None = None) -> None:
        self._tokenizer = tokenizer
        self._control_text = control_text
        self._added = {int(i): str(token.content) for i, token in tokenizer.added_tokens_decoder.items()}
        self._is_added = np.zeros(max(self._added, default=0) + 2, dtype=bool)
        self._is_added[list(self._added)] = True
        self._tokens_of_end = lru_cache(_MAX_REMEMBERED)(self._tokens_behind)

    def one(self, text: str) -> Encoded:
        """Tokens of one text. Raises CannotEncode."""
        if self._control_text is None or not self._control_text.is_marked(text):
            return encode(self._tokenizer, [text])[0]
        encoded = self._control_text.encode(text)
        if encoded is None:
            raise CannotEncode
        return encoded

    def num_tokens_of_start(self, encoded: Encoded, text: str, at: int) -> int | None:
        """How many tokens tok(text[:at]) has, if `encoded`, the tokens of text, begins with them."""
        if at == len(text):
            return len(encoded.token_ids)
        first = int(np.searchsorted(encoded.starts, at))  # tokens begin in order
        before = encoded.token_ids[:first]
        is_added = np.flatnonzero(self._is_added[np.minimum(before, len(self._is_added) - 1)])
        last = int(is_added[-1]) if len(is_added) else -1
        behind = 0
        if last >= 0:
            behind = int(encoded.ends[last])
            if behind >= at:
                content = self._added[int(before[last])]
                return (
                    last + 1 if text.find(content, int(encoded.starts[last])) + len(content) <= at else None
                )
        if behind == at:
            return last + 1
        ids = self._tokens_of_end(int(before[last]) if last >= 0 else -1, text[behind:at])
        num = last + 1 + len(ids)
        return num if np.array_equal(encoded.token_ids[last + 1 : num], ids) else None

    def at_edge(self, prompt: str, answer: str, whole: Encoded) -> tuple[np.ndarray, int, str, Encoded]:
        """Tokens of a prompt and its answer: (their ids, how many are the prompt's, a text that begins with
        the prompt, its tokens). whole: the tokens of prompt + answer."""
        text = prompt + answer
        num_prompt = self.num_tokens_of_start(whole, text, len(prompt)) if prompt else 0
        if num_prompt is not None:
            return whole.token_ids, num_prompt, text, whole
        before, answer_ids = self.joined(prompt, answer)
        ids = np.concatenate([before.token_ids, answer_ids]).astype(np.int32)
        return ids, len(before.token_ids), prompt, before

    def joined(self, prompt: str, answer: str) -> tuple[Encoded, np.ndarray]:
        """Tokens of prompt and answer apart, (tok(P), tok(A)), A's tokens being those of a text's middle."""
        before = self.one(prompt)
        whole = self._decode(self.one(prompt + answer).token_ids)
        fallback = None
        for anchor in (*[*self._added.values()][:_NUM_ANCHORS], "\n", "a", "."):
            start = self.one(anchor).token_ids
            ids = self.one(anchor + answer).token_ids
            if len(start) and np.array_equal(ids[: len(start)], start):
                rest = ids[len(start) :]
                fallback = rest if fallback is None else fallback
                if self._decode(np.concatenate([before.token_ids, rest])) == whole:
                    return before, rest
        return before, self.one(answer).token_ids if fallback is None else fallback

    def _tokens_behind(self, added_id: int, text: str) -> np.ndarray:
        """Tokens of a text behind an added token (-1: at the beginning)."""
        return self.one(self._added.get(added_id, "") + text).token_ids[int(added_id >= 0) :]

    def _decode(self, ids: np.ndarray) -> str:
        return str(
            self._tokenizer.decode(
                ids.tolist(), skip_special_tokens=False, clean_up_tokenization_spaces=False
            )
        )
