"""Steps under a memory budget, by the product's own path: plan, load the base, walk, update; and the same
steps with the weights on the device and streamed, in turns.

    base      write the random packed base that the others load (random_base.py); a process of its own,
              since 40 GB take a while
    budget    one training setup: the plan's bytes against the allocator's, seconds, bytes read
    streamed  two of them in one process, resident and streamed from RAM, all else equal, steps in turns

A budget is enforced: the allocator, from which the libraries take their workspaces too, may take what the
budget leaves beside the CUDA context (plan.CONTEXT_BYTES), and fails beyond it as it would on a smaller card.
What the context really takes here is measured too: another card's is another.

Data are random tokens, every row one document that fills its bin: the most that any data take.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import xxhash
from accelerate import Accelerator

from qlora_train.bench.process import answer
from qlora_train.bench.random_base import make_random_base, write_config
from qlora_train.device.compute import ComputeDevice
from qlora_train.kernels.on_device import find_device
from qlora_train.memory.execution import ExecutionPlan, Place
from qlora_train.memory.host_memory import HostMemory
from qlora_train.memory.measured_rates import rates_of
from qlora_train.memory.meter import DeviceMeter, make_workspaces
from qlora_train.memory.packed_cache import cache_root
from qlora_train.memory.plan.plan import CONTEXT_BYTES, Plan
from qlora_train.memory.plan.report import residency_lines
from qlora_train.memory.streaming import StreamedWeights
from qlora_train.model.base import read_config
from qlora_train.model.decoder import FrozenDecoder
from qlora_train.model.factors import FactorBuffers
from qlora_train.model.hub import resolve_dtype
from qlora_train.model.packed_tokens import PackedTokens
from qlora_train.model.probe import probe
from qlora_train.model.quantize import Packing
from qlora_train.model.shards import tensor_bytes
from qlora_train.recipe import Recipe
from qlora_train.train.optimizer import FlatOptimizer
from qlora_train.train.schedule import LossScale
from qlora_train.train.setup import load_model, make_accelerator, resolve
from qlora_train.train.step import StepRunner
from qlora_train.train.walk import LayerWalk

STEPS_METERED = 2
LEARNING_RATE = 1e-4
Change = Callable[[ExecutionPlan], ExecutionPlan]


def measure(arguments: dict[str, Any]) -> dict[str, Any]:
    """arguments: work ("base", "budget" or "streamed"); base: its name; config: of its config.json; recipe:
    sections of a recipe that are not the default; num_steps: timed ones."""
    recipe = _recipe(arguments)
    if arguments["work"] == "base":
        return _make_base(recipe)
    work = {"budget": _budget, "streamed": _streamed}[arguments["work"]]
    return work(recipe, arguments["num_steps"])


def _recipe(arguments: dict[str, Any]) -> Recipe:
    folder = write_config(cache_root() / "random" / arguments["base"], arguments["config"])
    values: dict[str, dict[str, Any]] = {
        "model": {"base": str(folder)},
        "data": {"train": "random tokens", "format": "text"},
    }
    for section, changes in arguments["recipe"].items():
        values[section] = values.get(section, {}) | changes
    return Recipe.from_dict(values)


def _make_base(recipe: Recipe) -> dict[str, Any]:
    """Its bytes on disk, and the seconds that it took."""
    device = find_device(make_accelerator(recipe).device)
    recipe, folder, dtype = resolve(recipe, device.description)
    packing = Packing(recipe.model.quantization, recipe.model.double_quant)
    started, said = time.perf_counter(), list[str]()
    made = make_random_base(folder, packing, dtype, cache_root(), said.append)
    seconds = time.perf_counter() - started
    num_bytes = sum(file.stat().st_size for file in made.iterdir())
    return {"base_bytes": num_bytes, "base_seconds": seconds, "was_there": not said}


@dataclass
class Trainer:
    """One training setup, ready to step. changes: plans that running out of memory made tighter."""

    plan: Plan
    execution: ExecutionPlan
    decoder: FrozenDecoder
    factors: FactorBuffers
    optimizer: FlatOptimizer
    runner: StepRunner
    host: HostMemory
    batches: Sequence[PackedTokens]
    changes: list[str]
    num_steps: int = 0
    loss: float = 0.0

    @staticmethod
    def of(recipe: Recipe, accelerator: Accelerator, change: Change = lambda execution: execution) -> Trainer:
        """As `train` does it, but for data and tokenizer. change: of what the plan says."""
        device = find_device(accelerator.device)
        recipe, folder, dtype = resolve(recipe, device.description)
        packing = Packing(recipe.model.quantization, recipe.model.double_quant)
        make_random_base(folder, packing, dtype, cache_root())
        config = read_config(folder)
        loaded = load_model(
            recipe,
            folder,
            dtype,
            device,
            probe(config),
            change,
            most_documents=recipe.training.micro_batch_size,
            cache=cache_root(),
            say=print,
        )
        decoder, factors, execution = loaded.decoder, loaded.factors, loaded.execution
        training, changes = recipe.training, list[str]()
        optimizer = FlatOptimizer(
            training.optimizer,
            factors,
            device,
            lora_b_lr_ratio=training.lora_b_lr_ratio,
            weight_decay=training.weight_decay,
        )
        walk = LayerWalk(
            decoder, factors, execution, reference=training.kernels == "reference", host=loaded.host
        )
        runner = StepRunner(
            walk,
            decoder,
            factors,
            optimizer,
            LossScale.for_dtype(dtype == torch.float16),
            accelerator,
            max_grad_norm=training.max_grad_norm,
            seed=training.seed,
            on_tighter_plan=lambda step, plan, reason: changes.append(f"step {step}: {reason}"),
        )
        batches = random_batches(recipe, config.vocab_size, device.torch)
        return Trainer(
            loaded.plan, execution, decoder, factors, optimizer, runner, loaded.host, batches, changes
        )

    @property
    def num_tokens(self) -> int:
        """Of a step."""
        return sum(len(tokens.ids) for tokens in self.batches)

    @property
    def num_bytes_read(self) -> int:
        """Into slots, so far."""
        weights = self.decoder.weights
        return weights.reader.num_bytes_read if isinstance(weights, StreamedWeights) else 0

    def step(self) -> float:
        """One optimizer step; its seconds, until the device has done all of it."""
        self.num_steps += 1
        num_supervised = sum(len(tokens.supervised) for tokens in self.batches)
        self.decoder.device.wait()
        started = time.perf_counter()
        outcome = self.runner.run(self.num_steps, self.batches, num_supervised, LEARNING_RATE)
        self.decoder.device.wait()
        assert outcome.applied, f"step {self.num_steps}: loss {outcome.loss}, norm {outcome.grad_norm}"
        self.loss = outcome.loss
        return time.perf_counter() - started


def random_batches(recipe: Recipe, vocabulary: int, device: torch.device) -> list[PackedTokens]:
    """The micro-batches of one step: full bins of random tokens, all supervised."""
    length, num_rows = recipe.data.sequence_length, recipe.training.micro_batch_size
    draw = np.random.default_rng(0)
    batches = []
    for k in range(recipe.training.gradient_accumulation_steps):
        ids = draw.integers(0, vocabulary, (num_rows, length))
        labels = np.full_like(ids, -100)
        labels[:, :-1] = ids[:, 1:]
        labels = labels.reshape(-1)
        host = SimpleNamespace(
            token_ids=ids.reshape(-1),
            position_ids=np.tile(np.arange(length), num_rows),
            labels=labels,
            cu_seqlens=np.arange(num_rows + 1) * length,
            supervised_positions=np.flatnonzero(labels >= 0),
            row_ids=np.repeat(np.arange(num_rows) + k * num_rows, length),
            token_offsets=np.tile(np.arange(length), num_rows),
        )
        batches.append(PackedTokens.from_host(host, device))
    return batches


def _budget(recipe: Recipe, num_steps: int) -> dict[str, Any]:
    accelerator = make_accelerator(recipe)
    device = find_device(accelerator.device)
    opened = open_device(device, recipe.memory.vram_bytes)
    rates_of(
        device, resolve_dtype(recipe.model.compute_dtype, device.description), cache_root()
    )  # its own peak is another
    with DeviceMeter(device) as meter:
        started = time.perf_counter()
        trainer = Trainer.of(recipe, accelerator)
        load_seconds, load_peak_bytes = time.perf_counter() - started, meter.peak_bytes
        meter.reset_peak()
        first_seconds = trainer.step()
        for _ in range(STEPS_METERED - 1):
            trainer.step()
        peak_bytes = meter.peak_bytes
        requested = _requested_peak(device)
    before = trainer.num_bytes_read
    seconds = [trainer.step() for _ in range(num_steps)]
    read_bytes = (trainer.num_bytes_read - before) / num_steps
    trainer.decoder.close()
    plan = trainer.plan
    return {
        **opened,
        **_after(device),
        **requested,
        "budget_bytes": plan.budget_bytes,
        "planned_peak_bytes": plan.peak_vram_bytes,
        "planned_step_bytes": plan.step_vram_bytes,
        "device_peak_bytes": peak_bytes,
        "paged_bytes": trainer.optimizer.managed_bytes,
        "peak_over_planned": (peak_bytes + trainer.optimizer.managed_bytes) / plan.step_vram_bytes,
        "planned_load_bytes": sum(plan.phases["load"].values()),
        "load_peak_bytes": load_peak_bytes,
        "held": not trainer.changes,
        "changes": trainer.changes,
        "load_seconds": load_seconds,
        "first_step_seconds": first_seconds,
        "step_seconds": statistics.median(seconds),
        "planned_step_seconds": plan.step_seconds,
        "tokens_per_second": trainer.num_tokens / statistics.median(seconds),
        "read_bytes_per_step": read_bytes,
        "planned_copied_bytes_per_step": plan.time.copied_bytes,
        "pinned": not trainer.host.num_unpinned_bytes,
        "loss": trainer.loss,
        "is_deterministic": torch.are_deterministic_algorithms_enabled(),
        "masters_hash": _hash_of_masters(trainer),
        "residency": residency_lines(trainer.execution),
        "rates": plan.rates.source,
    }


def _streamed(recipe: Recipe, num_steps: int) -> dict[str, Any]:
    """The recipe's own plan, everything resident, beside the same plan with everything in RAM."""
    accelerator = make_accelerator(recipe)
    open_device(find_device(accelerator.device), None)
    resident = Trainer.of(recipe, accelerator, lambda execution: replace(execution, num_groups=1))
    assert not resident.execution.streams, "the resident side is to be resident"
    streamed = Trainer.of(recipe, accelerator, lambda _: _all_in_ram(resident.execution))
    sides = {"resident": resident, "streamed": streamed}
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for trainer in sides.values():
        trainer.step()
    same_loss = resident.loss == streamed.loss
    difference = _difference(resident, streamed)
    before = streamed.num_bytes_read
    for number in range(num_steps):
        for name in sides if number % 2 == 0 else reversed(sides):
            seconds[name].append(sides[name].step())
    read_bytes = (streamed.num_bytes_read - before) / num_steps
    streamed.decoder.close()
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    return {
        "streamed_over_resident": medians["resident"] / medians["streamed"],
        "resident_tokens_per_second": resident.num_tokens / medians["resident"],
        "tokens_per_second": streamed.num_tokens / medians["streamed"],
        "step_seconds": medians["streamed"],
        "resident_step_seconds": medians["resident"],
        "resident_seconds": seconds["resident"],
        "streamed_seconds": seconds["streamed"],
        "read_bytes_per_step": read_bytes,
        "read_gb_per_second": read_bytes / medians["streamed"] / 1e9,
        "tokens_per_group": resident.num_tokens,
        "pinned": not streamed.host.num_unpinned_bytes,
        "same_loss": same_loss,
        "gradient_difference": difference,
        "changes": resident.changes + streamed.changes,
        "residency": residency_lines(streamed.execution),
        "rates": resident.plan.rates.source,
    }


def _all_in_ram(execution: ExecutionPlan) -> ExecutionPlan:
    ram = Place.RAM
    return replace(execution, weights=(ram,) * execution.num_layers, embedding=ram, head=ram, num_slots=2)


def _difference(one: Trainer, other: Trainer) -> float:
    """Of the gradients of the last step, relative to the largest."""
    a, b = one.factors.gradient, other.factors.gradient
    return float((a - b).abs().amax() / a.abs().amax())


def open_device(device: ComputeDevice, budget_bytes: int | None) -> dict[str, int]:
    """Make the context and the workspaces, and hold the allocator to the budget. Empty without CUDA."""
    if not device.is_accelerator:
        return {}
    total_bytes = device.total_bytes
    opened = {"device_total_bytes": total_bytes, "context_bytes": total_bytes - device.free_bytes}
    if budget_bytes is not None:
        opened["limit_bytes"] = budget_bytes - CONTEXT_BYTES
        device.limit_allocator(opened["limit_bytes"])
    make_workspaces(device)
    return opened | {"workspace_bytes": device.allocated_bytes}


def _after(device: ComputeDevice) -> dict[str, int]:
    """What is on the device besides the allocator's memory: the context with all its kernels loaded (and
    whatever other processes hold); and how often the allocator met its limit."""
    if not device.is_accelerator:
        return {}
    stats = device.memory_stats()
    return {
        "context_bytes_after": device.total_bytes - device.free_bytes - device.reserved_bytes,
        "num_alloc_retries": stats["num_alloc_retries"],
        "num_ooms": stats["num_ooms"],
    }


def _requested_peak(device: ComputeDevice) -> dict[str, int]:
    """What was asked of the allocator, before it rounds; workspaces included."""
    if not device.is_accelerator:
        return {}
    return {"requested_peak_bytes": device.memory_stats()["requested_bytes.all.peak"]}


def _hash_of_masters(trainer: Trainer) -> str:
    return xxhash.xxh3_128(tensor_bytes(trainer.factors.masters.cpu())).hexdigest()


if __name__ == "__main__":
    answer(measure)
