"""Optimizer state in managed memory on a simulated GPU: the host touches it only where the driver allows."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from simulated_gpu.fixture import SimulatedGpu
from torch import Tensor

from qlora_train.device.compute import THE_CPU, ComputeDevice
from qlora_train.model.linear import FrozenLinear
from qlora_train.model.lora_parameters import LoraParameters
from qlora_train.walk.optimizer import FlatOptimizer, paging_lines

PAGED = ["paged_adamw_8bit", "paged_adamw_32bit"]


def make(name: str, device: ComputeDevice) -> tuple[FlatOptimizer, LoraParameters]:
    """131,072 LoRA parameters: bitsandbytes pages from 100,000 on."""
    linears = {f"layer{i}": FrozenLinear(f"layer{i}", 512, 512) for i in range(4)}
    lora = LoraParameters(
        linears, rank=32, scaling=1.0, dropout=0.0, seed=0, dtype=torch.float32, device=device.torch
    )
    return FlatOptimizer(name, lora, device, lora_b_lr_ratio=1.0, weight_decay=0.01), lora


def run(optimizer: FlatOptimizer, lora: LoraParameters, steps: range) -> None:
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        lora.gradient.copy_(torch.randn(lora.gradient.shape, generator=generator))
        optimizer.step(1e-3 * (step + 1))


def on_host(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """As a checkpoint holds it."""
    return {key: value.cpu().clone() for key, value in state.items()}


def copy_under_way(device: ComputeDevice) -> list[object]:
    """A copy on a side stream that goes on: the ring reads the next layers. What must be held meanwhile."""
    from qlora_train.weights.host_memory import HostMemory

    host, stream = HostMemory(device), device.side_stream()
    source, slot = host.empty(1000), torch.zeros(1000, dtype=torch.uint8, device=device.torch)
    stream.wait_stream(device.current_stream())
    with device.on(stream):
        assert host.copy_if_pinned(source, slot)
    return [host, source, slot, stream]


@pytest.mark.parametrize("has_access", [True, False])
@pytest.mark.parametrize("name", PAGED)
def test_state_goes_to_a_checkpoint_and_back_while_copies_go_on(
    simulated_gpu: SimulatedGpu, sim: ComputeDevice, name: str, has_access: bool
) -> None:
    """The bits are the CPU's, whether it is paged or not."""
    straight, expected = make(name, THE_CPU)
    run(straight, expected, range(5))
    simulated_gpu.settings.concurrent_managed_access = has_access
    device = ComputeDevice(replace(sim.description, has_concurrent_managed_access=has_access))

    first, before = make(name, device)
    run(first, before, range(3))
    state_bytes = {"paged_adamw_8bit": 2, "paged_adamw_32bit": 8}[name] * before.masters.numel()
    assert first.managed_bytes == (state_bytes if has_access else 0)
    assert (simulated_gpu.num_prefetches > 0) == has_access
    held = copy_under_way(device)
    saved = on_host(first.state())
    device.wait()

    second, after = make(name, device)
    after.masters.copy_(before.masters)
    held += copy_under_way(device)
    second.load_state(saved)
    assert second.managed_bytes == first.managed_bytes
    device.wait()
    run(second, after, range(3, 5))
    assert torch.equal(after.masters.cpu(), expected.masters)
    assert len(held) == 8


def test_a_driver_without_access_would_end_the_process(
    simulated_gpu: SimulatedGpu, sim: ComputeDevice
) -> None:
    """What the plain twin is for: waiting before would not help against copies that go on."""
    simulated_gpu.settings.concurrent_managed_access = False
    optimizer, lora = make("paged_adamw_8bit", sim)
    run(optimizer, lora, range(1))
    simulated_gpu.take_hazards()
    sim.wait()
    held = copy_under_way(sim)
    on_host(optimizer.state())
    assert any("managed memory" in hazard for hazard in simulated_gpu.take_hazards())
    sim.wait()
    assert held


def test_it_is_said_where_a_paged_optimizer_is_not_paged(sim: ComputeDevice) -> None:
    without = replace(sim.description, has_concurrent_managed_access=False)
    (line,) = paging_lines("paged_adamw_8bit", without)
    assert "the state of paged_adamw_8bit stays on the device" in line
    assert paging_lines("adamw_8bit", without) == paging_lines("adamw", without) == []
    assert paging_lines("paged_adamw_8bit", sim.description) == []
    assert paging_lines("paged_adamw_8bit", THE_CPU.description) == []
