"""CUDA graphs of the walk: the forward half of a group is one graph, its backward half another.

A step of a small model is thousands of short kernels, and the host takes longer to queue them than the GPU to
run them. A graph is queued as a whole. Between the two halves stays what has no fixed shape: embedding
(library code) and head (as many tokens as are supervised) are queued as ever.

    edge[k] <- x_0[k], arguments <- the batch's         copies into tensors that stay where they are
    forward graph      edge[k] <- layer_L-1(... layer_0(edge[k]))
    head               loss, dL/dx_L of edge[k]
    edge[k] <- dL/dx_L
    backward graph     adds to the flat fp32 gradient

A graph repeats kernels with the addresses they had. So whatever a half reads or writes must be at the same
place in every step: packed weights, the buffer they are unpacked into, norms, factors, flat gradient (they
never move); one `edge` [1, T, D] per micro-batch and copies of the layers' tensor arguments (kept here). All
else is made inside. What is no tensor is burnt in: the shapes, which are few (`of_one_shape`), each with
graphs of its own. Copies begin as zeros and are filled at replay only, so a copy that is forgotten shows.

Bytes. What a half allocates comes from a pool that the graphs share, in the order of the walk, so the pool is
as large as the walk's own peak. But the pool keeps its bytes: head, embedding and optimizer do not find room
there any more (memory/plan/graph_bytes.py counts that), nor does an evaluation, nor an eager walk. So the
graphs are released before one (`release`), and captured again after it.

Trust. The first step of a shape is computed both ways: eagerly first, which also loads every kernel (a
capture may not) and shows whether a layer waits for the device; its result counts. Then it is captured,
replayed and compared: the same bits where torch is deterministic; else within TOLERANCE, as the backward of
flash attention adds in any order. What goes wrong ends the use of graphs; the walk goes on without.

Why not torch.cuda.make_graphed_callables: one callable per layer would be 2 L K graphs, and its inputs' and
outputs' copies stay for each. Why not torch.compile(mode="reduce-overhead"): it compiles the library's layers
again and chooses the order of sums itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor

from qlora_train.errors import TrainingFailure
from qlora_train.kernels.dropout import TokenKeys
from qlora_train.memory.tighten import is_out_of_memory
from qlora_train.model.attention import DocumentLayout
from qlora_train.model.decoder import LayerArguments
from qlora_train.model.packed_tokens import PackedTokens
from qlora_train.kernels.varlen_attention import VarlenAttention
from qlora_train.train.recorder import Recorder, Replay
from qlora_train.train.remembered import RememberedLayer

TOLERANCE = 2e-2
"""Relative difference of two gradients, or losses, that only the order of sums explains in 16 bits."""
MAX_CAPTURED = 4
"""Shapes with graphs at a time: the driver keeps some memory for each."""

Head = Callable[[list[Tensor]], tuple[Tensor, list[Tensor]]]
"""Outputs of the last layer -> (sum of losses, dL/dx of each); may empty the list."""
Shape = tuple[tuple[int, ...], int, int]


class Halves(Protocol):
    """The parts of `LayerWalk` that are needed here."""

    def embed(self, tokens: PackedTokens) -> tuple[Tensor, list[LayerArguments]]: ...

    def forward(
        self, xs: list[Tensor], arguments: Sequence[list[LayerArguments]], keys: Sequence[TokenKeys]
    ) -> list[RememberedLayer]: ...

    def backward(
        self,
        remembered: list[RememberedLayer],
        gradients: list[Tensor],
        arguments: Sequence[list[LayerArguments]],
        keys: Sequence[TokenKeys],
    ) -> None: ...

    def walk_group(
        self,
        group: Sequence[PackedTokens],
        keys: Sequence[TokenKeys],
        head: Head,
        within: Callable[[], AbstractContextManager[object]] = ...,
    ) -> Tensor: ...


@dataclass(frozen=True)
class _Inputs:
    """The layers' arguments of one micro-batch: copies of the tensors, and what was burnt in."""

    copies: list[Tensor]
    plain: list[Any]

    def fill(self, arguments: list[LayerArguments]) -> None:
        tensors, plain = _leaves(arguments)
        if plain != self.plain:
            raise ValueError("layers are called with other numbers in every step")
        for copy, tensor in zip(self.copies, tensors, strict=True):
            copy.copy_(tensor)


@dataclass(frozen=True)
class _Captured:
    """inputs: of every micro-batch."""

    inputs: list[_Inputs]
    forward: Replay
    backward: Replay


class WalkGraphs:
    """Walks groups by graphs; eagerly once they are given up.

    gradient: the flat one. must: a failure to capture, or a difference, is a `TrainingFailure`, not only
    said; running out of memory never is.
    """

    def __init__(
        self, recorder: Recorder, gradient: Tensor, *, must: bool, say: Callable[[str], None]
    ) -> None:
        self._recorder, self._gradient, self._must, self._say = recorder, gradient, must, say
        self._edges: list[Tensor] = []
        self._captured: dict[Shape, _Captured] = {}
        self._proven: set[Shape] = set()
        self.are_used = True

    def walk(
        self, walk: Halves, group: Sequence[PackedTokens], keys: Sequence[TokenKeys], head: Head
    ) -> Tensor:
        """As `walk.walk_group`: adds to the gradient, returns the sum of losses."""
        shape = _shape_of(group)
        if self.are_used and shape not in self._proven:
            return self._prove(shape, walk, group, keys, head)
        if self.are_used:
            ready = self._try(lambda: self._before_backward(shape, walk, group, keys, head))
            if ready is not None:
                return self._after_head(shape, *ready)
        return walk.walk_group(group, keys, head)

    def release(self) -> None:
        """Give the memory back; what is walked next is captured again."""
        if self._captured:
            self._drop()
            self._recorder.release()

    def give_up(self, reason: str) -> None:
        """Walk eagerly from now on, and say why."""
        if self.are_used:
            self.are_used = False
            self._drop()
            self._say(f"CUDA graphs are no longer used: {reason}")

    def _prove(
        self, shape: Shape, walk: Halves, group: Sequence[PackedTokens], keys: Sequence[TokenKeys], head: Head
    ) -> Tensor:
        """Both ways; see the module docstring. What is compared waits on the host: the device may be full."""
        self.release()
        before, waits = _on_host(self._gradient), list[str]()
        loss = walk.walk_group(group, keys, head, lambda: self._recorder.watching(waits))
        expected = _on_host(self._gradient)
        size = torch.linalg.vector_norm(expected - before)
        if waits:
            self._fail(f"a layer waits for the device ({waits[0]})")
        if waits or not (torch.isfinite(size) and size > 0):  # nothing to compare: another step will do
            return loss
        self._gradient.copy_(before)
        ready = self._try(lambda: self._before_backward(shape, walk, group, keys, head))
        if ready is not None:
            replayed_loss = self._after_head(shape, *ready)
            off = torch.linalg.vector_norm(_on_host(self._gradient).sub_(expected)) / size
            loss_off = ((replayed_loss - loss).abs() / loss.abs()).cpu()
            tolerance = 0.0 if torch.are_deterministic_algorithms_enabled() else TOLERANCE
            if off <= tolerance and loss_off <= tolerance:  # NaN is not
                self._proven.add(shape)
            else:
                self._fail(f"replayed, gradient and loss differ by {off:.1e} and {loss_off:.1e}, relative")
        self._gradient.copy_(expected)
        return loss

    def _before_backward(
        self, shape: Shape, walk: Halves, group: Sequence[PackedTokens], keys: Sequence[TokenKeys], head: Head
    ) -> tuple[Tensor, list[Tensor]]:
        """Everything that may run out of memory; the gradient has not been touched yet. Returns what the head
        does."""
        if shape not in self._captured:
            if len(self._captured) == MAX_CAPTURED:
                self.release()
            self._captured[shape] = self._capture(walk, group, keys)
        edges = self._edges[: len(group)]
        for edge, inputs, tokens in zip(edges, self._captured[shape].inputs, group, strict=True):
            x, arguments = walk.embed(tokens)
            edge.copy_(x)
            inputs.fill(arguments)
        self._captured[shape].forward()
        return head(list(edges))

    def _after_head(self, shape: Shape, loss_sum: Tensor, gradients: list[Tensor]) -> Tensor:
        for edge, gradient in zip(self._edges[: len(gradients)], gradients, strict=True):
            edge.copy_(gradient)
        self._captured[shape].backward()
        return loss_sum

    def _capture(self, walk: Halves, group: Sequence[PackedTokens], keys: Sequence[TokenKeys]) -> _Captured:
        arguments, inputs = [], []
        for k, tokens in enumerate(group):
            x, given = walk.embed(tokens)
            if k == len(self._edges):
                self._edges.append(torch.zeros_like(x))
            tensors, plain = _leaves(given)
            copies = {id(tensor): torch.zeros_like(tensor) for tensor in tensors}
            arguments.append(_mapped(given, partial(_copy_or_itself, copies)))
            inputs.append(_Inputs(list(copies.values()), plain))
        del x, given, tensors
        edges, remembered = self._edges[: len(group)], list[RememberedLayer]()

        def forward() -> None:
            xs = [edge.clone() for edge in edges]
            remembered.extend(walk.forward(xs, arguments, keys))
            for edge, x in zip(edges, xs, strict=True):
                edge.copy_(x)

        def backward() -> None:
            walk.backward(remembered, list(edges), arguments, keys)

        return _Captured(inputs, self._recorder.capture(forward), self._recorder.capture(backward))

    def _drop(self) -> None:
        self._captured.clear()
        self._edges.clear()

    def _try(self, work: Callable[[], tuple[Tensor, list[Tensor]]]) -> tuple[Tensor, list[Tensor]] | None:
        """None: it failed, and graphs are given up. The exception ends here, with the tensors it holds. One
        that has nothing to do with graphs comes again when the group is walked eagerly."""
        try:
            return work()
        except (RuntimeError, ValueError, MemoryError) as error:
            ran_out = any(is_out_of_memory(e) for e in _with_causes(error))
            reason = str(error).strip().partition("\n")[0] or type(error).__name__
        if ran_out:
            self.give_up(f"out of memory with them ({reason})")
            self._recorder.release()
        else:
            self._fail(f"the walk cannot be captured ({reason})")
        return None

    def _fail(self, reason: str) -> None:
        if self._must:
            raise TrainingFailure(f"training.cuda_graphs: true, but {reason}. Write auto or false.")
        self.give_up(reason)


def _shape_of(group: Sequence[PackedTokens]) -> Shape:
    """(tokens of each, boundaries of documents, the longest one)."""
    documents = group[0].documents
    return tuple(len(tokens.ids) for tokens in group), len(documents.cu_seqlens), documents.longest


def _mapped(value: Any, new: Callable[[Any], Any]) -> Any:
    """Nested arguments with every leaf replaced. Of the documents only what the variable-length kernel is
    told: a layer that attends another way finds nothing there, and fails."""
    if isinstance(value, dict):
        return {key: _mapped(item, new) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_mapped(item, new) for item in value)
    if isinstance(value, DocumentLayout):
        boundaries, longest = new(value.cu_seqlens), new(value.longest)
        return DocumentLayout((), (), inverse=boundaries, cu_seqlens=boundaries, longest=longest)
    return new(value)


def _leaves(value: Any) -> tuple[list[Tensor], list[Any]]:
    """The tensors in nested arguments, each once, and what is plain. ValueError for what is neither."""
    tensors: dict[int, Tensor] = {}
    plain: list[Any] = []

    def note(leaf: Any) -> None:
        if isinstance(leaf, Tensor):
            tensors[id(leaf)] = leaf
        elif leaf is None or isinstance(leaf, bool | int | float | str | VarlenAttention):
            plain.append(leaf)
        else:
            raise ValueError(f"layers are called with a {type(leaf).__name__}")

    _mapped(value, note)
    return list(tensors.values()), plain


def _copy_or_itself(copies: dict[int, Tensor], leaf: Any) -> Any:
    return copies.get(id(leaf), leaf)


def _on_host(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", copy=True)


def _with_causes(error: BaseException | None) -> Iterator[BaseException]:
    """Ending a capture that went wrong raises again."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__
