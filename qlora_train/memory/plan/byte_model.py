"""Bytes on the device by cause, for a workload under an execution plan: what stays, and what a layer needs.

    fixed        weights that stay, ring slots, factors, gradient, optimizer state: as long as training runs
    a layer      what it adds while a micro-batch passes, by replaying it with ghost tensors (ghost_layer.py)

once per kind of layer and policy. byte_walk.py adds them up in the order of the walk.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

from qlora_train.memory.execution import ExecutionPlan, Place
from qlora_train.memory.plan.ghost import Bytes, Ledger, backward
from qlora_train.memory.plan.ghost_layer import GhostLayer
from qlora_train.memory.plan.layer_settings import LayerSettings
from qlora_train.memory.plan.workload import Workload

PACKED = "packed weights"
CONSTANTS = "quantisation constants"
EMBEDDING = "embedding"
HEAD = "head"
PLAIN = "norms and biases"
MASTERS = "factors: masters"
GRADIENT = "factors: gradient"
WORKING = "factors: working copy"
OPTIMIZER = "optimizer state"
OPTIMIZER_SCRATCH = "optimizer scratch"
UNPACK_BUFFER = "unpack buffer"
SLOTS = "ring slots"
REMEMBERED = "remembered inputs"
KEPT = "kept activations"
LEAVING = "activations on their way to host memory"
RETURNING = "offloaded activations on their way back"
MICRO_BATCH = "token ids and labels"
KV_CACHE = "key-value cache"
LOADING = "rows being packed"
ROWS_BLOCK_BYTES = 64 * 2**20
MIN_8BIT_NUMBERS = 4096
"""bitsandbytes keeps 32-bit state for tensors smaller than this."""


@dataclass(frozen=True)
class LayerBytes:
    """What one layer adds while one micro-batch passes, above its input (and, going back, the gradient).

    first, later: of a visit's micro-batches; the later ones find held weights unpacked. saved: what a kept
    graph holds besides x and y.
    """

    forward_first: Bytes
    forward_later: Bytes
    kept_forward_first: Bytes
    kept_forward_later: Bytes
    saved: Bytes
    recompute_first: Bytes
    recompute_later: Bytes
    kept_backward_first: Bytes
    kept_backward_later: Bytes


def fixed_bytes(workload: Workload, plan: ExecutionPlan) -> Bytes:
    """What is on the device as long as training runs."""
    shape, itemsize = workload.shape, workload.itemsize
    sizes = [workload.packing.of(linear) for linear in shape.linear_shapes().values()]
    num_resident = sum(place is Place.RESIDENT for place in plan.weights)
    constants = sum(size.constant_bytes + size.padding_bytes for size in sizes)
    n = workload.num_factor_numbers
    result = {
        PACKED: num_resident * sum(size.data_bytes for size in sizes),
        CONSTANTS: num_resident * constants,
        EMBEDDING: workload.matrix_bytes if plan.embedding is Place.RESIDENT else 0,
        HEAD: workload.head_bytes if plan.head is Place.RESIDENT and not shape.is_tied else 0,
        PLAIN: shape.plain_parameters * itemsize + 8 * (shape.head_dim // 2),
        UNPACK_BUFFER: unpack_buffer_bytes(workload, plan) + head_buffer_bytes(workload, plan),
        SLOTS: plan.num_slots * slot_bytes(workload, plan),
        MASTERS: 4 * n,
        GRADIENT: 4 * n,
        WORKING: 0 if itemsize == 4 else itemsize * n,
        OPTIMIZER: optimizer_state_bytes(workload),
    }
    return {cause: num_bytes for cause, num_bytes in result.items() if num_bytes}


def unpack_buffer_bytes(workload: Workload, plan: ExecutionPlan) -> int:
    """One buffer for all layers; in reference mode every weight is unpacked into a tensor of its own."""
    if workload.reference:
        return 0
    shapes = workload.shape.linear_shapes()
    return workload.packing.buffer_bytes(shapes, hold_unpacked=plan.hold_unpacked)


def head_tile_shape(workload: Workload, plan: ExecutionPlan) -> tuple[int, int]:
    return min(plan.head_tile_rows, workload.shape.vocabulary), workload.shape.hidden


def head_buffer_bytes(workload: Workload, plan: ExecutionPlan) -> int:
    """What tiles of a packed head are unpacked into."""
    if not workload.head_is_packed:
        return 0
    return workload.packing.unpacked_bytes(head_tile_shape(workload, plan))


def slot_bytes(workload: Workload, plan: ExecutionPlan) -> int:
    """A slot holds the largest item that streams."""
    items = [0]
    if any(place is not Place.RESIDENT for place in plan.weights):
        items.append(workload.slab_bytes)
    if plan.head is not Place.RESIDENT:
        num_rows, num_columns = head_tile_shape(workload, plan)
        items.append(num_rows * workload.head_packing.row_bytes(num_columns))
    return max(items)


def _learning_rate_groups(workload: Workload) -> tuple[int, ...]:
    return workload.factor_parts if workload.splits_learning_rate else (workload.num_factor_numbers,)


def optimizer_state_bytes(workload: Workload) -> int:
    """Two moments per factor number: 8 bytes, or 2 and a scale per 256 numbers."""
    if workload.optimizer not in ("adamw_8bit", "paged_adamw_8bit"):
        return 8 * workload.num_factor_numbers
    return sum(
        8 * n if n < MIN_8BIT_NUMBERS else 2 * n + 8 * -(-n // 256) for n in _learning_rate_groups(workload)
    )


def managed_bytes(workload: Workload) -> int:
    """Of that, what paged optimizers keep in managed memory, which is not torch's allocator's."""
    pages = workload.on_accelerator and workload.target.has_concurrent_managed_access
    return optimizer_state_bytes(workload) if pages and workload.optimizer.startswith("paged_") else 0


def optimizer_scratch_bytes(workload: Workload) -> int:
    """torch's AdamW makes a denominator of its own, from a square root; bitsandbytes' updates in place."""
    return 8 * max(_learning_rate_groups(workload)) if workload.optimizer == "adamw" else 0


@lru_cache(maxsize=512)
def layer_bytes(settings: LayerSettings, window: int | None, needs_dx: bool) -> LayerBytes:
    """Replay one layer. needs_dx: False for the lowest layer with factors, whose input has no gradient."""
    kept_forward_first, kept_forward_later, saved, kept_backward_first, kept_backward_later = _kept(
        settings, window, needs_dx
    )
    forward_first, forward_later = _forward(settings, window)
    recompute_first, recompute_later = _recompute(settings, window, needs_dx)
    return LayerBytes(
        forward_first,
        forward_later,
        kept_forward_first,
        kept_forward_later,
        saved,
        recompute_first,
        recompute_later,
        kept_backward_first,
        kept_backward_later,
    )


class _Replay:
    """One visit to a layer with x and dL/dy given; `peak_of` is what an action adds to what was alive before
    it."""

    def __init__(self, settings: LayerSettings, window: int | None) -> None:
        self.ledger = Ledger()
        self.x = self.ledger.tensor((1, settings.num_tokens, settings.shape.hidden), settings.itemsize)
        self.gradient = self.x.like()
        self.layer = GhostLayer(self.ledger, settings, window)

    def peak_of(self, action: Callable[[], None]) -> Bytes:
        before = dict(self.ledger.live)
        self.ledger.restart()
        action()
        return _above(self.ledger.peak, before)


def _forward(settings: LayerSettings, window: int | None) -> tuple[Bytes, Bytes]:
    replay = _Replay(settings, window)

    def run() -> None:
        with replay.ledger.no_grad():
            replay.layer.forward(replay.x)

    return replay.peak_of(run), replay.peak_of(run)


def _kept(
    settings: LayerSettings, window: int | None, needs_dx: bool
) -> tuple[Bytes, Bytes, Bytes, Bytes, Bytes]:
    replay, outputs = _Replay(settings, window), []

    def forward() -> None:
        outputs.append(replay.layer.forward(replay.x.leaf() if needs_dx else replay.x))

    before = replay.ledger.live_bytes
    forwards = replay.peak_of(forward), replay.peak_of(forward)
    replay.layer.close()
    saved = (replay.ledger.live_bytes - before) // 2 - outputs[0].num_bytes

    def back() -> None:
        backward(outputs.pop(0), replay.gradient)

    return *forwards, {KEPT: saved}, replay.peak_of(back), replay.peak_of(back)


def _recompute(settings: LayerSettings, window: int | None, needs_dx: bool) -> tuple[Bytes, Bytes]:
    replay = _Replay(settings, window)

    def run() -> None:
        x = replay.x.leaf() if needs_dx else replay.x
        backward(replay.layer.forward(x, skips_tail=True), replay.gradient)

    return replay.peak_of(run), replay.peak_of(run)


def _above(peak: Bytes, before: Bytes) -> Bytes:
    causes = peak.keys() | before.keys()
    return {cause: peak.get(cause, 0) - before.get(cause, 0) for cause in causes}
