"""A plan: what a run will do, what it takes on the device, in RAM and on disk, and how long a step lasts.

Made by planner.py, shown by report.py, obeyed by `train` (its `execution`), kept in plan.json.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from qlora_train.errors import UserError
from qlora_train.memory.execution import ExecutionPlan
from qlora_train.memory.plan.ghost import Bytes
from qlora_train.memory.plan.host_bytes import (
    HostBudget,
    Machine,
    load_host_bytes,
    merge_host_bytes,
    merged_disk_bytes,
    save_host_bytes,
)
from qlora_train.memory.plan.time_model import Rates, StepTime
from qlora_train.memory.plan.workload import Workload

CONTEXT = "CUDA context"
WORKSPACES = "cuBLAS workspaces"
FRAGMENTATION = 0.02
FRAGMENTATION_OF_FIXED_SEGMENTS = 0.06
"""Shares of a GPU's budget left to what torch's allocator holds beside tensors: rounding, and holes between
what lives longer. Segments that cannot grow are of 2 or 20 MiB, or of one large tensor rounded up to 2 MiB,
and what is left free in them serves few others. Seen when the tensors of planned steps (Llama 1B and 8B, 512
to 8,192 tokens, kept and recomputed, the number of documents changing) went through a model of the allocator
with no byte more than needed: 0.2 to 1.5 % with segments that grow (3.7 % once, at 2.4 GiB), 1 to 6 % without
(13 % once, at 2 GiB). Where it is not enough, memory runs out and a step is tried again with less
(tighten.py)."""
PINNED = "pinned: "


def context_parts(workload: Workload) -> Bytes:
    """What is on the device besides tensors, by cause."""
    parts = {
        CONTEXT: workload.target.context_bytes,
        WORKSPACES: workload.target.workspace_bytes(deterministic=workload.deterministic),
    }
    return {cause: num_bytes for cause, num_bytes in parts.items() if num_bytes}


def room_in(budget_bytes: int, workload: Workload) -> int:
    """Bytes for tensors on the device within a budget."""
    context_bytes = sum(context_parts(workload).values())
    return int((budget_bytes - context_bytes) * (1 - _fragmentation(workload)))


def budget_for(tensor_bytes: int, workload: Workload) -> int:
    """The smallest budget with room for so many bytes of tensors."""
    context_bytes = sum(context_parts(workload).values())
    return math.ceil(tensor_bytes / (1 - _fragmentation(workload))) + 1 + context_bytes


def _fragmentation(workload: Workload) -> float:
    if not workload.on_accelerator:
        return 0.0
    return FRAGMENTATION if workload.target.has_expandable_segments else FRAGMENTATION_OF_FIXED_SEGMENTS


@dataclass(frozen=True)
class Choices:
    """What the recipe's `memory` section leaves open."""

    weights: Literal["auto", "resident", "ram", "disk"] = "auto"
    activations: Literal["auto", "keep", "recompute", "offload"] = "auto"


@dataclass(frozen=True)
class Row:
    """One line of the table. place: VRAM, pinned RAM, RAM or disk."""

    phase: str
    place: str
    cause: str
    num_bytes: int


@dataclass(frozen=True)
class Plan:
    """What will happen, and what it takes.

    phases: bytes on the device by cause, at the most, of every phase that uses it. host, disk: bytes by cause
    in RAM while training and on disk, of all ranks of a machine. budget_bytes: for the device of each rank,
    context included. problems: which budgets
    do not hold, and by how much. advice: what each knob would save; where there are problems, changes of the
    recipe that would fit.
    """

    workload: Workload
    execution: ExecutionPlan
    phases: dict[str, Bytes]
    host: Bytes
    disk: Bytes
    budget_bytes: int
    host_budget: HostBudget
    time: StepTime
    rates: Rates
    problems: tuple[str, ...]
    advice: tuple[str, ...]

    @property
    def fits(self) -> bool:
        return not self.problems

    @property
    def context_bytes(self) -> int:
        """Context and workspaces."""
        return sum(context_parts(self.workload).values())

    @property
    def peak_vram_bytes(self) -> int:
        """The largest phase on the device, context included."""
        return max(sum(phase.values()) for phase in self.phases.values()) + self.context_bytes

    @property
    def step_vram_bytes(self) -> int:
        """Tensors in an optimizer step: what a meter reads."""
        return sum(self.phases["step"].values())

    @property
    def peak_ram_bytes(self) -> int:
        """Of a machine, all its ranks together. On a CPU the devices' bytes are RAM."""
        on_devices = 0 if self.workload.on_accelerator else self.machine.num_ranks * self.peak_vram_bytes
        return sum(self.host.values()) + on_devices

    @property
    def machine(self) -> Machine:
        """How many ranks share the RAM."""
        return self.host_budget.machine

    @property
    def step_seconds(self) -> float:
        return self.time.total_seconds

    @property
    def seconds_per_million_tokens(self) -> float:
        """Of bins, which packing fills almost to the last token."""
        return self.step_seconds * 1e6 / self.workload.tokens_per_step

    @property
    def device_place(self) -> str:
        return "VRAM" if self.workload.on_accelerator else "RAM (compute device)"

    def rows(self) -> Iterator[Row]:
        """The table: per phase and place the bytes by cause."""
        for phase, parts in self.phases.items():
            for cause, num_bytes in (context_parts(self.workload) | parts).items():
                yield Row(phase, self.device_place, cause, num_bytes)
        host = {
            "load": load_host_bytes(self.workload, self.execution, self.machine),
            "step": self.host,
            "save": save_host_bytes(self.workload, self.machine),
            "merge": merge_host_bytes(self.workload),
        }
        for phase, parts in host.items():
            for cause, num_bytes in parts.items():
                place = "pinned RAM" if cause.startswith(PINNED) and self.workload.on_accelerator else "RAM"
                yield Row(phase, place, cause.removeprefix(PINNED), num_bytes)
        for cause, num_bytes in self.disk.items():
            yield Row("load" if "cache" in cause else "save", "disk", cause, num_bytes)
        for cause, num_bytes in merged_disk_bytes(self.workload).items():
            yield Row("merge", "disk", cause, num_bytes)

    def to_dict(self, num_steps: int | None = None) -> dict[str, Any]:
        """plan.json. num_steps: optimizer steps to the end, where known."""
        execution = self.execution.to_dict()
        return {
            "fits": self.fits,
            "peak_vram_bytes": self.peak_vram_bytes,
            "step_vram_bytes": self.step_vram_bytes,
            "peak_ram_bytes": self.peak_ram_bytes,
            "ranks_per_machine": self.machine.num_ranks,
            "copies_in_ram": self.machine.num_copies,
            "disk_bytes": sum(self.disk.values()),
            "step_seconds": self.step_seconds,
            "seconds_per_million_tokens": self.seconds_per_million_tokens,
            "seconds_to_the_end": None if num_steps is None else num_steps * self.step_seconds,
            "weights": execution["weights"],
            "activations": execution["activations"],
            "execution": execution,
            "device": self.workload.target.type,
            "target": asdict(self.workload.target) | {"is_deterministic": self.workload.deterministic},
            "vram_budget_bytes": self.budget_bytes,
            "most_documents": self.workload.most_documents,
            "is_estimate": not self.workload.shape.is_exact,
            "rates": {
                "flops_per_second": self.rates.flops,
                "memory_bytes_per_second": self.rates.memory,
                "copy_bytes_per_second": self.rates.copy,
                "disk_bytes_per_second": self.rates.disk,
                "source": self.rates.source,
            },
            "flops_per_step": self.time.flops,
            "copied_bytes_per_step": self.time.copied_bytes,
            "rows": [
                {"phase": r.phase, "place": r.place, "cause": r.cause, "bytes": r.num_bytes}
                for r in self.rows()
            ],
            "problems": list(self.problems),
            "advice": list(self.advice),
        }

    def require_fit(self) -> None:
        """Raise `UserError`, with what is missing and what would fit, where the plan does not."""
        if self.fits:
            return
        largest = max(self.phases.values(), key=lambda phase: sum(phase.values()))
        otherwise = "no single change of the recipe would do; take a smaller base or a larger budget"
        raise refusal(self.problems, largest, self.advice, otherwise)


def refusal(problems: Sequence[str], floor: Bytes, advice: Sequence[str], otherwise: str) -> UserError:
    """The error of a plan that does not fit. floor: what the smallest plan needs by cause. advice: changes
    each of which would fit; otherwise: what to do where there is none."""
    lines = ["this does not fit, however it is arranged:"]
    lines += [f"  {problem}" for problem in problems]
    lines.append(f"  the floor is made of {in_words(floor)}")
    if advice:
        lines += ["what would fit, one at a time:", *(f"  {change}" for change in advice)]
    else:
        lines.append(otherwise)
    return UserError("\n".join(lines))


def largest_causes(plan: Plan) -> str:
    """What takes most on the device in a step."""
    return in_words(plan.phases["step"])


def in_words(parts: Bytes) -> str:
    """The five largest causes."""
    causes = sorted(parts.items(), key=lambda item: -item[1])[:5]
    return ", ".join(f"{cause} {gib(num_bytes)}" for cause, num_bytes in causes)


def gib(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:.2f} GiB"


def duration(seconds: float) -> str:
    """In s, min or h."""
    if seconds < 120:
        return f"{seconds:.2g} s" if seconds < 10 else f"{seconds:.0f} s"
    minutes = seconds / 60
    return f"{minutes:.0f} min" if minutes < 120 else f"{minutes / 60:.1f} h"
