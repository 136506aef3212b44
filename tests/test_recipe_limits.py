"""Recipes that no person writes: nesting without end, numbers beyond what an update can hold."""

from __future__ import annotations

from pathlib import Path

import pytest

from qlora_train import Recipe, load_recipe
from qlora_train.errors import RecipeError


@pytest.mark.parametrize("text", ["[" * 10**4, "model: " + "[" * 10**4 + "]" * 10**4, "{a: " * 10**4])
def test_yaml_that_never_ends_its_nesting(tmp_path: Path, text: str) -> None:
    file = tmp_path / "r.yaml"
    file.write_text(text)
    with pytest.raises(RecipeError, match=r"r\.yaml"):
        load_recipe(file)


@pytest.mark.parametrize("key", ["learning_rate", "weight_decay", "lora_b_lr_ratio"])
def test_factors_of_an_update_stay_in_float32(key: str) -> None:
    values = {"model": {"base": "x"}, "data": {"train": "y"}, "training": {key: 1e6}}
    Recipe.from_dict(values)
    values["training"][key] = 1.1e6  # type: ignore[assignment]
    with pytest.raises(RecipeError, match=rf"training\.{key}: must be 1,000,000 or less"):
        Recipe.from_dict(values)


BOMB = "x: &a {p: 1, q: 1, r: 1, s: 1, t: 1, u: 1, v: 1, w: 1}\n" + "".join(
    f"y{i}: &{name} [{', '.join([f'*{before}'] * 8)}]\n"
    for i, (before, name) in enumerate(zip("abcdefgh", "bcdefghi", strict=True))
)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (BOMB, r"r\.yaml:\d+: the recipe has more than 10,000 values"),
        ("".join(f"k{i}: 1\n" for i in range(20_000)), "the recipe has more than 10,000 values"),
        ("model: {base: '" + "x" * 2**20 + "'}", "is larger than 1 MiB"),
    ],
    ids=["aliases", "keys", "a long text"],
)
def test_recipes_beyond_any_size(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "r.yaml"
    file.write_text(text)
    with pytest.raises(RecipeError, match=message):
        load_recipe(file)


def test_the_first_hundred_problems_are_reported(tmp_path: Path) -> None:
    file = tmp_path / "r.yaml"
    file.write_text("".join(f"k{i}: 1\n" for i in range(9_000)))
    with pytest.raises(RecipeError, match=r"r\.yaml:7: k6: unknown key") as caught:
        load_recipe(file)
    assert len(caught.value.problems) <= 102 and "... and more" in caught.value.problems
