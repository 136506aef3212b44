"""Seconds per optimizer step from counts of work and rates: FLOPs, dequantized bytes, copied bytes.

Per token and parameter of the linears: 2 FLOPs forward and 2 backward (the base is frozen, so only the
gradient of the input is computed), 2 more where a layer is recomputed, less the last linear where its product
may be skipped. Attention and operations on single numbers (norms, rotary tables, activations, sums) have
rates of their own: on a CPU they are a third of a step. LoRA's narrow products have few FLOPs for what they
read and write of activations, so that counts too. An expert multiplies another number of rows in each
micro-batch, which takes a fixed time besides: a CPU's library makes a kernel for every new number, a GPU is
told to launch a few. Copies overlap with arithmetic, so a pass over the layers takes the larger of the two
times: what copies take longer is waited for, and so are all rows of an embedding that is off the device. The
estimate serves to choose between plans and to inform; nothing depends on its being exact.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from qlora_train.device.cards import ASSUMED_CARD, CARDS, known_card
from qlora_train.device.description import DeviceDescription
from qlora_train.device.step_clock import Cause
from qlora_train.kernels.blocked_attention import LONGEST
from qlora_train.plan.host_bytes import offloaded_bytes
from qlora_train.plan.workload import Workload
from qlora_train.weights.execution_plan import ActivationPolicy, ExecutionPlan, Placement
from qlora_train.weights.principal_part import principal_part_flops


@dataclass(frozen=True, kw_only=True)
class Rates:
    """A machine's rates per second. flops: of matrix products in the compute dtype. attention: FLOPs of
    causal attention, both directions, over documents of up to `LONGEST` tokens; long_attention: over longer
    ones. elementwise: bytes read or written by operations on single numbers. expert_product_seconds: fixed
    seconds of a product with one expert's rows, besides its work. memory: bytes read or written by copies
    within the device. copy: bytes between host and device, each way. disk: bytes read. source: where the
    numbers come from, in a few words."""

    flops: float
    attention: float
    long_attention: float
    elementwise: float
    expert_product_seconds: float
    memory: float
    copy: float
    disk: float
    source: str


DISK_BYTES_PER_SECOND = 2e9
_ATTENTION_SHARE = 0.4
"""Of a card's FLOP/s in products, until it is measured."""
_LAUNCH_SECONDS = 2e-5
"""Assumed of a GPU until it is measured: to gather rows, multiply and add them."""
_ELEMENTWISE_READS = 8
"""How often a layer's elementwise operations read or write its stream of tokens, [T, hidden], in a forward
pass: two norms (2 each) and two residual sums, of which one is in place."""
_OUTPUT_READS = 4
"""The same for each linear's output: rotary embedding, gathering by document, activation and product."""
_EXPERT_READS = 3
"""How often more each of a token's experts reads or writes the token or its output: to gather one and to
weight and add the other."""
CPU_DECOMPOSITION_SHARES, GPU_DECOMPOSITION_SHARES = (0.1, 0.1), (5e-4, 0.01)
"""Shares of the arithmetic rate that decompositions reach, (exact, approximate): measured on a CPU,
guessed for GPUs."""


def stated_rates(device: DeviceDescription) -> Rates:
    """Rates from the table of cards, by the device's name; for an unknown name, those of a modest card."""
    if not device.is_accelerator:
        source = "assumed: a 2-core CPU with 100 GFLOP/s, disk 1 GB/s"
        return Rates(
            flops=100e9,
            attention=40e9,
            long_attention=40e9,
            elementwise=5e9,
            expert_product_seconds=3e-4,
            memory=10e9,
            copy=5e9,
            disk=1e9,
            source=source,
        )
    known = known_card(device.name)
    card = CARDS[known or ASSUMED_CARD]
    source = f"stated for {known}" if known else f"assumed: a card like an {ASSUMED_CARD}"
    return Rates(
        flops=card.flops,
        attention=card.flops * _ATTENTION_SHARE,
        long_attention=card.flops * _ATTENTION_SHARE,
        elementwise=card.memory,
        expert_product_seconds=_LAUNCH_SECONDS,
        memory=card.memory,
        copy=card.copy,
        disk=DISK_BYTES_PER_SECOND,
        source=f"{source}: {card.flops / 1e12:.0f} TFLOP/s, copies {card.copy / 1e9:.0f} GB/s, disk 2 GB/s",
    )


@dataclass(frozen=True)
class StepTime:
    """Seconds of one optimizer step by `Cause.key`, and their sum: copies overlap with arithmetic. flops,
    copied_bytes: of the step. evaluation_seconds: for evaluating as many tokens."""

    seconds: dict[str, float]
    total_seconds: float
    flops: float
    copied_bytes: int
    evaluation_seconds: float


def step_time(workload: Workload, plan: ExecutionPlan, rates: Rates) -> StepTime:
    """The time of one optimizer step of a workload under a plan."""
    group = plan.group_size(workload.num_micro_batches)
    num_groups = math.ceil(workload.num_micro_batches / group)
    num_tokens = workload.num_micro_batches * workload.num_tokens
    work, head_work = _forward_work(workload), _head_work(workload)
    back = work.back(_dora_flops(workload))
    down = workload.shape.skippable_parameters
    again = work.without(2 * down)
    tiled = replace(_NO_WORK, linear=4 * down)
    hidden_again = replace(_NO_WORK, linear=2 * workload.shape.expert_hidden_parameters)
    passes = []
    for policy in plan.activations:
        is_again = policy is ActivationPolicy.RECOMPUTE
        is_tiled = plan.mlp_tile_tokens is not None and not is_again
        passes.append([back, again if is_again else hidden_again, *([tiled] * is_tiled)])
    fixed_seconds, fixed_back_seconds = (
        workload.num_micro_batches * number * rates.expert_product_seconds
        for number in _expert_products(workload)
    )
    forward_seconds = num_tokens * plan.num_layers * work.seconds(rates) + fixed_seconds
    back_seconds = num_tokens * sum(part.seconds(rates) for parts in passes for part in parts)
    back_seconds += fixed_back_seconds
    flops = num_tokens * (
        plan.num_layers * work.flops + sum(part.flops for parts in passes for part in parts)
    )
    head_seconds = head_work.seconds(rates)
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
    forward_seconds = (forward_seconds + dequantize / 3) / num_groups
    back_seconds = (back_seconds + dequantize * 2 / 3) / num_groups
    row_seconds = _fetch_seconds(plan.embedding, row_bytes, rates)
    waited, waited_back = (
        _waits(computing, forward_copies, offloaded / rates.copy)
        for computing in (forward_seconds, back_seconds)
    )
    head_waited = max(0.0, head_copies - head_seconds / num_groups)
    seconds = {
        Cause.WEIGHTS.key: row_seconds + num_groups * (waited[0] + head_waited + waited_back[0]),
        Cause.ACTIVATIONS.key: num_groups * (waited[1] + waited_back[1]),
        Cause.FORWARD.key: num_groups * forward_seconds,
        Cause.LOSS.key: head_seconds,
        Cause.BACKWARD.key: num_groups * back_seconds,
    }
    copied = row_bytes + num_groups * (
        2 * len(streamed) * workload.layer_buffer_bytes
        + (plan.head is not Placement.DEVICE) * workload.head_bytes
        + 2 * offloaded
    )
    evaluation = row_seconds + num_groups * (
        max(forward_seconds, forward_copies) + max(head_seconds / 2 / num_groups, head_copies)
    )
    return StepTime(seconds, sum(seconds.values()), flops + head_work.flops, copied, evaluation)


def _waits(computing: float, weights: float, activations: float) -> tuple[float, float]:
    """Seconds that copies of weights and of activations take longer than what they overlap with, in
    proportion to the time of each."""
    copying = weights + activations
    late = max(0.0, copying - computing)
    return (late * weights / copying, late * activations / copying) if late else (0.0, 0.0)


@dataclass(frozen=True)
class _Work:
    """Work of one kind each. linear, attention, long_attention: FLOPs, the first with those of A and B.
    elementwise: bytes, also of activations that products with A and B read and write."""

    linear: float
    attention: float
    long_attention: float
    elementwise: float

    @property
    def flops(self) -> float:
        return self.linear + self.attention + self.long_attention

    def seconds(self, rates: Rates) -> float:
        return (
            self.linear / rates.flops
            + self.attention / rates.attention
            + self.long_attention / rates.long_attention
            + self.elementwise / rates.elementwise
        )

    def back(self, more_flops: float) -> _Work:
        """The work of backward, for that of forward: attention has five products for two."""
        attention, long_attention = 2.5 * self.attention, 2.5 * self.long_attention
        return _Work(self.linear + more_flops, attention, long_attention, 2 * self.elementwise)

    def without(self, linear_flops: float) -> _Work:
        """The same without products of linears that are skipped."""
        return replace(self, linear=self.linear - linear_flops)


_NO_WORK = _Work(0.0, 0.0, 0.0, 0.0)


def _forward_work(workload: Workload) -> _Work:
    """Work per token and layer in one direction. FLOPs: linears 2 per parameter, A and B 3 (6 for forward and
    backward), causal attention 2 (token-weighted mean length of documents) (query width)."""
    shape = workload.shape
    short = sum(n * n for n in workload.documents if n <= LONGEST) / workload.num_tokens
    long = sum(n * n for n in workload.documents if n > LONGEST) / workload.num_tokens
    lora_parameters, lora_activations = (number / shape.num_layers for number in workload.lora_per_token)
    reads = _ELEMENTWISE_READS * shape.hidden + _OUTPUT_READS * shape.active_outputs + lora_activations
    reads += _EXPERT_READS * shape.experts_per_token * shape.hidden
    return _Work(
        linear=2 * shape.active_parameters + 3 * lora_parameters,
        attention=2 * short * shape.q_width,
        long_attention=2 * long * shape.q_width,
        elementwise=workload.itemsize * reads,
    )


def _expert_products(workload: Workload) -> tuple[int, int]:
    """Products of one expert's rows in a micro-batch, (forward, backward): one with each weight, and with A
    and B two forward and five backward. Backward repeats those of the first matrix."""
    shape, forward, backward = workload.shape, 0, 0
    adapted = {path for path, _ in workload.lora_ranks}
    for path, (_, _, number) in shape.expert_shapes.items():
        used = min(number, workload.num_tokens * shape.experts_per_token)
        once, back = (3, 6) if path in adapted else (1, 1)
        forward += used * once
        backward += used * (back if path.endswith(".down_proj") else back + once)
    return forward, backward


def _head_work(workload: Workload) -> _Work:
    """Work of the loss and its gradient in a step: two products, and in fp32 the maximum, the exponentials
    and their sum, the probabilities and their cast."""
    supervised = workload.num_supervised * workload.num_micro_batches
    logits = supervised * workload.shape.vocabulary
    return replace(
        _NO_WORK, linear=4 * supervised * workload.shape.matrix_parameters, elementwise=6 * 4 * logits
    )


def _dora_flops(workload: Workload) -> float:
    """FLOPs per token and layer that DoRA adds to backward: the products of its linears once more."""
    if not workload.use_dora:
        return 0.0
    shapes = workload.shape.linear_shapes
    return 2 * sum(math.prod(shapes[path]) for path, _ in workload.lora_ranks) / workload.shape.num_layers


def decomposition_seconds(workload: Workload, rates: Rates) -> float:
    """Seconds that PiSSA takes before the first run of a base; 0 without it."""
    shares = GPU_DECOMPOSITION_SHARES if workload.on_accelerator else CPU_DECOMPOSITION_SHARES
    share = shares[workload.num_iterations is not None]
    return sum(workload.of_decompositions(principal_part_flops)) / (share * rates.flops)


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
