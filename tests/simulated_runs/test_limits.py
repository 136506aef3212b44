"""Runs on a simulated GPU within what budget, driver and allocator allow, and what they say of it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState
from simulated_gpu import device_module
from simulated_gpu.fixture import SimulatedGpu
from tiny_runs import adapter_bytes, losses_of, recipe_values, reversal_rows, write_base, write_rows

from qlora_train.device.compute import ComputeDevice
from qlora_train.generate import model_folder
from qlora_train.generate.model_folder import find_model
from qlora_train.kernels.on_device import find_device
from qlora_train.plan.planned_walk import GenerateSize
from qlora_train.recipe import Recipe
from qlora_train.train import run as run_module
from qlora_train.train import setup, train
from qlora_train.walk.step import StepRunner

pytestmark = pytest.mark.filterwarnings("ignore:Triton does not run")
MIB = 2**20
CONTEXT_BYTES = 100 * MIB


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_base(tmp_path_factory.mktemp("base"), num_hidden_layers=4)


@pytest.fixture(scope="module")
def train_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_rows(tmp_path_factory.mktemp("data") / "train.jsonl", reversal_rows(60))


@pytest.fixture(autouse=True)
def fresh_accelerate() -> Iterator[None]:
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture
def described(simulated_gpu: SimulatedGpu, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What the program is told of the device; a test may change it before a run."""
    simulated_gpu.settings.num_multiprocessors = 2
    told: dict[str, Any] = {"measured_context_bytes": CONTEXT_BYTES, "has_concurrent_managed_access": True}

    def find(where: torch.device | None = None) -> ComputeDevice:
        return ComputeDevice(replace(find_device(where).description, **told))

    monkeypatch.setattr(run_module, "find_device", find)
    return told


def recipe(base: Path, train_file: Path, out: Path, **sections: dict[str, Any]) -> Recipe:
    """Enough factor numbers for bitsandbytes to page."""
    training = {"max_steps": 3, "save_every": 2} | sections.pop("training", {})
    lora = {"rank": 32, "alpha": 8}
    return Recipe.from_dict(recipe_values(base, train_file, out, training=training, lora=lora) | sections)


def limit_in_force() -> int:
    total = device_module.mem_get_info(0)[1]
    return round(device_module.get_per_process_memory_fraction(0) * total)


@pytest.fixture
def limits(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Of the allocator at every step."""
    seen: list[int] = []
    run = StepRunner.run

    def noting(self: StepRunner, *arguments: Any) -> Any:
        seen.append(limit_in_force())
        return run(self, *arguments)

    monkeypatch.setattr(StepRunner, "run", noting)
    return seen


def test_a_budget_holds_during_the_run_and_no_longer(
    base: Path, train_file: Path, tmp_path: Path, described: dict[str, Any], limits: list[int]
) -> None:
    train(recipe(base, train_file, tmp_path / "run", memory={"vram": "400MiB"}))
    plan = json.loads((tmp_path / "run" / "plan.json").read_text())
    (state_bytes,) = (
        row["bytes"] for row in plan["rows"] if row["cause"] == "optimizer state" and row["phase"] == "step"
    )
    assert state_bytes > 200_000 and plan["target"]["measured_context_bytes"] == CONTEXT_BYTES
    assert limits == [400 * MIB - CONTEXT_BYTES - state_bytes] * 3
    assert limit_in_force() == device_module.mem_get_info(0)[1]


def test_without_a_budget_what_is_free_is_the_limit(
    base: Path,
    train_file: Path,
    tmp_path: Path,
    described: dict[str, Any],
    limits: list[int],
    simulated_gpu: SimulatedGpu,
) -> None:
    simulated_gpu.limit_memory(1024 * MIB)
    train(recipe(base, train_file, tmp_path / "run"))
    assert limits == [1024 * MIB] * 3


def test_reserved_bytes_are_told_beside_the_tensors(
    base: Path,
    train_file: Path,
    tmp_path: Path,
    described: dict[str, Any],
    capsys: pytest.CaptureFixture[str],
) -> None:
    train(recipe(base, train_file, tmp_path / "run", training={"optimizer": "adamw_8bit"}))
    plan = json.loads((tmp_path / "run" / "plan.json").read_text())
    assert plan["measured_step_reserved_bytes"] % (2 * MIB) == 0
    assert plan["measured_step_reserved_bytes"] >= plan["measured_step_vram_bytes"] > 0
    (line,) = (line for line in capsys.readouterr().out.splitlines() if line.startswith("peak of a step"))
    assert line.endswith(f"reserved by the allocator {plan['measured_step_reserved_bytes'] / 2**30:.2f} GiB")


def test_loading_leaves_nothing_in_the_allocators_cache(
    base: Path,
    train_file: Path,
    tmp_path: Path,
    described: dict[str, Any],
    simulated_gpu: SimulatedGpu,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen: list[tuple[int, int]] = []
    introduction = run_module.introduction

    def noting(*arguments: Any, **keywords: Any) -> list[str]:
        seen.append((simulated_gpu.live_bytes(), simulated_gpu.reserved_bytes()))
        return introduction(*arguments, **keywords)

    monkeypatch.setattr(run_module, "introduction", noting)
    monkeypatch.setattr(setup, "load_base", with_scratch(setup.load_base))
    train(recipe(base, train_file, tmp_path / "run"))
    ((live, reserved),) = seen
    assert 0 < live <= reserved < live + 22 * MIB  # what is left of one segment of each pool


def with_scratch(load: Any) -> Any:
    """A larger base's loading: scratch of some size comes and goes."""

    def load_with_scratch(*arguments: Any, **keywords: Any) -> Any:
        torch.empty(100 * MIB, dtype=torch.uint8, device="sim:0")
        return load(*arguments, **keywords)

    return load_with_scratch


def test_generation_is_held_to_its_budget_too(
    base: Path, simulated_gpu: SimulatedGpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = find_model(base)
    device = ComputeDevice(replace(source.device.description, measured_context_bytes=CONTEXT_BYTES))
    monkeypatch.setattr(model_folder, "load_base", with_scratch(model_folder.load_base))
    model = replace(source, device=device).load(GenerateSize((8,), 4), vram_bytes=320 * MIB)
    assert limit_in_force() == 220 * MIB
    assert simulated_gpu.reserved_bytes() < simulated_gpu.live_bytes() + 22 * MIB
    replace(source, device=device).load(GenerateSize((8,), 4))
    assert limit_in_force() == device_module.mem_get_info(0)[1]
    assert model.plan.budget_bytes == 320 * MIB


def test_paged_or_not_a_run_saves_resumes_and_ends_with_the_same_bits(
    base: Path,
    train_file: Path,
    tmp_path: Path,
    described: dict[str, Any],
    simulated_gpu: SimulatedGpu,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """While the ring reads ahead. Without concurrent access a touch of managed memory is a hazard."""
    adapters = []
    for has_access in (True, False):
        described["has_concurrent_managed_access"] = has_access
        simulated_gpu.settings.concurrent_managed_access = has_access
        run_dir = tmp_path / f"run-{has_access}"
        prefetches = simulated_gpu.num_prefetches
        values = recipe(base, train_file, run_dir, memory={"weights": "disk"})
        train(values)
        assert (simulated_gpu.num_prefetches > prefetches) == has_access
        assert ("stays on the device, unpaged" in capsys.readouterr().out) == (not has_access)
        straight = adapter_bytes(run_dir)
        shutil.rmtree(run_dir / "adapter")
        shutil.rmtree(max((run_dir / "checkpoints").iterdir()))  # on from step 2
        train(values, resume=True)
        assert adapter_bytes(run_dir) == straight and len(losses_of(run_dir)) == 3
        adapters.append(straight)
    assert adapters[0] == adapters[1]
