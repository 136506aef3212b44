"""Makes the plan of a recipe within the free memory of a device and its machine.

`plan_recipe` is for `train`, which knows its device; `plan_request` is for `qlora-train plan`, which needs
none. Both refuse what cannot be trained with the same messages.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from qlora_train.adapter.continued_adapter import as_continued
from qlora_train.adapter.pissa import is_pissa
from qlora_train.device.compute import THE_CPU
from qlora_train.device.compute_dtype import resolve_dtype
from qlora_train.device.description import DeviceDescription
from qlora_train.model.base_folder import check_base
from qlora_train.model.rope_lengths import refuse_length_dependent_rope
from qlora_train.plan.advice import advise
from qlora_train.plan.base_config import find_base_folder
from qlora_train.plan.host_budget import HostBudget, device_budget, free_host_memory
from qlora_train.plan.measured_rates import kept_rates, rates_of
from qlora_train.plan.model_shape import ModelShape, find_shape
from qlora_train.plan.plan import Choices, Plan
from qlora_train.plan.planned_walk import generate_size_in_training
from qlora_train.plan.planner import best_of, make_plan
from qlora_train.plan.request import PlanRequest
from qlora_train.plan.split import Split, smallest_split, splits_of
from qlora_train.plan.time_model import Rates, stated_rates
from qlora_train.plan.workload import workload_of
from qlora_train.recipe import Recipe
from qlora_train.weights.cache_key import cache_root


def plan_recipe(
    recipe: Recipe,
    target: DeviceDescription,
    free_bytes: int,
    *,
    shape: ModelShape | None = None,
    documents: Sequence[int] | None = None,
    most_documents: Callable[[int], int] = lambda micro_batch_size: 0,
    rates: Rates | None = None,
    has_context: bool = False,
    base_folder: Path | None = None,
    host_budget: HostBudget | None = None,
    num_ranks: int = 1,
    split: Split | None = None,
) -> Plan:
    """The plan of a run on `target`.

    free_bytes: free on the device now; the budget unless memory.vram is given. shape: sizes of model.base;
    None: read from its config. documents: token counts of a micro-batch's documents; None: each fills a bin.
    most_documents: the largest number of documents in any micro-batch of so many bins; 0: unknown. rates:
    None: the stated ones. has_context: a CUDA context exists already, so free_bytes is without it.
    base_folder: of model.base; None: it is searched for. host_budget: None: what is free here, for one rank.
    num_ranks: processes of the run. split: of the step into micro-batches; None: the best one is chosen. The
    disk of the cache must hold the quantized base unless it is there already.

    Raises `UserError` for a base that is unknown or cannot be trained; see `Plan.require_fit` for one that
    does not fit.
    """
    base_folder = base_folder or find_base_folder(recipe.model.base, recipe.model.revision)
    if base_folder is not None:
        check_base(base_folder, recipe.model.quantization, needs_originals=is_pissa(recipe.lora))
    resolve_dtype(recipe.model.compute_dtype, target)
    shape = shape or find_shape(recipe.model.base, recipe.model.revision)
    rates = rates or stated_rates(target)
    host_budget = host_budget or free_host_memory(recipe, target, base_folder)

    def plan_with(recipe: Recipe) -> Plan:
        refuse_length_dependent_rope(shape.config, recipe.data.sequence_length)
        budget = device_budget(target, free_bytes, recipe.memory.vram_bytes, has_context=has_context)
        generate = generate_size_in_training(recipe.data.sequence_length)
        choices = Choices(recipe.memory.weights, recipe.memory.activations)

        def plan_of(split: Split) -> Plan:
            known = most_documents(split.micro_batch_size)
            work = workload_of(recipe, shape, target, documents, known, split)
            return make_plan(work, budget, rates, host_budget, choices, generate)

        splits = [split] if split else splits_of(recipe, num_ranks)
        plan = plan_of(splits[-1])
        if plan.fits:
            return best_of([*map(plan_of, splits[:-1]), plan])
        smaller = None if split else smallest_split(recipe, num_ranks)
        return plan if smaller in (None, splits[-1]) else plan_of(smaller)

    plan = plan_with(recipe)
    return replace(plan, advise=partial(advise, plan, recipe, plan_with))


def plan_request(request: PlanRequest) -> dict[str, Any]:
    """The plan that `qlora-train plan` prints, as plain values, with advice."""
    recipe, target = request.recipe, request.target
    if recipe.lora.init_from is not None:
        shape = find_shape(recipe.model.base, recipe.model.revision)
        lora = as_continued(recipe.lora, shape.linear_shapes, shape.expert_shapes)
        recipe = recipe.model_copy(update={"lora": lora})
    plan = plan_recipe(
        recipe,
        target,
        request.free_bytes,
        rates=_rates_for(request),
        host_budget=request.host,
    )
    return plan.to_dict() | {"advice": list(plan.advice)}


def _rates_for(request: PlanRequest) -> Rates | None:
    """Rates measured on this machine if the plan is for it: a CPU's are measured now, a GPU's are those that
    an earlier run measured. None: stated rates are used."""
    if not request.is_here:
        return None
    dtype: torch.dtype = resolve_dtype(request.recipe.model.compute_dtype, request.target)
    if not request.target.is_accelerator:
        return rates_of(THE_CPU, dtype, cache_root())
    return kept_rates(request.target, dtype, cache_root())
