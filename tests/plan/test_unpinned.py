"""Where pinning is refused: the same bits, and one line that says what it costs."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from simulated_gpu.fixture import SimulatedGpu
from tiny_models import NF4, packed_row, resident_plan, write_checkpoint
from torch import Tensor

from qlora_train.device.compute import THE_CPU, ComputeDevice
from qlora_train.device.description import planned_gpu
from qlora_train.model.lora_parameters import LoraParameters
from qlora_train.plan.from_recipe import plan_recipe
from qlora_train.plan.plan import Plan
from qlora_train.plan.unpinned import host_memory_of_run
from qlora_train.recipe import Recipe
from qlora_train.walk.layer_walk import LayerWalk
from qlora_train.weights.execution_plan import ActivationPolicy, ExecutionPlan, Placement
from qlora_train.weights.host_memory import HostMemory
from qlora_train.weights.load import load_base
from qlora_train.weights.stores import ItemReader

IN_RAM = {"weights": (Placement.RAM,) * 3, "embedding": Placement.RAM, "head": Placement.RAM, "num_slots": 2}
EXECUTION = resident_plan(*[ActivationPolicy.OFFLOAD] * 3, **IN_RAM)


def plan_with(copy_rate: float, base: str = "meta-llama/Llama-3.1-8B") -> Plan:
    training = {"micro_batch_size": 4, "gradient_accumulation_steps": 4}
    recipe = Recipe.from_dict({"model": {"base": base}, "data": {"train": "x"}, "training": training})
    plan = plan_recipe(recipe, planned_gpu(None, None), 80 * 2**30)
    return replace(plan, rates=replace(plan.rates, copy=copy_rate, flops=1e18))  # nothing hides a copy


def streaming(plan: Plan) -> ExecutionPlan:
    return replace(plan.execution, weights=(Placement.RAM,) * plan.execution.num_layers, num_slots=2)


def test_one_line_says_what_it_costs_per_step(simulated_gpu: SimulatedGpu, sim: ComputeDevice) -> None:
    plan, said = plan_with(1e15), list[str]()  # no machine copies that fast
    simulated_gpu.refuse_pinning()
    host = host_memory_of_run(plan, streaming(plan), sim, said.append)
    assert said == []
    buffers = [host.empty(100) for _ in range(3)]
    assert len(buffers) == 3 and len(said) == 1
    found = re.fullmatch(
        r"the system refused to pin memory \(ulimit -l: .*\); copies run at (\S+) GB/s instead of "
        r"1000000\.0 GB/s: up to (\S+) (s|min|h) more per step",
        said[0],
    )
    assert found is not None, said[0]
    assert float(found[1]) < 1000 and float(found[2]) >= 0  # of 300 bytes
    assert host.num_bytes == 300 == host.num_unpinned_bytes  # what measured has gone


def test_the_rate_is_that_of_copies_through_pinned_pieces(
    simulated_gpu: SimulatedGpu, sim: ComputeDevice
) -> None:
    """Where only weights are refused; the driver's own way with pageable memory is not asked."""
    plan, said = plan_with(1e15), list[str]()
    host = host_memory_of_run(plan, streaming(plan), sim, said.append)
    reader = ItemReader(sim, host)
    simulated_gpu.refuse_pinning(blocks={1})
    simulated_gpu.host_reads.clear()
    weights = host.empty(100, gives_way=True)
    assert len(said) == 1 and not host.is_pinned(weights) and reader.largest_bytes == 0
    assert not simulated_gpu.host_reads.copies


def test_what_is_resident_costs_nothing_more(simulated_gpu: SimulatedGpu, sim: ComputeDevice) -> None:
    plan, said = plan_with(1e15), list[str]()
    simulated_gpu.refuse_pinning()
    host_memory_of_run(plan, plan.execution, sim, said.append).empty(1)
    assert said[0].endswith(": up to 0 s more per step")


def test_a_plan_made_with_such_copies_says_so(simulated_gpu: SimulatedGpu, sim: ComputeDevice) -> None:
    plan, said = plan_with(1.0), list[str]()
    simulated_gpu.refuse_pinning()
    host_memory_of_run(plan, streaming(plan), sim, said.append).empty(1)
    assert said[0].endswith("with which the plan has reckoned")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("base"))


@pytest.mark.parametrize("refusal", [None, {}, {"beyond_bytes": 60_000}, {"blocks": {1, 4, 5, 9}}], ids=str)
def test_a_step_is_the_same_and_all_its_host_memory_is_one(
    simulated_gpu: SimulatedGpu, sim: ComputeDevice, folder: Path, refusal: dict[str, Any] | None
) -> None:
    """Everything streams and parks. No pages at all, no more than some, or single blocks are refused: it is
    said once, changes no bit, and no access is without an order."""
    expected = step_on(THE_CPU, HostMemory(THE_CPU), folder)
    said: list[str] = []
    host = host_memory_of_run(plan_with(1e15, str(folder)), EXECUTION, sim, said.append)
    if refusal is not None:
        simulated_gpu.refuse_pinning(**refusal)
    found = step_on(sim, host, folder)
    assert len(said) == (refusal is not None)
    assert found[0] == expected[0] and torch.equal(found[1], expected[1])
    simulated_gpu.finish()


def step_on(device: ComputeDevice, host: HostMemory, folder: Path) -> tuple[float, Tensor]:
    """Loss and gradient of one step, documents attended to one by one."""
    by_document = ComputeDevice(replace(device.description, blocks_documents=False))
    decoder = load_base(folder, NF4, torch.float32, by_document, plan=EXECUTION, host=host, poison=True)
    lora = LoraParameters(
        decoder.linears,
        rank=4,
        scaling=2.0,
        dropout=0.0,
        seed=0,
        dtype=torch.float32,
        device=device.torch,
    )
    lora.masters.copy_(torch.sin(torch.arange(lora.masters.numel(), dtype=torch.float32)) / 10)
    lora.refresh_working()
    layer_buffers = host.num_bytes
    walk = LayerWalk(decoder, lora, EXECUTION, reference=False, host=host)
    batch = packed_row([14, 1, 18]).moved(lambda tensor: tensor.to(device.torch))
    loss = float(walk.accumulate([batch], seed=1, step=1, num_supervised=10))
    assert host.num_bytes > layer_buffers > 0  # spare buffers of what was offloaded
    gradient = lora.gradient.cpu()
    decoder.close()
    return loss, gradient
