"""Evaluation loss: the forward half of the walk, summed over all supervised tokens, each counted once, or
token by token.

Micro-batches pass the layers in groups, as in training, so that a streamed layer is fetched once per group.
Losses are added one after another: their sum has the same bits in groups of any size.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from qlora_train.model.decoder import FrozenDecoder
from qlora_train.model.loss import TiledLoss, TokenScores
from qlora_train.model.packed_tokens import PackedTokens
from qlora_train.weights.execution_plan import LOSS_TOKENS


@torch.no_grad()
def loss_sum(
    decoder: FrozenDecoder,
    micro_batches: Iterable[PackedTokens],
    *,
    group_size: int = 1,
    loss_tokens: int = LOSS_TOKENS,
    make_loss: type[TiledLoss] = TiledLoss,
) -> Tensor:
    """Sum of the supervised losses over the micro-batches, fp32 scalar on the device, with the LoRA
    parameters and without dropout. group_size: micro-batches that pass the layers together. loss_tokens: see
    `TiledLoss`. make_loss: the loss's class."""
    loss = make_loss(decoder, loss_tokens)
    total = torch.zeros((), dtype=torch.float32, device=decoder.device.torch)
    for group in _grouped(micro_batches, group_size):
        total, _ = loss(_last_outputs(decoder, group), group, None, total)
        group.clear()  # freed before the next group is made
    return total


@torch.no_grad()
def token_scores(
    decoder: FrozenDecoder,
    micro_batches: Iterable[PackedTokens],
    *,
    group_size: int = 1,
    loss_tokens: int = LOSS_TOKENS,
) -> Iterator[TokenScores]:
    """The scores of every supervised token of each micro-batch in turn; see `loss_sum`."""
    loss = TiledLoss(decoder, loss_tokens)
    for group in _grouped(micro_batches, group_size):
        yield from loss.scores(_last_outputs(decoder, group), group)
        group.clear()


def _last_outputs(decoder: FrozenDecoder, group: list[PackedTokens]) -> list[Tensor]:
    """The outputs of the last layer, [1, T, D] for each micro-batch of the group."""
    embedded = [decoder.embed_packed(tokens) for tokens in group]
    xs, arguments = [x for x, _ in embedded], [a for _, a in embedded]
    del embedded
    for i in decoder.layers_in_turn():
        for k, x in enumerate(xs):
            xs[k] = decoder.run_layer(i, x, arguments[k][i])
    return xs


def _grouped(micro_batches: Iterable[PackedTokens], size: int) -> Iterator[list[PackedTokens]]:
    group: list[PackedTokens] = []
    for tokens in micro_batches:
        group.append(tokens)
        if len(group) == size:
            yield group
            group = []
    if group:
        yield group
