"""Models of runs loaded on the CPU, and their answers to plain prompts."""

from __future__ import annotations

from pathlib import Path

from qlora_train.adapter.run_adapter import find_adapter
from qlora_train.data.prompts import encode_prompt
from qlora_train.device.compute import THE_CPU
from qlora_train.generate.model_folder import LoadedModel, find_run
from qlora_train.generate.sampling import Sampling
from qlora_train.plan.planned_walk import GenerateSize
from qlora_train.recipe import Recipe


def loaded_run(run: Path, recipe: Recipe, *, with_adapter: bool = True) -> LoadedModel:
    """A run's model, with its finished adapter or as it was before training."""
    adapter = find_adapter(run, None, lambda line: None) if with_adapter else None
    return find_run(run, recipe, THE_CPU, adapter).load(GenerateSize())


def answers_of(model: LoadedModel, prompts: list[str], sampling: Sampling) -> list[str]:
    """The answers to prompts, which are written as in training, all in one batch."""
    encoded = [encode_prompt(prompt, model.data, model.tokenizer) for prompt in prompts]
    return list(model.answers(encoded, sampling, len(encoded)))
