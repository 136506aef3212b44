"""What a layer stores in its forward pass for its backward pass, by activation policy.

    keep       the graph: inputs and saved tensors stay on the device
    offload    the graph, its saved tensors in host memory (walk/host_offload.py)
    recompute  the input x_i [T, D], on the device or in host memory; backward runs the layer again. Where
               the start-up probe found that the last linear's output goes straight into the residual sum,
               that product is skipped (5.46 instead of 6 FLOPs per token and parameter: 37 % over keeping
               everything instead of 50 %)

Copies to host overlap the next micro-batch; the device copy is freed after it.

`LayerActivations` is one layer in one group of one step; it has one entry per micro-batch.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from qlora_train.model.decoder import FrozenDecoder, LayerArguments
from qlora_train.model.lora_parameters import LoraParameters
from qlora_train.walk.host_offload import HostOffloader, OffloadedGraph, OffloadedTensor
from qlora_train.weights.execution_plan import ActivationPolicy, ExecutionPlan, Placement
from qlora_train.weights.host_memory import HostMemory


class ActivationStore:
    """Makes the `LayerActivations` of every layer of a walk. host: memory for offloaded tensors."""

    def __init__(self, decoder: FrozenDecoder, lora: LoraParameters, host: HostMemory) -> None:
        self.decoder, self.lora = decoder, lora
        self.offloader = HostOffloader(decoder.device, host)

    def layer(self, index: int, execution: ExecutionPlan, *, in_backward: bool) -> LayerActivations:
        """The activations of one layer. in_backward: False below the first layer with LoRA parameters, where
        nothing is stored."""
        policy = execution.activations[index] if in_backward else None
        return LayerActivations(self, index, policy, inputs_wait_in_ram=execution.inputs is Placement.RAM)


class LayerActivations:
    """What one layer stores for the micro-batches of a group; see the module docstring."""

    def __init__(
        self, owner: ActivationStore, index: int, policy: ActivationPolicy | None, *, inputs_wait_in_ram: bool
    ) -> None:
        self._owner, self._index, self._policy = owner, index, policy
        self._inputs_wait_in_ram = inputs_wait_in_ram
        self._runs: list[_Kept | _ToRecompute | None] = []

    def forward(self, x: Tensor, arguments: LayerArguments, *, with_gradient: bool) -> Tensor:
        """Run the layer on one micro-batch and store what the policy says; returns its output [1, T, D].
        with_gradient: x needs a gradient."""
        decoder, index = self._owner.decoder, self._index
        if self._policy in (None, ActivationPolicy.RECOMPUTE):
            with torch.no_grad():
                y = decoder.run_layer(index, x, arguments)
            self._owner.offloader.finish_copies()
            if self._policy is not None:
                waiting = self._owner.offloader.offload(x) if self._inputs_wait_in_ram else x
                self._runs.append(_ToRecompute(waiting, with_gradient))
            return y
        leaf = x.detach().requires_grad_(with_gradient)
        if self._policy is ActivationPolicy.KEEP:
            with torch.enable_grad():
                y = decoder.run_layer(index, leaf, arguments)
            self._owner.offloader.finish_copies()
            self._runs.append(_Kept(leaf, y, None))
            return y.detach()
        graph = OffloadedGraph(self._owner.offloader, self._stays(leaf, arguments))
        with torch.enable_grad(), graph.recording():
            y = decoder.run_layer(index, leaf, arguments)
        graph.offload()
        self._runs.append(_Kept(leaf, y, graph))
        return y.detach()

    def fetch(self, k: int) -> None:
        """Start copying micro-batch k's offloaded tensors to the device. Call it one backward pass before
        that of k, no earlier: the copies take device memory."""
        run = self._runs[k]
        assert run is not None
        run.fetch()

    def backward(self, k: int, gradient: Tensor, arguments: LayerArguments) -> Tensor:
        """From dL/dy (`gradient`) to dL/dx [1, T, D] of micro-batch k, adding the gradients of the layer's
        LoRA parameters. Returns `gradient` itself where x needs none."""
        run, self._runs[k] = self._runs[k], None  # a graph is freed after its backward pass
        assert run is not None
        if isinstance(run, _ToRecompute):
            leaf = run.leaf()
            decoder = self._owner.decoder
            with torch.enable_grad(), decoder.running_again(self._index):
                y = decoder.run_layer(self._index, leaf, arguments)
        else:
            leaf, y = run.leaf, run.y
            run.leave_to_autograd()
        del run
        y.backward(gradient)
        return gradient if leaf.grad is None else leaf.grad

    def _stays(self, leaf: Tensor, arguments: LayerArguments) -> Iterator[Tensor]:
        """Tensors that are on the device anyway and need no copy."""
        yield leaf
        yield self._owner.lora.working
        yield from self._owner.decoder.layers[self._index].parameters()
        yield from _tensors(arguments)


class _Kept:
    """One micro-batch's graph from input `leaf` to output `y`. graph: None where it stays on the device."""

    def __init__(self, leaf: Tensor, y: Tensor, graph: OffloadedGraph | None) -> None:
        self.leaf, self.y, self._graph = leaf, y, graph

    def fetch(self) -> None:
        if self._graph is not None:
            self._graph.fetch()

    def leave_to_autograd(self) -> None:
        if self._graph is not None:
            self._graph.leave_to_autograd()


class _ToRecompute:
    """One micro-batch's layer input, from which backward runs the layer again."""

    def __init__(self, x: Tensor | OffloadedTensor, with_gradient: bool) -> None:
        self._x, self._with_gradient = x, with_gradient

    def fetch(self) -> None:
        if isinstance(self._x, OffloadedTensor):
            self._x.fetch()

    def leaf(self) -> Tensor:
        x = self._x.take() if isinstance(self._x, OffloadedTensor) else self._x
        return x.detach().requires_grad_(self._with_gradient)


def _tensors(value: Any) -> Iterator[Tensor]:
    """All tensors in nested dicts, lists and tuples."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from _tensors(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _tensors(item)
