"""Forward and backward of one training step: an explicit walk over the decoder layers.

    for each group of micro-batches:
      forward    for layer i = 0..L-1:  fetch(i);  for each k:  x[k] = layer_i(x[k])     inputs stored
      head       for each k:  loss, g[k] = dL/dx[k]                                     one pass over the head
      backward   for layer i = L-1..0:  fetch(i);  for each k:  (recompute y unless stored)  y.backward(g[k]);
                                                                g[k] = x[k].grad

Because the base is frozen, backward needs input gradients and the LoRA gradients of one layer at a time;
there is no graph through the model, only K small ones per layer. The result is bit-identical to autograd
through the whole model (for one micro-batch; for several it is the fp32 sum), whether a layer is kept,
offloaded or recomputed, and wherever its weights live.

Stored: K (L + 1) inputs of T D elements, plus the graphs of kept layers. Layers below the first one with
LoRA parameters need no backward, unless rows of the embedding are trained: nothing of them is stored. All
micro-batches of a group pass a layer before the next layer is touched (layer-major), so what a layer costs to
bring in and dequantize is paid once per pass and group: G (2 L - s) fetches for G groups, s of them saved
where the direction turns and the next layers are still in their slots.

Nothing here reads a tensor on the host: the whole walk is queued without waiting for the device.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor

from qlora_train.device.step_clock import Cause
from qlora_train.kernels.dropout import DropoutKeys
from qlora_train.model.decoder import FrozenDecoder, LayerArguments
from qlora_train.model.lora_parameters import LoraParameters
from qlora_train.model.loss import TiledLoss, reference_loss
from qlora_train.model.packed_tokens import PackedTokens
from qlora_train.walk.activation_store import ActivationStore, LayerActivations
from qlora_train.weights.execution_plan import ExecutionPlan
from qlora_train.weights.host_memory import HostMemory


class LayerWalk:
    """Forward and backward of one optimizer step; gradients land in `lora.gradient`.

    execution: what is kept, recomputed or offloaded, and in how many groups micro-batches pass; may be
    replaced between steps. reference: library operations and autograd's own sums (`training.kernels:
    reference`).
    host: memory for what is offloaded; None: memory of its own. make_loss: the loss's class.
    """

    def __init__(
        self,
        decoder: FrozenDecoder,
        lora: LoraParameters,
        execution: ExecutionPlan,
        *,
        reference: bool,
        host: HostMemory | None = None,
        make_loss: type[TiledLoss] = TiledLoss,
    ) -> None:
        self._decoder, self._lora, self._reference = decoder, lora, reference
        self._modules = [decoder.lora_of(i) for i in range(len(decoder.layers))]
        self._trains_tokens = decoder.trains_tokens
        adapted = (i for i, modules in enumerate(self._modules) if modules)
        self._lowest = 0 if self._trains_tokens else next(adapted)
        kernels = decoder.kernels
        decoder.run_with(kernels.reference() if reference else replace(kernels, is_reference=False))
        self._make_loss = make_loss
        self._activations = ActivationStore(decoder, lora, host or HostMemory(decoder.device))
        self.set_execution(execution)

    def set_execution(self, execution: ExecutionPlan) -> None:
        """Walk by this plan from the next step on."""
        assert execution.num_layers == len(self._decoder.layers)
        self.execution = execution
        self._decoder.weights.hold_dequantized = execution.hold_dequantized
        self._decoder.tile_mlps(execution.mlp_tile_tokens, self._lora.dropout_context)
        self._loss = self._make_loss(self._decoder, execution.loss_tokens)

    def accumulate(
        self,
        micro_batches: Sequence[PackedTokens],
        *,
        seed: int,
        step: int,
        num_supervised: int,
        loss_scale: float = 1.0,
    ) -> Tensor:
        """Add the gradient of (loss sum / num_supervised) * loss_scale to `lora.gradient`.

        micro_batches: K of them. seed, step: identify the dropout masks. num_supervised: supervised tokens of
        the whole optimizer step on all ranks. Returns the sum of the supervised losses of these
        micro-batches, fp32 scalar on the device.
        """
        for modules in self._modules:
            for module in modules:
                module.zero_grad()  # left by an aborted step
        size = self.execution.group_size(len(micro_batches))
        groups = [micro_batches[start : start + size] for start in range(0, len(micro_batches), size)]
        self._decoder.weights.set_schedule(self._order(len(groups)))
        loss_sum = torch.zeros((), dtype=torch.float32, device=self._decoder.device.torch)
        for group in groups:
            keys = [DropoutKeys(seed, step, tokens.rows, tokens.offsets) for tokens in group]
            loss_sum += self._walk(group, keys, num_supervised, loss_scale)
        return loss_sum

    def abort(self) -> None:
        """After an exception out of `accumulate`, while its traceback still holds the tensors: wait for the
        copies that are under way."""
        self._decoder.release_shared()
        self._activations.offloader.synchronize()

    def _order(self, num_groups: int) -> list[int]:
        """The layers and head tiles that this step visits, in order, then the layers that the next begins
        with."""
        num_layers = len(self._decoder.layers)
        forward, back = list(range(num_layers)), list(reversed(range(self._lowest, num_layers)))
        one_group = forward + list(self._decoder.head.items) + back
        return one_group * num_groups + forward

    def _walk(
        self,
        group: Sequence[PackedTokens],
        keys: Sequence[DropoutKeys],
        num_supervised: int,
        loss_scale: float,
    ) -> Tensor:
        """Forward, head and backward of one group; returns the sum of its losses."""
        clock = self._decoder.device.clock
        with clock.spent_on(Cause.FORWARD):
            embedded = [self._decoder.embed_packed(tokens) for tokens in group]
            xs, arguments = [x for x, _ in embedded], [a for _, a in embedded]
            del embedded
            stored = self._forward(xs, arguments, keys)
        with clock.spent_on(Cause.LOSS):
            loss_sum, gradients = self._losses(xs, group, num_supervised, loss_scale)
            xs.clear()
        with clock.spent_on(Cause.BACKWARD):
            self._backward(stored, gradients, arguments, keys)
            if self._trains_tokens:
                for tokens, gradient in zip(group, gradients, strict=True):
                    self._decoder.add_embedding_gradient(tokens, gradient)
        return loss_sum

    def _needs_dx(self, layer: int) -> bool:
        """Whether a layer's input needs a gradient."""
        return layer > self._lowest or self._trains_tokens

    def _forward(
        self, xs: list[Tensor], arguments: Sequence[list[LayerArguments]], keys: Sequence[DropoutKeys]
    ) -> list[LayerActivations]:
        """Run every x_0 in the list through all layers, in place; returns the activations, one per layer."""
        stored: list[LayerActivations] = []
        for i in range(len(self._decoder.layers)):
            layer = self._activations.layer(i, self.execution, in_backward=i >= self._lowest)
            with self._decoder.weights.layer_on_device(i):
                for k, x in enumerate(xs):
                    with self._dropping(keys[k]):
                        xs[k] = layer.forward(x, arguments[k][i], with_gradient=self._needs_dx(i))
            stored.append(layer)
        del x  # the input of the last layer
        self._activations.offloader.finish_copies()
        return stored

    def _backward(
        self,
        stored: list[LayerActivations],
        gradients: list[Tensor],
        arguments: Sequence[list[LayerArguments]],
        keys: Sequence[DropoutKeys],
    ) -> None:
        """Take every dL/dx in the list back to the lowest layer with LoRA parameters, in place. stored: the
        result of `_forward`, emptied on the way."""
        for i in reversed(range(self._lowest, len(self._decoder.layers))):
            layer = stored.pop()
            with self._decoder.weights.layer_on_device(i):
                for k, gradient in enumerate(gradients):
                    if k + 1 < len(gradients):
                        layer.fetch(k + 1)
                    elif i > self._lowest:
                        stored[-1].fetch(0)
                    with self._dropping(keys[k]):
                        gradients[k] = layer.backward(k, gradient, arguments[k][i])
                    if self._reference:
                        for module in self._modules[i]:
                            module.collect_autograd()

    def _losses(
        self, xs: list[Tensor], group: Sequence[PackedTokens], num_supervised: int, loss_scale: float
    ) -> tuple[Tensor, list[Tensor]]:
        """(sum of losses, dL/dx of each) from the outputs of the last layer. May empty `xs`."""
        if not self._reference:
            return self._loss(xs, group, loss_scale / num_supervised)
        loss_sum = torch.zeros((), dtype=torch.float32, device=self._decoder.device.torch)
        gradients = []
        head = self._decoder.whole_head()
        for x, tokens in zip(xs, group, strict=True):
            loss, gradient = reference_loss(self._decoder, head, x, tokens, num_supervised, loss_scale)
            loss_sum += loss
            gradients.append(gradient)
        return loss_sum, gradients

    @contextmanager
    def _dropping(self, keys: DropoutKeys) -> Iterator[None]:
        """Dropout inside uses the masks of one micro-batch."""
        self._lora.dropout_context.tokens = keys
        try:
            yield
        finally:
            self._lora.dropout_context.tokens = None
