"""Cross-entropy over the vocabulary in tiles: the loss of a group of micro-batches and its gradients.

    loss = 1/N sum over supervised t of ( logsumexp(z_t) - z_t[label_t] ),   z = head(norm(x))

N is the number of supervised tokens of the whole optimizer step, over all micro-batches and ranks, so every
split of the same data has the same loss and gradients. (An average of means per micro-batch would weight
tokens by the split.)

`TiledLoss` reads the head once, one tile of vocabulary rows at a time, and holds the logits of one tile only.
It works like flash attention (Dao et al. 2022, arXiv:2205.14135) with the vocabulary in place of the keys:
per token a running maximum m, a running sum s of exp(z_v - m) and a running sum a of exp(z_v - m) dz_v/dh,
all over the vocabulary without the label; a larger maximum rescales both sums. With the logit z of the label
and its gradient dz/dh, from the head's row of that label, gathered once:

    u = m + log s - z        loss = log(1 + e^u)        dloss/dh = sigmoid(u) (a / s - dz/dh)

so the gradient is complete after the forward pass: two products with the head, as many as for a loss that
stores all logits. sigmoid(u) is 1 - p(label), exact even if the model is nearly certain, since the sums leave
out the label. (With the label in the sums, the gradient would be a difference of two nearly equal vectors,
each rounded to 16 bits; at p = 0.994 a third of it is rounding error.) dz/dh is computed by autograd through
the family's own epilogue (scale, tanh cap) of one tile.

Bytes in 16 bits: 8 C Vt for a block of C tokens and a tile of Vt rows (logits 2, their exponentials 4 in fp32
and 2 in 16 bits). Per supervised token 10 D (a 4 in fp32; hidden state before and after the norm, and dz/dh,
2 each) and what the norm saves. With V = 128,256, D = 2,048, T = 2,048, Vt = 4,096 and C = 512: 17 MB +
42 MB, instead of 2.6 GB for whole logits. Tiles are the outer loop: all micro-batches of a group share one
pass over a streamed head.

`reference_loss` is the formula over all T positions as transformers computes it, bit-identical to autograd
through the model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from qlora_train.micro_batch import IGNORED_LABEL
from qlora_train.model.decoder import FrozenDecoder
from qlora_train.model.packed_tokens import PackedTokens
from qlora_train.model.token_rows import TokenRows
from qlora_train.model.vocab_matrix import tiles

LOWEST = -1e30  # below any logit, and finite: the first maximum subtracts from -inf where a tile is one label


@dataclass
class _Running:
    """Running sums of one micro-batch with S supervised tokens.

    leaf [S, D]: hidden states of the supervised tokens. hidden [S, D]: norm(leaf), with its graph. labels:
    int64 [S]. largest, total: fp32 [S], m and s. label_logits: fp32 [S], z. weighted: fp32 [S, D], a.
    label_gradients [S, D]: dz/dh. These two are None without gradients. rivals: int64 [S], the first of the
    other tokens with the largest logit; None where nobody asks.
    """

    leaf: Tensor
    hidden: Tensor
    labels: Tensor
    largest: Tensor
    total: Tensor
    label_logits: Tensor
    weighted: Tensor | None = None
    label_gradients: Tensor | None = None
    rivals: Tensor | None = None

    def others_above_label(self) -> Tensor:
        """u = m + log s - z, fp32 [S]: log-sum-exp of the other logits minus the label's logit."""
        return self.largest + self.total.log() - self.label_logits

    def scores(self) -> TokenScores:
        assert self.rivals is not None
        is_first = (self.label_logits == self.largest) & (self.labels < self.rivals)
        return TokenScores(
            F.softplus(self.others_above_label()), (self.label_logits > self.largest) | is_first
        )


@dataclass(frozen=True)
class TokenScores:
    """What the model gives to S supervised tokens. losses: fp32 [S]. is_greedy: bool [S], whether the label
    is the first token with the largest logit, which greedy decoding takes."""

    losses: Tensor
    is_greedy: Tensor


class TiledLoss:
    """Cross-entropy that reads the head once, tile by tile. block_tokens: C, tokens per block of logits."""

    def __init__(self, decoder: FrozenDecoder, block_tokens: int) -> None:
        self._decoder, self._block_tokens = decoder, block_tokens

    def __call__(
        self,
        xs: list[Tensor],
        batches: Sequence[PackedTokens],
        gradient_scale: float | None,
        loss_sum: Tensor | None = None,
    ) -> tuple[Tensor, list[Tensor]]:
        """Return the sum of the supervised losses (fp32 scalar) and dL/dx [1, T, D] of every micro-batch.

        xs: outputs of the last layer, [1, T, D] each; the list is emptied, so that they are freed early.
        gradient_scale: multiplies the gradients; None: no gradients, an empty list. loss_sum: of the groups
        before, which goes on, so that a sum has the same bits in groups of any size.
        """
        states = [self._begin(xs.pop(0), tokens, gradient_scale is not None) for tokens in batches]
        self._add_tiles(states)
        if loss_sum is None:
            loss_sum = torch.zeros((), dtype=torch.float32, device=self._decoder.device.torch)
        for state in states:
            loss_sum += F.softplus(state.others_above_label()).sum()
        if gradient_scale is None:
            return loss_sum, []
        for state in states if self._decoder.trains_tokens else ():
            self._add_row_gradients(state, gradient_scale)
        return loss_sum, [_finish(states.pop(0), tokens, gradient_scale) for tokens in batches]

    def scores(self, xs: list[Tensor], batches: Sequence[PackedTokens]) -> list[TokenScores]:
        """The loss of every supervised token, by micro-batch. xs: as of a call; the list is emptied."""
        states = [self._begin(xs.pop(0), tokens, with_gradient=False) for tokens in batches]
        for state in states:
            state.rivals = torch.zeros_like(state.labels)
        self._add_tiles(states)
        return [state.scores() for state in states]

    def _add_tiles(self, states: list[_Running]) -> None:
        for start, rows in tiles(self._decoder.head):
            for state in states:
                for block in _blocks(len(state.leaf), self._block_tokens):
                    self._add_tile(state, block, start, rows)

    def _begin(self, x: Tensor, tokens: PackedTokens, with_gradient: bool) -> _Running:
        leaf = x.detach()[0, tokens.supervised].requires_grad_(with_gradient)
        with torch.set_grad_enabled(with_gradient):
            hidden = self._decoder.norm(leaf)
        label_rows = self._decoder.head.gather(tokens.label_ids)
        chosen = hidden.detach().requires_grad_(with_gradient)
        with torch.set_grad_enabled(with_gradient):
            label_logits = self._decoder.label_logits(chosen, tokens.label_ids, label_rows)
        state = _Running(
            leaf,
            hidden,
            tokens.label_ids.device,
            largest=torch.full((len(leaf),), LOWEST, device=x.device),
            total=torch.zeros(len(leaf), device=x.device),
            label_logits=label_logits.detach().float(),
        )
        if with_gradient:
            (state.label_gradients,) = torch.autograd.grad(label_logits.sum(), chosen)
            state.weighted = torch.zeros(leaf.shape, dtype=torch.float32, device=x.device)
        return state

    def _add_row_gradients(self, state: _Running, gradient_scale: float) -> None:
        """Add the gradients of the head's trained rows: their logits once more, now that all sums are
        known."""
        head = self._decoder.head
        assert isinstance(head, TokenRows) and head.gradient is not None
        above = state.others_above_label()
        sum_of_all = state.label_logits + F.softplus(above)  # logarithm of the sum of all exponentials
        for block in _blocks(len(state.leaf), self._block_tokens):
            rows = head.rows.detach().requires_grad_()
            with torch.enable_grad():
                logits = self._decoder.tile_logits(state.hidden.detach()[block][None], 0, rows)[0]
            shares = (logits.detach() - sum_of_all[block, None]).exp_()
            is_label = state.labels[block, None] == head.ids
            shares = torch.where(is_label, -torch.sigmoid(above[block, None]), shares).mul_(gradient_scale)
            (gradient,) = torch.autograd.grad(logits, rows, shares.to(logits.dtype))
            head.gradient.add_(gradient)

    def _add_tile(self, state: _Running, block: slice, start: int, rows: Tensor) -> None:
        """Add one tile's logits of a block of tokens to the running m, s and a."""
        with_gradient = state.weighted is not None
        hidden = state.hidden.detach()[block].requires_grad_(with_gradient)
        with torch.set_grad_enabled(with_gradient):
            logits = self._decoder.tile_logits(hidden[None], start, rows)
        largest, total = state.largest[block], state.total[block]
        scores = _without_labels(logits.detach()[0], state.labels[block] - start)
        new_largest = torch.maximum(largest, scores.amax(-1))
        if state.rivals is not None:
            rivals = state.rivals[block]
            rivals.copy_(torch.where(new_largest > largest, scores.argmax(-1) + start, rivals))
        weights = (scores - new_largest[:, None]).exp_()  # fp32 for every logit dtype
        rescale = (largest - new_largest).exp_()
        total.mul_(rescale).add_(weights.sum(-1))
        largest.copy_(new_largest)
        if state.weighted is not None:
            (gradient,) = torch.autograd.grad(logits, hidden, weights.to(logits.dtype)[None])
            state.weighted[block].mul_(rescale[:, None]).add_(gradient)


def _blocks(num_tokens: int, block_tokens: int) -> list[slice]:
    return [
        slice(start, min(start + block_tokens, num_tokens)) for start in range(0, num_tokens, block_tokens)
    ]


def _without_labels(scores: Tensor, places: Tensor) -> Tensor:
    """Set scores [n, rows] to -inf at [t, places[t]], in place, for the places within this tile."""
    clamped = places.clamp(0, scores.shape[1] - 1)[:, None]
    is_here = clamped == places[:, None]
    return scores.scatter_(1, clamped, scores.gather(1, clamped).masked_fill_(is_here, float("-inf")))


def _finish(state: _Running, tokens: PackedTokens, gradient_scale: float) -> Tensor:
    """dL/dx [1, T, D] from the finished sums, zero at unsupervised positions."""
    assert state.weighted is not None and state.label_gradients is not None
    others_share = torch.sigmoid(state.others_above_label()).mul_(gradient_scale)  # 1 - p(label), scaled
    gradient = (
        state.weighted.div_(state.total[:, None]).sub_(state.label_gradients).mul_(others_share[:, None])
    )
    (chosen_gradient,) = torch.autograd.grad(state.hidden, state.leaf, gradient.to(state.hidden.dtype))
    result = state.leaf.new_zeros(1, len(tokens.labels), state.leaf.shape[-1])
    result[0, tokens.supervised] = chosen_gradient
    return result


def reference_loss(
    decoder: FrozenDecoder,
    head: Tensor,
    x: Tensor,
    tokens: PackedTokens,
    num_supervised: int,
    loss_scale: float,
) -> tuple[Tensor, Tensor]:
    """Cross-entropy by library operations over all positions: (loss sum, dL/dx [1, T, D]).

    The gradient is scaled by loss_scale / num_supervised. head: [V, D]."""
    leaf = x.detach().requires_grad_()
    matrix = decoder.head
    trained = matrix.rows.detach().requires_grad_() if isinstance(matrix, TokenRows) else None
    with torch.enable_grad():
        if isinstance(matrix, TokenRows) and trained is not None:
            head = head.index_copy(0, matrix.ids, trained)
        logits = decoder.tile_logits(decoder.norm(leaf), 0, head)[0].float()
        loss_sum = F.cross_entropy(logits, tokens.labels, ignore_index=IGNORED_LABEL, reduction="sum")
        loss = loss_sum / num_supervised
        (loss * loss_scale if loss_scale != 1.0 else loss).backward()
    assert leaf.grad is not None
    if isinstance(matrix, TokenRows) and trained is not None:
        assert matrix.gradient is not None and trained.grad is not None
        matrix.gradient.add_(trained.grad)
    return loss_sum.detach(), leaf.grad
