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
