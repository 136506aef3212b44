"""A plan: how a run executes, its bytes on the device, in RAM and on disk, and the seconds of a step.

Made by planner.py, printed by report.py from the plain values of `Plan.to_dict`, followed by `train` (its
`execution`), stored in plan.json.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Any, Literal

from qlora_train.adapter.lora_targets import coverage
from qlora_train.kernels.planned_sdpa import flash_gap_bytes
from qlora_train.plan.fixed_bytes import Bytes, total
from qlora_train.plan.host_budget import HostBudget, Machine
from qlora_train.plan.host_bytes import (
    load_host_bytes,
    merge_host_bytes,
    merged_disk_bytes,
    ram_of_devices,
    save_host_bytes,
)
from qlora_train.plan.time_model import Rates, StepTime, decomposition_seconds
from qlora_train.plan.words import duration, largest_in_words, positions_line, refusal
from qlora_train.plan.workload import Workload
from qlora_train.weights.execution_plan import ExecutionPlan

CONTEXT = "CUDA context"
WORKSPACES = "cuBLAS workspaces"
FRAGMENTATION = 0.02
FRAGMENTATION_OF_FIXED_SEGMENTS = 0.06
"""Shares of a GPU's budget reserved for fragmentation: rounding, and holes between tensors in torch's
allocator. Fixed segments have 2 or 20 MiB, or one large tensor rounded up to 2 MiB, and their free parts fit
few other tensors. Measured by replaying the tensors of planned steps (Llama 1B and 8B, 512 to 8,192 tokens,
kept and recomputed, varying numbers of documents) in a model of the allocator with no spare byte: 0.2 to
1.5 % with expandable segments (3.7 % once, at 2.4 GiB), 1 to 6 % with fixed ones (13 % once, at 2 GiB). Where
the share is too small, memory runs out and the step is tried again with less (walk/oom_fallback.py)."""
PINNED = "pinned: "


def context_parts(workload: Workload) -> Bytes:
    """Bytes on the device besides tensors, by cause: CUDA context and cuBLAS workspaces."""
    workspace_bytes = workload.target.workspace_bytes(deterministic=workload.deterministic)
    return total({CONTEXT: workload.target.context_bytes, WORKSPACES: workspace_bytes})


def room_in(budget_bytes: int, workload: Workload) -> int:
    """Bytes for tensors on the device within a budget."""
    context_bytes = sum(context_parts(workload).values())
    return int((budget_bytes - context_bytes) * (1 - _fragmentation(workload)))


def budget_for(tensor_bytes: int, workload: Workload) -> int:
    """The smallest budget with room for so many bytes of tensors."""
    context_bytes = sum(context_parts(workload).values())
    return math.ceil(tensor_bytes / (1 - _fragmentation(workload))) + 1 + context_bytes


def _fragmentation(workload: Workload) -> float:
    """The share of the budget that fragmentation may take on the workload's device."""
    if not workload.on_accelerator:
        return 0.0
    return FRAGMENTATION if workload.target.has_expandable_segments else FRAGMENTATION_OF_FIXED_SEGMENTS


@dataclass(frozen=True)
class Choices:
    """What the recipe's `memory` section prescribes; `auto` leaves the choice to the planner."""

    weights: Literal["auto", "resident", "ram", "disk"] = "auto"
    activations: Literal["auto", "keep", "recompute", "offload"] = "auto"


@dataclass(frozen=True)
class MemoryEntry:
    """One row of the memory table. place: VRAM (on a CPU: tensors in RAM), pinned RAM, RAM or disk."""

    phase: str
    place: str
    cause: str
    num_bytes: int


@dataclass(frozen=True)
class Plan:
    """How a run executes, and the memory and time it needs.

    phases: peak bytes on the device by cause, for every phase that uses it, without the context. host, disk:
    bytes by cause in RAM while training and on disk, of all ranks of a machine. budget_bytes: for the device
    of each rank, context included. problems: messages of exceeded budgets. advise: makes `advice`.
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
    advise: Callable[[], tuple[str, ...]] = field(default=tuple, compare=False, repr=False)

    @cached_property
    def advice(self) -> tuple[str, ...]:
        """Changes of the recipe that help, one line of text each; made when first asked for."""
        return self.advise()

    @property
    def fits(self) -> bool:
        return not self.problems

    @property
    def context_bytes(self) -> int:
        """Bytes of the CUDA context and the workspaces."""
        return sum(context_parts(self.workload).values())

    @property
    def peak_vram_bytes(self) -> int:
        """Bytes on the device in the largest phase, context included."""
        return max(sum(phase.values()) for phase in self.phases.values()) + self.context_bytes

    @property
    def step_vram_bytes(self) -> int:
        """Peak bytes of tensors in an optimizer step, to compare with the measured peak."""
        return sum(self.phases["step"].values())

    @property
    def peak_ram_bytes(self) -> int:
        """RAM of all ranks of a machine together; on a CPU it includes the bytes of the device."""
        in_host_memory = sum(self.host.values())
        if self.workload.on_accelerator:
            return in_host_memory
        return in_host_memory + ram_of_devices(self.peak_vram_bytes, self.machine)

    @property
    def _heap(self) -> Bytes:
        """Bytes of the C heap besides tensors, on a CPU."""
        of_devices = self.peak_ram_bytes - sum(self.host.values())
        kept = of_devices - self.machine.num_ranks * self.peak_vram_bytes
        return {} if self.workload.on_accelerator else {"free pages of the heap": kept}

    @property
    def machine(self) -> Machine:
        """The ranks that share the machine's RAM."""
        return self.host_budget.machine

    @property
    def step_seconds(self) -> float:
        return self.time.total_seconds

    @property
    def seconds_per_million_tokens(self) -> float:
        """Seconds per million tokens of full bins; packing fills bins almost to the last token."""
        return self.step_seconds * 1e6 / self.workload.tokens_per_step

    @property
    def evaluation_seconds_per_million_tokens(self) -> float:
        return self.time.evaluation_seconds * 1e6 / self.workload.tokens_per_step

    @property
    def remarks(self) -> list[str]:
        """Notes for the user: long sequences, memory that grows with the number of documents, and the time of
        PiSSA."""
        shape, work = self.workload.shape, self.workload
        lines = positions_line(max(work.documents), shape.max_positions)
        grouped = shape.num_heads != shape.num_kv_heads
        serves = work.target.varlen_serves(
            work.itemsize, shape.head_dim, grouped=grouped, has_softcap=shape.has_softcap
        )
        if serves and not work.known_most_documents and not work.reference:
            gap_bytes = flash_gap_bytes(shape.num_heads, shape.head_dim)
            lines.append(
                f"for up to {work.most_documents} documents in a micro-batch; with more, attention's scratch "
                f"grows by {gap_bytes / 2**20:.1f} MiB for each"
            )
        if work.principal_ranks and not self.host_budget.has_quantized_base:
            lines.append(
                f"PiSSA: decomposing {len(work.principal_ranks)} weights takes about "
                f"{duration(decomposition_seconds(work, self.rates))}, once for this base and these ranks"
                + ("" if work.num_iterations else "; lora.init_lora_weights: pissa_niter_16 is faster")
            )
        return lines

    @property
    def device_place(self) -> str:
        return "VRAM" if self.workload.on_accelerator else "tensors in RAM"

    def entries(self) -> Iterator[MemoryEntry]:
        """The rows of the memory table: bytes per phase, place and cause."""
        for phase, parts in self.phases.items():
            for cause, num_bytes in (context_parts(self.workload) | parts).items():
                yield MemoryEntry(phase, self.device_place, cause, num_bytes)
        host = {
            "load": load_host_bytes(self.workload, self.execution, self.machine),
            "step": self.host | self._heap,
            "save": save_host_bytes(self.workload, self.machine),
            "merge": merge_host_bytes(self.workload),
        }
        for phase, parts in host.items():
            for cause, num_bytes in parts.items():
                place = "pinned RAM" if cause.startswith(PINNED) and self.workload.on_accelerator else "RAM"
                yield MemoryEntry(phase, place, cause.removeprefix(PINNED), num_bytes)
        for cause, num_bytes in self.disk.items():
            yield MemoryEntry("load" if "cache" in cause else "save", "disk", cause, num_bytes)
        for cause, num_bytes in merged_disk_bytes(self.workload).items():
            yield MemoryEntry("merge", "disk", cause, num_bytes)

    def to_dict(self) -> dict[str, Any]:
        """The content of plan.json, apart from what depends on the data."""
        execution, work = self.execution.to_dict(), self.workload
        return {
            "fits": self.fits,
            "model_type": work.shape.model_type,
            "num_parameters": work.shape.num_parameters,
            "lora": coverage(dict(work.lora_ranks), work.shape.linear_shapes, work.shape.expert_shapes),
            "micro_batch_size": work.micro_batch_size,
            "num_micro_batches": work.num_micro_batches,
            "tokens_per_step": work.tokens_per_step,
            "in_words": work.target.in_words(deterministic=work.deterministic),
            "remarks": self.remarks,
            "peak_vram_bytes": self.peak_vram_bytes,
            "step_vram_bytes": self.step_vram_bytes,
            "peak_ram_bytes": self.peak_ram_bytes,
            "ranks_per_machine": self.machine.num_ranks,
            "copies_in_ram": self.machine.num_copies,
            "disk_bytes": sum(self.disk.values()),
            "step_seconds": self.step_seconds,
            "seconds_of_a_step": self.time.seconds,
            "seconds_per_million_tokens": self.seconds_per_million_tokens,
            "evaluation_seconds_per_million_tokens": self.evaluation_seconds_per_million_tokens,
            "weights": execution["weights"],
            "activations": execution["activations"],
            "execution": execution,
            "device": self.workload.target.type,
            "target": asdict(self.workload.target) | {"is_deterministic": self.workload.deterministic},
            "vram_budget_bytes": self.budget_bytes,
            "ram_budget_bytes": self.host_budget.ram_bytes,
            "disk_budget_bytes": self.host_budget.disk_bytes,
            "most_documents": self.workload.most_documents,
            "rates": {
                "flops_per_second": self.rates.flops,
                "attention_flops_per_second": self.rates.attention,
                "long_attention_flops_per_second": self.rates.long_attention,
                "elementwise_bytes_per_second": self.rates.elementwise,
                "expert_product_seconds": self.rates.expert_product_seconds,
                "memory_bytes_per_second": self.rates.memory,
                "copy_bytes_per_second": self.rates.copy,
                "disk_bytes_per_second": self.rates.disk,
                "source": self.rates.source,
            },
            "flops_per_step": self.time.flops,
            "copied_bytes_per_step": self.time.copied_bytes,
            "rows": [
                {"phase": r.phase, "place": r.place, "cause": r.cause, "bytes": r.num_bytes}
                for r in self.entries()
            ],
            "problems": list(self.problems),
            "floor": self.floor,
        }

    @property
    def floor(self) -> Bytes:
        """Bytes by cause in the largest phase."""
        return max(self.phases.values(), key=lambda phase: sum(phase.values()))

    def require_fit(self) -> None:
        """Raise `UserError`, with the exceeded budgets and advice, where the plan does not fit."""
        if not self.fits:
            raise refusal(self.problems, self.floor, self.advice)


def largest_causes(plan: Plan) -> str:
    """The five largest causes of device memory in a step, as text."""
    return largest_in_words(plan.phases["step"], 5)
