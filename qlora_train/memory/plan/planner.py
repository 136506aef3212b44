"""The planner: which of all execution plans to follow, decided before the first byte is loaded.

In this order, each step only if the one before does not fit into the budget:

1. everything resident, nothing recomputed;
2. recompute (or offload, where its copies cost less time) as few layers as fit, the first ones: the last
   layers' graphs are born last and freed first;
3. the same with the embedding in RAM. Only the rows of a batch's tokens are copied, so its room (1.05 GB in
   Llama 3 8B) is the cheapest to have: it keeps several layers that would be recomputed;
4. recompute (or offload) every layer, and move the embedding, then the head, then as few layers as fit to
   RAM, or to disk where RAM does not hold them. The resident ones are spread evenly between the streamed
   ones, so that copies find arithmetic to hide behind;
5. remembered inputs in RAM, smaller loss blocks and head tiles, MLP tiles;
6. refuse, with the least that would fit and which change of the recipe would.

Every step is tried for several numbers of groups (micro-batches that pass the layers together cost memory and
save transfers and unpacking); of what fits the fastest by the time model is taken. Of those that are as fast,
as far as the model can tell, it is the one with the fewest copies, which may find a bus that others use; then
the earliest. Explicit `memory.*` keys narrow the choice. Bytes come from byte_walk.py, seconds from
time_model.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import product

from qlora_train.memory.execution import (
    HEAD_TILE_ROWS,
    LOSS_TOKENS,
    Activation,
    ExecutionPlan,
    Place,
    everything_resident,
)
from qlora_train.memory.plan.byte_walk import (
    GenerateSize,
    evaluation_peak,
    generate_peak,
    load_peak,
    step_peak,
)
from qlora_train.memory.plan.ghost import Bytes
from qlora_train.memory.plan.host_bytes import HostBudget, disk_bytes, host_bytes
from qlora_train.memory.plan.placement import fewest, place_of_streamed, placed
from qlora_train.memory.plan.plan import Choices, Plan, budget_for, gib, room_in
from qlora_train.memory.plan.time_model import Rates, StepTime, step_time
from qlora_train.memory.plan.workload import Workload

TELLABLE = 0.01
"""Plans whose seconds differ by less are equally fast: the time model cannot tell them apart."""
SMALLEST_LOSS_TOKENS, SMALLEST_TILE_ROWS, SMALLEST_MLP_TILE = 64, 1024, 256


def make_plan(
    workload: Workload,
    budget_bytes: int,
    rates: Rates,
    host_budget: HostBudget,
    choices: Choices = Choices(),  # noqa: B008  # frozen
    generate: GenerateSize = GenerateSize(),  # noqa: B008
) -> Plan:
    """The best plan that fits, or, with `fits` False, the smallest one and what would help.

    budget_bytes: for the device of each rank, context included. host_budget: RAM and disk that may be used.
    """
    search = _Search(workload, budget_bytes, rates, host_budget, choices, generate)
    execution = search.best()
    fits = execution is not None
    if execution is None:
        execution = search.smallest()
    phases = _phases(workload, execution, generate)
    plan = Plan(
        workload=workload,
        execution=execution,
        phases=phases,
        host=host_bytes(workload, execution, host_budget.machine),
        disk=disk_bytes(workload, has_packed_base=host_budget.has_packed_base),
        budget_bytes=budget_bytes,
        host_budget=host_budget,
        time=step_time(workload, execution, rates),
        rates=rates,
        problems=(),
        advice=(),
    )
    problems = tuple(search.problems(plan))
    advice = tuple(search.savings(execution) if fits and not problems else search.remedies())
    return replace(plan, problems=problems, advice=advice)


def _phases(workload: Workload, plan: ExecutionPlan, generate: GenerateSize) -> dict[str, Bytes]:
    return {
        "load": load_peak(workload, plan),
        "step": step_peak(workload, plan),
        "evaluation": evaluation_peak(workload, plan),
        "generate": generate_peak(workload, plan, generate),
    }


@dataclass(frozen=True)
class _Lean:
    """What happens to a layer that is not kept. inputs: where its input waits."""

    policy: Activation
    inputs: Place

    @property
    def text(self) -> str:
        where = ", inputs in RAM" if self.inputs is Place.RAM else ""
        return f"memory.activations={self.policy}{where}"


def _not_kept(plan: ExecutionPlan, number: int, lean: _Lean) -> ExecutionPlan:
    """The first `number` layers not kept."""
    activations = (lean.policy,) * number + (Activation.KEEP,) * (plan.num_layers - number)
    return replace(plan, activations=activations, inputs=lean.inputs)


class _Search:
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
        self._peaks: dict[ExecutionPlan, int] = {}
        if choices.weights in ("ram", "disk"):
            self._host_place = Place(choices.weights)
        else:
            self._host_place = place_of_streamed(workload, self._start(1, holds=False), host_budget)

    def peak(self, plan: ExecutionPlan) -> int:
        """Bytes on the device at the most, over all phases."""
        if plan not in self._peaks:
            self._peaks[plan] = max(
                sum(phase.values()) for phase in _phases(self._workload, plan, self._generate).values()
            )
        return self._peaks[plan]

    def fits(self, plan: ExecutionPlan) -> bool:
        in_ram = sum(host_bytes(self._workload, plan, self._host.machine).values())
        if in_ram > self._host.ram_bytes:
            return False
        if not self._workload.on_accelerator:
            in_ram += self._host.machine.num_ranks * self.peak(plan)
        return self.peak(plan) <= self._room and in_ram <= self._host.ram_bytes

    def best(self) -> ExecutionPlan | None:
        """The fastest of what fits; of equally fast ones that with the fewest copies, then the first."""
        if not self.can_fit():
            return None
        found = {plan: self._time(plan) for plan in self._fitting()}
        least_seconds = min(time.total_seconds for time in found.values())
        as_fast = [p for p, time in found.items() if time.total_seconds * (1 - TELLABLE) <= least_seconds]
        return min(as_fast, key=lambda plan: found[plan].copied_bytes)

    def _fitting(self) -> Iterator[ExecutionPlan]:
        """In the order of preference, the first plan that fits of every way to step. A later stage does all
        that an earlier one does and more, so it is for where that does not fit. Moving the embedding is not:
        it makes room for layers to be kept."""
        for num_groups, holds, lean in product(self._group_counts(), (False, True), self._lean_ways()):
            start = self._start(num_groups, holds=holds)
            for stages in (
                (self._policies, self._embedding_away),
                (self._placements,),
                (self._last_resorts,),
            ):
                found = [next(filter(self.fits, stage(start, lean)), None) for stage in stages]
                yield from filter(None, found)
                if any(found):
                    break

    def can_fit(self) -> bool:
        """Whether anything does."""
        return any(self.fits(plan) for plan in self._smallest_pieces())

    def smallest(self) -> ExecutionPlan:
        """The plan with the least on the device."""
        return min(self._smallest_pieces(), key=self.peak)

    def _smallest_pieces(self) -> Iterator[ExecutionPlan]:
        """One micro-batch at a time, everything off the device, in the smallest pieces."""
        start = self._start(self._workload.num_micro_batches, holds=False)
        for lean in self._lean_ways():
            *_, smallest = self._pieces(start, lean)
            yield smallest
            yield replace(smallest, mlp_tile_tokens=None)

    def _time(self, plan: ExecutionPlan) -> StepTime:
        return step_time(self._workload, plan, self._rates)

    def _group_counts(self) -> list[int]:
        k = self._workload.num_micro_batches
        return sorted({min(k, 2**i) for i in range(k.bit_length() + 1)} | {k})

    def _lean_ways(self) -> list[_Lean]:
        """How a layer that is not kept is treated, and where its input waits."""
        ways = [_Lean(Activation.RECOMPUTE, Place.RESIDENT)]
        if self._workload.on_accelerator:  # on a CPU, host memory is no other place
            ways += [_Lean(Activation.OFFLOAD, Place.RESIDENT), _Lean(Activation.RECOMPUTE, Place.RAM)]
        if self._choices.activations == "auto":
            return ways
        chosen = Activation(self._choices.activations)
        return [way for way in ways if way.policy is chosen] or [_Lean(chosen, Place.RESIDENT)]

    def _start(self, num_groups: int, *, holds: bool) -> ExecutionPlan:
        """What the recipe insists on, and otherwise everything resident and kept."""
        policy = Activation.KEEP if self._choices.activations == "auto" else self._choices.activations
        plan = everything_resident(
            self._num_layers, activation=Activation(policy), num_groups=num_groups, hold_unpacked=holds
        )
        if self._choices.weights in ("ram", "disk"):
            plan = self._placed(plan, self._num_layers, with_embedding=True, with_head=True)
        return plan

    def _policies(self, start: ExecutionPlan, lean: _Lean) -> Iterator[ExecutionPlan]:
        """Everything where it starts; as few layers as fit not kept."""
        yield start
        if self._choices.activations == "auto":
            yield from self._fewest(lambda n: _not_kept(start, n, lean))

    def _embedding_away(self, start: ExecutionPlan, lean: _Lean) -> Iterator[ExecutionPlan]:
        """The embedding in RAM, whether or not RAM would hold more; as few layers as fit not kept."""
        if self._choices.weights != "auto" or self._workload.shape.is_tied:  # tied, it is the head as well
            return
        place = Place.RAM if self._workload.on_accelerator else self._host_place
        yield from self._policies(replace(start, embedding=place), lean)

    def _placements(self, start: ExecutionPlan, lean: _Lean) -> Iterator[ExecutionPlan]:
        """Nothing kept; embedding, head, and as few layers as fit off the device."""
        if self._choices.weights != "auto":
            return
        start = _not_kept(start, self._num_layers, lean)
        yield self._placed(start, 0, with_embedding=True, with_head=False)
        yield from self._fewest_streamed(start)

    def _last_resorts(self, start: ExecutionPlan, lean: _Lean) -> Iterator[ExecutionPlan]:
        """Smaller pieces of everything, and then again as few layers as fit off the device."""
        for plan in self._pieces(start, lean):
            if self.fits(plan):
                yield from self._fewest_streamed(plan) if self._choices.weights == "auto" else (plan,)

    def _pieces(self, start: ExecutionPlan, lean: _Lean) -> Iterator[ExecutionPlan]:
        """As little as can be on the device, cut smaller and smaller, the cheapest cuts first."""
        start = _not_kept(start, self._num_layers, lean)
        if self._choices.weights == "auto":
            start = self._placed(start, self._num_layers, with_embedding=True, with_head=True)
        blocks = ((LOSS_TOKENS, HEAD_TILE_ROWS), (128, 4096), (SMALLEST_LOSS_TOKENS, SMALLEST_TILE_ROWS))
        for tile, (loss_tokens, rows) in product(self._mlp_tiles(), blocks):
            yield replace(start, loss_tokens=loss_tokens, head_tile_rows=rows, mlp_tile_tokens=tile)

    def _mlp_tiles(self) -> list[int | None]:
        tiles: list[int | None] = [None]
        size = self._workload.num_tokens // 2
        while size >= SMALLEST_MLP_TILE:
            tiles.append(size)
            size //= 2
        return tiles

    def _placed(
        self, plan: ExecutionPlan, num_streamed: int, *, with_embedding: bool, with_head: bool
    ) -> ExecutionPlan:
        return placed(
            plan,
            self._host_place,
            num_streamed,
            is_tied=self._workload.shape.is_tied,
            with_embedding=with_embedding,
            with_head=with_head,
        )

    def _fewest_streamed(self, plan: ExecutionPlan) -> Iterator[ExecutionPlan]:
        return self._fewest(lambda m: self._placed(plan, m, with_embedding=True, with_head=True))

    def _fewest(self, plan_of: Callable[[int], ExecutionPlan]) -> Iterator[ExecutionPlan]:
        plan = fewest(plan_of, self._num_layers, self.fits)
        if plan is not None:
            yield plan

    def problems(self, plan: Plan) -> Iterator[str]:
        """What does not fit, by how much."""
        if self.peak(plan.execution) > self._room:
            needed = budget_for(self.peak(plan.execution), self._workload)
            yield (
                f"the device: at least {gib(needed)} are needed, the budget is "
                f"{gib(self._budget_bytes)} ({gib(needed - self._budget_bytes)} too little)"
            )
        if plan.peak_ram_bytes > self._host.ram_bytes:
            yield (f"RAM: {gib(plan.peak_ram_bytes)} are needed, {gib(self._host.ram_bytes)} are free")
        needed = sum(plan.disk.values())
        if needed > self._host.disk_bytes and Place.DISK in (*plan.execution.weights, plan.execution.head):
            yield f"disk: {gib(needed)} are needed, {gib(self._host.disk_bytes)} are free"

    def savings(self, plan: ExecutionPlan) -> Iterator[str]:
        """What each knob would save on the device, and cost."""
        lean = {way: _not_kept(plan, self._num_layers, way) for way in self._lean_ways()}
        knobs = {f"{way.text}": other for way, other in lean.items()} | {
            "memory.weights=ram": self._placed(plan, self._num_layers, with_embedding=True, with_head=True),
            "one micro-batch at a time": replace(plan, num_groups=self._workload.num_micro_batches),
            "smaller loss blocks": replace(
                plan, loss_tokens=SMALLEST_LOSS_TOKENS, head_tile_rows=SMALLEST_TILE_ROWS
            ),
        }
        before, seconds = self.peak(plan), self._time(plan).total_seconds
        for name, other in knobs.items():
            saved = before - self.peak(other)
            if saved > 2**20:
                yield f"{name}: saves {gib(saved)}, {self._time(other).total_seconds / seconds - 1:+.0%} time"

    def remedies(self) -> Iterator[str]:
        """Changes of the recipe that would fit."""
        workload = self._workload
        if self._choices != Choices():
            free = self._with(workload, Choices())
            if free.can_fit():
                yield "memory.weights=auto memory.activations=auto"
        half = max(16, workload.documents[0] // 2)
        of_one_row = -(-workload.known_most_documents // len(workload.documents))
        changes = {
            "training.micro_batch_size=1 (and more accumulation)": replace(
                workload,
                documents=workload.documents[:1],
                num_supervised=workload.documents[0],
                known_most_documents=of_one_row,
            ),
            f"data.sequence_length={half}": replace(
                workload,
                documents=(half,) * len(workload.documents),
                num_supervised=half,
                known_most_documents=-(-workload.known_most_documents // 2),
            ),
            "lora.rank=8": replace(workload, rank=min(8, workload.rank)),
            "training.micro_batch_size=1 data.sequence_length=512 lora.rank=8": replace(
                workload,
                documents=(min(512, half),),
                num_supervised=min(512, half),
                known_most_documents=of_one_row,
                rank=min(8, workload.rank),
            ),
            "model.quantization=nf4": replace(
                workload, packing=replace(workload.packing, format="nf4", double_quant=True)
            ),
            "training.optimizer=paged_adamw_8bit": replace(workload, optimizer="paged_adamw_8bit"),
        }
        for name, changed in changes.items():
            if changed != workload and self._with(changed, self._choices).can_fit():
                yield name

    def _with(self, workload: Workload, choices: Choices) -> _Search:
        return _Search(workload, self._budget_bytes, self._rates, self._host, choices, self._generate)
