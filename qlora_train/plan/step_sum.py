"""A step's bytes as a sum, for the search: what stays, what layers remember, the largest thing that comes and
goes. It takes microseconds where a walk takes a tenth of a second, and is near it; what is said of a plan
comes from the walk (planned_walk.py), which also corrects the sum.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache

import torch

from qlora_train.kernels.dropout import DropoutKeys
from qlora_train.model.loss import reference_loss
from qlora_train.plan.fixed_bytes import fixed_bytes
from qlora_train.plan.planned_model import PlannedLoss
from qlora_train.plan.planned_walk import group_size, load_peak, set_up
from qlora_train.plan.recorded_layers import Record
from qlora_train.plan.workload import Workload
from qlora_train.weights.execution_plan import ActivationPolicy, ExecutionPlan, Placement, everything_resident


@dataclass(frozen=True)
class LayerBytes:
    """Of one kind of layer: without a graph, with one that is kept, with one that is taken back at once."""

    alone: Record
    kept: Record
    again: Record

    @property
    def recompute(self) -> int:
        """At the most while it is run again and taken back."""
        return self.again.kept + max(max(self.again.forward), max(self.again.backward))


def peak_by_sum(workload: Workload, plan: ExecutionPlan) -> int:
    """Bytes on the device at the most in a step, and while loading."""
    group, x_bytes = group_size(workload, plan), workload.x_bytes
    layers = layer_bytes(workload, plan.hold_dequantized, plan.mlp_tile_tokens)
    kept_bytes = group * x_bytes
    largest = 0
    for layer, policy in zip(layers, plan.activations, strict=True):
        if policy is ActivationPolicy.RECOMPUTE:
            forward, backward = max(layer.alone.forward), layer.recompute
            stays = x_bytes if plan.inputs is Placement.DEVICE else 0
        else:
            offloaded = layer.kept.saved if policy is ActivationPolicy.OFFLOAD else 0
            forward = layer.kept.kept + max(layer.kept.forward)
            backward = max(layer.kept.backward) + 2 * offloaded
            stays = x_bytes + layer.kept.kept - offloaded
        largest = max(largest, kept_bytes + max(x_bytes + forward, group * stays + backward))
        kept_bytes += group * stays
    loss = _loss_bytes(workload, group, plan.loss_tokens, plan.head_tile_rows)
    step = sum(fixed_bytes(workload, plan).values()) + max(largest, kept_bytes + loss)
    return max(step, sum(load_peak(workload, plan).values()))


@lru_cache(maxsize=256)
def layer_bytes(workload: Workload, holds: bool, mlp_tile_tokens: int | None) -> tuple[LayerBytes, ...]:
    """Of every layer."""
    plan = replace(_plain(workload), hold_dequantized=holds, mlp_tile_tokens=mlp_tile_tokens)
    model, tokens, meter = set_up(workload, plan)
    decoder, dropout = model.decoder, model.lora.dropout_context
    found: dict[int, LayerBytes] = {}
    with meter:
        x, arguments = decoder.embed_packed(tokens)
        leaf = x.detach().requires_grad_()
        dropout.tokens = DropoutKeys(0, 1, tokens.rows, tokens.offsets)
        for index, kind in enumerate(decoder.kinds):
            if kind not in found:
                with torch.no_grad():
                    alone = decoder.record(index, x, arguments[index])
                kept = decoder.record(index, leaf, arguments[index])
                with decoder.running_again(index):
                    again = decoder.record(index, leaf, arguments[index])
                found[kind] = LayerBytes(alone, kept, again)
        dropout.tokens = None
    return tuple(found[kind] for kind in decoder.kinds)


@lru_cache(maxsize=256)
def _loss_bytes(workload: Workload, group: int, loss_tokens: int, tile_rows: int) -> int:
    """What the loss of a group takes besides its inputs."""
    at_once = replace(_plain(workload), loss_tokens=loss_tokens, head_tile_rows=tile_rows)
    model, tokens, meter = set_up(workload, at_once)
    decoder = model.decoder
    xs = [
        torch.empty(1, workload.num_tokens, workload.shape.hidden, dtype=workload.dtype, device="meta")
    ] * group
    with meter:
        if workload.reference:
            reference_loss(decoder, decoder.whole_head(), xs[0], tokens, 1, 1.0)
        else:
            PlannedLoss(decoder, loss_tokens)(xs, [tokens] * group, 1.0)
    return meter.peak_bytes


def _plain(workload: Workload) -> ExecutionPlan:
    return everything_resident(workload.shape.num_layers)
