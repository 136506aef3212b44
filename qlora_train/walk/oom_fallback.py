"""The next tighter plan when a step runs out of memory.

Another process took memory, or a step was an outlier. Changes that keep every bit of the result come first:

1. recompute half of the layers that are kept or offloaded, the first ones;
2. store layer inputs in RAM;
3. half the supervised tokens per loss block;
4. twice as many groups, so that activations of fewer micro-batches are stored at a time;
5. MLP tiles, then half as many tokens in each.

3 to 5 change the order of sums, so a change is logged and recorded with the step from which it holds.
"""

from __future__ import annotations

from dataclasses import replace

from qlora_train.units import ceil_div
from qlora_train.weights.execution_plan import ActivationPolicy, ExecutionPlan, Placement

_MESSAGES = (
    "DefaultCPUAllocator",
    "CUDA error: out of memory",  # the runtime's, for pinned or managed memory: torch.AcceleratorError
    "CUDA driver error: out of memory",  # of torch's allocator, when it maps an expandable segment
    "CUBLAS_STATUS_ALLOC_FAILED",
    "[CUDA]: out of memory",  # Triton's, when it loads a kernel
)
LEAST_LOSS_TOKENS, FIRST_MLP_TILE, LEAST_MLP_TILE = 64, 2048, 256


def fallback_plan(
    execution: ExecutionPlan, num_micro_batches: int, num_tokens: int
) -> tuple[ExecutionPlan, str] | None:
    """The next plan to try and a description of the change; None if there is no tighter one.

    num_micro_batches: K of a step. num_tokens: T of a micro-batch.
    """
    not_recomputed = [i for i, a in enumerate(execution.activations) if a is not ActivationPolicy.RECOMPUTE]
    if not_recomputed:
        now = set(not_recomputed[: ceil_div(len(not_recomputed), 2)])
        activations = tuple(
            ActivationPolicy.RECOMPUTE if i in now else a for i, a in enumerate(execution.activations)
        )
        return replace(execution, activations=activations), f"{len(now)} more layers are recomputed"
    if execution.inputs is Placement.DEVICE:
        return replace(execution, inputs=Placement.RAM), "layer inputs wait in RAM"
    if execution.loss_tokens > LEAST_LOSS_TOKENS:
        halved = max(LEAST_LOSS_TOKENS, execution.loss_tokens // 2)
        return replace(execution, loss_tokens=halved), f"the loss takes {halved} tokens at a time"
    if execution.num_groups < num_micro_batches:
        doubled = min(num_micro_batches, 2 * execution.num_groups)
        return replace(execution, num_groups=doubled), f"micro-batches pass in {doubled} groups"
    tile = FIRST_MLP_TILE if execution.mlp_tile_tokens is None else execution.mlp_tile_tokens // 2
    while tile >= num_tokens:
        tile //= 2
    if tile >= LEAST_MLP_TILE:
        return replace(execution, mlp_tile_tokens=tile), f"the MLP takes {tile} tokens at a time"
    return None


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception means out of memory: Python's, torch's allocators' or a CUDA library's. The last
    have no type of their own and are told by their message."""
    kinds = {kind.__name__ for kind in type(error).__mro__}
    return bool(kinds & {"MemoryError", "OutOfMemoryError"}) or any(m in str(error) for m in _MESSAGES)
