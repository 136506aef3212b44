"""What the context takes: two readings of the driver, with what others hold in both; else what is stated."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import torch

from qlora_train.device import context, driver
from qlora_train.device.compute import ComputeDevice
from qlora_train.device.context import context_bytes, in_use_before, make_workspaces
from qlora_train.plan.machine_plan import plan_generation_here
from qlora_train.plan.model_shape import find_shape
from qlora_train.plan.planned_walk import GenerateSize
from qlora_train.plan.workload import Workload
from qlora_train.quant.formats import Quantization

MIB, GIB = 2**20, 2**30
STATED = 450 * MIB


@dataclass
class Card:
    """A card of 8 GiB as driver and runtime see it. Bytes: ours counts once work has run on the device."""

    others: int = 300 * MIB
    ours: int = 412 * MIB
    has_context: bool = False
    says_in_use: bool = True

    def in_use(self, reserved: int) -> int:
        return self.others + (self.ours if self.has_context else 0) + reserved


@pytest.fixture
def card(sim: ComputeDevice, monkeypatch: pytest.MonkeyPatch) -> Iterator[Card]:
    card = Card()
    in_use_before.cache_clear()
    monkeypatch.setattr(context, "_measured", {})
    monkeypatch.setattr(ComputeDevice, "uuid", "aa-1")
    monkeypatch.setattr(driver, "has_context", lambda: card.has_context)

    def memory_in_use() -> dict[str, int]:
        return {"aa-1": card.in_use(sim.reserved_bytes), "bb-2": 7 * GIB} if card.says_in_use else {}

    def work(device: ComputeDevice) -> None:
        card.has_context = True
        make_workspaces(device)

    monkeypatch.setattr(driver, "memory_in_use", memory_in_use)
    monkeypatch.setattr(context, "make_workspaces", work)
    total = sim.total_bytes
    monkeypatch.setattr(
        ComputeDevice, "free_bytes", property(lambda device: total - card.in_use(device.reserved_bytes))
    )
    yield card
    in_use_before.cache_clear()


def test_measured_while_others_hold_memory(card: Card, sim: ComputeDevice) -> None:
    in_use_before()
    held = torch.zeros(3 * MIB, device=sim.torch)  # a tensor is not the context's
    assert context_bytes(sim) == card.ours
    assert len(held) == 3 * MIB


@pytest.mark.parametrize(
    ("others", "ours", "expected"),
    [(0, 412 * MIB, 412 * MIB), (0, 900 * MIB, STATED), (2 * GIB, 412 * MIB, STATED)],
)
def test_a_context_from_before_is_bounded_by_what_is_in_use(
    card: Card, sim: ComputeDevice, others: int, ours: int, expected: int
) -> None:
    """A notebook: stated, or less where all that is in use is less."""
    card.has_context, card.others, card.ours = True, others, ours
    in_use_before()
    assert context_bytes(sim) == expected


def test_a_driver_that_does_not_say(card: Card, sim: ComputeDevice) -> None:
    card.says_in_use = False
    in_use_before()
    assert context_bytes(sim) == STATED


def test_somebody_else_goes_in_between(card: Card, sim: ComputeDevice) -> None:
    card.others = 2 * GIB
    in_use_before()
    card.others = 0
    assert context_bytes(sim) == min(card.ours, STATED)


def test_asked_too_late_and_asked_again(card: Card, sim: ComputeDevice) -> None:
    """A second command of the process, after somebody else has taken memory."""
    first = dict(in_use_before())
    assert context_bytes(sim) == card.ours
    card.others += GIB
    assert in_use_before() == first and context_bytes(sim) == card.ours


def test_plans_take_what_is_measured(card: Card, sim: ComputeDevice) -> None:
    in_use_before()
    shape = find_shape("meta-llama/Llama-3.2-1B", None)
    workload = Workload(shape, Quantization("nf4", True), torch.bfloat16, sim.description)
    plan = plan_generation_here(workload, GenerateSize(), sim, vram_bytes=4 * GIB, weights="auto")
    assert plan.workload.target.context_bytes == card.ours != STATED == sim.description.context_bytes
    free = plan_generation_here(workload, GenerateSize(), sim, vram_bytes=None, weights="auto")
    assert free.budget_bytes == int(sim.free_bytes * 0.95) + card.ours


@pytest.mark.parametrize("without_gradients", [torch.no_grad, torch.inference_mode])
def test_workspaces_are_made_where_gradients_are_off(sim: ComputeDevice, without_gradients) -> None:
    with without_gradients():
        make_workspaces(sim)
