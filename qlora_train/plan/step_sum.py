"""Estimates a step's peak bytes as a sum, for the planner's search: fixed bytes, stored activations, and the
largest temporary. It takes microseconds where a planned walk takes a tenth of a second. A plan's reported
bytes come from the walk (planned_walk.py), which also corrects the sum.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache

import torch

from qlora_train.kernels.dropout import DropoutKeys
from qlora_train.model.loss import reference_loss
from qlora_train.plan.fixed_bytes import fixed_bytes
from qlora_train.plan.planned_model import PlannedLoss
from qlora_train.plan.planned_walk import load_peak, set_up
from qlora_train.plan.recorded_layers import Record
from qlora_train.plan.workload import Workload
from qlora_train.weights.execution_plan import ActivationPolicy, ExecutionPlan, Placement, everything_resident


@dataclass(frozen=True)
class LayerBytes:
    """Bytes of one kind of layer. without_graph: in a forward pass that is recomputed later. with_graph: in
    one whose graph is kept. recomputed: in the second forward pass, for backward."""

    without_graph: Record
    with_graph: Record
    recomputed: Record

    @property
    def recompute_peak_bytes(self) -> int:
        """Peak bytes while the layer is recomputed and run backward."""
        return self.recomputed.graph_bytes + max(*self.recomputed.forward, *self.recomputed.backward)


def peak_by_sum(workload: Workload, plan: ExecutionPlan) -> int:
    """Estimated peak bytes on the device in a step and while loading."""
    group, x_bytes = plan.group_size(workload.num_micro_batches), workload.x_bytes
    layers = layer_bytes(workload, plan.hold_dequantized, plan.mlp_tile_tokens)
    kept_bytes = group * x_bytes
    largest = 0
    for layer, policy in zip(layers, plan.activations, strict=True):
        if policy is ActivationPolicy.RECOMPUTE:
            forward, backward = max(layer.without_graph.forward), layer.recompute_peak_bytes
            stays = x_bytes if plan.inputs is Placement.DEVICE else 0
        else:
            offloaded = layer.with_graph.saved if policy is ActivationPolicy.OFFLOAD else 0
            forward = layer.with_graph.graph_bytes + max(layer.with_graph.forward)
            backward = max(layer.with_graph.backward) + 2 * offloaded
            stays = x_bytes + layer.with_graph.graph_bytes - offloaded
        largest = max(largest, kept_bytes + max(x_bytes + forward, group * stays + backward))
        kept_bytes += group * stays
    loss = _loss_bytes(workload, group, plan.loss_tokens, plan.head_tile_rows)
    step = sum(fixed_bytes(workload, plan).values()) + max(largest, kept_bytes + loss)
    return max(step, sum(load_peak(workload, plan).values()))


@lru_cache(maxsize=256)
def layer_bytes(workload: Workload, holds: bool, mlp_tile_tokens: int | None) -> tuple[LayerBytes, ...]:
    """The bytes of every layer."""
    plan = replace(_plain(workload), hold_dequantized=holds, mlp_tile_tokens=mlp_tile_tokens)
    model, tokens, meter = set_up(workload, plan)
    decoder, dropout = model.decoder, model.lora.dropout_context
    by_kind: dict[int, LayerBytes] = {}
    with meter:
        x, arguments = decoder.embed_packed(tokens)
        leaf = x.detach().requires_grad_()
        dropout.tokens = DropoutKeys(0, 1, tokens.rows, tokens.offsets)
        for index, kind in enumerate(decoder.kinds):
            if kind not in by_kind:
                with torch.no_grad():
                    without_graph = decoder.record(index, x, arguments[index])
                with_graph = decoder.record(index, leaf, arguments[index])
                with decoder.running_again(index):
                    recomputed = decoder.record(index, leaf, arguments[index])
                by_kind[kind] = LayerBytes(without_graph, with_graph, recomputed)
        dropout.tokens = None
    return tuple(by_kind[kind] for kind in decoder.kinds)


@lru_cache(maxsize=256)
def _loss_bytes(workload: Workload, group: int, loss_tokens: int, tile_rows: int) -> int:
    """Peak bytes of the loss of a group, besides its inputs."""
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
