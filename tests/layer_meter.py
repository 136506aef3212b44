"""One decoder layer's bytes, by the meter and by the plan."""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import dataclass

import torch
from tiny_models import packed_row

from qlora_train.device.compute import THE_CPU
from qlora_train.device.description import DeviceDescription
from qlora_train.memory.meter import DeviceMeter
from qlora_train.memory.plan.byte_model import layer_bytes
from qlora_train.memory.plan.layer_settings import LayerSettings
from qlora_train.memory.plan.model_shape import ModelShape
from qlora_train.memory.plan.packed_sizes import PackingSizes
from qlora_train.model.decoder import FrozenDecoder

RANK = 4


@dataclass(frozen=True)
class LayerPeaks:
    """At the most, above the layer's input (and, going back, the gradient of its output). saved: what a kept
    graph holds besides input and output."""

    forward: int
    saved: int
    kept_forward: int
    kept_backward: int
    recompute: int


def measured(decoder: FrozenDecoder, index: int, documents: list[int]) -> LayerPeaks:
    """Layer `index` of a decoder on the CPU whose weights are not packed."""
    x, arguments = decoder.embed_packed(packed_row(documents))
    gradient = torch.zeros_like(x)

    def forward(leaf: torch.Tensor) -> torch.Tensor:
        return decoder.run_layer(index, leaf, arguments[index])

    def peak_of(run: Callable[[], None]) -> int:
        gc.collect()
        with DeviceMeter(THE_CPU) as meter:
            run()
            return meter.peak_bytes

    def without_graph() -> None:
        with torch.no_grad():
            forward(x)

    def recompute() -> None:
        with decoder.skipping_tail(index):
            y = forward(x.detach().requires_grad_())
        y.backward(gradient)

    without_graph()  # whatever is made once
    gc.collect()
    with DeviceMeter(THE_CPU) as meter:
        y = forward(x.detach().requires_grad_())
        kept_forward, live = meter.peak_bytes, meter.live_bytes
        meter.reset_peak()
        y.backward(gradient)
        kept_backward = meter.peak_bytes - live
    return LayerPeaks(
        peak_of(without_graph), live - y.nbytes, kept_forward, kept_backward, peak_of(recompute)
    )


def planned(
    shape: ModelShape,
    index: int,
    documents: list[int],
    itemsize: int,
    target: DeviceDescription,
    *,
    deterministic: bool = False,
) -> LayerPeaks:
    """The same by the planner."""
    settings = LayerSettings(
        shape=shape,
        packing=PackingSizes("none", False, itemsize),
        rank=RANK,
        targets=frozenset(shape.linear_shapes()),
        dropout=False,
        documents=tuple(documents),
        target=target,
        deterministic=deterministic,
        skip_tail=shape.may_skip_tail,
    )
    found = layer_bytes(settings, shape.windows[index], True)
    return LayerPeaks(
        sum(found.forward_first.values()),
        sum(found.saved.values()),
        sum(found.kept_forward_first.values()),
        sum(found.kept_backward_first.values()),
        sum(found.recompute_first.values()),
    )
