"""Peak bytes on the device in every phase of a run, from running the program on meta tensors.

    step         walk/layer_walk.py with a meta model (planned_model.py), then the optimizer
    evaluation   walk/evaluate.py, forward only
    generate     the prompts of one batch through one layer of each kind, the key-value cache and the logits
    load         the weights on the device, one layer buffer and blocks of rows

Bytes that stay while training runs are added (fixed_bytes.py). A run's peak is that of its largest phase.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PretrainedConfig

from qlora_train.model.packed_tokens import PackedTokens
from qlora_train.plan.fixed_bytes import (
    DECOMPOSED,
    DEQUANTIZE_BUFFER,
    GRADIENT,
    KV_CACHE,
    LOADING,
    MASTERS,
    MICRO_BATCH,
    OPTIMIZER,
    OPTIMIZER_SCRATCH,
    ROW_NORMS,
    ROWS_BLOCK_BYTES,
    WORKING,
    Bytes,
    fixed_bytes,
    optimizer_scratch_bytes,
    total,
)
from qlora_train.plan.planned_meter import PlannedMeter
from qlora_train.plan.planned_model import PlannedHost, PlannedLoss, PlannedModel, planned_model
from qlora_train.plan.workload import Workload
from qlora_train.recipe import MOST_SAMPLE_TOKENS
from qlora_train.units import ceil_div
from qlora_train.walk.evaluate import loss_sum
from qlora_train.walk.layer_walk import LayerWalk
from qlora_train.weights.execution_plan import ExecutionPlan, Placement
from qlora_train.weights.principal_part import principal_part_bytes

INPUTS = "layer inputs"
"""The cause of layer inputs (in use, kept for backward or copied from host memory) and their gradients."""
MOST_TOGETHER = 32
"""The largest group of micro-batches. Larger ones save no more time: long before, copies are hidden behind
arithmetic and dequantizing is negligible."""


@dataclass(frozen=True)
class GenerateSize:
    """Size of a batch to generate. prompts: token counts. new_tokens: of each prompt at most.
    evaluated_tokens: of a row whose loss is computed besides; 0: none is. evaluated_rows: of those at
    most."""

    prompts: tuple[int, ...] = (512,)
    new_tokens: int = MOST_SAMPLE_TOKENS
    evaluated_tokens: int = 0
    evaluated_rows: int = MOST_TOGETHER

    @property
    def capacity(self) -> int:
        """Tokens per prompt that the key-value cache has room for."""
        return max(self.prompts) + self.new_tokens


def generate_size_in_training(sequence_length: int) -> GenerateSize:
    """The size that every plan of a run has room for beside its training: one prompt."""
    return GenerateSize(prompts=(min(512, sequence_length),), new_tokens=MOST_SAMPLE_TOKENS)


@dataclass(frozen=True)
class StepBytes:
    """Bytes of one optimizer step: the peak on the device by cause, and buffers in host memory."""

    device: Bytes
    host_bytes: int


def step_bytes(workload: Workload, plan: ExecutionPlan) -> StepBytes:
    """Bytes of an optimizer step from the second on, when optimizer state exists."""
    model, tokens, meter = set_up(workload, plan)
    group = plan.group_size(workload.num_micro_batches)
    number = min(workload.num_micro_batches, 2 * group)  # a third group is like the second
    host = PlannedHost(model.device, meter)
    plan_of_two = replace(plan, num_groups=ceil_div(number, group))
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


def evaluation_peak(workload: Workload, plan: ExecutionPlan, *, in_training: bool = True) -> Bytes:
    """Peak bytes on the device by cause in an evaluation. in_training: beside optimizer state."""
    model, tokens, meter = set_up(workload, plan)
    group = plan.group_size(workload.num_micro_batches)
    with meter:
        loss_sum(
            model.decoder,
            [tokens] * group,
            group_size=group,
            loss_tokens=plan.loss_tokens,
            make_loss=PlannedLoss,
        )
    staying = _staying_bytes(workload, plan, in_training=in_training)
    return total(staying, _micro_batch_bytes(workload, tokens), meter.peak)


def generate_peak(
    workload: Workload, plan: ExecutionPlan, size: GenerateSize, *, in_training: bool = True
) -> Bytes:
    """Peak bytes on the device by cause while generating: all prompts in one row, then token by token.
    in_training: beside optimizer state."""
    model, tokens, meter = set_up(replace(workload, documents=size.prompts, num_supervised=1), plan)
    decoder = model.decoder
    caches: dict[int, _NotedCache] = {}
    with meter, torch.no_grad():
        x, arguments = decoder.embed_packed(tokens)
        for index, kind in enumerate(decoder.kinds):
            if kind not in caches:
                decoder.run_layer(index, x, arguments[index])
                caches[kind] = _NotedCache(decoder.config, len(size.prompts))
                with meter.paused():
                    decoder.layers[index](x, **{**arguments[index], "past_key_values": caches[kind]})
    of_layers = [caches[kind] for kind in decoder.kinds]
    cached_numbers = len(size.prompts) * size.capacity * sum(noted.num_numbers for noted in of_layers)
    cached_bytes = cached_numbers * workload.itemsize + sum(noted.state_bytes for noted in of_layers)
    logits = len(size.prompts) * workload.shape.vocabulary
    itemsize = workload.itemsize
    # Logits of the token before in fp32, and of this one: tiles and all of them, or all of them and in fp32.
    last = {"logits": logits * (4 + max(2 * itemsize, itemsize + 4))}
    staying = _staying_bytes(workload, plan, in_training=in_training)
    largest = max(meter.peak, last, key=lambda parts: sum(parts.values()))
    return total(staying, {KV_CACHE: cached_bytes}, largest)


def _staying_bytes(workload: Workload, plan: ExecutionPlan, *, in_training: bool) -> Bytes:
    """Bytes that stay on the device; optimizer state only in training."""
    parts = fixed_bytes(workload, plan)
    return {cause: n for cause, n in parts.items() if in_training or cause != OPTIMIZER}


class _NotedCache:
    """Stands in for a layer's cache. num_numbers: in the keys and values of one token. states: what a layer
    with a memory keeps of each prompt."""

    num_numbers = 0

    def __init__(self, config: PretrainedConfig, num_prompts: int) -> None:
        self.states = [DynamicCache(config=config) for _ in range(num_prompts)]

    @property
    def state_bytes(self) -> int:
        kept = (getattr(layer, "conv_states", {}) for cache in self.states for layer in cache.layers)
        more = (getattr(layer, "recurrent_states", {}) for cache in self.states for layer in cache.layers)
        return sum(
            state.nbytes for states in (*kept, *more) for state in states.values() if state is not None
        )

    def update(self, keys: Tensor, values: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        self.num_numbers = sum(t.shape[1] * t.shape[3] for t in (keys, values))
        return keys, values


def load_peak(workload: Workload, plan: ExecutionPlan) -> Bytes:
    """Peak bytes on the device by cause while loading: the weights, and buffers of what is being read; or,
    before any weight is placed, one weight that PiSSA decomposes."""
    parts = {
        cause: num_bytes
        for cause, num_bytes in fixed_bytes(workload, plan).items()
        if cause not in (MASTERS, GRADIENT, WORKING, ROW_NORMS, OPTIMIZER, DEQUANTIZE_BUFFER)
    }
    streams = any(place is not Placement.DEVICE for place in plan.weights)
    loading = 2 * ROWS_BLOCK_BYTES + (workload.layer_buffer_bytes if streams else 0)
    if workload.head_is_quantized and not workload.on_accelerator:
        loading += workload.head_bytes  # read as a whole, on the host
    placing = total(parts, {LOADING: loading})
    decomposed = max(workload.of_decompositions(principal_part_bytes), default=0)
    if not decomposed:
        return placing
    making = {LOADING: 2 * ROWS_BLOCK_BYTES + workload.layer_buffer_bytes, DECOMPOSED: decomposed}
    return max(placing, making, key=lambda causes: sum(causes.values()))


def set_up(workload: Workload, plan: ExecutionPlan) -> tuple[PlannedModel, PackedTokens, PlannedMeter]:
    """(model placed as in the plan, one micro-batch, a meter that is not started)."""
    bare = replace(workload, documents=(1,), num_supervised=1, num_micro_batches=1, optimizer="adamw")
    model = planned_model(replace(bare, known_most_documents=0))
    meter = model.decoder.meter = model.meter(workload.most_documents)
    meter.cause = INPUTS
    model.place(plan)
    model.decoder.weights.hold_dequantized = plan.hold_dequantized
    model.decoder.tile_mlps(plan.mlp_tile_tokens, model.lora.dropout_context)
    return model, model.micro_batch(workload.documents, workload.num_supervised), meter


def _micro_batch_bytes(workload: Workload, tokens: PackedTokens) -> Bytes:
    """Bytes of all micro-batches of a step; none on a CPU, where tensors share the host arrays' memory."""
    if not workload.on_accelerator:
        return {MICRO_BATCH: 0}
    return {MICRO_BATCH: workload.num_micro_batches * sum(tensor.nbytes for tensor in tokens.tensors())}
