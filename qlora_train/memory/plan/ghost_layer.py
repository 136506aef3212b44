"""One decoder layer with ghost tensors: what transformers and our linear do, statement by statement.

Kept in the order, and with the local names, of the real code (transformers' modeling_llama.py and its
relatives, model/linear.py, model/attention.py, model/tiled_mlp.py): a name that lives to the end of a
function keeps its tensor alive to the end of the function. See ghost.py for why.
"""

from __future__ import annotations

from qlora_train.device.description import MAX_LIGER_COLUMNS
from qlora_train.memory.plan import ghost_ops as op
from qlora_train.memory.plan.ghost import Ghost, Ledger, apply, backward
from qlora_train.memory.plan.ghost_activation import xielu
from qlora_train.memory.plan.ghost_attention import AttentionRule, packed_attention, with_rotary
from qlora_train.memory.plan.ghost_linear import GhostLinears, trainable
from qlora_train.memory.plan.ghost_norm import fused_norm, library_norm, liger_norm
from qlora_train.memory.plan.layer_settings import LayerSettings


class GhostLayer:
    """One layer, for one visit: weights that are held stay unpacked until `close`."""

    def __init__(self, ledger: Ledger, settings: LayerSettings, window: int | None) -> None:
        self._ledger, self._settings = ledger, settings
        self._linears = GhostLinears(ledger, settings)
        self._rule = AttentionRule(
            settings.documents,
            window,
            settings.shape.has_softcap,
            self._has_liger(settings.shape.head_dim) and settings.shape.norms_transposed_heads,
            settings.reference,
            settings.target,
            settings.deterministic,
            settings.most_documents or len(settings.documents),
        )

    def close(self) -> None:
        """End of the visit."""
        self._linears.close()

    def forward(self, x: Ghost, *, skips_tail: bool = False) -> Ghost:
        """x [1, T, D] -> [1, T, D]. skips_tail: the value of the last linear is not wanted."""
        self._linears.skips_tail = skips_tail and self._settings.skip_tail and not self._settings.reference
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
            qkv = self._linears.one("self_attn.qkv_proj", hidden)
            query = op.heads(op.part(qkv, shape.q_width), shape.num_heads)
            key = op.heads(op.part(qkv, shape.kv_width), shape.num_kv_heads)
            value = op.heads(op.part(qkv, shape.kv_width), shape.num_kv_heads)
        else:
            q, k, v = self._qkv(hidden)
            query, key = self._heads(q, shape.num_heads), self._heads(k, shape.num_kv_heads)
            value = op.heads(v, shape.num_kv_heads)
            del q, k, v
        kind = shape.family.qk_norm
        if kind == "per_transposed_head":
            query, key = self._norm(query, is_transposed=True), self._norm(key, is_transposed=True)
        query, key = with_rotary(query, key, shape.family.rotary, self._rule.window)
        if kind == "per_rotated_head":
            query, key = self._norm(query, is_transposed=True), self._norm(key, is_transposed=True)
        return self._linears.one("self_attn.o_proj", packed_attention(query, key, value, self._rule))

    def _qkv(self, hidden: Ghost) -> list[Ghost]:
        names = [f"self_attn.{name}_proj" for name in ("q", "k", "v")]
        if self._settings.reference:
            return [self._linears.one(name, hidden) for name in names]
        return self._linears.sharing(names, hidden)

    def _heads(self, x: Ghost, num_heads: int) -> Ghost:
        """Queries or keys [1, heads, T, d], normed where that comes before tokens and heads are exchanged."""
        kind = self._settings.shape.family.qk_norm
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
            return self._linears.one(down, activation(self._linears.one(inner[0], x)))
        gate, up = inner
        if not self._settings.reference:
            return self._fused_mlp(x, gate, up, down)
        return self._linears.one(
            down, op.multiply(op.activation(self._linears.one(gate, x)), self._linears.one(up, x))
        )

    def _fused_mlp(self, x: Ghost, gate_name: str, up_name: str, down_name: str) -> Ghost:
        """model/fused.py, `_FusedMlpFunction`."""
        needs_dx, both = x.node is not None, (gate_name, up_name)
        (gate, up), hs = self._linears.forward_of_all(both, x)
        if self._linears.skips_tail:
            y = self._linears.tail_placeholder(x)
        else:
            y, _ = self._linears.forward(down_name, gate.like())

        def run(gradient: Ghost, x: Ghost, gate: Ghost, up: Ghost, *hs: Ghost) -> tuple[Ghost | None, None]:
            inner = self._before_down(down_name, gradient, gate, up)
            return self._linears.backward_of_all(both, inner, x, hs, needs_dx=needs_dx), None

        return apply(y, (x, trainable(self._ledger)), (x, gate, up, *hs), run)

    def _before_down(self, down_name: str, gradient: Ghost, gate: Ghost, up: Ghost) -> tuple[Ghost, Ghost]:
        """(d_gate, d_up): liger's kernels put them where gate and up were."""
        if self._settings.shape.has_silu and self._has_liger(gate.shape[-1]):
            product = gate.like()
            d_product = self._linears.backward(down_name, gradient, product, None, needs_dx=True)
            del product, d_product
            return gate, up
        activated, product = gate.like(), gate.like()
        d_product = self._linears.backward(down_name, gradient, product, None, needs_dx=True)
        assert d_product is not None
        del product
        d_up, d_gate = d_product.like(), d_product.like()
        del activated, d_product
        return d_gate, d_up

    def _joint_mlp(self, x: Ghost) -> Ghost:
        up_states = self._linears.one("mlp.gate_up_proj", x)
        width = self._settings.shape.intermediate
        gate, up_states = op.part(up_states, width), op.part(up_states, width)
        up_states = op.multiply(up_states, op.activation(gate))
        return self._linears.one("mlp.down_proj", up_states)

    def _tiled_mlp(self, x: Ghost) -> Ghost:
        """model/tiled_mlp.py: an operation of its own that saves its input and goes tile by tile."""
        tile = self._settings.mlp_tile_tokens
        assert tile is not None
        sizes = [min(tile, x.shape[1] - start) for start in range(0, x.shape[1], tile)]
        sizes = sorted({sizes[0], sizes[-1]}, reverse=True)  # one of each size stands for all
        width, itemsize = x.shape[2], x.itemsize
        result = self._linears.tail_placeholder(x) if self._linears.skips_tail else x.like()
        if not self._linears.skips_tail:
            with self._ledger.no_grad():
                for size in sizes:
                    self._mlp(Ghost(x.storage, (1, size, width), itemsize))

        def run(gradient: Ghost, x: Ghost) -> tuple[Ghost]:
            dx = x.like()
            for size in sizes:
                leaf = Ghost(x.storage, (1, size, width), itemsize).leaf()
                self._linears.skips_tail = self._settings.skip_tail and not self._settings.reference
                backward(self._mlp(leaf), Ghost(gradient.storage, (1, size, width), itemsize))
            return (dx,)

        return apply(result, (x,), (x,), run)
