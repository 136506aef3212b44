"""The one call of a tokenizer on text of the data. A damaged tokenizer may load, pass its trial text, and
panic at an example: its files are at fault, and the message says so."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from qlora_train.boundary import parsing
from qlora_train.errors import BaseModelError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Encoded(NamedTuple):
    """Tokens of one text. token_ids int32 [n]; starts, ends int64 [n]: the characters of each token."""

    token_ids: np.ndarray
    starts: np.ndarray
    ends: np.ndarray


def tokenize(tokenizer: PreTrainedTokenizerBase, text: str | list[str], **options: bool) -> Any:
    """`tokenizer(text)` with nothing put around it. Raises `BaseModelError` for whatever it throws."""
    what = f"the tokenizer of {tokenizer.name_or_path}"
    remedy = "Download the tokenizer files of the base again."
    with parsing(what, BaseModelError, remedy):
        return tokenizer(text, add_special_tokens=False, verbose=False, **options)


def encode(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], **options: bool) -> list[Encoded]:
    """Tokens of each text, and which characters they cover."""
    if not texts:
        return []
    encoded = tokenize(tokenizer, list(texts), return_offsets_mapping=True, **options)
    found = []
    for ids, offsets in zip(encoded["input_ids"], encoded["offset_mapping"], strict=True):
        bounds = np.asarray(offsets, dtype=np.int64).reshape(-1, 2)
        found.append(Encoded(np.asarray(ids, dtype=np.int32), bounds[:, 0], bounds[:, 1]))
    return found
