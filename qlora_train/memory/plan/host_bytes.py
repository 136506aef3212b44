"""Bytes off the device by cause: RAM (pinned where a GPU copies from it) and disk, under an execution plan.

All of it is counted per machine. The ranks of a machine each have their own process, activations and pieces
of files; the base that waits in RAM they have once, where they can map the same pages (memory/ranks.py). On a
CPU the compute device is RAM too; what byte_walk.py counts comes on top of what is here, for every rank.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

import psutil

from qlora_train.errors import UserError
from qlora_train.memory.cache_key import is_complete
from qlora_train.memory.execution import Activation, ExecutionPlan, Place
from qlora_train.memory.plan.byte_model import layer_bytes, optimizer_state_bytes
from qlora_train.memory.plan.ghost import Bytes
from qlora_train.memory.plan.workload import Workload

PROCESS = "Python and libraries"
SLABS = "pinned: packed layers"
MATRICES = "pinned: embedding and head"
INPUTS = "pinned: remembered inputs"
PARKED = "pinned: offloaded activations"
STAGING = "pinned: pieces of files on their way"
ROWS = "rows of the checkpoint"
PACKED_BASE = "packed base (cache)"
CHECKPOINTS = "checkpoints"
ADAPTER = "adapter"
MERGED = "merged model"
CPU_PROCESS_BYTES, GPU_PROCESS_BYTES = 500 * 10**6, 1500 * 10**6
STAGING_BYTES = 2 * 16 * 2**20
ROWS_BYTES = 3 * 64 * 2**20
_SHARE_OF_RAM = 0.9


@dataclass(frozen=True)
class Machine:
    """How a run sits on one machine. num_ranks: its processes there. num_copies: of what waits in RAM for all
    of them: 1, or one for each rank."""

    num_ranks: int = 1
    num_copies: int = 1


ONE_RANK = Machine()


@dataclass(frozen=True)
class HostBudget:
    """Bytes of RAM and disk that a run may use on a machine, by all its ranks there. has_packed_base: an
    earlier start has put it on the disk, so no room is needed for it."""

    ram_bytes: int
    disk_bytes: int
    has_packed_base: bool = False
    machine: Machine = ONE_RANK

    @staticmethod
    def of_this_machine(
        cache: Path, packed_base: Path | None = None, machine: Machine = ONE_RANK
    ) -> HostBudget:
        """What is free now. cache: the folder of packed bases (it need not exist yet). packed_base: where in
        it the run's own is, or will be; None: not known."""
        folder = next((f for f in (cache, *cache.absolute().parents) if f.exists()), None)
        if folder is None:
            raise UserError(f"{cache}: there is no such drive for the cache; set QLORA_TRAIN_CACHE")
        return HostBudget(
            int(psutil.virtual_memory().available * _SHARE_OF_RAM),
            shutil.disk_usage(folder).free,
            packed_base is not None and is_complete(packed_base),
            machine,
        )


def host_bytes(workload: Workload, plan: ExecutionPlan, machine: Machine = ONE_RANK) -> Bytes:
    """RAM of a machine while training, without what a CPU holds as the compute device."""
    matrices = workload.matrix_bytes if plan.embedding is Place.RAM else 0
    if plan.head is Place.RAM and not workload.shape.is_tied:
        matrices += workload.head_bytes
    group = -(-workload.num_micro_batches // plan.num_groups)
    x_bytes = workload.num_tokens * workload.shape.hidden * workload.itemsize
    num_recomputed = plan.activations.count(Activation.RECOMPUTE)
    from_disk = Place.DISK in (*plan.weights, plan.head)
    of_every_rank = {
        PROCESS: _process_bytes(workload),
        INPUTS: group * num_recomputed * x_bytes if plan.inputs is Place.RAM else 0,
        PARKED: group * parked_bytes(workload, plan),
        STAGING: STAGING_BYTES if from_disk and workload.on_accelerator else 0,
    }
    of_every_copy = {
        SLABS: sum(place is Place.RAM for place in plan.weights) * workload.slab_bytes,
        MATRICES: matrices,
    }
    result = {cause: machine.num_ranks * num_bytes for cause, num_bytes in of_every_rank.items()}
    result |= {cause: machine.num_copies * num_bytes for cause, num_bytes in of_every_copy.items()}
    return {cause: num_bytes for cause, num_bytes in result.items() if num_bytes}


def _process_bytes(workload: Workload) -> int:
    return GPU_PROCESS_BYTES if workload.on_accelerator else CPU_PROCESS_BYTES


def parked_bytes(workload: Workload, plan: ExecutionPlan) -> int:
    """What offloaded layers park of one micro-batch."""
    if Activation.OFFLOAD not in plan.activations:
        return 0
    settings = workload.layer_settings(hold_unpacked=plan.hold_unpacked, mlp_tile_tokens=plan.mlp_tile_tokens)
    counts: dict[tuple[int | None, bool], int] = {}
    for i, policy in enumerate(plan.activations):
        if policy is Activation.OFFLOAD:
            key = (workload.shape.windows[i], i > 0)
            counts[key] = counts.get(key, 0) + 1
    return sum(n * sum(layer_bytes(settings, *key).saved.values()) for key, n in counts.items())


def load_host_bytes(workload: Workload, plan: ExecutionPlan, machine: Machine = ONE_RANK) -> Bytes:
    """RAM while the base is read and packed, by one rank: what is to stay there, and blocks of rows, or a
    packed head."""
    training = host_bytes(workload, plan, machine)
    stays = {c: n for c, n in training.items() if c in (PROCESS, SLABS, MATRICES)}
    return stays | {ROWS: ROWS_BYTES + (workload.head_bytes if workload.head_is_packed else 0)}


def save_host_bytes(workload: Workload, machine: Machine = ONE_RANK) -> Bytes:
    """RAM while one rank writes a checkpoint: the masters and the optimizer state on their way."""
    state = 4 * workload.num_factor_numbers + optimizer_state_bytes(workload)
    return {PROCESS: machine.num_ranks * _process_bytes(workload), CHECKPOINTS: state}


def merge_host_bytes(workload: Workload) -> Bytes:
    """RAM while merging: a few rows at a time, one packed weight."""
    largest = max(workload.packing.of(shape).num_bytes for shape in workload.shape.linear_shapes().values())
    if workload.head_is_packed:
        largest = max(largest, workload.head_bytes)
    return {PROCESS: _process_bytes(workload), ROWS: ROWS_BYTES + largest}


def disk_bytes(workload: Workload, *, has_packed_base: bool, keep_checkpoints: int = 2) -> Bytes:
    """What a run writes: the packed base unless it is there, checkpoints (one more while it replaces another;
    the best by evaluation may be kept besides), the adapter."""
    shape = workload.shape
    matrices = workload.matrix_bytes + (0 if shape.is_tied else workload.head_bytes)
    packed = shape.num_layers * workload.slab_bytes + matrices
    state = 4 * workload.num_factor_numbers + optimizer_state_bytes(workload)
    base = {} if has_packed_base else {PACKED_BASE: packed + shape.plain_parameters * workload.itemsize}
    return base | {
        CHECKPOINTS: (keep_checkpoints + 2) * state,
        ADAPTER: 4 * workload.num_factor_numbers,
    }


def merged_disk_bytes(workload: Workload) -> Bytes:
    """What `export --to merged` writes in 16 bits."""
    return {MERGED: 2 * workload.shape.num_parameters}
