"""Seconds per optimizer step from counts of work and rates: FLOPs, dequantized bytes, copied bytes.

Per token and parameter of the linears: 2 FLOPs forward and 2 backward (the base is frozen, so only the
gradient of the input is computed), 2 more where a layer is recomputed, less the last linear where its product
may be skipped; attention and LoRA are added. Copies overlap with arithmetic, so a pass over the layers takes
the larger of the two times; only the rows of an embedding that is off the device are waited for. The estimate
serves to choose between plans and to inform; nothing depends on its being exact.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from qlora_train.device.cards import ASSUMED_CARD, CARDS, known_card
from qlora_train.device.description import DeviceDescription
from qlora_train.plan.host_bytes import offloaded_bytes
from qlora_train.plan.workload import Workload
from qlora_train.weights.execution_plan import ActivationPolicy, ExecutionPlan, Placement


@dataclass(frozen=True)
class Rates:
    """A machine's rates per second. flops: of large matrix products in the compute dtype. memory: bytes read
    or written by the device. copy: bytes between host and device, each way. disk: bytes read. source: where
    the numbers come from, in a few words."""

    flops: float
    memory: float
    copy: float
    disk: float
    source: str


DISK_BYTES_PER_SECOND = 2e9


def stated_rates(device: DeviceDescription) -> Rates:
    """Rates from the table of cards, by the device's name; for an unknown name, those of a modest card."""
    if not device.is_accelerator:
        return Rates(100e9, 10e9, 5e9, 1e9, "assumed: a 2-core CPU with 100 GFLOP/s, disk 1 GB/s")
    known = known_card(device.name)
    card = CARDS[known or ASSUMED_CARD]
    source = f"stated for {known}" if known else f"assumed: a card like an {ASSUMED_CARD}"
    return Rates(
        card.flops,
        card.memory,
        card.copy,
        DISK_BYTES_PER_SECOND,
        f"{source}: {card.flops / 1e12:.0f} TFLOP/s, copies {card.copy / 1e9:.0f} GB/s, disk 2 GB/s",
    )


@dataclass(frozen=True)
class StepTime:
    """Seconds of one optimizer step. total_seconds: copies overlap with arithmetic. flops, copied_bytes: of
    the step. evaluation_seconds: for evaluating as many tokens."""

    total_seconds: float
    flops: float
    copied_bytes: int
    evaluation_seconds: float


def step_time(workload: Workload, plan: ExecutionPlan, rates: Rates) -> StepTime:
    """The time of one optimizer step of a workload under a plan."""
    group = plan.group_size(workload.num_micro_batches)
    num_groups = math.ceil(workload.num_micro_batches / group)
    num_tokens = workload.num_micro_batches * workload.num_tokens
    forward_flops = _forward_flops(workload)
    products = workload.shape.active_parameters
    down = workload.shape.skippable_parameters
    again = 1 - down / products
    forward = back = 0.0
    for policy in plan.activations:
        forward += num_tokens * forward_flops
        extra = again if policy is ActivationPolicy.RECOMPUTE else 0.0
        back += num_tokens * (forward_flops * (1.0 + extra) + _dora_flops(workload))
        if plan.mlp_tile_tokens is not None and policy is not ActivationPolicy.RECOMPUTE:
            back += num_tokens * 4 * down
    head = 4 * workload.num_supervised * workload.num_micro_batches * workload.shape.matrix_parameters
    dequantize = _dequantize_seconds(workload, plan, group, num_groups, rates)
    streamed = [i for i, place in enumerate(plan.weights) if place is not Placement.DEVICE]
    forward_copies = sum(
        _fetch_seconds(plan.weights[i], workload.layer_buffer_bytes, rates) for i in streamed
    )
    head_copies = _fetch_seconds(plan.head, workload.head_bytes, rates)
    offloaded = group * offloaded_bytes(workload, plan)
    x_bytes = workload.x_bytes
    row_bytes = workload.num_micro_batches * x_bytes if plan.embedding is not Placement.DEVICE else 0
    if plan.inputs is Placement.RAM:
        offloaded += group * plan.activations.count(ActivationPolicy.RECOMPUTE) * x_bytes
    forward_seconds = forward / rates.flops / num_groups + dequantize / num_groups / 3
    back_seconds = back / rates.flops / num_groups + dequantize * 2 / num_groups / 3
    row_seconds = _fetch_seconds(plan.embedding, row_bytes, rates)
    total = row_seconds + num_groups * (
        max(forward_seconds, forward_copies + offloaded / rates.copy)
        + max(head / rates.flops / num_groups, head_copies)
        + max(back_seconds, forward_copies + offloaded / rates.copy)
    )
    copied = row_bytes + num_groups * (
        2 * len(streamed) * workload.layer_buffer_bytes
        + (plan.head is not Placement.DEVICE) * workload.head_bytes
        + 2 * offloaded
    )
    evaluation = row_seconds + num_groups * (
        max(forward_seconds, forward_copies) + max(head / 2 / rates.flops / num_groups, head_copies)
    )
    return StepTime(total, forward + back + head, copied, evaluation)


def _forward_flops(workload: Workload) -> float:
    """FLOPs per token and layer in one direction: linears 2 per parameter, A and B 3 (6 for forward and
    backward), causal attention 2 (token-weighted mean length of documents) (query width)."""
    lora = workload.num_lora_parameters / workload.shape.num_layers
    mean_length = sum(n * n for n in workload.documents) / workload.num_tokens
    return 2 * workload.shape.active_parameters + 3 * lora + 2 * mean_length * workload.shape.q_width


def _dora_flops(workload: Workload) -> float:
    """FLOPs per token and layer that DoRA adds to backward: the products of its linears once more."""
    if not workload.use_dora:
        return 0.0
    shapes = workload.shape.linear_shapes
    return 2 * sum(math.prod(shapes[path]) for path, _ in workload.lora_ranks) / workload.shape.num_layers


def _dequantize_seconds(
    workload: Workload, plan: ExecutionPlan, group: int, num_groups: int, rates: Rates
) -> float:
    """Seconds of dequantizing in a step: each use of a weight writes it in the compute dtype and reads it."""
    again = sum(policy is ActivationPolicy.RECOMPUTE for policy in plan.activations)
    every_time = num_groups * group * (2 * plan.num_layers + again)
    once_a_visit = num_groups * 2 * plan.num_layers
    shape = workload.shape
    linears = (once_a_visit if plan.hold_dequantized else every_time) * shape.linear_parameters
    experts = every_time * (shape.layer_parameters - shape.linear_parameters)
    if not workload.quantization.is_quantized:
        linears, experts = 0, experts if shape.keeps_experts else 0
    return (linears + experts) * (2 * workload.itemsize + 0.5) / rates.memory


def _fetch_seconds(place: Placement, num_bytes: int, rates: Rates) -> float:
    """Seconds to copy num_bytes from where they are placed to the device; 0 if they are there."""
    if place is Placement.DEVICE:
        return 0.0
    return num_bytes / (rates.copy if place is Placement.RAM else min(rates.copy, rates.disk))
