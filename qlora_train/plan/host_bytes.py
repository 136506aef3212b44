"""Bytes of RAM (pinned where a GPU copies from it) and disk by cause, under an execution plan.

Everything is counted per machine. Each rank has its own process, activations and staging buffers; weights in
RAM exist once where the ranks can map the same pages (weights/ranks.py). On a CPU the compute device is RAM
too: each rank's bytes from planned_walk.py come on top.
"""

from __future__ import annotations

from qlora_train.plan.fixed_bytes import Bytes, optimizer_state_bytes, total
from qlora_train.plan.host_budget import ONE_RANK, Machine
from qlora_train.plan.step_sum import layer_bytes
from qlora_train.plan.workload import Workload
from qlora_train.weights.execution_plan import ActivationPolicy, ExecutionPlan, Placement

PROCESS = "Python and libraries"
LAYER_BUFFERS = "pinned: quantized layers"
MATRICES = "pinned: embedding and head"
INPUTS = "pinned: layer inputs"
OFFLOADED = "pinned: offloaded activations"
STAGING = "pinned: pieces of files on their way"
ROWS = "rows of the checkpoint"
QUANTIZED_BASE = "quantized base (cache)"
CHECKPOINTS = "checkpoints"
ADAPTER = "adapter"
FACTORS = "principal parts"
MERGED = "merged model"
CPU_PROCESS_BYTES, GPU_PROCESS_BYTES = 600 * 10**6, 1500 * 10**6
HEAP_SHARE, MOST_HEAP_BYTES = 0.3, 512 * 2**20
"""On a CPU, free pages that the C heap keeps between tensors: a share of the tensors' bytes at the peak, to a
maximum, as large tensors are returned to the system. Measured on runs with 0.14 to 0.8 GB of tensors: right
within 5 %, 7 % on a busy machine (imports alone take 0.53 GB)."""
STAGING_BYTES = 2 * 16 * 2**20
ROWS_BYTES = 3 * 64 * 2**20


def host_bytes(workload: Workload, plan: ExecutionPlan, machine: Machine = ONE_RANK) -> Bytes:
    """RAM of a machine while training, by cause, without the tensors of a CPU as the compute device."""
    matrices = workload.matrix_bytes if plan.embedding is Placement.RAM else 0
    if plan.head is Placement.RAM and not workload.shape.is_tied:
        matrices += workload.head_bytes
    group = plan.group_size(workload.num_micro_batches)
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
        LAYER_BUFFERS: sum(sum(size) for size, at in layer_buffers if at is Placement.RAM),
        MATRICES: matrices,
    }
    return total(*[of_every_rank] * machine.num_ranks, *[of_every_copy] * machine.num_copies)


def ram_of_devices(peak_bytes: int, machine: Machine) -> int:
    """RAM of all ranks that compute on a machine's CPU. peak_bytes: tensors of one rank at its peak."""
    return machine.num_ranks * (peak_bytes + min(int(HEAP_SHARE * peak_bytes), MOST_HEAP_BYTES))


def _process_bytes(workload: Workload) -> int:
    return GPU_PROCESS_BYTES if workload.on_accelerator else CPU_PROCESS_BYTES


def offloaded_bytes(workload: Workload, plan: ExecutionPlan) -> int:
    """Activations of one micro-batch that are copied to RAM by layers with the policy `offload`."""
    if ActivationPolicy.OFFLOAD not in plan.activations:
        return 0
    layers = layer_bytes(workload, plan.hold_dequantized, plan.mlp_tile_tokens)
    policies = zip(layers, plan.activations, strict=True)
    return sum(layer.with_graph.saved for layer, policy in policies if policy is ActivationPolicy.OFFLOAD)


def load_host_bytes(workload: Workload, plan: ExecutionPlan, machine: Machine = ONE_RANK) -> Bytes:
    """RAM while one rank reads and quantizes the base: the weights that stay in RAM, the blocks of rows being
    read, and a quantized head."""
    training = host_bytes(workload, plan, machine)
    stays = {c: n for c, n in training.items() if c in (PROCESS, LAYER_BUFFERS, MATRICES)}
    rows = ROWS_BYTES + (workload.head_bytes if workload.head_is_quantized else 0)
    return total(stays, {ROWS: rows, FACTORS: workload.factor_bytes})


def save_host_bytes(workload: Workload, machine: Machine = ONE_RANK) -> Bytes:
    """RAM while one rank writes a checkpoint: a copy of the fp32 masters and the optimizer state, then the
    adapter."""
    state = 4 * workload.num_lora_parameters + optimizer_state_bytes(workload)
    written = max(state, workload.adapter_bytes)
    return {PROCESS: machine.num_ranks * _process_bytes(workload), CHECKPOINTS: written}


def merge_host_bytes(workload: Workload) -> Bytes:
    """RAM while merging: a few blocks of rows and the quantized weights of one layer, or the head."""
    largest = max(map(sum, workload.layer_buffer_sizes))
    if workload.head_is_quantized:
        largest = max(largest, workload.head_bytes)
    return {PROCESS: _process_bytes(workload), ROWS: ROWS_BYTES + largest}


def disk_bytes(workload: Workload, *, has_quantized_base: bool, keep_checkpoints: int = 2) -> Bytes:
    """Bytes that a run writes to disk: the quantized base unless it is there, checkpoints (one more while it
    replaces another, and the best by evaluation), the adapter."""
    shape = workload.shape
    matrices = workload.matrix_bytes + (0 if shape.is_tied else workload.head_bytes)
    quantized = sum(map(sum, workload.layer_buffer_sizes)) + matrices + workload.factor_bytes
    state = 4 * workload.num_lora_parameters + optimizer_state_bytes(workload)
    base = (
        {} if has_quantized_base else {QUANTIZED_BASE: quantized + shape.plain_parameters * workload.itemsize}
    )
    return base | {
        CHECKPOINTS: (keep_checkpoints + 2) * state,
        ADAPTER: workload.adapter_bytes,
    }


def merged_disk_bytes(workload: Workload) -> Bytes:
    """Bytes that `export --to merged` writes in 16 bits."""
    return {MERGED: 2 * workload.shape.num_parameters}
