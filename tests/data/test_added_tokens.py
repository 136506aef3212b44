"""model.add_tokens: what the recipe may say, and what becomes of the tokenizer."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import pytest
from tiny_runs import byte_tokenizer

from qlora_train.data.added_tokens import AddedTokens, add_tokens
from qlora_train.errors import BaseModelError, RecipeError
from qlora_train.recipe import NewToken, Recipe

SPECIAL = NewToken(token="<|x|>", special=True)


def test_new_and_known_tokens() -> None:
    tokenizer = deepcopy(byte_tokenizer())
    split = tokenizer("<|x|>", add_special_tokens=False).input_ids
    (known,) = tokenizer("b", add_special_tokens=False).input_ids
    added = add_tokens(tokenizer, [SPECIAL, NewToken(token="b"), NewToken(token="<eos>", special=True)])
    assert added == AddedTokens((2, known, 259), ((2,), (known,), tuple(split)), ("b", "<eos>"))
    assert added.vocabulary_size(259) == 260 and added.vocabulary_size(300) == 300
    assert tokenizer("b<|x|>b", add_special_tokens=False).input_ids == [known, 259, known]
    assert tokenizer.decode([known, 259], skip_special_tokens=True) == "b"
    assert AddedTokens().vocabulary_size(7) == 7


def test_a_known_token_does_not_become_special() -> None:
    with pytest.raises(BaseModelError, match="b is in the vocabulary already, and is not special there"):
        add_tokens(deepcopy(byte_tokenizer()), [NewToken(token="b", special=True)])


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (["<a>", {"token": "<a>"}], "names <a> twice"),
        ([" \n"], "nothing but white space"),
        ([{"token": "<a>", "specail": True}], "unknown key; did you mean special"),
        ("<a>", "must be a list"),
    ],
)
def test_mistakes_are_refused(value: Any, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        Recipe.from_dict({"model": {"base": "org/x", "add_tokens": value}, "data": {"train": "x.jsonl"}})


def test_a_recipe_reads_what_it_writes() -> None:
    values = {"model": {"base": "org/x", "add_tokens": ["<a>", SPECIAL.model_dump()]}, "data": {"train": "x"}}
    recipe = Recipe.from_dict(values)
    assert recipe.model.add_tokens == (NewToken(token="<a>"), SPECIAL)
    assert Recipe.from_dict(recipe.to_dict()) == recipe
