"""Adds the recipe's tokens (`model.add_tokens`) to the base's tokenizer, before any text is tokenised."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from qlora_train.errors import BaseModelError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from qlora_train.recipe import NewToken


@dataclass(frozen=True)
class AddedTokens:
    """Tokens whose rows are trained. ids: ascending. parts: for each the ids of the tokens that its text was
    split into before; of a token that was in the vocabulary already, itself. known: the texts of those."""

    ids: tuple[int, ...] = ()
    parts: tuple[tuple[int, ...], ...] = ()
    known: tuple[str, ...] = ()

    def vocabulary_size(self, num_rows: int) -> int:
        """The rows that an embedding of `num_rows` has with these tokens."""
        return max([num_rows, *(token + 1 for token in self.ids[-1:])])

    @property
    def remarks(self) -> list[str]:
        """Lines about what is trained, for the user."""
        return [
            f"model.add_tokens: {text} is in the vocabulary already: its row is trained from what it is"
            for text in self.known
        ]


def add_tokens(tokenizer: PreTrainedTokenizerBase, tokens: Sequence[NewToken]) -> AddedTokens:
    """Add tokens to the tokenizer, which then never splits their text. Raises `BaseModelError` for a text
    that the tokenizer cannot split, and for a known token that is to become special."""
    from transformers import AddedToken

    vocabulary = tokenizer.get_vocab()
    parts: dict[str, tuple[int, ...]] = {}
    for token in tokens:
        if (known := vocabulary.get(token.token)) is not None:
            entry = tokenizer.added_tokens_decoder.get(known)
            if token.special and not (entry is not None and entry.special):
                raise BaseModelError(
                    f"model.add_tokens: {token.token} is in the vocabulary already, and is not special "
                    "there; leave special out"
                )
            parts[token.token] = (known,)
            continue
        parts[token.token] = tuple(tokenizer(token.token, add_special_tokens=False).input_ids)
        if not parts[token.token]:
            raise BaseModelError(f"model.add_tokens: {token.token!r} is no text to the tokenizer")
    new = [token for token in tokens if token.token not in vocabulary]
    for token in new:
        added = AddedToken(token.token, special=token.special, normalized=False)
        tokenizer.add_tokens([added], special_tokens=token.special)
    numbers = tokenizer.get_vocab()
    by_id = sorted((numbers[text], ids) for text, ids in parts.items())
    return AddedTokens(
        tuple(number for number, _ in by_id),
        tuple(ids for _, ids in by_id),
        tuple(token.token for token in tokens if token not in new),
    )
