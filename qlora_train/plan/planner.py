"""Searches for the best execution plan of a training step within a memory budget.

Tried in this order, each only if the one before does not fit:

1. everything resident, nothing recomputed;
2. recompute (or offload, where its copies cost less time) as few layers as fit, beginning with the first:
   the last layers' graphs are made last and freed first;
3. the same with the embedding in RAM. Only the rows of a batch's tokens are copied, so its bytes (1.05 GB in
   Llama 3 8B) are the cheapest to free: several layers can be kept that would be recomputed;
4. recompute (or offload) every layer, and move the embedding, then the head, then as few layers as fit to
   RAM, or to disk where RAM does not hold them. Resident layers are spread evenly between streamed ones, so
   that copies overlap with arithmetic;
5. layer inputs in RAM, smaller loss blocks and head tiles, MLP tiles;
6. refuse, with the smallest budget that would fit and the changes of the recipe that would.

Every step is tried for several numbers of groups (micro-batches that pass the layers together need memory and
save copies and dequantizing). Of the plans that fit, the fastest by the time model is taken; among equally
fast ones that with the least host memory, then the fewest copies, as the bus may be shared, then the most
layers on the device. Explicit `memory.*` keys narrow the choice.

Seconds come from time_model.py. Exact bytes come from a planned walk (planned_walk.py), which takes a tenth
of a second, so the search uses an estimated sum (step_sum.py). The plan found is walked, the sum of plans of
its kind is corrected by the difference, and the search is repeated until it finds a plan already walked.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from typing import TypeVar

from qlora_train.plan.fixed_bytes import Bytes, fixed_bytes
from qlora_train.plan.host_budget import HostBudget
from qlora_train.plan.host_bytes import QUANTIZED_BASE, disk_bytes, host_bytes, ram_of_devices
from qlora_train.plan.placement import fewest, mlp_tiles, place_of_streamed, placed
from qlora_train.plan.plan import Choices, Plan, budget_for, room_in
from qlora_train.plan.planned_walk import (
    MOST_TOGETHER,
    GenerateSize,
    evaluation_peak,
    generate_peak,
    load_peak,
    step_bytes,
)
from qlora_train.plan.step_sum import peak_by_sum
from qlora_train.plan.time_model import Rates, StepTime, step_time
from qlora_train.plan.words import gib
from qlora_train.plan.workload import Workload
from qlora_train.units import ceil_div
from qlora_train.weights.execution_plan import (
    HEAD_TILE_ROWS,
    LOSS_TOKENS,
    ActivationPolicy,
    ExecutionPlan,
    Placement,
    everything_resident,
)

T = TypeVar("T")
TELLABLE = 0.02
"""Relative difference of seconds below which plans count as equally fast; the time model is no better."""
MOST_ROUNDS = 16
"""Rounds of searching and walking at the most."""
SMALLEST_LOSS_TOKENS, SMALLEST_TILE_ROWS, SMALLEST_MLP_TILE = 64, 1024, 256


def make_plan(
    workload: Workload,
    budget_bytes: int,
    rates: Rates,
    host_budget: HostBudget,
    choices: Choices = Choices(),  # noqa: B008  # frozen
    generate: GenerateSize = GenerateSize(),  # noqa: B008
) -> Plan:
    """The best plan that fits; if none does, the smallest one, whose `fits` is False.

    budget_bytes: for the device of each rank, context included. host_budget: RAM and disk that may be used.
    """
    search = _Search(workload, budget_bytes, rates, host_budget, choices, generate)
    execution = search.best() or search.smallest()
    plan = Plan(
        workload=workload,
        execution=execution,
        phases=search.phases(execution),
        host=host_bytes(workload, execution, host_budget.machine),
        disk=disk_bytes(workload, has_quantized_base=host_budget.has_quantized_base),
        budget_bytes=budget_bytes,
        host_budget=host_budget,
        time=step_time(workload, execution, rates),
        rates=rates,
        problems=(),
    )
    return replace(plan, problems=tuple(search.problems(plan)))


def best_of(plans: Iterable[Plan]) -> Plan:
    """The best of several plans for the same tokens, by the preference of the search; if none fits, the one
    with the least bytes on the device."""
    plans = list(plans)
    fitting = [plan for plan in plans if plan.fits]
    if not fitting:
        return min(plans, key=lambda plan: plan.peak_vram_bytes)
    return _preferred(fitting, lambda plan: plan.step_seconds, _cost)


def _cost(plan: Plan) -> tuple[int, ...]:
    return _cost_of(plan.workload, plan.execution, plan.time)


def _cost_of(workload: Workload, plan: ExecutionPlan, time: StepTime) -> tuple[int, ...]:
    """Cost that decides between equally fast plans: (bytes in host memory, copied bytes, parts of the weights
    off the device)."""
    elsewhere = sum(place is not Placement.DEVICE for place in (*plan.weights, plan.embedding, plan.head))
    return sum(host_bytes(workload, plan).values()), time.copied_bytes, elsewhere


def _preferred(plans: Sequence[T], seconds: Callable[[T], float], cost: Callable[[T], tuple[int, ...]]) -> T:
    """The fastest plan; of equally fast ones that with the least cost, then the first."""
    least = min(map(seconds, plans))
    return min((plan for plan in plans if seconds(plan) * (1 - TELLABLE) <= least), key=cost)


def _phases(workload: Workload, plan: ExecutionPlan, generate: GenerateSize) -> dict[str, Bytes]:
    """Peak bytes on the device by phase and cause, from planned walks."""
    return {
        "load": load_peak(workload, plan),
        "step": step_bytes(workload, plan).device,
        "evaluation": evaluation_peak(workload, plan),
        "generate": generate_peak(workload, plan, generate),
    }


@dataclass(frozen=True)
class _Alternative:
    """An alternative to keeping a layer's activations. inputs: where its input is stored until backward."""

    policy: ActivationPolicy
    inputs: Placement


def _not_kept(plan: ExecutionPlan, number: int, alternative: _Alternative) -> ExecutionPlan:
    """The plan with an alternative for the first `number` layers; the others keep their activations."""
    activations = (alternative.policy,) * number + (ActivationPolicy.KEEP,) * (plan.num_layers - number)
    return replace(plan, activations=activations, inputs=alternative.inputs)


def _kind(plan: ExecutionPlan) -> tuple[object, ...]:
    """A key shared by plans that differ only in numbers of layers, for which the sum has the same error."""
    return (
        frozenset(plan.weights),
        frozenset(plan.activations),
        *(plan.embedding, plan.head, plan.inputs, plan.num_groups, plan.hold_dequantized),
        *(plan.mlp_tile_tokens, plan.loss_tokens, plan.head_tile_rows),
    )


class _Search:
    """The search for one workload: estimated and walked bytes of execution plans, and their order."""

    def __init__(
        self,
        workload: Workload,
        budget_bytes: int,
        rates: Rates,
        host_budget: HostBudget,
        choices: Choices,
        generate: GenerateSize,
    ) -> None:
        self._generate = generate
        self._workload, self._rates, self._choices = workload, rates, choices
        self._budget_bytes, self._host = budget_bytes, host_budget
        self._room = room_in(budget_bytes, workload)
        self._num_layers = workload.shape.num_layers
        self._sums: dict[ExecutionPlan, int] = {}
        self._walked: dict[ExecutionPlan, dict[str, Bytes]] = {}
        self._corrections: dict[tuple[object, ...], int] = {}
        if choices.weights in ("ram", "disk"):
            self._host_place = Placement(choices.weights)
        else:
            self._host_place = place_of_streamed(workload, self._start(1, holds=False), host_budget)
        self._placed = partial(placed, place=self._host_place, is_tied=workload.shape.is_tied)

    def phases(self, plan: ExecutionPlan) -> dict[str, Bytes]:
        """Peak bytes on the device by phase and cause, from a planned walk."""
        if plan not in self._walked:
            self._walked[plan] = _phases(self._workload, plan, self._generate)
        return self._walked[plan]

    def peak(self, plan: ExecutionPlan) -> int:
        """Peak bytes on the device over all phases: walked if the plan was walked before, else estimated."""
        if plan in self._walked:
            return max(sum(phase.values()) for phase in self._walked[plan].values())
        if plan not in self._sums:
            self._sums[plan] = peak_by_sum(self._workload, plan)
        return self._sums[plan] + self._corrections.get(_kind(plan), 0)

    def walked_peak(self, plan: ExecutionPlan) -> int:
        """Peak bytes on the device over all phases, from a planned walk."""
        self.phases(plan)
        return self.peak(plan)

    def fits(self, plan: ExecutionPlan) -> bool:
        """Whether the plan fits on the device (by `peak`) and in RAM."""
        in_ram = sum(host_bytes(self._workload, plan, self._host.machine).values())
        if in_ram > self._host.ram_bytes:
            return False
        if not self._workload.on_accelerator:
            in_ram += ram_of_devices(self.peak(plan), self._host.machine)
        return self.peak(plan) <= self._room and in_ram <= self._host.ram_bytes

    def best(self) -> ExecutionPlan | None:
        """The best plan that fits by its walk; None where none does."""
        if self._room < min(map(self._least_bytes, self._smallest_pieces())):
            return None
        for _ in range(MOST_ROUNDS):
            found = list(self._fitting())
            if not found:
                break
            plan = self._preferred(found)
            if plan in self._walked:
                return plan
            self._corrections[_kind(plan)] = self.walked_peak(plan) - self._sums[plan]
        for plan in self._least_by_sum():
            self.walked_peak(plan)
        sound = [plan for plan in self._walked if self.fits(plan)]
        return self._preferred(sound) if sound else None

    def _preferred(self, plans: list[ExecutionPlan]) -> ExecutionPlan:
        times = {plan: self._time(plan) for plan in plans}
        return _preferred(
            plans,
            lambda plan: times[plan].total_seconds,
            lambda plan: _cost_of(self._workload, plan, times[plan]),
        )

    def _fitting(self) -> Iterator[ExecutionPlan]:
        """For every combination of groups, held weights and alternative, the first plan that fits. A later
        stage saves more memory than an earlier one and is tried only where that does not fit; but the
        embedding in RAM is always tried, as it makes room for layers to be kept."""
        combinations = product(self._group_counts(), (False, True), self._alternatives())
        for num_groups, holds, alternative in combinations:
            start = self._start(num_groups, holds=holds)
            for stages in (
                (self._policies, self._embedding_away),
                (self._placements,),
                *([] if holds else [(self._last_resorts,)]),
            ):
                found = [next(filter(self.fits, stage(start, alternative)), None) for stage in stages]
                yield from filter(None, found)
                if any(found):
                    break

    def smallest(self) -> ExecutionPlan:
        """The plan with the least bytes on the device."""
        return min(self._least_by_sum()[:2], key=self.walked_peak)

    def _least_bytes(self, plan: ExecutionPlan) -> int:
        """A lower bound of a plan's peak: fixed bytes, and one layer's input, output and gradient."""
        return sum(fixed_bytes(self._workload, plan).values()) + 3 * self._workload.x_bytes

    def _least_by_sum(self) -> list[ExecutionPlan]:
        """The smallest plans, in the order of their uncorrected sums."""
        return sorted(self._smallest_pieces(), key=lambda plan: peak_by_sum(self._workload, plan))

    def _smallest_pieces(self) -> Iterator[ExecutionPlan]:
        """The plans with the least memory: groups of one, all weights off the device, the smallest tiles."""
        start = self._start(self._workload.num_micro_batches, holds=False)
        for alternative in self._alternatives():
            *_, smallest = self._pieces(start, alternative)
            yield smallest
            yield replace(smallest, mlp_tile_tokens=None)

    def _time(self, plan: ExecutionPlan) -> StepTime:
        return step_time(self._workload, plan, self._rates)

    def _group_counts(self) -> list[int]:
        """Numbers of groups to try: powers of two, and one group for each micro-batch."""
        k = self._workload.num_micro_batches
        fewest = ceil_div(k, MOST_TOGETHER)
        return sorted({max(fewest, min(k, 2**i)) for i in range(k.bit_length() + 1)} | {k})

    def _alternatives(self) -> list[_Alternative]:
        """The alternatives to keeping activations that the device and the recipe allow."""
        found = [_Alternative(ActivationPolicy.RECOMPUTE, Placement.DEVICE)]
        if self._workload.on_accelerator:  # on a CPU, host memory is the device's
            found += [
                _Alternative(ActivationPolicy.OFFLOAD, Placement.DEVICE),
                _Alternative(ActivationPolicy.RECOMPUTE, Placement.RAM),
            ]
        if self._choices.activations == "auto":
            return found
        chosen = ActivationPolicy(self._choices.activations)
        return [each for each in found if each.policy is chosen] or [_Alternative(chosen, Placement.DEVICE)]

    def _start(self, num_groups: int, *, holds: bool) -> ExecutionPlan:
        """The plan with everything resident and kept, except where the recipe prescribes otherwise."""
        policy = ActivationPolicy.KEEP if self._choices.activations == "auto" else self._choices.activations
        plan = everything_resident(
            self._num_layers,
            activation=ActivationPolicy(policy),
            num_groups=num_groups,
            hold_dequantized=holds,
        )
        if self._choices.weights in ("ram", "disk"):
            plan = self._placed(plan, self._num_layers)
        return plan

    def _policies(self, start: ExecutionPlan, alternative: _Alternative) -> Iterator[ExecutionPlan]:
        """The plan itself, then with as few layers as fit not kept."""
        yield start
        if self._choices.activations == "auto":
            yield from self._fewest(lambda n: _not_kept(start, n, alternative))

    def _embedding_away(self, start: ExecutionPlan, alternative: _Alternative) -> Iterator[ExecutionPlan]:
        """`_policies` with the embedding in RAM, even where RAM would not hold more."""
        if self._choices.weights != "auto" or self._workload.shape.is_tied:  # tied, it is the head as well
            return
        place = Placement.RAM if self._workload.on_accelerator else self._host_place
        yield from self._policies(replace(start, embedding=place), alternative)

    def _placements(self, start: ExecutionPlan, alternative: _Alternative) -> Iterator[ExecutionPlan]:
        """No layer kept; embedding, head, and as few layers as fit off the device."""
        if self._choices.weights != "auto":
            return
        start = _not_kept(start, self._num_layers, alternative)
        yield self._placed(start, 0, with_head=False)
        yield from self._fewest_streamed(start)

    def _last_resorts(self, start: ExecutionPlan, alternative: _Alternative) -> Iterator[ExecutionPlan]:
        """Smaller tiles and blocks, and then again as few layers as fit off the device."""
        for plan in self._pieces(start, alternative):
            if self.fits(plan):
                yield from self._fewest_streamed(plan) if self._choices.weights == "auto" else (plan,)

    def _pieces(self, start: ExecutionPlan, alternative: _Alternative) -> Iterator[ExecutionPlan]:
        """No layer kept and all weights off the device, with smaller and smaller tiles, cheapest first."""
        start = _not_kept(start, self._num_layers, alternative)
        if self._choices.weights == "auto":
            start = self._placed(start, self._num_layers)
        blocks = ((LOSS_TOKENS, HEAD_TILE_ROWS), (128, 4096), (SMALLEST_LOSS_TOKENS, SMALLEST_TILE_ROWS))
        tiles = mlp_tiles(self._workload.num_tokens, SMALLEST_MLP_TILE)
        for tile, (loss_tokens, rows) in product(tiles, blocks):
            yield replace(start, loss_tokens=loss_tokens, head_tile_rows=rows, mlp_tile_tokens=tile)

    def _fewest_streamed(self, plan: ExecutionPlan) -> Iterator[ExecutionPlan]:
        return self._fewest(partial(self._placed, plan))

    def _fewest(self, plan_of: Callable[[int], ExecutionPlan]) -> Iterator[ExecutionPlan]:
        plan = fewest(plan_of, self._num_layers, self.fits)
        if plan is not None:
            yield plan

    def problems(self, plan: Plan) -> Iterator[str]:
        """A message for each budget that is exceeded, and by how much."""
        if self.peak(plan.execution) > self._room:
            needed = budget_for(self.peak(plan.execution), self._workload)
            yield (
                f"the device: at least {gib(needed)} are needed, the budget is "
                f"{gib(self._budget_bytes)} ({gib(needed - self._budget_bytes)} too little)"
            )
        if plan.peak_ram_bytes > self._host.ram_bytes:
            yield (f"RAM: {gib(plan.peak_ram_bytes)} are needed, {gib(self._host.ram_bytes)} are free")
        needed = sum(plan.disk.values())
        if plan.execution.is_resident and not self._host.keeps_quantized_base:
            needed -= plan.disk.get(QUANTIZED_BASE, 0)
        if needed > self._host.disk_bytes:
            yield f"disk: {gib(needed)} are needed, {gib(self._host.disk_bytes)} are free"
