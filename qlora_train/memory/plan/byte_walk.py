"""The walk once more, over numbers: bytes on the device at the most in every phase of a run.

    step         train/walk.py: what is remembered, kept and on its way, layer by layer; then the optimizer
    evaluation   the forward half
    generate     all prompts through the layers at once, then token by token, with a key-value cache
    load         what is being filled, one slab and one block of rows

In a layer memory peaks either at the first micro-batch of a visit (most graphs are alive) or at a later one
(held weights are all unpacked), so both are looked at. The peak of a run is the largest of its phases, never
a sum over things that are not there at the same time.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache

from qlora_train.memory.execution import Activation, ExecutionPlan, Place
from qlora_train.memory.plan.byte_model import (
    GRADIENT,
    KV_CACHE,
    LEAVING,
    LOADING,
    MASTERS,
    MICRO_BATCH,
    OPTIMIZER,
    OPTIMIZER_SCRATCH,
    REMEMBERED,
    RETURNING,
    ROWS_BLOCK_BYTES,
    UNPACK_BUFFER,
    WORKING,
    LayerBytes,
    fixed_bytes,
    layer_bytes,
    optimizer_scratch_bytes,
)
from qlora_train.memory.plan.ghost import Bytes, Ledger, total
from qlora_train.memory.plan.ghost_loss import (
    GRADIENTS,
    LOSS_BLOCK,
    ROTARY,
    LossSettings,
    embedded,
    reference_loss,
    tile_scratch_bytes,
    tiled_loss,
)
from qlora_train.memory.plan.workload import Workload

STREAM = "layer inputs"
"""x of every micro-batch of a group, on its way through the layers."""
_LEAVES_GRAPH = (Activation.KEEP, Activation.OFFLOAD)


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


def step_peak(workload: Workload, plan: ExecutionPlan) -> Bytes:
    """Bytes by cause at the most in an optimizer step, from the second on (optimizer state exists)."""
    return _Step(workload, plan).peak()


class _Step:
    def __init__(self, workload: Workload, plan: ExecutionPlan) -> None:
        self._workload, self._plan = workload, plan
        self._group = -(-workload.num_micro_batches // plan.num_groups)
        self._ledger = Ledger()
        self._x_bytes = workload.num_tokens * workload.shape.hidden * workload.itemsize
        self._layers: dict[tuple[int | None, bool], LayerBytes] = {}
        for cause, num_bytes in fixed_bytes(workload, plan).items():
            self._ledger.add(cause, num_bytes)

    def peak(self) -> Bytes:
        """Walk, then update."""
        self._add_micro_batches()
        self._embed()
        for i in range(self._plan.num_layers):
            self._forward(i)
        self._loss()
        for i in reversed(range(self._plan.num_layers)):
            self._backward(i)
        self._optimizer()
        return self._ledger.peak

    def evaluation(self) -> Bytes:
        """Forward only: nothing is remembered."""
        self._embed()
        for i in range(self._plan.num_layers):
            layer = self._layer(i)
            self._ledger.bump(layer.forward_first)
            if self._group > 1:
                self._ledger.bump(layer.forward_later)
        self._ledger.add(STREAM, -self._group * self._x_bytes)
        settings = loss_settings(self._workload, self._plan)
        self._ledger.bump(_loss_bytes(settings, self._group, False, False, False))
        return self._ledger.peak

    def _layer(self, index: int) -> LayerBytes:
        key = (self._workload.shape.windows[index], index > 0)
        if key not in self._layers:
            settings = self._workload.layer_settings(
                hold_unpacked=self._plan.hold_unpacked, mlp_tile_tokens=self._plan.mlp_tile_tokens
            )
            self._layers[key] = layer_bytes(settings, *key)
        return self._layers[key]

    def _policy(self, index: int) -> Activation:
        return self._plan.activations[index]

    def _input_stays(self, index: int) -> bool:
        """Whether the layer's input is on the device from its forward to its backward pass."""
        if self._policy(index) in _LEAVES_GRAPH or self._plan.inputs is Place.RESIDENT:
            return True
        return index > 0 and self._policy(index - 1) in _LEAVES_GRAPH

    def _add_micro_batches(self) -> None:
        if self._workload.on_accelerator:  # on the CPU they share memory with the host's arrays
            per_token = 9 * 8
            self._ledger.add(
                MICRO_BATCH, self._workload.num_micro_batches * self._workload.num_tokens * per_token
            )

    def _embed(self) -> None:
        """All micro-batches of the group, one after another."""
        shape, workload = self._workload.shape, self._workload
        one = Ledger()
        x, arguments = embedded(
            one,
            workload.num_tokens,
            shape.hidden,
            shape.head_dim,
            workload.itemsize,
            _rows_from_host(workload, self._plan.embedding),
        )
        rotary = arguments.num_bytes
        del x, arguments
        for _ in range(self._group):
            self._ledger.bump(one.peak)
            self._ledger.add(STREAM, self._x_bytes)
            self._ledger.add(ROTARY, rotary)

    def _forward(self, i: int) -> None:
        layer, ledger, group = self._layer(i), self._ledger, self._group
        is_graph = self._policy(i) in _LEAVES_GRAPH
        first, later = (
            (layer.kept_forward_first, layer.kept_forward_later)
            if is_graph
            else (layer.forward_first, layer.forward_later)
        )
        per_micro_batch: Bytes = dict(layer.saved) if self._policy(i) is Activation.KEEP else {}
        if self._input_stays(i):
            per_micro_batch[REMEMBERED] = self._x_bytes
        ledger.bump(first)
        self._let_leave(self._leaving(i))
        _add(ledger, per_micro_batch, group - 1)
        if group > 1:
            ledger.bump(later)
        _add(ledger, per_micro_batch, 1)

    def _leaving(self, i: int) -> int:
        """Bytes of one micro-batch in layer i that are copied to the host while the next one is computed. On
        a CPU they are copied at once."""
        if not self._workload.on_accelerator:
            return 0
        if self._policy(i) is Activation.OFFLOAD:
            return sum(self._layer(i).saved.values())
        return 0 if self._input_stays(i) else self._x_bytes

    def _let_leave(self, num_bytes: int) -> None:
        """Of what leaves, the last is alive."""
        self._ledger.add(LEAVING, num_bytes - self._ledger.live.get(LEAVING, 0))

    def _loss(self) -> None:
        """Takes the last layer's outputs, leaves a gradient for each."""
        ledger, group, last = self._ledger, self._group, self._plan.num_layers - 1
        output_stays = self._policy(last) in _LEAVES_GRAPH
        self._let_leave(0)
        ledger.add(STREAM, -group * self._x_bytes)
        if output_stays:
            ledger.add(REMEMBERED, group * self._x_bytes)
        ledger.bump(
            _loss_bytes(
                loss_settings(self._workload, self._plan),
                group,
                output_stays,
                True,
                self._workload.reference,
            )
        )
        ledger.add(GRADIENTS, group * self._x_bytes)

    def _backward(self, i: int) -> None:
        layer, ledger, group, policy = self._layer(i), self._ledger, self._group, self._policy(i)
        is_graph = policy in _LEAVES_GRAPH
        first, later = (
            (layer.kept_backward_first, layer.kept_backward_later)
            if is_graph
            else (layer.recompute_first, layer.recompute_later)
        )
        # What one micro-batch's backward pass ends the life of: this layer's saved tensors, its output where
        # the graph held it, and its input where nothing below holds that.
        ends: Bytes = dict(layer.saved) if policy is Activation.KEEP else {}
        ends[REMEMBERED] = self._x_bytes if is_graph else 0
        if self._input_stays(i) and not (i > 0 and self._policy(i - 1) in _LEAVES_GRAPH):
            ends[REMEMBERED] += self._x_bytes
        returning = total(self._returning(i), self._returning(i if group > 1 else i - 1))
        ledger.bump(total(first, returning))
        _add(ledger, ends, -1)
        if group > 1:
            ledger.bump(total(later, returning))
        _add(ledger, ends, 1 - group)

    def _returning(self, i: int) -> Bytes:
        """What comes back from the host for one micro-batch of layer i."""
        if i < 0:
            return {}
        if self._policy(i) is Activation.OFFLOAD:
            return {RETURNING: sum(self._layer(i).saved.values())}
        return {} if self._input_stays(i) else {REMEMBERED: self._x_bytes}

    def _optimizer(self) -> None:
        ledger = self._ledger
        for cause in (GRADIENTS, STREAM, ROTARY):
            ledger.add(cause, -ledger.live.get(cause, 0))
        ledger.bump({OPTIMIZER_SCRATCH: optimizer_scratch_bytes(self._workload)})


def _add(ledger: Ledger, parts: Bytes, times: int) -> None:
    for cause, num_bytes in parts.items():
        ledger.add(cause, times * num_bytes)


def _rows_from_host(workload: Workload, place: Place) -> bool:
    """Whether gathered rows are first put together on the host, where a CPU's meter sees them."""
    return not workload.on_accelerator and place is Place.DISK


def loss_settings(workload: Workload, plan: ExecutionPlan) -> LossSettings:
    """What of a run decides the bytes of its loss."""
    return LossSettings(
        num_tokens=workload.num_tokens,
        num_supervised=workload.num_supervised,
        hidden=workload.shape.hidden,
        vocabulary=workload.shape.vocabulary,
        itemsize=workload.itemsize,
        loss_tokens=plan.loss_tokens,
        tile_rows=plan.head_tile_rows,
        norm=workload.shape.family.norm,
        num_logit_steps=workload.shape.num_logit_steps,
        head_packing=workload.head_packing,
        on_accelerator=workload.target.is_accelerator,
        rows_from_file=_rows_from_host(workload, plan.head),
        copies_head=workload.head_is_packed or plan.head is not Place.RESIDENT,
    )


@lru_cache(maxsize=512)
def _loss_bytes(
    settings: LossSettings, num_micro_batches: int, output_stays: bool, gradients: bool, reference: bool
) -> Bytes:
    """What the loss of a group takes at the most; its inputs count where it is what frees them."""
    ledger = Ledger()
    with ledger.cause(STREAM):
        xs = [
            ledger.tensor((1, settings.num_tokens, settings.hidden), settings.itemsize)
            for _ in range(num_micro_batches)
        ]
    kept = list(xs) if output_stays or reference else []
    before = dict(ledger.live) if output_stays else {}
    ledger.restart()
    if reference and gradients:
        reference_loss(ledger, xs, settings)
    else:
        tiled_loss(ledger, xs, settings, gradients=gradients)
    kept.clear()
    return total(ledger.peak, {cause: -num_bytes for cause, num_bytes in before.items()})


def evaluation_peak(workload: Workload, plan: ExecutionPlan) -> Bytes:
    """The forward half of a step, without dropout; optimizer state and gradient are there too."""
    quiet = replace(workload, dropout=False)
    step = _Step(quiet, plan)
    return step.evaluation()


def generate_peak(
    workload: Workload, plan: ExecutionPlan, size: GenerateSize, *, in_training: bool = True
) -> Bytes:
    """The prompts of one batch in one row, then token by token. in_training: optimizer state is there too."""
    quiet = replace(workload, dropout=False, documents=size.prompts, num_micro_batches=1)
    shape, itemsize = workload.shape, workload.itemsize
    ledger = Ledger()
    for cause, num_bytes in fixed_bytes(workload, plan).items():
        if in_training or cause != OPTIMIZER:
            ledger.add(cause, num_bytes)
    x_bytes = quiet.num_tokens * shape.hidden * itemsize
    cache = 2 * shape.num_layers * len(size.prompts) * shape.kv_width * size.capacity * itemsize
    ledger.add(KV_CACHE, cache)
    ledger.add(STREAM, x_bytes)
    ledger.add(ROTARY, 2 * quiet.num_tokens * shape.head_dim * itemsize)
    settings = quiet.layer_settings(hold_unpacked=plan.hold_unpacked, mlp_tile_tokens=plan.mlp_tile_tokens)
    for window in set(shape.windows):
        ledger.bump(layer_bytes(settings, window, True).forward_first)
    # Logits of the token before in fp32, and of this one: tiles and all of them, or all of them and in fp32.
    logits = len(size.prompts) * shape.vocabulary
    ledger.bump({"logits": logits * (4 + max(2 * itemsize, itemsize + 4))})
    ledger.bump(
        {"logits": logits * (4 + itemsize), LOSS_BLOCK: tile_scratch_bytes(loss_settings(quiet, plan))}
    )
    return ledger.peak


def load_peak(workload: Workload, plan: ExecutionPlan) -> Bytes:
    """Everything that stays but the training state, and what is being filled on top of it."""
    parts = {
        cause: num_bytes
        for cause, num_bytes in fixed_bytes(workload, plan).items()
        if cause not in (MASTERS, GRADIENT, WORKING, OPTIMIZER, UNPACK_BUFFER)
    }
    streams = any(place is not Place.RESIDENT for place in plan.weights)
    loading = 2 * ROWS_BLOCK_BYTES + (workload.slab_bytes if streams else 0)
    if workload.head_is_packed and not workload.on_accelerator:
        loading += workload.head_bytes  # read as a whole, on the host
    return total(parts, {LOADING: loading})
