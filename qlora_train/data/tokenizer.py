"""Loads the base's own tokenizer, and reads what its model says about the ends of answers. Only fast ones:
the supervised mask needs each token's offsets.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from qlora_train.boundary import parsing, read_json
from qlora_train.data.added_tokens import AddedTokens, add_tokens
from qlora_train.data.chat.choice import choose_chat_template
from qlora_train.data.tables import first_line
from qlora_train.errors import BaseModelError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from qlora_train.recipe import ModelSection

_GENERATION_CONFIG = "generation_config.json"
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tekken.json", "vocab.json", "spiece.model")
_REMEDY = "Download the tokenizer files of the base again."
_TRIAL = "Try it: 1 + 1 = 2.\n\tÄ 日本 🦙"
"""Text that every tokenizer can do: what is damaged in one shows when it is used, not when it is read."""


def has_tokenizer(folder: Path) -> bool:
    """Whether a base's folder holds a tokenizer."""
    return any((folder / name).is_file() for name in _TOKENIZER_FILES)


def tokenizer_of_run(
    model: ModelSection, base: str, revision: str | None = None
) -> tuple[PreTrainedTokenizerBase, AddedTokens]:
    """The tokenizer that a recipe's model section makes of the base's: with its tokens, and its chat template
    as the only one.

    base, revision: where the section's base was found. Raises as `load_tokenizer` and `add_tokens`, and
    DataError for a chat template that is not there.
    """
    tokenizer = load_tokenizer(base, revision)
    added = add_tokens(tokenizer, model.add_tokens)
    if model.chat_template is not None:
        tokenizer.chat_template = choose_chat_template(tokenizer, model.chat_template)
    return tokenizer, added


def load_tokenizer(base: str, revision: str | None = None) -> PreTrainedTokenizerBase:
    """The tokenizer of a folder or hub id, with its chat template. No code of the base is ever run.

    Raises BaseModelError: no such base, no tokenizer files in it, or a tokenizer without offsets.
    """
    from transformers import AutoTokenizer

    folder = Path(base).expanduser()
    if folder.is_dir():
        if not has_tokenizer(folder):
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


def read_stop_ids(base: str, revision: str | None = None) -> tuple[int, ...]:
    """The tokens that end an answer by generation_config.json (eos_token_id) of a folder or hub id; empty
    where the base has no such file, or it names none. Raises BaseModelError for a file that is damaged.
    """
    from transformers.utils import cached_file

    folder = Path(base).expanduser()
    if folder.is_dir():
        found: str | None = str(folder / _GENERATION_CONFIG)
    else:
        try:
            found = cached_file(
                base, _GENERATION_CONFIG, revision=revision, _raise_exceptions_for_missing_entries=False
            )
        except OSError as error:
            raise BaseModelError(f"{_GENERATION_CONFIG} of {base}: {first_line(error)}") from error
    if found is None or not Path(found).is_file():
        return ()
    listed = read_json(Path(found), BaseModelError, "Download it again, or remove it.").get("eos_token_id")
    listed = listed if isinstance(listed, list) else [] if listed is None else [listed]
    if not all(isinstance(token, int) and token >= 0 for token in listed):
        raise BaseModelError(f"{found}: eos_token_id is {listed}; it is a token's number, or a list of them.")
    return tuple(dict.fromkeys(listed))


def special_token_ids(tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """Ids of all control tokens, named (EOS, ...) or only marked as special."""
    added = tokenizer.added_tokens_decoder.items()
    return frozenset({*tokenizer.all_special_ids, *(i for i, token in added if token.special)})


class BosRule:
    """What stands before the tokens of a text: what the tokenizer itself puts there (BOS, for most that have
    one; nothing, for many that define one), and at most one BOS.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.bos_id: int | None = tokenizer.bos_token_id
        alone = tokenizer("a", add_special_tokens=False).input_ids
        with_its_own = tokenizer("a").input_ids
        num_before = next(
            (n for n in range(len(with_its_own)) if with_its_own[n : n + len(alone)] == alone), 0
        )
        self._before: list[int] = with_its_own[:num_before]

    def to_drop_and_add(self, token_ids: Sequence[int]) -> tuple[int, list[int]]:
        """(leading tokens to drop, tokens to put before what is left)."""
        num_bos = next((i for i, token in enumerate(token_ids) if token != self.bos_id), len(token_ids))
        if num_bos:
            return num_bos - 1, []
        num_before = len(self._before)
        is_there = num_before and list(token_ids[:num_before]) == self._before
        return 0, [] if is_there else self._before

    def apply(self, token_ids: list[int]) -> list[int]:
        num_drop, before = self.to_drop_and_add(token_ids)
        return [*before, *token_ids[num_drop:]]
