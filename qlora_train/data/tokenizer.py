"""Loads the base's own tokenizer. Only fast ones: the supervised mask needs each token's offsets."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from qlora_train.boundary import parsing
from qlora_train.errors import BaseModelError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tekken.json", "vocab.json", "spiece.model")
_REMEDY = "Download the tokenizer files of the base again."
_TRIAL = "Try it: 1 + 1 = 2.\n\tÄ 日本 🦙"
"""Text that every tokenizer can do: what is damaged in one shows when it is used, not when it is read."""


def load_tokenizer(base: str, revision: str | None = None) -> PreTrainedTokenizerBase:
    """The tokenizer of a folder or hub id, with its chat template. No code of the base is ever run.

    Raises BaseModelError: no such base, no tokenizer files in it, or a tokenizer without offsets.
    """
    from transformers import AutoTokenizer

    folder = Path(base).expanduser()
    if folder.is_dir():
        if not any((folder / name).is_file() for name in _TOKENIZER_FILES):
            raise BaseModelError(
                f"The base folder {folder} holds no tokenizer ({', '.join(_TOKENIZER_FILES[:3])}, ...). "
                "Copy the tokenizer files of the original model into it."
            )
        base = str(folder)
    elif folder.exists():
        raise BaseModelError(
            f"model.base: {base} is a file; name the folder that holds config.json and the weights."
        )
    elif base.count("/") > 1 or base.startswith((".", "~", "/")):
        raise BaseModelError(f"model.base: there is no folder {base}.")
    with parsing(f"the tokenizer of {base}", BaseModelError, _REMEDY):
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            base, revision=revision, trust_remote_code=False
        )
    if not tokenizer.is_fast:
        raise BaseModelError(
            f"The tokenizer of {base} has no fast version (tokenizer.json), which the supervised mask "
            "needs. Convert it with transformers' convert_slow_tokenizer and save it beside the base."
        )
    with parsing(f"the tokenizer of {base}", BaseModelError, _REMEDY):
        ids = tokenizer(_TRIAL, return_offsets_mapping=True)["input_ids"]
        tokenizer.decode(ids)
    return tokenizer


def special_token_ids(tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """Ids of all control tokens, named (EOS, ...) or only marked as special."""
    added = tokenizer.added_tokens_decoder.items()
    return frozenset({*tokenizer.all_special_ids, *(i for i, token in added if token.special)})
