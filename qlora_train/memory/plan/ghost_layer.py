"""One decoder layer with ghost tensors: what transformers and our linear do, statement by statement.

Kept in the order, and with the local names, of the real code (transformers' modeling_llama.py and its
relatives, model/linear.py, model/attention.py, model/tiled_mlp.py): a name that lives to the end of a
function keeps its tensor alive to the end of the function. See ghost.py for why.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from qlora_train.memory.plan import ghost_ops as op
from qlora_train.memory.plan.ghost import Ghost, Ledger, Node, apply, backward
from qlora_train.memory.plan.ghost_activation import xielu
from qlora_train.memory.plan.ghost_attention import AttentionRule, packed_attention, with_rotary
from qlora_train.memory.plan.ghost_norm import fused_norm, library_norm, liger_norm
from qlora_train.memory.plan.model_shape import ModelShape
from qlora_train.memory.plan.packed_sizes import PackingSizes
from qlora_train.memory.plan.target import MAX_LIGER_COLUMNS, Target

UNPACKING = "unpacking one weight"


@dataclass(frozen=True)
class LayerSettings:
    """What of a run decides a layer's bytes.

    rank: R. targets: linears with factors, by name within the layer. dropout: whether anything is dropped.
    documents: tokens of each document in a micro-batch; their sum is T. hold_unpacked, mlp_tile_tokens: of
    the execution plan. skip_tail: recomputation need not compute the last product. reference: the library's
    own operations. target, deterministic: where and how it runs.
    """

    shape: ModelShape
    packing: PackingSizes
    rank: int
    targets: frozenset[str]
    dropout: bool
    documents: tuple[int, ...]
    target: Target
    deterministic: bool
    hold_unpacked: bool = False
    mlp_tile_tokens: int | None = None
    skip_tail: bool = True
    reference: bool = False

    @property
    def num_tokens(self) -> int:
        return sum(self.documents)

    @property
    def itemsize(self) -> int:
        return self.packing.itemsize


class GhostLayer:
    """One layer, for one visit: weights that are held stay unpacked until `close`."""

    def __init__(self, ledger: Ledger, settings: LayerSettings, window: int | None) -> None:
        self._ledger, self._settings = ledger, settings
        self._shapes = settings.shape.linear_shapes()
        self._held: set[str] = set()
        self._rule = AttentionRule(
            settings.documents,
            window,
            settings.shape.has_softcap,
            self._has_liger(settings.shape.head_dim) and settings.shape.norms_transposed_heads,
            settings.reference,
            settings.target,
            settings.deterministic,
        )
        self._skips_tail = False

    def close(self) -> None:
        """End of the visit."""
        self._held.clear()

    def forward(self, x: Ghost, *, skips_tail: bool = False) -> Ghost:
        """x [1, T, D] -> [1, T, D]. skips_tail: the value of the last linear is not wanted."""
        self._skips_tail = skips_tail and self._settings.skip_tail and not self._settings.reference
        family = self._settings.shape.family
        if family.is_parallel:
            return self._parallel(x)
        only_post = family.only_post_norms
        residual = x
        hidden = x if only_post else self._norm(x)
        hidden = self._attention(hidden)
        if only_post or family.num_norms == 4:
            hidden = self._norm(hidden)
        hidden = op.add(residual, self._residual_scaled(hidden))
        residual = hidden
        hidden = hidden if only_post else self._norm(hidden)
        hidden = self._whole_mlp(hidden)
        if only_post or family.num_norms == 4:
            hidden = self._norm(hidden)
        return op.add(residual, self._residual_scaled(hidden))

    def _parallel(self, x: Ghost) -> Ghost:
        """Attention and MLP read the same norm (cohere)."""
        residual = x
        hidden = self._norm(x)
        attended = self._attention(hidden)
        hidden = self._whole_mlp(hidden)
        return op.add(op.add(residual, attended), hidden)

    def _norm(self, x: Ghost, *, is_transposed: bool = False) -> Ghost:
        settings = self._settings
        if settings.reference or not settings.shape.family.fuses_norms:
            return library_norm(x, settings.shape.family.norm)
        if self._has_liger(x.shape[-1]):
            return liger_norm(x, is_transposed=is_transposed)
        return fused_norm(x)

    def _has_liger(self, width: int) -> bool:
        return self._settings.target.has_liger and width <= MAX_LIGER_COLUMNS

    def _residual_scaled(self, x: Ghost) -> Ghost:
        return op.scale(x) if self._settings.shape.family.scales_residual else x

    def _attention(self, hidden: Ghost) -> Ghost:
        shape = self._settings.shape
        if shape.family.fuses_qkv:
            qkv = self._linear("self_attn.qkv_proj", hidden)
            query = op.heads(op.part(qkv, shape.q_width), shape.num_heads)
            key = op.heads(op.part(qkv, shape.kv_width), shape.num_kv_heads)
            value = op.heads(op.part(qkv, shape.kv_width), shape.num_kv_heads)
        else:
            query = self._heads("self_attn.q_proj", hidden, shape.num_heads)
            key = self._heads("self_attn.k_proj", hidden, shape.num_kv_heads)
            value = op.heads(self._linear("self_attn.v_proj", hidden), shape.num_kv_heads)
        kind = shape.family.qk_norm
        if kind == "per_transposed_head":
            query, key = self._norm(query, is_transposed=True), self._norm(key, is_transposed=True)
        query, key = with_rotary(query, key, shape.family.rotary, self._rule.window)
        if kind == "per_rotated_head":
            query, key = self._norm(query, is_transposed=True), self._norm(key, is_transposed=True)
        return self._linear("self_attn.o_proj", packed_attention(query, key, value, self._rule))

    def _heads(self, name: str, hidden: Ghost, num_heads: int) -> Ghost:
        """Queries or keys [1, heads, T, d], normed where that comes before tokens and heads are exchanged."""
        kind, x = self._settings.shape.family.qk_norm, self._linear(name, hidden)
        if kind == "whole":
            x = self._norm(x)
        if kind == "per_head":
            num_tokens, width = x.shape[1], x.shape[2]
            x = self._norm(x.view(num_tokens, num_heads, width // num_heads)).view(1, num_tokens, width)
        return op.heads(x, num_heads)

    def _whole_mlp(self, x: Ghost) -> Ghost:
        return self._mlp(x) if self._settings.mlp_tile_tokens is None else self._tiled_mlp(x)

    def _mlp(self, x: Ghost) -> Ghost:
        family = self._settings.shape.family
        if family.fuses_gate:
            return self._joint_mlp(x)
        *inner, down = (f"mlp.{name}" for name in family.mlp)
        if len(inner) == 1:
            activation = xielu if family.activation == "xielu" else op.activation
            return self._linear(down, activation(self._linear(inner[0], x)))
        gate, up = inner
        if not self._settings.reference:
            return self._fused_mlp(x, gate, up, down)
        return self._linear(down, op.multiply(op.activation(self._linear(gate, x)), self._linear(up, x)))

    def _fused_mlp(self, x: Ghost, gate_name: str, up_name: str, down_name: str) -> Ghost:
        """model/fused.py, `_FusedMlpFunction`."""
        needs_dx = x.node is not None
        gate, gate_h = self._linear_forward(gate_name, x)
        up, up_h = self._linear_forward(up_name, x)
        if self._skips_tail:
            y = self._tail_placeholder(x)
        else:
            y, _ = self._linear_forward(down_name, gate.like())

        def run(gradient: Ghost, x: Ghost, gate: Ghost, up: Ghost, *low: Ghost) -> tuple[Ghost | None, None]:
            d_gate, d_up = self._before_down(down_name, gradient, gate, up)
            h = low[0] if low else None  # a stand-in for both: they are not computed again
            dx = self._linear_backward(gate_name, d_gate, x, h, needs_dx=needs_dx)
            dx = self._linear_backward(up_name, d_up, x, h, needs_dx=needs_dx, onto=dx)
            return dx, None

        low = tuple(h for h in (gate_h, up_h) if h is not None)
        return apply(y, (x, _trainable(self._ledger)), (x, gate, up, *low), run)

    def _before_down(self, down_name: str, gradient: Ghost, gate: Ghost, up: Ghost) -> tuple[Ghost, Ghost]:
        """(d_gate, d_up): liger's kernels put them where gate and up were."""
        if self._settings.shape.has_silu and self._has_liger(gate.shape[-1]):
            product = gate.like()
            d_product = self._linear_backward(down_name, gradient, product, None, needs_dx=True)
            del product, d_product
            return gate, up
        activated, product = gate.like(), gate.like()
        d_product = self._linear_backward(down_name, gradient, product, None, needs_dx=True)
        assert d_product is not None
        del product
        d_up, d_gate = d_product.like(), d_product.like()
        del activated, d_product
        return d_gate, d_up

    def _joint_mlp(self, x: Ghost) -> Ghost:
        up_states = self._linear("mlp.gate_up_proj", x)
        width = self._settings.shape.intermediate
        gate, up_states = op.part(up_states, width), op.part(up_states, width)
        up_states = op.multiply(up_states, op.activation(gate))
        return self._linear("mlp.down_proj", up_states)

    def _tiled_mlp(self, x: Ghost) -> Ghost:
        """model/tiled_mlp.py: an operation of its own that saves its input and goes tile by tile."""
        tile = self._settings.mlp_tile_tokens
        assert tile is not None
        sizes = [min(tile, x.shape[1] - start) for start in range(0, x.shape[1], tile)]
        sizes = sorted({sizes[0], sizes[-1]}, reverse=True)  # one of each size stands for all
        width, itemsize = x.shape[2], x.itemsize
        result = self._tail_placeholder(x) if self._skips_tail else x.like()
        if not self._skips_tail:
            with self._ledger.no_grad():
                for size in sizes:
                    self._mlp(Ghost(x.storage, (1, size, width), itemsize))

        def run(gradient: Ghost, x: Ghost) -> tuple[Ghost]:
            dx = x.like()
            for size in sizes:
                leaf = Ghost(x.storage, (1, size, width), itemsize).leaf()
                self._skips_tail = self._settings.skip_tail and not self._settings.reference
                backward(self._mlp(leaf), Ghost(gradient.storage, (1, size, width), itemsize))
            return (dx,)

        return apply(result, (x,), (x,), run)

    def _tail_placeholder(self, x: Ghost) -> Ghost:
        """zeros(()).expand(...): a value that nobody looks at."""
        one = self._ledger.tensor((), x.itemsize)
        return Ghost(one.storage, x.shape, x.itemsize)

    def _linear(self, name: str, x: Ghost) -> Ghost:
        """model/linear.py, `_FrozenLinearFunction` (or, in reference mode, the formula itself)."""
        settings = self._settings
        if settings.reference:
            return self._reference_linear(name, x, name in settings.targets)
        y, h = self._linear_forward(name, x)
        needs_dx = x.node is not None

        def run(gradient: Ghost, *saved: Ghost) -> tuple[Ghost | None, None]:
            x, h = saved or (gradient, None)
            return self._linear_backward(name, gradient, x, h, needs_dx=needs_dx), None

        if h is None:
            return apply(y, (x,), (), run)
        return apply(y, (x, _trainable(self._ledger)), (x, h), run)

    def _linear_forward(self, name: str, x: Ghost) -> tuple[Ghost, Ghost | None]:
        """(y, h = x A^T; None without factors)."""
        settings, ledger, num_tokens, itemsize = self._settings, self._ledger, x.shape[1], x.itemsize
        num_out, _ = self._shapes[name]
        if name == settings.shape.tail_name and self._skips_tail:
            y = Ghost(ledger.tensor((), itemsize).storage, (1, num_tokens, num_out), itemsize)
        else:
            self._unpack(name)
            y = ledger.tensor((1, num_tokens, num_out), itemsize)
        if name not in settings.targets:
            return y, None
        branch = self._dropped(x.detach()) if settings.dropout else x
        h = ledger.tensor((num_tokens, settings.rank), itemsize)
        del branch
        return y, h

    def _linear_backward(
        self,
        name: str,
        gradient: Ghost,
        x: Ghost,
        h: Ghost | None,
        *,
        needs_dx: bool,
        onto: Ghost | None = None,
    ) -> Ghost | None:
        """dL/dx, written into `onto` where there is one."""
        settings, ledger, num_tokens, itemsize = self._settings, self._ledger, x.shape[1], gradient.itemsize
        num_out, num_in = self._shapes[name]
        rank, dx = settings.rank, onto
        if needs_dx:
            self._unpack(name)
            dx = ledger.tensor((1, num_tokens, num_in), itemsize) if onto is None else onto
        if name not in settings.targets:
            return dx
        dh = ledger.tensor((num_tokens, rank), itemsize)
        if settings.dropout:
            op.scratch_of_dropout_mask(ledger, num_tokens, num_in)
            kept = ledger.tensor((num_tokens * num_in * (1 + itemsize),), 1)  # with the mask
            branch = ledger.tensor((num_tokens, num_in), itemsize)
        if h is None:
            h = dh.like()
        ledger.scratch(rank * (num_in + num_out) * itemsize)
        if settings.dropout and needs_dx:
            ledger.scratch(num_tokens * num_in * itemsize)
            del kept, branch
        del dh
        return dx

    def _dropped(self, x: Ghost) -> Ghost:
        """kernels/dropout.dropout."""
        op.scratch_of_dropout_mask(self._ledger, x.shape[1], x.shape[2])
        mask = self._ledger.tensor(x.shape, 1)
        factor = x.like()
        branch = self._ledger.tensor(x.shape, x.itemsize)
        del mask, factor
        return branch

    def _reference_linear(self, name: str, x: Ghost, has_factors: bool) -> Ghost:
        """F.linear, twice more for the factors: autograd saves the unpacked weight and the branch."""
        num_out, num_in = self._shapes[name]
        ledger, itemsize, rank, num_tokens = self._ledger, x.itemsize, self._settings.rank, x.shape[1]
        weight = self._unpacked_copy(name)
        value = ledger.tensor((1, num_tokens, num_out), itemsize)

        def product_run(gradient: Ghost, weight: Ghost) -> tuple[Ghost]:
            return (gradient.ledger.tensor((1, num_tokens, num_in), itemsize),)

        y = apply(value, (x,), (weight,), product_run)
        del weight, value
        if not has_factors:
            return y
        branch = self._reference_dropped(x) if self._settings.dropout else x
        factors = _trainable(ledger)
        low = apply(
            ledger.tensor((1, num_tokens, rank), itemsize),
            (branch, factors),
            (branch,),
            _factor_run((1, num_tokens, num_in), (rank, num_in), itemsize),
        )
        high = apply(
            ledger.tensor((1, num_tokens, num_out), itemsize),
            (low, factors),
            (low,),
            _factor_run((1, num_tokens, rank), (num_out, rank), itemsize),
        )
        del branch, low
        return op.add(y, op.scale(high))

    def _reference_dropped(self, x: Ghost) -> Ghost:
        op.scratch_of_dropout_mask(self._ledger, x.shape[1], x.shape[2])
        mask = self._ledger.tensor(x.shape, 1)
        factor = x.like()
        result = apply(x.like(), (x,), (factor,), lambda g, saved: (g.like(),))
        del mask, factor
        return result

    def _unpack(self, name: str) -> None:
        """Into the buffer that all weights share, which the walk counts; a held one is there already."""
        if name not in self._held:
            with self._ledger.cause(UNPACKING):
                self._ledger.scratch(
                    self._settings.packing.scratch_bytes(
                        self._shapes[name], on_cuda=self._settings.target.on_cuda
                    )
                )
        if self._settings.hold_unpacked:
            self._held.add(name)

    def _unpacked_copy(self, name: str) -> Ghost:
        """A weight of its own, which autograd may save."""
        shape, packing = self._shapes[name], self._settings.packing
        with self._ledger.cause(UNPACKING):
            absmax = self._ledger.tensor((packing.absmax_bytes(shape[0] * shape[1]),), 1)
            weight = self._ledger.tensor(shape, packing.itemsize)
            del absmax
        return weight


def _trainable(ledger: Ledger) -> Ghost:
    """Stands for A and B, which have memory of their own: they only make the graph begin."""
    empty = ledger.tensor((0,), 1)
    empty.node = Node(ledger, (), (), None)
    return empty


def _factor_run(
    input_shape: tuple[int, ...], factor_shape: tuple[int, ...], itemsize: int
) -> Callable[..., tuple[Ghost, Ghost]]:
    def run(gradient: Ghost, saved: Ghost) -> tuple[Ghost, Ghost]:
        ledger = gradient.ledger
        return ledger.tensor(input_shape, itemsize), ledger.tensor(factor_shape, itemsize)

    return run
