"""The training step: an explicit walk over the decoder layers.

    forward    for layer i = 0..L-1:  for each micro-batch k:  x[k] = layer_i(x[k])     inputs remembered
    head       for each micro-batch k:  loss, g[k] = dL/dx[k]
    backward   for layer i = L-1..0:  for each k:  (y again, unless kept)  y.backward(g[k]);  g[k] = x[k].grad

Because the base is frozen, backward needs input gradients and the LoRA gradients of one layer at a time;
there is no graph through the model, only K small ones per layer. The result is bit-identical to autograd
through the whole model (for one micro-batch; for several it is the fp32 sum), whether a layer is kept or
recomputed.

Remembered: K (L + 1) inputs of T D elements, plus the graphs of kept layers. Layers below the first one with
factors need no backward: nothing of them is remembered. All micro-batches pass a layer before the next layer
is touched (layer-major), so whatever a layer costs to bring in is paid once per pass, not once per
micro-batch.

Nothing here reads a tensor on the host: the whole walk is queued without waiting for the device.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from qlora_train.kernels.dropout import TokenKeys
from qlora_train.memory.activations import Activation
from qlora_train.model.decoder import FrozenDecoder, LayerArguments
from qlora_train.model.factors import FactorBuffers
from qlora_train.model.loss import chunked_loss, reference_loss
from qlora_train.model.packed_tokens import PackedTokens


class LayerWalk:
    """Forward and backward of one optimizer step; gradients land in `factors.gradient`.

    activations: one policy per layer. reference: library operations and autograd's own sums
    (`training.kernels: reference`).
    """

    def __init__(
        self,
        decoder: FrozenDecoder,
        factors: FactorBuffers,
        activations: Sequence[Activation],
        *,
        reference: bool,
    ) -> None:
        assert len(activations) == len(decoder.layers)
        self._decoder, self._factors, self._reference = decoder, factors, reference
        self.activations = tuple(activations)
        self._modules = [factors.modules(decoder.linears_of(i)) for i in range(len(decoder.layers))]
        self._lowest = next(i for i, modules in enumerate(self._modules) if modules)
        for linear in decoder.linears.values():
            linear.use_autograd = reference

    def accumulate(
        self,
        micro_batches: Sequence[PackedTokens],
        *,
        seed: int,
        step: int,
        num_supervised: int,
        loss_scale: float = 1.0,
    ) -> Tensor:
        """Add the gradient of (loss sum / num_supervised) * loss_scale to `factors.gradient`.

        micro_batches: K of them. seed, step: identify the dropout masks. num_supervised: supervised tokens of
        the whole optimizer step on all ranks. Returns the sum of the supervised losses of these
        micro-batches, fp32 scalar on the device.
        """
        keys = [TokenKeys(seed, step, tokens.rows, tokens.offsets) for tokens in micro_batches]
        xs, arguments = self._embed(micro_batches)
        num_layers = len(self._decoder.layers)
        inputs: list[list[Tensor]] = [[] for _ in range(num_layers)]
        outputs: list[list[Tensor]] = [[] for _ in range(num_layers)]

        for i in range(num_layers):
            kept = i >= self._lowest and self.activations[i] is Activation.KEEP
            for k, x in enumerate(xs):
                leaf = x.detach().requires_grad_(i > self._lowest)
                y = self._run(i, leaf, arguments[k], keys[k], with_graph=kept)
                if i >= self._lowest:
                    inputs[i].append(leaf)
                if kept:
                    outputs[i].append(y)
                xs[k] = y.detach()

        loss_sum = torch.zeros((), dtype=torch.float32, device=self._decoder.device)
        gradients: list[Tensor] = []
        for k, tokens in enumerate(micro_batches):
            loss, gradient = self._loss(xs[k], tokens, num_supervised, loss_scale)
            loss_sum += loss
            gradients.append(gradient)
        xs.clear()

        for i in reversed(range(self._lowest, num_layers)):
            kept_outputs, layer_inputs = outputs.pop(), inputs.pop()
            for k, leaf in enumerate(layer_inputs):
                y = (
                    kept_outputs[k]
                    if kept_outputs
                    else self._run(i, leaf, arguments[k], keys[k], with_graph=True)
                )
                y.backward(gradients[k])
                if i > self._lowest:
                    assert leaf.grad is not None
                    gradients[k] = leaf.grad
                if self._reference:
                    for module in self._modules[i]:
                        module.collect_autograd()
                if kept_outputs:
                    kept_outputs[k] = y.detach()  # its graph is spent
        return loss_sum

    def _embed(
        self, micro_batches: Sequence[PackedTokens]
    ) -> tuple[list[Tensor], list[list[LayerArguments]]]:
        embedded = [self._decoder.embed_packed(tokens) for tokens in micro_batches]
        return [x for x, _ in embedded], [arguments for _, arguments in embedded]

    def _run(
        self, i: int, x: Tensor, arguments: list[LayerArguments], keys: TokenKeys, *, with_graph: bool
    ) -> Tensor:
        self._factors.dropout_context.tokens = keys
        try:
            with torch.set_grad_enabled(with_graph):
                return self._decoder.run_layer(i, x, arguments[i])
        finally:
            self._factors.dropout_context.tokens = None

    def _loss(
        self, x: Tensor, tokens: PackedTokens, num_supervised: int, loss_scale: float
    ) -> tuple[Tensor, Tensor]:
        if self._reference:
            return reference_loss(self._decoder, x, tokens, num_supervised, loss_scale)
        loss, gradient = chunked_loss(self._decoder, x, tokens, loss_scale / num_supervised)
        assert gradient is not None
        return loss, gradient
