"""How a step is divided: few choices, all of the same batch, whatever is asked for."""

from __future__ import annotations

import time
from typing import Any

import pytest

from qlora_train.errors import RecipeError, UserError
from qlora_train.plan.split import Split, batch_size_of, smallest_split, splits_of
from qlora_train.recipe import Recipe


def recipe(sequence_length: int = 2048, **training: Any) -> Recipe:
    data = {"train": "x", "sequence_length": sequence_length}
    return Recipe.from_dict({"model": {"base": "b"}, "data": data, "training": training})


@pytest.mark.parametrize(
    ("training", "num_ranks", "batch_size", "splits"),
    [
        ({}, 1, 16, [(4, 4), (2, 8), (1, 16)]),
        ({}, 2, 16, [(4, 2), (2, 4), (1, 8)]),
        ({}, 3, 16, [(3, 2), (2, 3), (1, 6)]),  # 6 in each, two of them empty
        ({"batch_size": 7}, 1, 7, [(1, 7)]),
        ({"batch_size": 1}, 4, 1, [(1, 1)]),
        ({"micro_batch_size": 2}, 1, 16, [(2, 8)]),
        ({"micro_batch_size": 2, "gradient_accumulation_steps": 3}, 2, 12, [(2, 3)]),
        ({"batch_size": 12, "gradient_accumulation_steps": 3}, 2, 12, [(2, 3)]),
        ({"batch_size": 12, "micro_batch_size": 4, "gradient_accumulation_steps": 3}, 1, 12, [(4, 3)]),
    ],
)
def test_what_is_chosen_from(
    training: dict[str, Any], num_ranks: int, batch_size: int, splits: list[tuple[int, int]]
) -> None:
    asked = recipe(**training)
    assert batch_size_of(asked.training, num_ranks) == batch_size
    found = splits_of(asked, num_ranks)
    assert found == [Split(*numbers) for numbers in splits]
    for split in found:
        assert split.micro_batch_size * split.num_micro_batches * num_ranks >= batch_size


def test_short_sequences_are_not_taken_one_by_one_unless_nothing_else_fits() -> None:
    asked = recipe(128)
    assert splits_of(asked) == [Split(16, 1), Split(8, 2)]
    assert smallest_split(asked) == Split(1, 16)
    assert smallest_split(recipe(128, micro_batch_size=4)) is None


@pytest.mark.parametrize("batch_size", [2**20, 2**20 - 1, 1_048_573])
def test_any_batch_is_divided_at_once(batch_size: int) -> None:
    started = time.process_time()
    assert 1 <= len(splits_of(recipe(16, batch_size=batch_size))) <= 4
    assert time.process_time() - started < 0.5


def test_numbers_of_another_launch_are_refused() -> None:
    asked = recipe(batch_size=12, micro_batch_size=2, gradient_accumulation_steps=3)
    assert batch_size_of(asked.training, 2) == 12
    with pytest.raises(UserError, match=r"batch_size is 12, but .* 2 x 3 x 1 = 6"):
        batch_size_of(asked.training, 1)


@pytest.mark.parametrize(
    ("training", "message"),
    [
        ({"gradient_accumulation_steps": 4}, r"gradient_accumulation_steps: .*write training\.batch_size"),
        (
            {"batch_size": 10, "micro_batch_size": 4},
            r"micro_batch_size: .*no multiple of micro_batch_size = 4",
        ),
        ({"micro_batch_size": 3}, r"training\.batch_size is 16"),
        (
            {"batch_size": 10, "micro_batch_size": 2, "gradient_accumulation_steps": 2},
            r"no multiple of micro_batch_size x gradient_accumulation_steps = 4",
        ),
        ({"batch_size": 2**20 + 1}, r"batch_size: must be 1,048,576 or less"),
        ({"micro_batch_size": 0}, r"micro_batch_size: must be auto or a whole number from 1"),
        ({"micro_batch_size": 4096, "batch_size": 4096}, r"8,388,608 tokens .* at most 4,194,304"),
    ],
)
def test_contradictions_and_sizes_beyond_all_bounds(training: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        recipe(**training)


@pytest.mark.parametrize(("section", "key"), [("data", "sequence_length"), ("lora", "rank")])
def test_other_sizes_are_bounded(section: str, key: str) -> None:
    values: dict[str, Any] = {"model": {"base": "b"}, "data": {"train": "x"}}
    values.setdefault(section, {})[key] = 10**9
    with pytest.raises(RecipeError, match=rf"{section}\.{key}: must be [\d,]+ or less"):
        Recipe.from_dict(values)
