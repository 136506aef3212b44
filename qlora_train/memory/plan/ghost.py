"""Ghost tensors: sizes without numbers.

Code that is written like the real one and run with ghosts says which bytes are alive when, in a millisecond
and without torch.

Peaks are decided by details nobody gets right in closed form: which operation saves its input, that a norm in
16 bits makes a 32-bit copy, that a temporary lives to the end of its statement, in which order autograd goes
back. So the planner does not have formulas. It has the layer once more (ghost_layer.py), line by line as
transformers and our linear write it, over tensors that only know their size; CPython frees an object when its
last name goes, here as there. What has to be known of an operation is its result, what it saves, and what its
backward allocates (ghost_ops.py).

`Ledger` adds up what is alive, by cause, and remembers the moment of the peak. `backward` is autograd's
engine: nodes in reverse order of their making, each releasing what it saved when it has run, a second
gradient for the same node added out of place.

Not modelled: an allocator's rounding, and scratch inside one operation, which the CPU's meter does not see
either. On CUDA the allocator gives it, so the one that is large counts there: attention's (ghost_flash.py).
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import count
from math import prod

WORKING_SET = "one layer's working set"
Bytes = dict[str, int]
"""Bytes by cause."""


class Ledger:
    """Bytes alive now and at the peak, by cause."""

    def __init__(self) -> None:
        self.live: Bytes = {}
        self.live_bytes = 0
        self.peak: Bytes = {}
        self.peak_bytes = 0
        self.records_graph = True
        self._cause = WORKING_SET
        self._order = count()

    @contextmanager
    def cause(self, name: str) -> Iterator[None]:
        """What is allocated inside counts under `name`."""
        before, self._cause = self._cause, name
        try:
            yield
        finally:
            self._cause = before

    @contextmanager
    def no_grad(self) -> Iterator[None]:
        """Nothing inside gets a graph."""
        before, self.records_graph = self.records_graph, False
        try:
            yield
        finally:
            self.records_graph = before

    def tensor(self, shape: Sequence[int], itemsize: int) -> Ghost:
        """A new tensor."""
        return Ghost(_Storage(self, prod(shape) * itemsize, self._cause), tuple(shape), itemsize)

    def scratch(self, num_bytes: int) -> None:
        """Something that comes and goes at once."""
        self.add(self._cause, num_bytes)
        self.add(self._cause, -num_bytes)

    def bump(self, extra: Mapping[str, int]) -> None:
        """Something with these bytes at its most, above what is alive now, comes and goes."""
        num_bytes = self.live_bytes + sum(extra.values())
        if num_bytes > self.peak_bytes:
            self.peak_bytes, self.peak = num_bytes, total(self.live, extra)

    def restart(self) -> None:
        """Let the peak begin at what is alive now."""
        self.peak_bytes, self.peak = self.live_bytes, dict(self.live)

    def add(self, cause: str, num_bytes: int) -> None:
        self.live[cause] = self.live.get(cause, 0) + num_bytes
        self.live_bytes += num_bytes
        if self.live_bytes > self.peak_bytes:
            self.peak_bytes, self.peak = self.live_bytes, dict(self.live)

    def next_order(self) -> int:
        return next(self._order)


class _Storage:
    """Bytes that are alive as long as a tensor refers to them."""

    __slots__ = ("cause", "ledger", "num_bytes")

    def __init__(self, ledger: Ledger, num_bytes: int, cause: str) -> None:
        self.ledger, self.num_bytes, self.cause = ledger, num_bytes, cause
        ledger.add(cause, num_bytes)

    def __del__(self) -> None:
        self.ledger.add(self.cause, -self.num_bytes)


class Ghost:
    """A tensor's shape, element size, storage and place in the graph."""

    __slots__ = ("itemsize", "node", "shape", "storage")

    def __init__(
        self, storage: _Storage, shape: tuple[int, ...], itemsize: int, node: Node | None = None
    ) -> None:
        self.storage, self.shape, self.itemsize, self.node = storage, shape, itemsize, node

    @property
    def ledger(self) -> Ledger:
        return self.storage.ledger

    @property
    def num_bytes(self) -> int:
        return prod(self.shape) * self.itemsize

    def view(self, *shape: int) -> Ghost:
        """The same elements in another shape. Gradients pass as they are."""
        assert prod(shape) == prod(self.shape), (shape, self.shape)
        return Ghost(self.storage, shape, self.itemsize, self.node)

    def detach(self) -> Ghost:
        return Ghost(self.storage, self.shape, self.itemsize)

    def leaf(self) -> Ghost:
        """Detached, and asking for a gradient (`leaf.node.gradient`)."""
        return Ghost(self.storage, self.shape, self.itemsize, Node(self.ledger, (), (), None))

    def like(self) -> Ghost:
        """A new tensor of this shape and element size."""
        return self.ledger.tensor(self.shape, self.itemsize)


Backward = Callable[..., Sequence[Ghost | None]]
"""(gradient, *saved) -> a gradient for each input."""


class Node:
    """One operation of the graph; a leaf where `backward` is None."""

    __slots__ = ("backward", "buffer", "gradient", "inputs", "order", "saved")

    def __init__(
        self, ledger: Ledger, inputs: tuple[Node | None, ...], saved: tuple[Ghost, ...], run: Backward | None
    ) -> None:
        self.order = ledger.next_order()
        self.inputs, self.saved, self.backward = inputs, saved, run
        self.buffer: Ghost | None = None
        self.gradient: Ghost | None = None

    def run(self) -> Sequence[Ghost | None]:
        gradient, self.buffer = self.buffer, None
        if self.backward is None:
            self.gradient = gradient
            return ()
        return self.backward(gradient, *self.saved)


def apply(result: Ghost, inputs: Sequence[Ghost], saved: Sequence[Ghost], run: Backward) -> Ghost:
    """`result` as the outcome of an operation: with a graph if any input has one, else as it is."""
    if result.ledger.records_graph and any(x.node is not None for x in inputs):
        nodes = tuple(x.node for x in inputs)
        detached = tuple(x.detach() for x in saved)
        result = Ghost(
            result.storage, result.shape, result.itemsize, Node(result.ledger, nodes, detached, run)
        )
    return result


def backward(y: Ghost, gradient: Ghost) -> None:
    """Autograd's walk back from y; leaves keep their gradients."""
    assert y.node is not None
    waiting = _dependencies(y.node)
    y.node.buffer = gradient.detach()
    ready = [(-y.node.order, y.node)]
    while ready:
        _, node = heapq.heappop(ready)
        gradients = list(node.run())
        node.saved = ()
        gradients.reverse()
        for target in node.inputs:
            part = gradients.pop()
            if target is None:
                continue
            if part is not None:
                target.buffer = part if target.buffer is None else _sum(target.buffer, part)
            del part
            waiting[target] -= 1
            if not waiting[target]:
                heapq.heappush(ready, (-target.order, target))
        del node


def _sum(a: Ghost, b: Ghost) -> Ghost:
    return a.like()


def _dependencies(root: Node) -> dict[Node, int]:
    counts: dict[Node, int] = {root: 0}
    stack = [root]
    while stack:
        for target in stack.pop().inputs:
            if target is not None:
                if target not in counts:
                    counts[target] = 0
                    stack.append(target)
                counts[target] += 1
    return counts


def total(*parts: Mapping[str, int]) -> Bytes:
    """The sum of bytes by cause, causes without bytes left out."""
    result: Bytes = {}
    for part in parts:
        for cause, num_bytes in part.items():
            result[cause] = result.get(cause, 0) + num_bytes
    return {cause: num_bytes for cause, num_bytes in result.items() if num_bytes}
