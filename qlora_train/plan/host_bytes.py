"""Bytes off the device by cause: RAM (pinned where a GPU copies from it) and disk, under an execution plan.

All of it is counted per machine. The ranks of a machine each have their own process, activations and pieces
of files; the base that waits in RAM they have once, where they can map the same pages (weights/ranks.py). On
a CPU the compute device is RAM too; what planned_walk.py counts comes on top of what is here, for every rank.
"""

from __future__ import annotations

from qlora_train.plan.fixed_bytes import Bytes, optimizer_state_bytes
from qlora_train.plan.host_budget import ONE_RANK, Machine
from qlora_train.plan.step_sum import layer_bytes
from qlora_train.plan.workload import Workload
from qlora_train.weights.execution_plan import ActivationPolicy, ExecutionPlan, Placement

PROCESS = "Python and libraries"
SLABS = "pinned: quantized layers"
MATRICES = "pinned: embedding and head"
INPUTS = "pinned: layer inputs"
OFFLOADED = "pinned: offloaded activations"
STAGING = "pinned: pieces of files on their way"
ROWS = "rows of the checkpoint"
QUANTIZED_BASE = "quantized base (cache)"
CHECKPOINTS = "checkpoints"
ADAPTER = "adapter"
MERGED = "merged model"
CPU_PROCESS_BYTES, GPU_PROCESS_BYTES = 560 * 10**6, 1500 * 10**6
HEAP_SHARE, MOST_HEAP_BYTES = 0.3, 512 * 2**20
"""On a CPU: of the tensors at the peak, what the C heap holds in free pages between them, and what it holds
of large models, whose tensors are given back to the system. Measured on runs with 0.14 to 0.8 GB of tensors:
within 5 %, 7 % where others keep the machine busy (imports alone take 0.55 GB)."""
STAGING_BYTES = 2 * 16 * 2**20
ROWS_BYTES = 3 * 64 * 2**20


def host_bytes(workload: Workload, plan: ExecutionPlan, machine: Machine = ONE_RANK) -> Bytes:
    """RAM of a machine while training, without what a CPU holds as the compute device."""
    matrices = workload.matrix_bytes if plan.embedding is Placement.RAM else 0
    if plan.head is Placement.RAM and not workload.shape.is_tied:
        matrices += workload.head_bytes
    group = -(-workload.num_micro_batches // plan.num_groups)
    x_bytes = workload.x_bytes
    num_recomputed = plan.activations.count(ActivationPolicy.RECOMPUTE)
    from_disk = Placement.DISK in (*plan.weights, plan.head)
    of_every_rank = {
        PROCESS: _process_bytes(workload),
        INPUTS: group * num_recomputed * x_bytes if plan.inputs is Placement.RAM else 0,
        OFFLOADED: group * offloaded_bytes(workload, plan),
        STAGING: STAGING_BYTES if from_disk and workload.on_accelerator else 0,
    }
    layer_buffers = zip(workload.layer_buffer_sizes, plan.weights, strict=True)
    of_every_copy = {
        SLABS: sum(sum(size) for size, at in layer_buffers if at is Placement.RAM),
        MATRICES: matrices,
    }
    result = {cause: machine.num_ranks * num_bytes for cause, num_bytes in of_every_rank.items()}
    result |= {cause: machine.num_copies * num_bytes for cause, num_bytes in of_every_copy.items()}
    return {cause: num_bytes for cause, num_bytes in result.items() if num_bytes}


def ram_of_devices(peak_bytes: int, machine: Machine) -> int:
    """RAM that the ranks of a machine take where they compute on its CPU. peak_bytes: of tensors, on each."""
    return machine.num_ranks * (peak_bytes + min(int(HEAP_SHARE * peak_bytes), MOST_HEAP_BYTES))


def _process_bytes(workload: Workload) -> int:
    return GPU_PROCESS_BYTES if workload.on_accelerator else CPU_PROCESS_BYTES


def offloaded_bytes(workload: Workload, plan: ExecutionPlan) -> int:
    """What offloaded layers offload of one micro-batch."""
    if ActivationPolicy.OFFLOAD not in plan.activations:
        return 0
    layers = layer_bytes(workload, plan.hold_dequantized, plan.mlp_tile_tokens)
    policies = zip(layers, plan.activations, strict=True)
    return sum(layer.kept.saved for layer, policy in policies if policy is ActivationPolicy.OFFLOAD)


def load_host_bytes(workload: Workload, plan: ExecutionPlan, machine: Machine = ONE_RANK) -> Bytes:
    """RAM while the base is read and quantized, by one rank: what is to stay there, and blocks of rows, or a
    quantized head."""
    training = host_bytes(workload, plan, machine)
    stays = {c: n for c, n in training.items() if c in (PROCESS, SLABS, MATRICES)}
    return stays | {ROWS: ROWS_BYTES + (workload.head_bytes if workload.head_is_quantized else 0)}


def save_host_bytes(workload: Workload, machine: Machine = ONE_RANK) -> Bytes:
    """RAM while one rank writes a checkpoint: the masters and the optimizer state on their way."""
    state = 4 * workload.num_lora_parameters + optimizer_state_bytes(workload)
    return {PROCESS: machine.num_ranks * _process_bytes(workload), CHECKPOINTS: state}


def merge_host_bytes(workload: Workload) -> Bytes:
    """RAM while merging: a few rows at a time, the quantized weights of one layer."""
    largest = max(map(sum, workload.layer_buffer_sizes))
    if workload.head_is_quantized:
        largest = max(largest, workload.head_bytes)
    return {PROCESS: _process_bytes(workload), ROWS: ROWS_BYTES + largest}


def disk_bytes(workload: Workload, *, has_quantized_base: bool, keep_checkpoints: int = 2) -> Bytes:
    """What a run writes: the quantized base unless it is there, checkpoints (one more while it replaces
    another; the best by evaluation may be kept besides), the adapter."""
    shape = workload.shape
    matrices = workload.matrix_bytes + (0 if shape.is_tied else workload.head_bytes)
    quantized = sum(map(sum, workload.layer_buffer_sizes)) + matrices
    state = 4 * workload.num_lora_parameters + optimizer_state_bytes(workload)
    base = (
        {} if has_quantized_base else {QUANTIZED_BASE: quantized + shape.plain_parameters * workload.itemsize}
    )
    return base | {
        CHECKPOINTS: (keep_checkpoints + 2) * state,
        ADAPTER: 4 * workload.num_lora_parameters,
    }


def merged_disk_bytes(workload: Workload) -> Bytes:
    """What `export --to merged` writes in 16 bits."""
    return {MERGED: 2 * workload.shape.num_parameters}
