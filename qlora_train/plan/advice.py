"""Advice: changes of recipe keys that save memory, each confirmed by a plan made with them that fits.

Making a plan takes time: plans are made one by one, only when advice is asked for, until `MOST_LINES` help.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from qlora_train.plan.plan import Plan
from qlora_train.plan.words import duration, gib
from qlora_train.recipe import Recipe

Changes = dict[str, Any]
"""New value by `section.key`."""
MOST_LINES, LEAST_GAIN = 3, 0.02
LEAST_SEQUENCE_LENGTH = 16


def advise(plan: Plan, recipe: Recipe, plan_with: Callable[[Recipe], Plan]) -> tuple[str, ...]:
    """A line of text for each change that makes a plan fit, or, where `plan` fits already, that needs less
    VRAM or RAM. plan_with: makes the plan of a recipe."""
    lines: list[str] = []
    for changes in _savings(plan, recipe) if plan.fits else _remedies(plan, recipe):
        other = plan_with(_changed(recipe, changes))
        if other.fits and (not plan.fits or _saves(other, plan)):
            lines.append(_line(changes, other, plan))
        if len(lines) == MOST_LINES:
            break
    return tuple(lines)


def _savings(plan: Plan, recipe: Recipe) -> Iterator[Changes]:
    """Changes to try for a plan that fits: those that may need less memory."""
    split = {"training.micro_batch_size": plan.workload.micro_batch_size}
    if recipe.training.micro_batch_size != "auto" or plan.workload.num_micro_batches == 1:
        split = {}
    weights, activations = set(map(str, plan.execution.weights)), set(map(str, plan.execution.activations))
    if activations != {"recompute"}:
        yield split | {"memory.activations": "recompute"}
    elsewhere = ("ram", "disk") if plan.workload.on_accelerator else ("disk",)
    for place in elsewhere:
        if weights != {place}:
            yield split | {"memory.weights": place}


def _remedies(plan: Plan, recipe: Recipe) -> Iterator[Changes]:
    """Changes to try for a plan that does not fit, the cheapest first."""
    training, half = recipe.training, max(LEAST_SEQUENCE_LENGTH, recipe.data.sequence_length // 2)
    if (recipe.memory.weights, recipe.memory.activations) != ("auto", "auto"):
        yield {"memory.weights": "auto", "memory.activations": "auto"}
    one_by_one: Changes = {}
    if plan.workload.micro_batch_size > 1:
        one_by_one = {"training.micro_batch_size": 1}
        if training.gradient_accumulation_steps is not None:
            one_by_one["training.gradient_accumulation_steps"] = (
                plan.workload.num_micro_batches * plan.workload.micro_batch_size
            )
        yield one_by_one
    if recipe.model.quantization != "nf4":
        yield {"model.quantization": "nf4", "model.double_quant": True}
    if not training.optimizer.endswith("8bit"):
        yield {"training.optimizer": "paged_adamw_8bit"}
    if recipe.lora.rank > 8 and recipe.lora.init_from is None:
        yield {"lora.rank": 8}
    if half < recipe.data.sequence_length:
        yield {"data.sequence_length": half}
        shortest: Changes = {"data.sequence_length": min(512, half)}
        if recipe.lora.init_from is None:
            shortest["lora.rank"] = min(8, recipe.lora.rank)
        yield one_by_one | shortest


def _changed(recipe: Recipe, changes: Changes) -> Recipe:
    for path, value in changes.items():
        section, _, key = path.partition(".")
        changed = getattr(recipe, section).model_copy(update={key: value})
        recipe = recipe.model_copy(update={section: changed})
    return recipe


def _saves(other: Plan, plan: Plan) -> bool:
    peaks = ((other.peak_vram_bytes, plan.peak_vram_bytes), (other.peak_ram_bytes, plan.peak_ram_bytes))
    return any(less < (1 - LEAST_GAIN) * more for less, more in peaks)


def _line(changes: Changes, other: Plan, plan: Plan) -> str:
    words = " ".join(f"{path}={_written(value)}" for path, value in changes.items())
    line = (
        f"{words}: {gib(other.peak_vram_bytes)} on the device, {gib(other.peak_ram_bytes)} of RAM, "
        f"{duration(other.step_seconds)} a step"
    )
    same_work = other.workload.tokens_per_step == plan.workload.tokens_per_step
    if plan.fits and same_work:
        line += f" ({other.step_seconds / plan.step_seconds - 1:+.0%})"
    return line


def _written(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
