"""The one call of a tokenizer on text of the data. A damaged tokenizer may load, pass its trial text, and
panic at a row: its files are at fault, and the message says so."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from qlora_train.boundary import parsing
from qlora_train.errors import BaseModelError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def tokenize(tokenizer: PreTrainedTokenizerBase, text: str | list[str], **options: bool) -> Any:
    """`tokenizer(text)` with nothing put around it. Raises `BaseModelError` for whatever it throws."""
    what = f"the tokenizer of {tokenizer.name_or_path}"
    remedy = "Download the tokenizer files of the base again."
    with parsing(what, BaseModelError, remedy):
        return tokenizer(text, add_special_tokens=False, verbose=False, **options)
