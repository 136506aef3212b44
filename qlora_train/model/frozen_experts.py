"""The experts of a mixture-of-experts layer: y_t = sum_e p_te down_e(act(up_e(x_t))).

transformers holds all experts of a layer in two 3-D parameters and lets a registered function compute with
them (`ALL_EXPERTS_FUNCTIONS`). This is ours: the parameters are replaced by two matrices with the rows of
one expert after another (gate_up [E 2I, D], down [E D, I]), quantized in the layer buffer like every other
weight. What a family does besides (activation, interleaved gates, biases, transposed weights) is read off its
own module.

Tokens are sorted by expert; the host reads the counts once per layer and micro-batch, in the forward pass,
and they are kept for a recomputation. Experts are dequantized a chunk at a time (weight_store.py), and the
rows of one expert are computed in tiles of 2,048, so the working set does not depend on the routing.

Saved for backward: x [T, D], p [T, k], and the order of the T k rows. With W1, W2 of one expert, g = dL/dy of
its rows and q = g W2:

    dL/dp = <h, q>  (+ <g, b2>)      dh = p q      dz = act'(z) dh      dx += dz W1

The gradient of p needs h and q, not the expert's output, so a recomputation may leave out the last product.
With LoRA (expert_lora.py), W1 and W2 stand for W + s B A everywhere; A and B get their gradients here.
Routers are frozen, without an auxiliary loss: a frozen router could not follow it.

Why not transformers' `grouped_mm`: it needs every expert in 16 bits at once, and keeps each intermediate for
backward (419 MB a layer at 4,096 tokens of Qwen3-30B-A3B, against 17 MB here).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from qlora_train.errors import UnsupportedModelError
from qlora_train.model.expert_lora import ExpertLora, ExpertStack
from qlora_train.model.weight_store import WeightStore
from qlora_train.quant.formats import Quantization

NAME = "qlora_train_frozen_experts"
TILE_ROWS = 2048
"""Rows of one expert that are computed at once."""


class FrozenExperts(nn.Module):
    """The two matrices of a layer's experts, asked from a `WeightStore` a few experts at a time.

    name: module path of the library's experts module, which holds this one as `frozen`. shapes: name of a
    matrix within that module -> (rows, columns) of one expert, as it is stored. stacks: the same matrices as
    LoRA sees them. skip_output: the output is zeros, while backward stays what it is. counts: rows per
    expert, by name of the module, of the micro-batch that passes now. keeps_counts: read the counts that the
    first forward pass of this micro-batch left there, which a recomputation repeats bit for bit.
    kept: how the checkpoint has quantized the matrices, if they stay so; they are [out, in] then.
    is_transposed: they are [in, out].
    """

    source: WeightStore

    def __init__(self, name: str, module: nn.Module, kept: Quantization | None = None) -> None:
        super().__init__()
        self.name = name
        self.first = "gate_up_proj" if module.has_gate else "up_proj"
        self.num_experts = int(module.num_experts)  # type: ignore[arg-type]
        self.kept = kept
        self.is_transposed = bool(module.is_transposed) and kept is None
        self.shapes = {
            matrix: tuple(getattr(module, matrix).shape[1:]) for matrix in (self.first, "down_proj")
        }
        self.stacks = nn.ModuleDict()
        for matrix, (rows, columns) in self.shapes.items():
            sizes = (rows, columns) if module.is_transposed else (columns, rows)
            self.stacks[matrix] = ExpertStack(
                f"{name}.{matrix}", *sizes, self.num_experts, bool(module.is_transposed)
            )
        if self.is_transposed != bool(module.is_transposed):
            self.shapes = {matrix: (rows, columns) for matrix, (columns, rows) in self.shapes.items()}
        self.skip_output = False
        self.use_autograd = False
        self.counts: dict[str, list[int]] = {}
        self.keeps_counts = False

    def stacked_shapes(self) -> dict[str, tuple[int, int]]:
        """Matrix -> its size with the rows of all experts one after another."""
        return {name: (self.num_experts * rows, columns) for name, (rows, columns) in self.shapes.items()}

    def weights(self, matrix: str, experts: range, dtype: torch.dtype) -> Tensor:
        """Some experts' weights [experts, rows, columns], valid until others of this matrix are asked for."""
        rows, columns = self.shapes[matrix]
        found = self.source.dequantize_rows(
            f"{self.name}.{matrix}", experts.start * rows, experts.stop * rows, dtype
        )
        return found.view(len(experts), rows, columns)

    def stack(self, matrix: str) -> ExpertStack:
        found = self.stacks[matrix]
        assert isinstance(found, ExpertStack)
        return found

    def sorted_rows(self, chosen: Tensor) -> tuple[Tensor, list[int]]:
        """From the chosen experts [T, k]: the T k rows in the order of their experts, and how many each has:
        read by the host, or kept from the micro-batch's first forward pass."""
        experts, order = chosen.flatten().sort(stable=True)
        if self.keeps_counts and self.name in self.counts:
            return order, self.counts[self.name]
        if chosen.is_meta:
            return order, self._most_counts(*chosen.shape)
        ends = torch.searchsorted(experts, torch.arange(self.num_experts, device=experts.device), right=True)
        self.counts[self.name] = ends.diff(prepend=ends.new_zeros(1)).tolist()  # the one read
        return order, self.counts[self.name]

    def _most_counts(self, num_tokens: int, num_chosen: int) -> list[int]:
        """For a plan: the first experts take every token, which is the most they can get. In reference mode
        the others take one, since autograd saves the weights of every expert that has any."""
        counts, left = [], num_tokens * num_chosen
        for others in reversed(range(self.num_experts)):
            kept = others if self.use_autograd else 0
            counts.append(min(num_tokens, max(left - kept, min(left, 1))))
            left -= counts[-1]
        return counts

    def extra_repr(self) -> str:
        return f"{self.name}: {self.num_experts} experts, {self.shapes}"


def is_experts(module: nn.Module) -> bool:
    """Whether transformers lets a registered function compute this module's experts."""
    return all(hasattr(module, name) for name in ("has_gate", "is_transposed", "has_bias", "_apply_gate"))


def freeze_experts(name: str, module: nn.Module, kept: Quantization | None) -> FrozenExperts:
    """Take the 3-D parameters of a library's experts module away and let it compute with ours. kept: see
    `FrozenExperts`.

    Raises `UnsupportedModelError` for experts that are followed by norms of their own."""
    if getattr(module, "has_post_expert_norm", False):
        raise UnsupportedModelError(f"{name}: a norm behind every expert is not supported")
    frozen = FrozenExperts(name, module, kept)
    for matrix in frozen.shapes:
        delattr(module, matrix)
    module.frozen = frozen
    return frozen


def experts_forward(module: nn.Module, x: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
    """In transformers' calling convention: x [T, D], chosen [T, k] experts, weights [T, k] -> [T, D]."""
    frozen = module.frozen
    assert isinstance(frozen, FrozenExperts)
    if frozen.use_autograd:
        return _with_autograd(module, frozen, x, chosen, weights)
    lora = [stack.lora.A for stack in map(frozen.stack, frozen.shapes) if stack.lora is not None]
    y: Tensor = _ExpertsFunction.apply(x, weights, chosen, module, *lora)
    return y


ALL_EXPERTS_FUNCTIONS.register(NAME, experts_forward)


def _activated(module: Any, z: Tensor) -> Tensor:
    """The expert's hidden values, from what its first matrix gives [n, 2I] or [n, I]."""
    h: Tensor = module._apply_gate(z) if module.has_gate else module.act_fn(z)
    return h


def _times(frozen: FrozenExperts, x: Tensor, weight: Tensor) -> Tensor:
    """x through one expert's matrix."""
    return x @ weight if frozen.is_transposed else x @ weight.t()


def _times_back(frozen: FrozenExperts, gradient: Tensor, weight: Tensor) -> Tensor:
    """dL/dx from dL/dy of `_times`."""
    return gradient @ weight.t() if frozen.is_transposed else gradient @ weight


def _bias(module: Any, matrix: str, expert: int) -> Tensor | None:
    return getattr(module, f"{matrix}_bias")[expert] if module.has_bias else None


def _with_autograd(module: Any, frozen: FrozenExperts, x: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
    """The reference: library operations, one expert after another, gradients by autograd."""
    y = torch.zeros_like(x)
    order, counts = frozen.sorted_rows(chosen)
    factors = {matrix: frozen.stack(matrix).factors() for matrix in frozen.shapes}

    def product(rows: Tensor, matrix: str, expert: int) -> Tensor:
        out = _times(frozen, rows, frozen.weights(matrix, range(expert, expert + 1), x.dtype)[0])
        if (lora := frozen.stack(matrix).lora) is not None:
            a, b = factors[matrix][expert]
            out = out + rows @ a.t() @ b.t() * lora.scaling
        bias = _bias(module, matrix, expert)
        return out if bias is None else out + bias

    for expert, places in enumerate(order.split(counts)):
        if not len(places):
            continue
        tokens = places // chosen.shape[1]
        h = _activated(module, product(x[tokens], frozen.first, expert))
        out = product(h, "down_proj", expert)
        y = y.index_add(0, tokens, (out * weights.flatten()[places, None]).to(x.dtype))
    return y


class _Tile:
    """Some rows of one expert. places: their indices in the flattened [T k]; tokens: in [T]. first, down: its
    matrices. first_lora, down_lora: their LoRA parameters."""

    def __init__(
        self,
        expert: int,
        places: Tensor,
        num_chosen: int,
        matrices: tuple[Tensor, Tensor],
        loras: tuple[ExpertLora | None, ExpertLora | None],
    ) -> None:
        self.expert, self.places, self.tokens = expert, places, places // num_chosen
        self.first, self.down = matrices
        self.first_lora, self.down_lora = loras


def _tiles(
    frozen: FrozenExperts, counts: list[int], order: Tensor, num_chosen: int, dtype: torch.dtype
) -> Iterator[_Tile]:
    """All rows, expert by expert, each expert dequantized once."""
    start, step = 0, frozen.source.experts_at_once
    first_loras, down_loras = (frozen.stack(matrix).loras() for matrix in (frozen.first, "down_proj"))
    for begin in range(0, frozen.num_experts, step):
        hit = [e for e in range(begin, min(begin + step, frozen.num_experts)) if counts[e]]
        if not hit:
            continue
        chunk = range(hit[0], hit[-1] + 1)
        firsts = frozen.weights(frozen.first, chunk, dtype)
        downs = frozen.weights("down_proj", chunk, dtype)
        for expert in hit:
            stop = start + counts[expert]
            matrices = firsts[expert - chunk.start], downs[expert - chunk.start]
            loras = (
                first_loras[expert] if first_loras else None,
                down_loras[expert] if down_loras else None,
            )
            for places in order[start:stop].split(TILE_ROWS):
                yield _Tile(expert, places, num_chosen, matrices, loras)
            start = stop


def _hidden(module: Any, frozen: FrozenExperts, tile: _Tile, x: Tensor) -> Tensor:
    """What an expert's first matrix gives for a tile's rows."""
    rows = x[tile.tokens]
    z = _times(frozen, rows, tile.first)
    if tile.first_lora is not None:
        tile.first_lora.add_product(z, rows)
    bias = _bias(module, frozen.first, tile.expert)
    return z if bias is None else z.add_(bias)


class _ExpertsFunction(torch.autograd.Function):
    """See the module docstring."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weights: Tensor, chosen: Tensor, module: Any, *lora: Tensor
    ) -> Tensor:  # lora: so that the output requires a gradient
        frozen: FrozenExperts = module.frozen
        order, counts = frozen.sorted_rows(chosen)
        ctx.save_for_backward(x, weights, order)
        ctx.module, ctx.counts = module, counts
        y = torch.zeros_like(x)
        if not frozen.skip_output:
            for tile in _tiles(frozen, counts, order, weights.shape[1], x.dtype):
                _add_output(module, frozen, tile, x, weights.flatten(), y)
        return y

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weights, order = ctx.saved_tensors
        module = ctx.module
        frozen: FrozenExperts = module.frozen
        if not any(ctx.needs_input_grad):
            return (None,) * len(ctx.needs_input_grad)
        dx, d_weights = torch.zeros_like(x), torch.zeros_like(weights)
        for tile in _tiles(frozen, ctx.counts, order, weights.shape[1], x.dtype):
            _add_gradients(module, frozen, tile, x, weights.flatten(), gradient, dx, d_weights.view(-1))
        return dx, d_weights, *(None,) * (len(ctx.needs_input_grad) - 2)


def _add_output(
    module: Any, frozen: FrozenExperts, tile: _Tile, x: Tensor, weights: Tensor, y: Tensor
) -> None:
    """Add a tile's rows to y [T, D]. weights: flat [T k]."""
    h = _activated(module, _hidden(module, frozen, tile, x))
    out = _times(frozen, h, tile.down)
    if tile.down_lora is not None:
        tile.down_lora.add_product(out, h)
    del h
    if (bias := _bias(module, "down_proj", tile.expert)) is not None:
        out.add_(bias)
    y.index_add_(0, tile.tokens, (out * weights[tile.places, None]).to(x.dtype))


def _add_gradients(
    module: Any,
    frozen: FrozenExperts,
    tile: _Tile,
    x: Tensor,
    weights: Tensor,
    gradient: Tensor,
    dx: Tensor,
    d_weights: Tensor,
) -> None:
    """From dL/dy [T, D], add a tile's part of dL/dx [T, D] and write that of dL/dp, flat [T k]."""
    z = _hidden(module, frozen, tile, x).requires_grad_()
    with torch.enable_grad():
        h = _activated(module, z)
    g = gradient[tile.tokens]
    q = _times_back(frozen, g, tile.down)
    if tile.down_lora is not None:  # dA and dB are linear in h, which takes p
        tile.down_lora.backward(g, (h.detach() * weights[tile.places, None]).to(x.dtype), q)
    d_weight = torch.linalg.vecdot(h.detach().float(), q.float())
    if (bias := _bias(module, "down_proj", tile.expert)) is not None:
        d_weight += g.float() @ bias.float()
    d_weights[tile.places] = d_weight.to(d_weights.dtype)
    dh = (q * weights[tile.places, None]).to(x.dtype)
    del g, q
    (dz,) = torch.autograd.grad(h, z, dh)
    d_rows = _times_back(frozen, dz, tile.first)
    if tile.first_lora is not None:
        tile.first_lora.backward(dz, x[tile.tokens], d_rows)
    dx.index_add_(0, tile.tokens, d_rows)
