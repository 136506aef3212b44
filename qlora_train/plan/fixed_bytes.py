"""Bytes on the device for as long as training runs, by cause; computed from tensor sizes.

quantized weights, constants   the layer buffers of resident layers (model/layer_buffer.py)
embedding, head             where they are resident; for a quantized head, one dequantized tile more
ring slots                  num_slots times the largest item that streams
LoRA parameters             masters and gradient in fp32, and the working copy, of trained tokens' rows too;
                            with DoRA its row norms
optimizer state             8 bytes per LoRA parameter, or 2 and two scales per 256
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from math import prod

from qlora_train.model.weight_store import chunk_sizes, experts_at_once, whole_sizes
from qlora_train.plan.workload import Workload
from qlora_train.units import ceil_div
from qlora_train.weights.execution_plan import ExecutionPlan, Placement

Bytes = dict[str, int]
"""Bytes by cause."""
QUANTIZED = "quantized weights"
CONSTANTS = "quantization constants"
EMBEDDING = "embedding"
HEAD = "head"
PLAIN = "norms and biases"
MASTERS = "LoRA: fp32 masters"
GRADIENT = "LoRA: gradient"
WORKING = "LoRA: working copy"
ROW_NORMS = "DoRA: row norms"
OPTIMIZER = "optimizer state"
OPTIMIZER_SCRATCH = "optimizer scratch"
DEQUANTIZE_BUFFER = "dequantize buffer"
SLOTS = "ring slots"
MICRO_BATCH = "token ids and labels"
KV_CACHE = "key-value cache"
LOADING = "rows being quantized"
DECOMPOSED = "a weight and its decomposition"
ROWS_BLOCK_BYTES = 64 * 2**20
MIN_8BIT_NUMBERS = 4096
"""bitsandbytes keeps 32-bit state for tensors smaller than this."""


def fixed_bytes(workload: Workload, plan: ExecutionPlan) -> Bytes:
    """Bytes that stay on the device while training runs, by cause; causes without bytes are left out."""
    shape, itemsize = workload.shape, workload.itemsize
    layer_buffers = [
        size
        for size, at in zip(workload.layer_buffer_sizes, plan.weights, strict=True)
        if at is Placement.DEVICE
    ]
    n = workload.num_lora_parameters
    parts = {
        QUANTIZED: sum(codes for codes, _ in layer_buffers),
        CONSTANTS: sum(constants for _, constants in layer_buffers),
        EMBEDDING: workload.matrix_bytes if plan.embedding is Placement.DEVICE else 0,
        HEAD: workload.head_bytes if plan.head is Placement.DEVICE and not shape.is_tied else 0,
        PLAIN: shape.plain_parameters * itemsize + 8 * (shape.head_dim // 2),
        DEQUANTIZE_BUFFER: dequantize_buffer_bytes(workload, plan) + head_buffer_bytes(workload, plan),
        SLOTS: plan.num_slots * slot_bytes(workload, plan),
        MASTERS: 4 * n,
        GRADIENT: 4 * n,
        WORKING: 0 if itemsize == 4 else itemsize * n,
        ROW_NORMS: 8 * workload.num_of_rows if workload.use_dora else 0,
        OPTIMIZER: optimizer_state_bytes(workload),
    }
    return total(parts)


def total(*parts: Mapping[str, int]) -> Bytes:
    """The sum of bytes by cause; causes without bytes are left out."""
    return dict(sum(map(Counter, parts), Counter()))  # adding counters leaves out zeros


def dequantize_buffer_bytes(workload: Workload, plan: ExecutionPlan) -> int:
    """Bytes of the buffer that weights are dequantized into, shared by all layers: the largest weight's, or
    the largest layer's with `hold_dequantized`. 0 in reference mode, which makes a tensor for each weight."""
    if workload.reference:
        return 0
    layouts = [layer.layout(workload.quantization, workload.dtype) for layer in set(workload.shape.layers)]
    sizes = [list(whole_sizes(layout)) for layout in layouts]
    whole = max(sum(layer) if plan.hold_dequantized else max(layer, default=0) for layer in sizes)
    chunks = chunk_sizes(layouts, experts_at_once(workload.target.dequantize_kernel))
    return workload.itemsize * (whole + sum(chunks.values()))


def head_tile_shape(workload: Workload, plan: ExecutionPlan) -> tuple[int, int]:
    """(rows, hidden size) of one tile of the head."""
    return min(plan.head_tile_rows, workload.shape.vocabulary), workload.shape.hidden


def head_buffer_bytes(workload: Workload, plan: ExecutionPlan) -> int:
    """Bytes of the buffer that tiles of a quantized head are dequantized into."""
    if not workload.head_is_quantized:
        return 0
    return workload.itemsize * prod(head_tile_shape(workload, plan))


def slot_bytes(workload: Workload, plan: ExecutionPlan) -> int:
    """Bytes of one ring slot: those of the largest streamed item, a layer buffer or a tile of the head."""
    items = [0]
    if any(place is not Placement.DEVICE for place in plan.weights):
        items.append(workload.layer_buffer_bytes)
    if plan.head is not Placement.DEVICE:
        items.append(head_tile_shape(workload, plan)[0] * workload.head_format.row_bytes)
    return max(items)


def _learning_rate_groups(workload: Workload) -> tuple[int, ...]:
    """LoRA parameters in each tensor that the optimizer updates: all, or A and rows of tokens apart from B
    (LoRA+)."""
    return workload.lora_sizes if workload.splits_learning_rate else (workload.num_lora_parameters,)


def optimizer_state_bytes(workload: Workload) -> int:
    """Bytes of both Adam moments: 8 per LoRA parameter in 32 bits; in 8 bits 2, and 8 per block of 256."""
    if workload.optimizer not in ("adamw_8bit", "paged_adamw_8bit"):
        return 8 * workload.num_lora_parameters
    return sum(
        8 * n if n < MIN_8BIT_NUMBERS else 2 * n + 8 * ceil_div(n, 256)
        for n in _learning_rate_groups(workload)
    )


def managed_bytes(workload: Workload) -> int:
    """Optimizer state that paged optimizers keep in CUDA managed memory, outside torch's allocator."""
    pages = workload.on_accelerator and workload.target.has_concurrent_managed_access
    return optimizer_state_bytes(workload) if pages and workload.optimizer.startswith("paged_") else 0


def optimizer_scratch_bytes(workload: Workload) -> int:
    """Temporary bytes of an update: torch's AdamW makes a square root and a denominator, fp32 each, of its
    largest tensor; bitsandbytes' optimizers update in place."""
    return 8 * max(_learning_rate_groups(workload)) if workload.optimizer == "adamw" else 0
