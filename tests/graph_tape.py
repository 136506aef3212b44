"""CUDA graphs without a GPU: a tape of operations with the very tensors they had.

Replayed, an operation reads the tensors that it read in the capture and writes into those it wrote then, as a
graph's kernels have fixed addresses. So whatever of a step's input does not get into a tensor of the capture
stays what it was, and shows.

As on a GPU, nothing is done during a capture as far as anybody outside can see: what was there before has its
bytes back, and what was made is full of NaN. Every replay begins like that too, for what this graph makes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from qlora_train.kernels.varlen_attention import VarlenAttention

NOT_IN_A_GRAPH = ("_local_scalar_dense", "nonzero", "masked_select", "_unique2", "equal", "is_nonzero")


class TapeRecorder:
    """A `Recorder`. num_captures, num_replays, num_releases: so far. waits: what watching says it saw.
    at_capture: called with the number of each capture before it, and may raise."""

    def __init__(self, at_capture: Callable[[int], None] = lambda number: None) -> None:
        self.num_captures = self.num_replays = self.num_releases = 0
        self.waits: list[str] = []
        self.at_capture = at_capture
        self.tapes: list[Tape] = []

    def capture(self, work: Callable[[], None]) -> Callable[[], None]:
        self.num_captures += 1
        self.at_capture(self.num_captures)
        tape = Tape()
        with tape:
            work()
        tape.undo()
        self.tapes.append(tape)
        return lambda: self._replay(tape)

    def _replay(self, tape: Tape) -> None:
        self.num_replays += 1
        tape.replay()

    @contextmanager
    def watching(self, waits: list[str]) -> Iterator[None]:
        yield
        waits += self.waits

    def release(self) -> None:
        self.num_releases += 1
        self.tapes.clear()


class Tape(TorchDispatchMode):
    """Inside, operations are noted; see the module docstring."""

    def __init__(self) -> None:
        super().__init__()
        self._calls: list[tuple[Any, tuple[Any, ...], dict[str, Any], dict[int, Tensor]]] = []
        self._made: dict[int, Tensor] = {}  # storages of its own, each by a tensor that holds it
        self._before: dict[int, tuple[Tensor, Tensor]] = {}  # what was overwritten, and its bytes

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        name = function.overloadpacket.__name__
        assert name not in NOT_IN_A_GRAPH, f"{name} waits for the device"
        given = _tensors((args, kwargs))
        if function._schema.is_mutable:
            for tensor in given:
                if _storage(tensor) not in self._made:
                    self._before.setdefault(_storage(tensor), (tensor, _whole(tensor).clone()))
        result = function(*args, **kwargs)
        given_storages = {_storage(tensor) for tensor in given}
        made = {i: t for i, t in enumerate(_tensors(result)) if _storage(t) not in given_storages}
        self._made |= {_storage(tensor): tensor for tensor in made.values()}
        if made or function._schema.is_mutable:  # else it is a view: no kernel
            self._calls.append((function, args, kwargs, made))
        return result

    def undo(self) -> None:
        """What the capture did to memory."""
        for tensor, before in self._before.values():
            _whole(tensor).copy_(before)
        self._before.clear()
        self.spoil()

    def spoil(self) -> None:
        """Fill what this graph makes with 0xFF: NaN, or an index far outside."""
        for tensor in self._made.values():
            _whole(tensor).fill_(0xFF)

    @torch.no_grad()
    def replay(self) -> None:
        self.spoil()
        for function, args, kwargs, made in self._calls:
            results = _tensors(function(*args, **kwargs))
            for i, tensor in made.items():
                tensor.copy_(results[i])


def _tensors(value: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _whole(tensor: Tensor) -> Tensor:
    """All bytes of its storage."""
    storage = tensor.untyped_storage()
    return torch.empty(0, dtype=torch.uint8).set_(storage, 0, (storage.nbytes(),), (1,))


class DenseAttention(VarlenAttention):
    """Serves all, on any device and in any dtype: a dense mask, made from the boundaries by operations on
    tensors alone."""

    def __init__(self) -> None:
        super().__init__(_dense, capability=(8, 0))

    def serves(self, query: Tensor, key: Tensor, value: Tensor, softcap: float | None) -> bool:
        return True


def _dense(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seq_q: Tensor,
    cu_seq_k: Tensor,
    max_q: int,
    max_k: int,
    *,
    scale: float | None = None,
    window_size: tuple[int, int] = (-1, -1),
    enable_gqa: bool = False,
) -> Tensor:
    """query, key, value [T, heads, d] -> [T, heads, d]."""
    places = torch.arange(len(query))
    document = (cu_seq_q[1:, None] <= places).sum(0)
    distance = places[:, None] - places
    visible = (document[:, None] == document) & (distance >= 0)
    if window_size[0] >= 0:
        visible = visible & (distance <= window_size[0])
    q, k, v = (t.transpose(0, 1).float() for t in (query, key, value))
    if enable_gqa:
        k, v = (t.repeat_interleave(len(q) // len(t), dim=0) for t in (k, v))
    scores = q @ k.transpose(1, 2) * (q.shape[-1] ** -0.5 if scale is None else scale)
    weights = torch.softmax(scores.masked_fill(~visible, float("-inf")), -1)
    return (weights @ v).transpose(0, 1).to(query.dtype)
