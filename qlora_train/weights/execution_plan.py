"""The execution plan of an optimizer step: where every tensor is placed, what is stored, recomputed or tiled.

A step walks the decoder layers forward and back (walk/layer_walk.py). The plan is fixed before any weight is
loaded: the placement of each layer's quantized weights, what each layer stores for its backward pass, the
placement of stored inputs, how many micro-batches pass a layer per fetch, and the tile sizes of loss and MLP.
Planning, training, checkpoints and resuming share it. Placements and policies change no bit of the result.
`num_groups`, `loss_tokens`, `head_tile_rows` and `mlp_tile_tokens` change the order of sums, hence the last
bits: a resume keeps them.

plan/planned_walk.py computes the bytes that a plan needs, plan/planner.py chooses one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import Any

from qlora_train.units import ceil_div

LOSS_TOKENS, HEAD_TILE_ROWS = 512, 4096
"""Tile sizes of the loss (tokens, vocabulary rows) unless memory requires smaller ones. Independent of
placements, so that the arithmetic is the same everywhere."""


class Placement(StrEnum):
    """Where a tensor is stored between uses: on the compute device, in (pinned) CPU RAM, or in a file."""

    DEVICE = "resident"
    RAM = "ram"
    DISK = "disk"


class ActivationPolicy(StrEnum):
    """What one layer stores for its backward pass.

    keep       its saved tensors stay on the device: no extra FLOPs (4 per token and parameter in all)
    recompute  only its input [T, D] stays and the layer runs again (6 per token and parameter; Chen et al.
               2016, arXiv:1604.06174)
    offload    its saved tensors are stored in CPU RAM: no extra FLOPs, but two copies
    """

    KEEP = "keep"
    RECOMPUTE = "recompute"
    OFFLOAD = "offload"


@dataclass(frozen=True)
class ExecutionPlan:
    """How one optimizer step runs.

    weights, activations: one entry per decoder layer. embedding, head: placement of the two [V, D] matrices,
    equal where they are tied. num_groups: the K micro-batches pass the layers in this many groups of
    ceil(K / num_groups). inputs: placement of stored layer inputs (DEVICE or RAM). hold_dequantized: each
    weight of a layer is dequantized once per visit and held until the visit ends. mlp_tile_tokens: tokens of
    one MLP tile, None for all at once. loss_tokens: supervised tokens of one loss block. head_tile_rows:
    vocabulary rows of one head tile. num_slots: device slots of the ring, 0 if nothing streams.
    """

    weights: tuple[Placement, ...]
    activations: tuple[ActivationPolicy, ...]
    embedding: Placement
    head: Placement
    num_groups: int
    inputs: Placement
    hold_dequantized: bool
    mlp_tile_tokens: int | None
    loss_tokens: int
    head_tile_rows: int
    num_slots: int

    def __post_init__(self) -> None:
        assert len(self.weights) == len(self.activations) > 0
        assert self.inputs is not Placement.DISK
        assert self.num_groups >= 1 and self.loss_tokens >= 1 and self.head_tile_rows >= 1
        assert self.mlp_tile_tokens is None or self.mlp_tile_tokens >= 1
        assert (self.num_slots > 0) == self.streams, (self.num_slots, self.weights, self.head)

    @property
    def num_layers(self) -> int:
        return len(self.weights)

    @property
    def streams(self) -> bool:
        """Whether anything passes through the ring: a layer or the head (embedding rows are gathered)."""
        return any(place is not Placement.DEVICE for place in (*self.weights, self.head))

    @property
    def is_resident(self) -> bool:
        """Whether all weights are stored on the device."""
        return all(place is Placement.DEVICE for place in (*self.weights, self.embedding, self.head))

    def group_size(self, num_micro_batches: int) -> int:
        """Number of micro-batches that pass the layers together."""
        return ceil_div(num_micro_batches, self.num_groups)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values, for plan.json, metrics and checkpoints."""
        return {key: _plain(value) for key, value in asdict(self).items()}

    @staticmethod
    def from_dict(values: Mapping[str, Any]) -> ExecutionPlan:
        """The plan that `to_dict` wrote. Raises KeyError or ValueError for anything else."""
        return ExecutionPlan(
            weights=tuple(Placement(place) for place in values["weights"]),
            activations=tuple(ActivationPolicy(policy) for policy in values["activations"]),
            embedding=Placement(values["embedding"]),
            head=Placement(values["head"]),
            num_groups=int(values["num_groups"]),
            inputs=Placement(values["inputs"]),
            hold_dequantized=bool(values["hold_dequantized"]),
            mlp_tile_tokens=None if values["mlp_tile_tokens"] is None else int(values["mlp_tile_tokens"]),
            loss_tokens=int(values["loss_tokens"]),
            head_tile_rows=int(values["head_tile_rows"]),
            num_slots=int(values["num_slots"]),
        )


def everything_resident(
    num_layers: int,
    *,
    activation: ActivationPolicy = ActivationPolicy.KEEP,
    num_groups: int = 1,
    hold_dequantized: bool = False,
) -> ExecutionPlan:
    """The plan with all weights and stored inputs on the device and one policy for all layers; planning
    starts from it."""
    return ExecutionPlan(
        weights=(Placement.DEVICE,) * num_layers,
        activations=(activation,) * num_layers,
        embedding=Placement.DEVICE,
        head=Placement.DEVICE,
        num_groups=num_groups,
        inputs=Placement.DEVICE,
        hold_dequantized=hold_dequantized,
        mlp_tile_tokens=None,
        loss_tokens=LOSS_TOKENS,
        head_tile_rows=HEAD_TILE_ROWS,
        num_slots=0,
    )


def _plain(value: Any) -> Any:
    if isinstance(value, StrEnum):
        return value.value
    return [_plain(item) for item in value] if isinstance(value, tuple) else value
