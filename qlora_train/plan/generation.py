"""Chooses where a model's weights are placed (device, RAM, disk) while it generates, before loading it.

All B prompts run in one batch (generate/decoding.py), so a token costs one pass over the L layers, and each
streamed item is copied once per token. Nothing is kept for a backward pass; the key-value cache grows to
2 L B (kv heads) (head size) (longest prompt + new tokens) numbers. Tried in this order, each only if the one
before does not fit:

1. everything resident;
2. the embedding, then the head, then as few layers as fit off the device;
3. smaller head tiles, then MLP tiles (a long prompt's widest tensor), and again as few layers as fit;
4. refuse, with the smallest budget that would fit and other options that would.

The fewest streamed layers are the fastest, so no times are compared. Where weights are streamed, as many rows
as fit beside that are evaluated together. Only head and MLP tiles can change the
last bits of a logit.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from typing import Literal

from qlora_train.plan.fixed_bytes import Bytes
from qlora_train.plan.host_budget import HostBudget
from qlora_train.plan.host_bytes import host_bytes
from qlora_train.plan.placement import fewest, mlp_tiles, place_of_streamed, placed
from qlora_train.plan.plan import budget_for, room_in
from qlora_train.plan.planned_walk import (
    MOST_TOGETHER,
    GenerateSize,
    evaluation_peak,
    generate_peak,
    load_peak,
)
from qlora_train.plan.words import gib, refusal
from qlora_train.plan.workload import Workload
from qlora_train.weights.execution_plan import HEAD_TILE_ROWS, ExecutionPlan, Placement, everything_resident

SMALL_TILE_ROWS, SMALLEST_MLP_TILE = 1024, 64
WeightsChoice = Literal["auto", "resident", "ram", "disk"]


@dataclass(frozen=True)
class GenerationPlan:
    """Placement of a model's weights for generation. phases: bytes on the device by cause, of loading and
    generating, without the context. evaluation_group: rows whose loss is computed together. budget_bytes: for
    the device, context included. problems: empty if it fits. advice: other options that would fit, where it
    does not."""

    workload: Workload
    size: GenerateSize
    execution: ExecutionPlan
    phases: dict[str, Bytes]
    evaluation_group: int
    budget_bytes: int
    problems: tuple[str, ...]
    advice: tuple[str, ...]

    @property
    def peak_bytes(self) -> int:
        """Bytes of tensors on the device in the largest phase."""
        return max(sum(phase.values()) for phase in self.phases.values())

    @property
    def copied_bytes_per_token(self) -> int:
        """Bytes copied to the device for one new token of every prompt: each streamed layer and head once."""
        layers = sum(place is not Placement.DEVICE for place in self.execution.weights)
        head = self.execution.head is not Placement.DEVICE
        return layers * self.workload.layer_buffer_bytes + head * self.workload.head_bytes

    def require_fit(self) -> None:
        """Raise `UserError`, with the missing bytes and options that would fit, where nothing fits."""
        if self.problems:
            largest = max(self.phases.values(), key=lambda phase: sum(phase.values()))
            raise refusal(self.problems, largest, self.advice, "take a smaller model or a larger budget")

    def line(self) -> str:
        """The budget and the placement in one line of text."""
        plan = self.execution
        counts = [f"{plan.weights.count(place)} {place}" for place in Placement if place in plan.weights]
        return (
            f"within {gib(self.budget_bytes)}: layers {', '.join(counts)}; "
            f"embedding {plan.embedding}, head {plan.head}"
        )


def plan_generation(
    workload: Workload,
    size: GenerateSize,
    budget_bytes: int,
    host: HostBudget,
    weights: WeightsChoice = "auto",
) -> GenerationPlan:
    """The plan with the fewest copies that fits; where none does, the smallest one, with `problems`.

    workload: its model, quantization and LoRA parameters count, not its training step. budget_bytes: for the
    device, context included. host: RAM that may be used. weights: `memory.weights`."""
    search = _Search(workload, size, budget_bytes, host, weights)
    chosen = next((plan for plan in search.plans() if search.fits(plan)), None)
    execution = chosen or min(search.plans(), key=search.peak)
    group = search.evaluation_group(execution) if chosen else 1
    return GenerationPlan(
        workload,
        size,
        execution,
        search.phases(execution, group),
        group,
        budget_bytes,
        () if chosen else tuple(search.problems(execution)),
        () if chosen else tuple(search.remedies()),
    )


class _Search:
    """Execution plans for one generation, in the order of preference."""

    def __init__(
        self,
        workload: Workload,
        size: GenerateSize,
        budget_bytes: int,
        host: HostBudget,
        weights: WeightsChoice,
    ) -> None:
        self._workload = replace(workload, reference=False)  # only training has a reference mode
        self._size, self._host, self._weights = size, host, weights
        self._budget_bytes = budget_bytes
        self._room = room_in(budget_bytes, workload)
        self._start = everything_resident(workload.shape.num_layers)
        place = place_of_streamed(workload, self._start, host)
        place = Placement(weights) if weights in ("ram", "disk") else place
        self._placed = partial(placed, place=place, is_tied=workload.shape.is_tied)

    def plans(self) -> Iterator[ExecutionPlan]:
        """Execution plans in the order of preference; the last needs the least memory on the device."""
        tiles = mlp_tiles(sum(self._size.prompts), SMALLEST_MLP_TILE)
        if self._weights == "resident":
            yield from (replace(self._start, mlp_tile_tokens=tile) for tile in tiles)
            return
        num_layers = self._start.num_layers
        if self._weights == "auto":
            yield self._start
            yield self._placed(self._start, 0, with_head=False)
        for tile, rows in product(tiles, (HEAD_TILE_ROWS, SMALL_TILE_ROWS)):
            start = replace(self._start, mlp_tile_tokens=tile, head_tile_rows=rows)
            if self._weights == "auto":
                found = fewest(partial(self._placed, start), num_layers, self.fits)
                if found is not None:
                    yield found
            yield self._placed(start, num_layers)

    def evaluation_group(self, plan: ExecutionPlan) -> int:
        """How many rows to evaluate together: where weights are streamed, which is once per group, as many as
        fit beside a plan that fits for one."""
        gains = plan.streams and self._size.evaluated_tokens > 0
        group = min(MOST_TOGETHER, self._size.evaluated_rows) if gains else 1
        while group > 1 and not self.fits(plan, group):
            group //= 2
        return max(group, 1)

    def phases(self, plan: ExecutionPlan, group: int = 1) -> dict[str, Bytes]:
        """Bytes on the device by cause, while loading, generating and evaluating `group` rows together."""
        generate = generate_peak(self._workload, plan, self._size, in_training=False)
        found = {"load": load_peak(self._workload, plan), "generate": generate}
        if n := self._size.evaluated_tokens:
            row = replace(self._workload, documents=(n,), num_supervised=n - 1, num_micro_batches=group)
            found["evaluate"] = evaluation_peak(row, plan, in_training=False)
        return found

    def peak(self, plan: ExecutionPlan, group: int = 1) -> int:
        return max(sum(phase.values()) for phase in self.phases(plan, group).values())

    def fits(self, plan: ExecutionPlan, group: int = 1) -> bool:
        return self.peak(plan, group) <= self._room and self._ram_bytes(plan, group) <= self._host.ram_bytes

    def _ram_bytes(self, plan: ExecutionPlan, group: int = 1) -> int:
        on_device = self.peak(plan, group) if not self._workload.on_accelerator else 0
        return on_device + sum(host_bytes(self._workload, plan).values())

    def problems(self, plan: ExecutionPlan) -> Iterator[str]:
        """A message for each budget that is exceeded, and by how much."""
        size = self._size
        asked = f"{len(size.prompts)} prompt{'s' if len(size.prompts) > 1 else ''} of up to "
        asked += f"{max(size.prompts)} tokens and {size.new_tokens} new ones"
        if size.evaluated_tokens:
            asked += f", and for rows of {size.evaluated_tokens} tokens to score"
        needed = budget_for(self.peak(plan), self._workload)
        if self.peak(plan) > self._room:
            yield (
                f"the device: at least {gib(needed)} are needed for {asked}, the budget is "
                f"{gib(self._budget_bytes)} ({gib(needed - self._budget_bytes)} too little)"
            )
        if self._ram_bytes(plan) > self._host.ram_bytes:
            yield f"RAM: {gib(self._ram_bytes(plan))} are needed, {gib(self._host.ram_bytes)} are free"

    def remedies(self) -> Iterator[str]:
        """Options that would fit instead."""
        size = self._size
        if self._weights != "auto" and self._would_fit(size, "auto"):
            yield "memory.weights=auto"
        if len(size.prompts) > 1 and self._would_fit(replace(size, prompts=(max(size.prompts),))):
            yield "one prompt at a time"
        if self._would_fit(replace(size, new_tokens=max(1, size.new_tokens // 2))):
            yield f"--max-new-tokens {max(1, size.new_tokens // 2)}"

    def _would_fit(self, size: GenerateSize, weights: WeightsChoice | None = None) -> bool:
        other = _Search(self._workload, size, self._budget_bytes, self._host, weights or self._weights)
        return any(other.fits(plan) for plan in other.plans())
