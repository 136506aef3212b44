"""`training.cuda_graphs`: each thing in the way of graphs, in words, and who may go on without them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from graph_tape import DenseAttention
from tiny_models import tiny_config

from qlora_train.errors import UserError
from qlora_train.memory.execution import Activation, ExecutionPlan, Place
from qlora_train.memory.plan.byte_walk import step_peak
from qlora_train.memory.plan.from_recipe import plan_recipe
from qlora_train.memory.plan.graph_bytes import OVERHEAD_BYTES, step_with_graphs_bytes
from qlora_train.memory.plan.model_shape import shape_from_config
from qlora_train.memory.plan.plan import budget_for
from qlora_train.device.description import planned_gpu
from qlora_train.memory.plan.time_model import stated_rates
from qlora_train.kernels.varlen_attention import VarlenAttention
from qlora_train.recipe import Recipe
from qlora_train.train.graph_choice import GraphChoice, choose_graphs

CONFIG = tiny_config("llama")
CUDA, BF16, ROOMY = torch.device("cuda"), torch.bfloat16, "8GiB"
GPU = planned_gpu("NVIDIA GeForce RTX 4090", (8, 9))
TURING = VarlenAttention(DenseAttention().function, (7, 5))


def recipe_of(asked: bool | str, vram: str = ROOMY, dropout: float = 0.0) -> Recipe:
    return Recipe.from_dict(
        {
            "model": {"base": "b"},
            "data": {"train": "t", "sequence_length": 64},
            "lora": {"dropout": 0.0},
            "training": {"cuda_graphs": asked},
            "memory": {"vram": vram},
        }
    ).model_copy(update={"lora": Recipe.from_dict(_with_dropout(dropout)).lora})


def _with_dropout(dropout: float) -> dict[str, Any]:
    return {"model": {"base": "b"}, "data": {"train": "t"}, "lora": {"dropout": dropout}}


def choice(
    asked: bool | str,
    *,
    vram: str = ROOMY,
    dropout: float = 0.0,
    config: Any = CONFIG,
    dtype: torch.dtype = BF16,
    device: torch.device = CUDA,
    varlen: VarlenAttention | None = DenseAttention(),  # noqa: B008  # frozen
    kernels: str = "auto",
    **execution: Any,
) -> GraphChoice:
    recipe = recipe_of(asked, vram, dropout)
    training = recipe.training.model_copy(update={"kernels": kernels})
    recipe = recipe.model_copy(update={"training": training})
    shape = shape_from_config(CONFIG.to_dict())
    plan = plan_recipe(recipe, GPU, 2**34, shape=shape, rates=stated_rates("cuda", None))
    done: ExecutionPlan = replace(plan.execution, **execution)
    return choose_graphs(recipe, plan, done, config, dtype, device, varlen)


def test_nothing_in_the_way() -> None:
    for asked in (True, "auto"):
        assert choice(asked) == GraphChoice(
            True, "CUDA graphs: the layers are replayed from them, after the first steps"
        )
    assert choice(False) == GraphChoice(are_used=False, line=None)


RAM, RESIDENT = Place.RAM, Place.RESIDENT
FLASH = "attention goes document by document (flash attention does not serve this GPU, dtype or family)"
OBSTACLES: list[tuple[dict[str, Any], str]] = [
    ({"device": torch.device("cpu")}, "there is no GPU"),
    ({"kernels": "reference"}, "reference mode takes the library's own operations"),
    ({"dropout": 0.1}, "dropout's masks differ from step to step"),
    ({"weights": (RESIDENT, RAM, RAM), "num_slots": 1}, "2 layers stream"),
    ({"head": Place.DISK, "num_slots": 1}, "the head streams"),
    ({"activations": (Activation.OFFLOAD,) * 3}, "activations of 3 layers wait in RAM"),
    ({"inputs": RAM}, "layer inputs wait in RAM"),
    ({"varlen": None}, FLASH),
    ({"varlen": TURING}, FLASH),
    ({"dtype": torch.float32}, FLASH),
    ({"config": tiny_config("gemma2", head_dim=16)}, FLASH),  # caps its scores
    ({"config": tiny_config("llama", head_dim=20)}, FLASH),
]


@pytest.mark.parametrize(("changes", "why"), OBSTACLES)
def test_auto_says_what_is_in_the_way_and_true_what_to_change(changes: dict[str, Any], why: str) -> None:
    assert choice("auto", **changes) == GraphChoice(False, f"CUDA graphs: not used, because {why}")
    assert choice(False, **changes) == GraphChoice(False, None)
    with pytest.raises(UserError) as caught:
        choice(True, **changes)
    first, *rest = str(caught.value).splitlines()
    assert first == "training.cuda_graphs: true is not possible here; write auto, or change"
    (line,) = rest
    assert line.startswith(f"  {why}: ") and len(line) > len(f"  {why}: ")


def test_true_names_everything_in_the_way() -> None:
    with pytest.raises(UserError) as caught:
        choice(True, inputs=RAM, varlen=None, dropout=0.1)
    assert len(str(caught.value).splitlines()) == 1 + 3


def test_an_embedding_in_ram_is_not_in_the_way() -> None:
    assert choice(True, embedding=RAM).are_used


def test_the_budget_must_hold_more_than_the_step() -> None:
    """To the byte."""
    shape = shape_from_config(CONFIG.to_dict())
    plan = plan_recipe(recipe_of("auto"), GPU, 2**34, shape=shape, rates=stated_rates("cuda", None))
    needed = budget_for(step_with_graphs_bytes(plan.workload, plan.execution), plan.workload)
    assert choice("auto", vram=f"{needed}B").are_used
    short = choice("auto", vram=f"{needed - 1}B")
    assert not short.are_used and short.line is not None
    assert short.line.startswith("CUDA graphs: not used, because with them a step needs 0.")


def test_bytes_beside_the_graphs() -> None:
    """Copies and gradients of a group, and the loss; never less than the step, more with larger groups."""
    plan = plan_recipe(recipe_of("auto"), GPU, 2**34, shape=shape_from_config(CONFIG.to_dict()))
    workload, extra = plan.workload, []
    for num_groups in (1, 2, 4):
        changed = replace(plan.execution, num_groups=num_groups)
        step = sum(step_peak(workload, changed).values())
        extra.append(step_with_graphs_bytes(workload, changed) - step - OVERHEAD_BYTES)
    x_bytes = workload.num_tokens * workload.shape.hidden * 2
    assert extra[2] > 2 * x_bytes  # an edge and a gradient, and what the loss takes
    assert extra[0] - extra[1] >= 2 * 2 * x_bytes and extra[1] - extra[2] >= 2 * x_bytes
