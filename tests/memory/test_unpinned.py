"""Where pinning is refused: the same bits, and one line that says what it costs."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny_models import load_tiny, packed_row, resident_plan, write_checkpoint
from torch import Tensor

from qlora_train.device.compute import THE_CPU as CPU
from qlora_train.device.description import planned_gpu
from qlora_train.memory.execution import Activation, ExecutionPlan, Place
from qlora_train.memory.host_memory import HostMemory
from qlora_train.memory.load import load_base
from qlora_train.memory.measured_rates import rates_of
from qlora_train.memory.plan.from_recipe import plan_recipe
from qlora_train.memory.plan.plan import Plan
from qlora_train.memory.unpinned import host_memory_of_run
from qlora_train.model.quantize import Packing
from qlora_train.recipe import Recipe
from qlora_train.train.walk import LayerWalk

IN_RAM = {"weights": (Place.RAM,) * 3, "embedding": Place.RAM, "head": Place.RAM, "num_slots": 2}
EXECUTION = resident_plan(*[Activation.OFFLOAD] * 3, **IN_RAM)


class Refusal:
    """A system that pins nothing."""

    def pin(self, buffer: Tensor) -> bool:
        return False

    def unpin(self, address: int) -> None:
        raise AssertionError("nothing was pinned")


def plan_with(copy_rate: float) -> Plan:
    recipe = Recipe.from_dict({"model": {"base": "meta-llama/Llama-3.1-8B"}, "data": {"train": "x"}})
    plan = plan_recipe(recipe, planned_gpu(None, None), 80 * 2**30)
    return replace(plan, rates=replace(plan.rates, copy=copy_rate, flops=1e18))  # nothing hides a copy


def streaming(plan: Plan) -> ExecutionPlan:
    return replace(plan.execution, weights=(Place.RAM,) * plan.execution.num_layers, num_slots=2)


def test_one_line_says_what_it_costs_per_step() -> None:
    plan, said = plan_with(1e15), list[str]()  # no machine copies that fast
    host = host_memory_of_run(plan, streaming(plan), CPU, said.append, Refusal())
    assert said == []
    buffers = [host.empty(100) for _ in range(3)]
    assert len(buffers) == 3 and len(said) == 1
    found = re.fullmatch(
        r"the system refused to pin memory \(ulimit -l: .*\); copies run at (\S+) GB/s instead of "
        r"1000000\.0 GB/s: about (\S+) (s|min|h) more per step",
        said[0],
    )
    assert found is not None, said[0]
    assert 0.1 < float(found[1]) < 1000 and float(found[2]) > 0


def test_what_is_resident_costs_nothing_more() -> None:
    plan, said = plan_with(1e15), list[str]()
    host_memory_of_run(plan, plan.execution, CPU, said.append, Refusal()).empty(1)
    assert said[0].endswith(": about 0 s more per step")


def test_a_plan_made_with_such_copies_says_so() -> None:
    plan, said = plan_with(1.0), list[str]()
    host_memory_of_run(plan, streaming(plan), CPU, said.append, Refusal()).empty(1)
    assert said[0].endswith("with which the plan has reckoned")


def test_a_step_is_the_same_and_all_its_host_memory_is_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("QLORA_TRAIN_CACHE", str(tmp_path / "cache"))
    folder, batch = write_checkpoint(tmp_path / "base"), [packed_row([14, 1, 18])]
    results = []
    for pinning in (None, Refusal()):
        said: list[str] = []
        host = host_memory_of_run(plan_with(1e15), EXECUTION, CPU, said.append, pinning)
        decoder, factors = load_tiny(folder, plan=EXECUTION)
        before = host.num_bytes
        streamed = load_base(folder, Packing("nf4", True), torch.float32, CPU, plan=EXECUTION, host=host)
        assert host.num_bytes > before  # slabs
        slabs = host.num_bytes
        walk = LayerWalk(decoder, factors, EXECUTION, reference=False, host=host)
        loss = walk.accumulate(batch, seed=1, step=1, num_supervised=10)
        assert host.num_bytes > slabs  # spare buffers of what was offloaded
        results.append((float(loss), factors.gradient.clone()))
        assert len(said) == (pinning is not None) and host.pinned == (pinning is None)
        decoder.close()
        streamed.close()
    assert results[0][0] == results[1][0] and torch.equal(results[0][1], results[1][1])


def test_rates_of_copies_that_were_refused_are_not_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from qlora_train.memory import measured_rates

    monkeypatch.setattr(measured_rates, "_MATRIX", {"cpu": 64})
    monkeypatch.setattr(measured_rates, "HostMemory", lambda device: HostMemory(device, pinning=Refusal()))
    assert rates_of(CPU, torch.float32, tmp_path / "refused").copy > 0
    assert not (tmp_path / "refused").exists()
    monkeypatch.undo()
    monkeypatch.setattr(measured_rates, "_MATRIX", {"cpu": 64})
    kept = rates_of(CPU, torch.float32, tmp_path / "kept")
    assert rates_of(CPU, torch.float32, tmp_path / "kept") == kept
