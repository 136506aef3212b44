"""Answers to fixed prompts before, during and after training, which change nothing of the training."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from tiny_runs import adapter_bytes, metrics_of, recipe_values, write_base

from qlora_train import generate
from qlora_train.errors import DataError, RecipeError, UnsupportedModelError
from qlora_train.recipe import Recipe, load_recipe
from qlora_train.train import train

PROMPTS = ["abcdef:", "fade:"]


def values_of(base: Path, train_file: Path, run: Path, samples: dict[str, Any] | None) -> dict[str, Any]:
    training = {
        "max_steps": 5,
        "eval_every": 2,
        "save_every": 2,
        "keep_checkpoints": 9,
        "optimizer": "paged_adamw_8bit",
        "samples": samples,
    }
    lora, data = {"dropout": 0.1}, {"eval": 0.2}
    return recipe_values(base, train_file, run, lora=lora, data=data, training=training)


def samples_of(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "samples.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("weights", ["resident", "disk"])
def test_they_are_those_of_generate_and_the_run_is_the_same(
    tmp_path: Path, base: Path, train_file: Path, weights: str
) -> None:
    with_samples, without = tmp_path / "with", tmp_path / "without"
    asked = {"prompts": PROMPTS, "every": 2, "max_new_tokens": 6}
    for run, samples in ((without, None), (with_samples, asked)):
        values = values_of(base, train_file, run, samples) | {"memory": {"weights": weights}}
        train(Recipe.from_dict(values))
    assert metrics_of(with_samples) == metrics_of(without)
    for file in ("adapter/adapter_model.safetensors", "checkpoints/step-5/state.safetensors"):
        assert (with_samples / file).read_bytes() == (without / file).read_bytes()

    rows = samples_of(with_samples)
    assert [(row["step"], row["prompt"]) for row in rows] == [(n, p) for n in (0, 2, 4, 5) for p in PROMPTS]
    for step, checkpoint in ((2, "step-2"), (5, None)):
        answers = generate(with_samples, PROMPTS, max_new_tokens=6, checkpoint=checkpoint)
        assert [row["answer"] for row in rows if row["step"] == step] == answers
    assert rows[0]["answer"] != rows[-2]["answer"], "the run must change an answer, or nothing is shown"


def test_a_resume_has_each_row_once(tmp_path: Path, base: Path, train_file: Path) -> None:
    straight, resumed = tmp_path / "straight", tmp_path / "resumed"
    asked = {"prompts": [[{"role": "user", "content": "cab:"}]], "every": 1, "max_new_tokens": 4}
    train(Recipe.from_dict(values_of(base, train_file, straight, asked)))
    assert [row["step"] for row in samples_of(straight)] == [0, 1, 2, 3, 4, 5]
    assert samples_of(straight)[0]["prompt"] == asked["prompts"][0]

    shutil.copytree(straight, resumed)  # as if it had been killed in the last step
    shutil.rmtree(resumed / "checkpoints" / "step-5")
    train(load_recipe(resumed), resume=True)
    assert samples_of(resumed) == samples_of(straight)
    assert adapter_bytes(resumed) == adapter_bytes(straight)


def test_a_prompt_beyond_the_planned_room_is_refused_before_anything_is_written(
    tmp_path: Path, base: Path, train_file: Path
) -> None:
    asked = {"prompts": ["abc:", "a" * 40]}
    values = values_of(base, train_file, tmp_path / "run", asked)
    with pytest.raises(DataError, match=r"samples\.prompts\[1\]: has 4\d tokens; the memory plan .* for 32"):
        train(Recipe.from_dict(values))
    assert not (tmp_path / "run").exists()


def test_answers_that_would_change_the_rotary_table_are_refused_before_anything_is_written(
    tmp_path: Path, train_file: Path
) -> None:
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    base = write_base(tmp_path / "base", rope_parameters=rope, max_position_embeddings=32)
    values = values_of(base, train_file, tmp_path / "run", {"prompts": ["abc:"]})
    with pytest.raises(UnsupportedModelError, match=r"training\.samples: .*where the rotary table changes"):
        train(Recipe.from_dict(values))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("asked", "problem"),
    [
        ({}, r"samples\.prompts: required, and missing"),
        ({"prompts": []}, r"samples\.prompts: must be a list of texts, or of conversations"),
        ({"prompts": "hello"}, r"samples\.prompts: must be a list of texts"),
        ({"prompts": [""]}, r"samples\.prompts: must be a list of texts"),
        ({"prompts": [[{"role": "user"}]]}, r"samples\.prompts: must be a list of texts"),
        ({"prompts": [[{"role": "assistant", "content": "x"}]]}, r"to be answered"),
        ({"prompts": ["x"], "evry": 2}, r"samples\.evry: unknown key; did you mean every"),
        ({"prompts": ["x"], "max_new_tokens": 129}, r"max_new_tokens: must be 128 or less, got 129"),
    ],
)
def test_what_is_no_prompt_is_refused(asked: dict[str, Any], problem: str) -> None:
    values = recipe_values(Path("base"), Path("rows"), Path("run"), training={"samples": asked})
    with pytest.raises(RecipeError, match=problem):
        Recipe.from_dict(values)
