"""Seconds per optimizer step from counts of work and rates: FLOPs, unpacked bytes, copied bytes.

Per token and parameter of the linears 2 FLOPs forward and 2 back (the base is frozen, so there is one product
where training it would have two), 2 more where a layer is recomputed, less the last product where that may be
skipped; attention and factors on top. Copies run beside the arithmetic, so a pass over the layers takes the
larger of the two, not their sum; only the rows of an embedding that is not on the device are waited for. An
estimate for choosing and telling; nothing depends on its being exact.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from qlora_train.device.description import ASSUMED_CARD, DeviceDescription, known_card
from qlora_train.memory.execution import Activation, ExecutionPlan, Place
from qlora_train.memory.plan.host_bytes import parked_bytes
from qlora_train.memory.plan.workload import Workload


@dataclass(frozen=True)
class Rates:
    """What a machine does per second. flops: in the compute dtype, as reached by large products. memory:
    bytes read or written by the device. copy: bytes between host and device, each way. disk: bytes read.
    source: where the numbers are from, in a few words."""

    flops: float
    memory: float
    copy: float
    disk: float
    source: str


GPUS: dict[str, tuple[float, float, float]] = {
    "RTX 5090": (165e12, 1500e9, 45e9),
    "RTX 4090": (130e12, 850e9, 22e9),
    "RTX 4080": (80e12, 600e9, 22e9),
    "RTX 4070": (50e12, 420e9, 22e9),
    "RTX 4060": (26e12, 230e9, 11e9),
    "RTX 3090": (60e12, 800e9, 22e9),
    "RTX 3080": (50e12, 650e9, 22e9),
    "RTX 3070": (35e12, 380e9, 22e9),
    "RTX 3060": (22e12, 310e9, 22e9),
    "T4": (35e12, 260e9, 11e9),
    "L4": (70e12, 260e9, 22e9),
    "A10": (75e12, 500e9, 22e9),
    "A100": (220e12, 1400e9, 22e9),
    "H100": (550e12, 2600e9, 45e9),
    "H200": (550e12, 3800e9, 45e9),
}
"""By part of the name that the driver gives: 16-bit FLOP/s, device memory and PCIe bytes/s. Rounded, about
three quarters of what the makers state."""
DISK_BYTES_PER_SECOND = 2e9


def stated_rates(device: DeviceDescription) -> Rates:
    """Rates from the table, by the device's name; those of a modest card where none is known."""
    if not device.is_accelerator:
        return Rates(100e9, 10e9, 5e9, 1e9, "assumed: a 2-core CPU with 100 GFLOP/s, disk 1 GB/s")
    known = known_card(device.name)
    flops, memory, copy = GPUS[known or ASSUMED_CARD]
    source = f"stated for {known}" if known else f"assumed: a card like an {ASSUMED_CARD}"
    return Rates(
        flops,
        memory,
        copy,
        DISK_BYTES_PER_SECOND,
        f"{source}: {flops / 1e12:.0f} TFLOP/s, copies {copy / 1e9:.0f} GB/s, disk 2 GB/s",
    )


@dataclass(frozen=True)
class StepTime:
    """Seconds of one optimizer step. compute: alone; copies: alone; total: with what overlaps overlapping."""

    compute_seconds: float
    copy_seconds: float
    total_seconds: float
    flops: float
    copied_bytes: int


def step_time(workload: Workload, plan: ExecutionPlan, rates: Rates) -> StepTime:
    """Of one optimizer step."""
    group = math.ceil(workload.num_micro_batches / plan.num_groups)
    num_groups = math.ceil(workload.num_micro_batches / group)
    num_tokens = workload.num_micro_batches * workload.num_tokens
    forward_flops = _forward_flops(workload)
    products = workload.shape.layer_parameters
    down = workload.shape.hidden * workload.shape.intermediate
    again = 1 - down / products if workload.skips_tail else 1.0
    forward = back = 0.0
    for policy in plan.activations:
        forward += num_tokens * forward_flops
        extra = again if policy is Activation.RECOMPUTE else 0.0
        back += num_tokens * forward_flops * (1.0 + extra)
        if plan.mlp_tile_tokens is not None and policy is not Activation.RECOMPUTE:
            back += num_tokens * 4 * down
    head = 4 * workload.num_supervised * workload.num_micro_batches * workload.shape.matrix_parameters
    unpack = _unpack_seconds(workload, plan, group, num_groups, rates)
    streamed = [i for i, place in enumerate(plan.weights) if place is not Place.RESIDENT]
    forward_copies = sum(_fetch_seconds(plan.weights[i], workload.slab_bytes, rates) for i in streamed)
    head_copies = _fetch_seconds(plan.head, workload.head_bytes, rates)
    parked = group * parked_bytes(workload, plan)
    x_bytes = workload.num_tokens * workload.shape.hidden * workload.itemsize
    row_bytes = workload.num_micro_batches * x_bytes if plan.embedding is not Place.RESIDENT else 0
    if plan.inputs is Place.RAM:
        parked += group * plan.activations.count(Activation.RECOMPUTE) * x_bytes
    compute = (forward + back + head) / rates.flops + unpack
    forward_seconds = forward / rates.flops / num_groups + unpack / num_groups / 3
    back_seconds = back / rates.flops / num_groups + unpack * 2 / num_groups / 3
    row_seconds = _fetch_seconds(plan.embedding, row_bytes, rates)
    total = row_seconds + num_groups * (
        max(forward_seconds, forward_copies + parked / rates.copy)
        + max(head / rates.flops / num_groups, head_copies)
        + max(back_seconds, forward_copies + parked / rates.copy)
    )
    copied = row_bytes + num_groups * (
        2 * len(streamed) * workload.slab_bytes
        + (plan.head is not Place.RESIDENT) * workload.head_bytes
        + 2 * parked
    )
    copies = row_seconds + num_groups * (2 * forward_copies + head_copies + 2 * parked / rates.copy)
    return StepTime(compute, copies, total, forward + back + head, copied)


def _forward_flops(workload: Workload) -> float:
    """Per token and layer: linears, factors (three products for the one of the base), causal attention."""
    shapes = workload.shape.linear_shapes()
    factors = sum(workload.rank * sum(shapes[name]) for name in workload.targets)
    mean_length = sum(n * n for n in workload.documents) / workload.num_tokens
    return 2 * workload.shape.layer_parameters + 3 * factors + 2 * mean_length * workload.shape.q_width


def _unpack_seconds(
    workload: Workload, plan: ExecutionPlan, group: int, num_groups: int, rates: Rates
) -> float:
    """Each use of a weight writes it out once in the compute dtype and reads it again."""
    if workload.packing.format == "none":
        return 0.0
    uses = 1 if plan.hold_unpacked else group
    again = sum(policy is Activation.RECOMPUTE for policy in plan.activations)
    held_again = 0 if plan.hold_unpacked else again
    visits = num_groups * uses * (2 * plan.num_layers + held_again)
    return visits * workload.shape.layer_parameters * (2 * workload.itemsize + 0.5) / rates.memory


def _fetch_seconds(place: Place, num_bytes: int, rates: Rates) -> float:
    if place is Place.RESIDENT:
        return 0.0
    return num_bytes / (rates.copy if place is Place.RAM else min(rates.copy, rates.disk))
