"""Where a prompt ends and its answer begins: the tokens on both sides as generation meets them.

Generation is handed the tokens of the prompt alone, tok(P). In the tokens of the whole, tok(P + A), one token
may reach over the edge ("Answer: " + "Paris": the space belongs to " Paris"), and a model trained on it has
never seen the prompt it will be given. So a row is tokenised once, which is exact where its tokens begin with
tok(P), and else joined from tok(P) and the tokens of A.

Those cannot simply be tok(A): many tokenizers put a space before what begins a text. A is tokenised behind
something that ends where A begins, which is taken off again; of a few such contexts the first one serves that
gives the text of the whole back.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TokenIds = list[int]
_CONTEXTS = ("", "\n", "a", ".")


def joined_at_seams(
    tokenizer: PreTrainedTokenizerBase, pairs: Sequence[tuple[str, str]]
) -> list[tuple[TokenIds, int]]:
    """For each (prompt, answer): (token ids of both, how many of them are the prompt's)."""
    if not pairs:
        return []
    wholes = _ids(tokenizer, [prompt + answer for prompt, answer in pairs])
    prompts = _ids(tokenizer, [prompt for prompt, _ in pairs])
    joined = []
    for (_, answer), whole, prompt in zip(pairs, wholes, prompts, strict=True):
        if whole[: len(prompt)] != prompt:
            whole = prompt + _behind(tokenizer, answer, prompt, whole)
        joined.append((whole, len(prompt)))
    return joined


def _behind(tokenizer: PreTrainedTokenizerBase, answer: str, prompt: TokenIds, whole: TokenIds) -> TokenIds:
    text = _decoded(tokenizer, whole)
    found: list[TokenIds] = []
    for context in _CONTEXTS:
        before, both = _ids(tokenizer, [context, context + answer])
        if both[: len(before)] == before:
            found.append(both[len(before) :])
            if _decoded(tokenizer, prompt + found[-1]) == text:
                return found[-1]
    return found[0]


def _ids(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[TokenIds]:
    found: list[TokenIds] = tokenizer(texts, add_special_tokens=False, verbose=False).input_ids
    return found


def _decoded(tokenizer: PreTrainedTokenizerBase, token_ids: TokenIds) -> str:
    return str(tokenizer.decode(token_ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))
