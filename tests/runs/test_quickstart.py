"""The bundled quickstart keeps its word: the task, the base, and what training makes of it."""

from __future__ import annotations

import json
import random
from collections import Counter
from pathlib import Path

import pytest
import torch
from loaded_models import answers_of, loaded_run
from safetensors import safe_open

from qlora_train.export import export
from qlora_train.generate.model_folder import LoadedModel, find_model
from qlora_train.generate.sampling import Sampling
from qlora_train.plan.planned_walk import GenerateSize
from qlora_train.recipe import load_recipe
from qlora_train.recipe.files import bundled_recipes_dir
from qlora_train.train import train

QUICKSTART = bundled_recipes_dir() / "quickstart"
GREEDY = Sampling(max_new_tokens=48)


def rows(name: str) -> list[tuple[str, str]]:
    """(question, answer) of each row of a file."""
    lines = (QUICKSTART / f"{name}.jsonl").read_text().splitlines()
    messages = [json.loads(line)["messages"] for line in lines]
    return [(turns[-2]["content"], turns[-1]["content"]) for turns in messages]


def accuracy(model: LoadedModel, held_out: list[tuple[str, str]]) -> float:
    answers = answers_of(model, [question for question, _ in held_out], GREEDY)
    return sum(given == right for given, (_, right) in zip(answers, held_out, strict=True)) / len(held_out)


def test_the_task_cannot_be_guessed_or_remembered() -> None:
    held_out, training = rows("heldout"), rows("train")
    answers = Counter(answer for _, answer in held_out)
    assert len(held_out) >= 200 and len(answers) >= 100
    assert answers.most_common(1)[0][1] < 0.05 * len(held_out)
    assert not {q for q, _ in held_out} & {q for q, _ in training}
    assert not {a for _, a in held_out} & {a for _, a in training}


def test_the_base_is_small_and_fp16() -> None:
    file = QUICKSTART / "base" / "model.safetensors"
    assert file.stat().st_size < 12e6
    with safe_open(file, "pt") as tensors:
        values = [tensors.get_tensor(name) for name in tensors.keys()]  # noqa: SIM118 (no iterator)
    assert {value.dtype for value in values} == {torch.float16}
    assert 2e6 <= sum(value.numel() for value in values) <= 6e6


def test_the_base_can_do_what_it_was_pre_trained_for() -> None:
    assert accuracy(find_model(QUICKSTART / "base").load(GenerateSize()), rows("pretraining_eval")) >= 0.6


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    output_dir = tmp_path_factory.mktemp("quickstart") / "run"
    return train(load_recipe("quickstart", [f"training.output_dir={output_dir}"])).run_dir


def test_training_teaches_it_and_merging_keeps_it(run_dir: Path) -> None:
    recipe, held_out = load_recipe(run_dir / "recipe.yaml"), rows("heldout")
    before = accuracy(loaded_run(run_dir, recipe, with_adapter=False), held_out)
    after = accuracy(loaded_run(run_dir, recipe), held_out)
    merged = accuracy(find_model(export(run_dir)).load(GenerateSize()), held_out)
    assert before < 0.05
    assert after >= 0.8
    assert abs(merged - after) <= 0.02


def test_shuffled_answers_teach_nothing(tmp_path: Path) -> None:
    pairs = rows("train")
    answers = [answer for _, answer in pairs]
    random.Random(0).shuffle(answers)
    shuffled = [
        {"messages": [{"role": "user", "content": q}, {"role": "assistant", "content": a}]}
        for (q, _), a in zip(pairs, answers, strict=True)
    ]
    data = tmp_path / "shuffled.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in shuffled))
    overrides = [f"training.output_dir={tmp_path / 'run'}", f"data.train={data}"]
    recipe = load_recipe("quickstart", overrides)
    run = train(recipe).run_dir
    assert accuracy(loaded_run(run, recipe), rows("heldout")) < 0.1
