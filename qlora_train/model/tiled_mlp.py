"""The MLP of a layer in token tiles, for contexts whose MLP working set would not fit.

An MLP treats tokens one by one, so T tokens can pass it C at a time. Forward keeps only its input x [T, D];
backward takes each tile forward again and back at once, so what is alive at a time is C rows of the
intermediate width instead of T. At 32,768 tokens with D = 4,096, I = 14,336 in 16 bits: 0.94 GB for each of
gate, up, activation and product; with C = 2,048, 59 MB.

FLOPs: one more MLP forward where the layer is kept; none where it is recomputed anyway and the value of its
output is not needed (`skip_output`), since then the forward pass inside backward computes nothing. Why not a
checkpoint of the whole MLP: it bounds what is kept, not what is alive while a layer is taken back.

Factor gradients are sums over tokens; tiles add them in fp32 one after another. Dropout is a function of the
token (kernels/dropout.py), so each tile takes its tokens' keys.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from qlora_train.model.linear import DropoutContext, FrozenLinear


class TiledMlp(nn.Module):
    """Stands where a layer's MLP stood. tile_tokens: C, None for all at once. tail: its last linear, where
    the value of the MLP's output may be skipped in recomputation (see `FrozenLinear.skip_output`)."""

    def __init__(self, mlp: nn.Module, context: DropoutContext, tail: FrozenLinear | None) -> None:
        super().__init__()
        self.mlp = mlp
        self.tile_tokens: int | None = None
        self.skip_output = False
        self.context = context
        self.tail = tail
        self.linears = [m for m in mlp.modules() if isinstance(m, FrozenLinear)]

    def forward(self, x: Tensor) -> Tensor:
        """x [1, T, D] -> [1, T, D]."""
        if self.tile_tokens is None:
            return self.mlp(x)
        lora = [linear.lora.A for linear in self.linears if linear.lora is not None]
        return _TiledMlpFunction.apply(x, self, *lora)

    def tiles(self, num_tokens: int) -> list[slice]:
        """Ranges of tokens."""
        assert self.tile_tokens is not None
        starts = range(0, num_tokens, self.tile_tokens)
        return [slice(start, min(start + self.tile_tokens, num_tokens)) for start in starts]

    @contextmanager
    def of_tile(self, keys: Any, tile: slice) -> Iterator[None]:
        """Dropout as for the tokens of a tile; keys: the micro-batch's, None where nothing is dropped."""
        before = self.context.tokens
        self.context.tokens = (
            None if keys is None else replace(keys, rows=keys.rows[tile], offsets=keys.offsets[tile])
        )
        try:
            yield
        finally:
            self.context.tokens = before

    @contextmanager
    def skipping(self) -> Iterator[None]:
        """Inside, the value of the last linear is not computed, if it need not be."""
        if self.tail is not None:
            self.tail.skip_output = True
        try:
            yield
        finally:
            if self.tail is not None:
                self.tail.skip_output = False


class _TiledMlpFunction(torch.autograd.Function):
    """The factors are passed so that autograd sees that something here trains, also where x needs no
    gradient."""

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
                    linear.lora.collect_autograd()  # reference mode: into the fp32 sum, tile by tile
            if grad_input is not None:
                assert leaf.grad is not None
                grad_input[:, tile] = leaf.grad
        return grad_input, None, *[None] * ctx.num_lora
