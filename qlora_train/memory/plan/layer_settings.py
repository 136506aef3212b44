"""What of a run decides a layer's bytes."""

from __future__ import annotations

from dataclasses import dataclass

from qlora_train.device.description import DeviceDescription
from qlora_train.memory.plan.model_shape import ModelShape
from qlora_train.memory.plan.packed_sizes import PackingSizes


@dataclass(frozen=True)
class LayerSettings:
    """rank: R. targets: linears with factors, by name within the layer. dropout: whether anything is dropped.
    documents: tokens of each document in a micro-batch; their sum is T. hold_unpacked, mlp_tile_tokens: of
    the execution plan. skip_tail: recomputation need not compute the last product. reference: the library's
    own operations. most_documents: in any micro-batch; None: as many as in this one. target, deterministic:
    where and how it runs.
    """

    shape: ModelShape
    packing: PackingSizes
    rank: int
    targets: frozenset[str]
    dropout: bool
    documents: tuple[int, ...]
    target: DeviceDescription
    deterministic: bool
    hold_unpacked: bool = False
    mlp_tile_tokens: int | None = None
    skip_tail: bool = True
    reference: bool = False
    most_documents: int | None = None

    @property
    def num_tokens(self) -> int:
        return sum(self.documents)

    @property
    def itemsize(self) -> int:
        return self.packing.itemsize
