"""Counts the bytes of meta tensors, and the scratch memory inside operations, for planning.

Operations that the planned device would not run would be counted silently. So two are refused: attention that
writes all scores where no kernel of the device does, and mixing host tensors with device tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from qlora_train.device.memory_tracker import StorageMeter

Scratch = Mapping[str, Callable[..., int]]
"""Operation name -> function of its arguments that gives the bytes of scratch it needs."""
WORKING_SET = "one layer's working set"
_COPIES = {torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default}


class PlannedMeter(StorageMeter):
    """A `StorageMeter` of meta tensors by cause. scratch: bytes of operations beside their results.
    may_write_scores: attention may use the formula that writes all scores, as on a CPU."""

    def __init__(self, scratch: Scratch, *, may_write_scores: bool) -> None:
        super().__init__("meta")
        self._scratch, self._may_write_scores = scratch, may_write_scores
        self.cause = WORKING_SET

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        self._refuse(function, args)
        output = super().__torch_dispatch__(function, types, args, kwargs)
        if (scratch := self._scratch.get(str(function))) is not None:
            self.note_peak(scratch(*args, **(kwargs or {})))
        return output

    def note_peak(self, num_bytes: int, cause: str = WORKING_SET) -> None:
        """Count bytes that are allocated and freed at once."""
        if not self.is_paused:
            self.add(num_bytes, cause)
            self.add(-num_bytes, cause)

    @contextmanager
    def counting(self, cause: str) -> Iterator[None]:
        """Inside, new tensors count under `cause`."""
        before, self.cause = self.cause, cause
        try:
            yield
        finally:
            self.cause = before

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Inside, new tensors are not counted."""
        before, self.is_paused = self.is_paused, True
        try:
            yield
        finally:
            self.is_paused = before

    def another(self) -> PlannedMeter:
        """A new meter with the same settings."""
        return PlannedMeter(self._scratch, may_write_scores=self._may_write_scores)

    def _refuse(self, function: Any, args: tuple[Any, ...]) -> None:
        assert self._may_write_scores or function is not torch.ops.aten._safe_softmax.default, (
            "attention would write all scores, which no kernel of the planned device does"
        )
        if function not in _COPIES:
            tensors = [t for t in tree_leaves(args) if isinstance(t, Tensor)]
            on_host = [t for t in tensors if not t.is_meta and t.dim()]
            assert not on_host or len(on_host) == len(tensors), f"{function} takes tensors of two devices"
