"""The execution plan survives JSON and refuses what contradicts itself."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest

from qlora_train.weights.execution_plan import ActivationPolicy, ExecutionPlan, Placement

PLAN = ExecutionPlan(
    weights=(Placement.RAM, Placement.DEVICE, Placement.DISK),
    activations=(ActivationPolicy.RECOMPUTE, ActivationPolicy.OFFLOAD, ActivationPolicy.KEEP),
    embedding=Placement.RAM,
    head=Placement.DISK,
    num_groups=4,
    inputs=Placement.RAM,
    hold_dequantized=True,
    mlp_tile_tokens=None,
    loss_tokens=128,
    head_tile_rows=4096,
    num_slots=3,
)


@pytest.mark.parametrize("plan", [PLAN, replace(PLAN, mlp_tile_tokens=512, hold_dequantized=False)])
def test_json_and_back(plan: ExecutionPlan) -> None:
    text = json.dumps(plan.to_dict())
    assert ExecutionPlan.from_dict(json.loads(text)) == plan
    assert json.loads(text)["weights"] == ["ram", "resident", "disk"]


@pytest.mark.parametrize("key", list(PLAN.to_dict()))
def test_from_dict_misses_no_key(key: str) -> None:
    values = PLAN.to_dict()
    del values[key]
    with pytest.raises(KeyError):
        ExecutionPlan.from_dict(values)


def test_from_dict_refuses_another_word() -> None:
    with pytest.raises(ValueError, match="vram"):
        ExecutionPlan.from_dict(PLAN.to_dict() | {"head": "vram"})


@pytest.mark.parametrize(
    "changes",
    [
        {"activations": (ActivationPolicy.KEEP,)},
        {"weights": (), "activations": ()},
        {"inputs": Placement.DISK},
        {"num_groups": 0},
        {"mlp_tile_tokens": 0},
        {"num_slots": 0},
        {"weights": (Placement.DEVICE,) * 3, "head": Placement.DEVICE},
    ],
)
def test_contradictions_are_our_mistake(changes: dict[str, Any]) -> None:
    with pytest.raises(AssertionError):
        replace(PLAN, **changes)


def test_an_embedding_alone_needs_no_slots() -> None:
    plan = replace(PLAN, weights=(Placement.DEVICE,) * 3, head=Placement.DEVICE, num_slots=0)
    assert not plan.streams and PLAN.streams
