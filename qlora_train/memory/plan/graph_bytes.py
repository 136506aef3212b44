"""Bytes on the device of a step whose forward and backward are CUDA graphs (train/walk_graphs.py).

What the layers take is the graphs' own and stays theirs, so nothing else finds room in it: the peak of the
step, and on top of it what is outside of the graphs at the most.

    copies       an edge [1, T, D] and the rotary tables of every micro-batch of a group
    and one of   embedding of a micro-batch; the loss of a group with its gradients; the optimizer's scratch
"""

from __future__ import annotations

from qlora_train.memory.execution import ExecutionPlan
from qlora_train.memory.plan.byte_model import optimizer_scratch_bytes
from qlora_train.memory.plan.byte_walk import loss_settings, step_peak
from qlora_train.memory.plan.ghost import Ledger
from qlora_train.memory.plan.ghost_loss import embedded, tiled_loss
from qlora_train.memory.plan.workload import Workload

OVERHEAD_BYTES = 128 * 2**20
"""cuBLAS' workspaces for the stream of the captures, and the graphs themselves."""


def step_with_graphs_bytes(workload: Workload, plan: ExecutionPlan) -> int:
    """At the peak of a step, context not included."""
    return sum(step_peak(workload, plan).values()) + _outside(workload, plan) + OVERHEAD_BYTES


def _outside(workload: Workload, plan: ExecutionPlan) -> int:
    shape, itemsize, num_tokens = workload.shape, workload.itemsize, workload.num_tokens
    group = -(-workload.num_micro_batches // plan.num_groups)
    outside = Ledger()
    edges = [outside.tensor((1, num_tokens, shape.hidden), itemsize) for _ in range(group)]
    copies = [
        embedded(outside, num_tokens, shape.hidden, shape.head_dim, itemsize, rows_from_file=False)[1]
        for _ in range(group + 1)  # the batch's own beside its copy
    ]
    copies.pop()
    tiled_loss(outside, list(edges), loss_settings(workload, plan), gradients=True)
    outside.scratch(optimizer_scratch_bytes(workload))
    return outside.peak_bytes
