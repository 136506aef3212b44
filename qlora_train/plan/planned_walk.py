"""Bytes on the device at the most in every phase of a run, from the program's own walk.

    step         walk/layer_walk.py with a model without numbers (planned_model.py); then the optimizer
    evaluation   walk/evaluate.py
    generate     the prompts of one batch through one layer of each kind, the key-value cache and the logits
    load         what stays, one layer buffer and one block of rows

What stays as long as training runs is added (fixed_bytes.py). The peak of a run is the largest of its phases,
never a sum over things that are not there at the same time.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from qlora_train.model.packed_tokens import PackedTokens
from qlora_train.plan.fixed_bytes import (
    DEQUANTIZE_BUFFER,
    GRADIENT,
    KV_CACHE,
    LOADING,
    MASTERS,
    MICRO_BATCH,
    OPTIMIZER,
    OPTIMIZER_SCRATCH,
    ROWS_BLOCK_BYTES,
    WORKING,
    Bytes,
    fixed_bytes,
    optimizer_scratch_bytes,
)
from qlora_train.plan.planned_meter import PlannedMeter
from qlora_train.plan.planned_model import PlannedHost, PlannedLoss, PlannedModel, planned_model
from qlora_train.plan.workload import Workload
from qlora_train.walk.evaluate import loss_sum
from qlora_train.walk.layer_walk import LayerWalk
from qlora_train.weights.execution_plan import ExecutionPlan, Placement

INPUTS = "layer inputs"
"""Inputs of layers: in use, kept for the backward pass or fetched from host memory; and their gradients."""
MOST_TOGETHER = 32
"""Micro-batches that may pass the layers together: what that saves, transfers and dequantizing, is hidden
behind the arithmetic or beside it long before."""


@dataclass(frozen=True)
class GenerateSize:
    """What `generate` and samples are planned for: token counts of the prompts of one batch, new tokens of
    each."""

    prompts: tuple[int, ...] = (512,)
    new_tokens: int = 128

    @property
    def capacity(self) -> int:
        """Tokens that the cache has room for, per prompt."""
        return max(self.prompts) + self.new_tokens


@dataclass(frozen=True)
class StepBytes:
    """Of one optimizer step: bytes on the device by cause at the most, and what waits in host memory."""

    device: Bytes
    host_bytes: int


def group_size(workload: Workload, plan: ExecutionPlan) -> int:
    """Micro-batches that pass the layers together."""
    return -(-workload.num_micro_batches // plan.num_groups)


def step_bytes(workload: Workload, plan: ExecutionPlan) -> StepBytes:
    """In an optimizer step, from the second on (optimizer state exists)."""
    model, tokens, meter = set_up(workload, plan)
    group = group_size(workload, plan)
    number = min(workload.num_micro_batches, 2 * group)  # a third group finds what the second found
    host = PlannedHost(model.device, meter)
    plan_of_two = replace(plan, num_groups=-(-number // group))
    walk = LayerWalk(
        model.decoder,
        model.lora,
        plan_of_two,
        reference=workload.reference,
        host=host,
        make_loss=PlannedLoss,
    )
    with meter:
        walk.accumulate([tokens] * number, seed=0, step=1, num_supervised=1)
    fixed = total(fixed_bytes(workload, plan), _micro_batch_bytes(workload, tokens))
    updating = {OPTIMIZER_SCRATCH: optimizer_scratch_bytes(workload)}
    largest = max(meter.peak, updating, key=lambda parts: sum(parts.values()))
    return StepBytes(total(fixed, largest), host.num_bytes)


def evaluation_peak(workload: Workload, plan: ExecutionPlan) -> Bytes:
    """Forward only, without dropout; optimizer state and gradient are there too."""
    model, tokens, meter = set_up(workload, plan)
    group = group_size(workload, plan)
    with meter:
        loss_sum(
            model.decoder,
            [tokens] * group,
            group_size=group,
            loss_tokens=plan.loss_tokens,
            make_loss=PlannedLoss,
        )
    fixed = total(fixed_bytes(workload, plan), _micro_batch_bytes(workload, tokens))
    return total(fixed, meter.peak)


def generate_peak(
    workload: Workload, plan: ExecutionPlan, size: GenerateSize, *, in_training: bool = True
) -> Bytes:
    """The prompts of one batch in one row, then token by token. in_training: optimizer state is there too."""
    model, tokens, meter = set_up(replace(workload, documents=size.prompts, num_supervised=1), plan)
    decoder = model.decoder
    numbers: dict[int, int] = {}
    with meter, torch.no_grad():
        x, arguments = decoder.embed_packed(tokens)
        for index, kind in enumerate(decoder.kinds):
            if kind not in numbers:
                decoder.run_layer(index, x, arguments[index])
                with meter.paused():
                    numbers[kind] = _cached_numbers(decoder.layers[index], x, arguments[index])
    cached_numbers = len(size.prompts) * size.capacity * sum(numbers[kind] for kind in decoder.kinds)
    logits = len(size.prompts) * workload.shape.vocabulary
    itemsize = workload.itemsize
    # Logits of the token before in fp32, and of this one: tiles and all of them, or all of them and in fp32.
    last = {"logits": logits * (4 + max(2 * itemsize, itemsize + 4))}
    fixed = {
        cause: num_bytes
        for cause, num_bytes in fixed_bytes(workload, plan).items()
        if in_training or cause != OPTIMIZER
    }
    largest = max(meter.peak, last, key=lambda parts: sum(parts.values()))
    return total(fixed, {KV_CACHE: cached_numbers * itemsize}, largest)


def _cached_numbers(layer: nn.Module, x: Tensor, arguments: Mapping[str, Any]) -> int:
    """Of one token in one layer: its keys and values."""
    noted = _NotedCache()
    layer(x, **{**arguments, "past_key_values": noted})
    return noted.num_numbers


class _NotedCache:
    """Handed to a layer in the place of a key-value cache."""

    num_numbers = 0

    def update(self, keys: Tensor, values: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        self.num_numbers = sum(t.shape[1] * t.shape[3] for t in (keys, values))
        return keys, values


def load_peak(workload: Workload, plan: ExecutionPlan) -> Bytes:
    """Everything that stays but the training state, and what is being filled on top of it."""
    parts = {
        cause: num_bytes
        for cause, num_bytes in fixed_bytes(workload, plan).items()
        if cause not in (MASTERS, GRADIENT, WORKING, OPTIMIZER, DEQUANTIZE_BUFFER)
    }
    streams = any(place is not Placement.DEVICE for place in plan.weights)
    loading = 2 * ROWS_BLOCK_BYTES + (workload.layer_buffer_bytes if streams else 0)
    if workload.head_is_quantized and not workload.on_accelerator:
        loading += workload.head_bytes  # read as a whole, on the host
    return total(parts, {LOADING: loading})


def total(*parts: Mapping[str, int]) -> Bytes:
    """The sum of bytes by cause, causes without bytes left out."""
    result: Bytes = {}
    for part in parts:
        for cause, num_bytes in part.items():
            result[cause] = result.get(cause, 0) + num_bytes
    return {cause: num_bytes for cause, num_bytes in result.items() if num_bytes}


def set_up(workload: Workload, plan: ExecutionPlan) -> tuple[PlannedModel, PackedTokens, PlannedMeter]:
    """A model as a plan has it, one micro-batch, and a meter that is not switched on yet."""
    bare = replace(workload, documents=(1,), num_supervised=1, num_micro_batches=1, optimizer="adamw")
    model = planned_model(replace(bare, known_most_documents=0))
    meter = model.decoder.meter = model.meter(workload.most_documents)
    meter.cause = INPUTS
    model.place(plan)
    model.decoder.weights.hold_dequantized = plan.hold_dequantized
    model.decoder.tile_mlps(plan.mlp_tile_tokens, model.lora.dropout_context)
    return model, model.micro_batch(workload.documents, workload.num_supervised), meter


def _micro_batch_bytes(workload: Workload, tokens: PackedTokens) -> Bytes:
    """Of all micro-batches of a step; on a CPU they share memory with the host's arrays."""
    sizes: list[int] = []
    tokens.moved(lambda tensor: sizes.append(tensor.nbytes) or tensor)  # type: ignore[func-returns-value]
    return {MICRO_BATCH: workload.num_micro_batches * sum(sizes) if workload.on_accelerator else 0}
