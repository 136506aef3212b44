"""The MLP of a layer in tiles of tokens, for long contexts whose MLP activations would not fit.

An MLP processes each token independently, so T tokens can be processed C at a time. Forward saves only its
input x [T, D]; backward runs each tile forward and backward in turn, so C instead of T rows of the
intermediate width are alive at a time. At 32,768 tokens with D = 4,096, I = 14,336 in 16 bits: 0.94 GB for
each of gate, up, activation and product; with C = 2,048, 59 MB.

FLOPs: one more MLP forward if the layer's activations are kept; none if the layer is recomputed anyway and
its output is not needed (`skip_output`), since the recomputed forward then skips the MLP. Why not checkpoint
the whole MLP: that bounds what is saved, not what is alive in backward.

Gradients of LoRA parameters are sums over tokens; the tiles add to them in fp32. Dropout is a function of the
token (kernels/dropout.py), so each tile uses the keys of its tokens.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from qlora_train.model.linear import DropoutContext, FrozenLinear


class TiledMlp(nn.Module):
    """Replaces a layer's MLP. tile_tokens: C; None: all tokens at once. last_linear: the MLP's last one, if
    recomputation may skip its output (see `FrozenLinear.skip_output`), else None."""

    def __init__(self, mlp: nn.Module, context: DropoutContext, last_linear: FrozenLinear | None) -> None:
        super().__init__()
        self.mlp = mlp
        self.tile_tokens: int | None = None
        self.skip_output = False
        self.context = context
        self.last_linear = last_linear
        self.linears = [m for m in mlp.modules() if isinstance(m, FrozenLinear)]

    def forward(self, x: Tensor) -> Tensor:
        """x [1, T, D] -> [1, T, D]."""
        if self.tile_tokens is None:
            return self.mlp(x)
        lora = [linear.lora.A for linear in self.linears if linear.lora is not None]
        return _TiledMlpFunction.apply(x, self, *lora)

    def tiles(self, num_tokens: int) -> list[slice]:
        """The token range of every tile."""
        assert self.tile_tokens is not None
        starts = range(0, num_tokens, self.tile_tokens)
        return [slice(start, min(start + self.tile_tokens, num_tokens)) for start in starts]

    @contextmanager
    def of_tile(self, keys: Any, tile: slice) -> Iterator[None]:
        """Context with the dropout keys of a tile's tokens. keys: the micro-batch's, or None."""
        before = self.context.tokens
        self.context.tokens = None if keys is None else keys.of(tile)
        try:
            yield
        finally:
            self.context.tokens = before

    @contextmanager
    def skipping(self) -> Iterator[None]:
        """Context in which the last linear skips its output, if it may."""
        if self.last_linear is not None:
            self.last_linear.skip_output = True
        try:
            yield
        finally:
            if self.last_linear is not None:
                self.last_linear.skip_output = False


class _TiledMlpFunction(torch.autograd.Function):
    """Autograd of `TiledMlp`; the A matrices are passed so that the output requires a gradient even if x does
    not."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, module: TiledMlp, *lora: Tensor) -> Tensor:
        ctx.module, ctx.keys, ctx.num_lora = module, module.context.tokens, len(lora)
        ctx.save_for_backward(x)
        if module.skip_output:
            return x.new_zeros(()).expand(x.shape)
        y = torch.empty_like(x)
        for tile in module.tiles(x.shape[1]):
            with module.of_tile(ctx.keys, tile):
                y[:, tile] = module.mlp(x[:, tile])
        return y

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        module: TiledMlp = ctx.module
        (x,) = ctx.saved_tensors
        needs_dx = ctx.needs_input_grad[0]
        grad_input = torch.empty_like(x) if needs_dx else None
        for tile in module.tiles(x.shape[1]):
            leaf = x[:, tile].detach().requires_grad_(needs_dx)
            with torch.enable_grad(), module.of_tile(ctx.keys, tile), module.skipping():
                module.mlp(leaf).backward(gradient[:, tile])
            for linear in module.linears:
                if linear.lora is not None:
                    linear.lora.collect_autograd()  # reference mode: add each tile in fp32
            if grad_input is not None:
                assert leaf.grad is not None
                grad_input[:, tile] = leaf.grad
        return grad_input, None, *[None] * ctx.num_lora
