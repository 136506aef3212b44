"""`training.cuda_graphs`: whether the walk is replayed from CUDA graphs (walk_graphs.py), decided before the
base is loaded.

A graph repeats kernels with the arguments they had, so a step must be the same kernels at the same places
every time: nothing streams or waits in host memory, no mask depends on the step, and attention takes
documents of any lengths in one call. And graphs keep the memory of the layers for themselves, so the budget
must hold more than the step. Results do not depend on the choice.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from transformers import PretrainedConfig

from qlora_train.errors import UserError
from qlora_train.memory.execution import Activation, ExecutionPlan, Place
from qlora_train.memory.plan.graph_bytes import step_with_graphs_bytes
from qlora_train.memory.plan.plan import Plan, budget_for, gib
from qlora_train.kernels.varlen_attention import VarlenAttention
from qlora_train.recipe import Recipe


@dataclass(frozen=True)
class GraphChoice:
    """are_used: from the steps on that are not metered. line: what to say at the start, if anything."""

    are_used: bool
    line: str | None


@dataclass(frozen=True)
class _Obstacle:
    """why: in words. change: what would mend it."""

    why: str
    change: str


def choose_graphs(
    recipe: Recipe,
    plan: Plan,
    execution: ExecutionPlan,
    config: PretrainedConfig,
    dtype: torch.dtype,
    device: torch.device,
    varlen: VarlenAttention | None,
) -> GraphChoice:
    """plan: of the run, with its budget. execution: what will be done. config: of the base. varlen: of this
    device. Raises `UserError`, with all that is in the way, where the recipe says true and it cannot be."""
    asked = recipe.training.cuda_graphs
    if asked is False:
        return GraphChoice(are_used=False, line=None)
    obstacles = list(_obstacles(recipe, plan, execution, config, dtype, device, varlen))
    if not obstacles:
        return GraphChoice(True, "CUDA graphs: the layers are replayed from them, after the first steps")
    if asked is True:
        listed = "\n".join(f"  {o.why}: {o.change}" for o in obstacles)
        raise UserError(f"training.cuda_graphs: true is not possible here; write auto, or change\n{listed}")
    return GraphChoice(False, f"CUDA graphs: not used, because {obstacles[0].why}")


def _obstacles(
    recipe: Recipe,
    plan: Plan,
    execution: ExecutionPlan,
    config: PretrainedConfig,
    dtype: torch.dtype,
    device: torch.device,
    varlen: VarlenAttention | None,
) -> Iterator[_Obstacle]:
    if device.type != "cuda":
        yield _Obstacle("there is no GPU", "run on a CUDA device")
        return
    if recipe.training.kernels != "auto":
        yield _Obstacle("reference mode takes the library's own operations", "training.kernels: auto")
    if recipe.lora.dropout > 0:
        yield _Obstacle("dropout's masks differ from step to step", "lora.dropout: 0")
    if execution.streams:
        num_streamed = sum(place is not Place.RESIDENT for place in execution.weights)
        what = f"{num_streamed} layers stream" if num_streamed else "the head streams"
        yield _Obstacle(what, "a larger memory.vram, or a smaller step")
    if Activation.OFFLOAD in execution.activations:
        num_offloaded = sum(policy is Activation.OFFLOAD for policy in execution.activations)
        yield _Obstacle(f"activations of {num_offloaded} layers wait in RAM", "memory.activations: recompute")
    if execution.inputs is not Place.RESIDENT:
        yield _Obstacle("layer inputs wait in RAM", "a larger memory.vram, or a smaller step")
    if varlen is None or not varlen.serves_model(config, dtype):
        yield _Obstacle(
            "attention goes document by document (flash attention does not serve this GPU, dtype or family)",
            "a GPU of compute capability 8.0 with bfloat16 or float16, and a family that it serves",
        )
    needed = budget_for(step_with_graphs_bytes(plan.workload, execution), plan.workload)
    if needed > plan.budget_bytes:
        yield _Obstacle(
            f"with them a step needs {gib(needed)} and the budget is {gib(plan.budget_bytes)}",
            "a larger memory.vram, memory.activations: recompute, or a smaller step",
        )
