"""Evaluation loss: the forward half of the walk, summed over all supervised tokens, each counted once.

Micro-batches pass the layers in groups, as in training, so that a streamed layer is fetched once per group.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from qlora_train.model.decoder import FrozenDecoder
from qlora_train.model.loss import TiledLoss
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
        embedded = [decoder.embed_packed(tokens) for tokens in group]
        xs, arguments = [x for x, _ in embedded], [a for _, a in embedded]
        del embedded
        for i in decoder.layers_in_turn():
            for k, x in enumerate(xs):
                xs[k] = decoder.run_layer(i, x, arguments[k][i])
        total += loss(xs, group, None)[0]
    return total


def _grouped(micro_batches: Iterable[PackedTokens], size: int) -> Iterator[list[PackedTokens]]:
    group: list[PackedTokens] = []
    for tokens in micro_batches:
        group.append(tokens)
        if len(group) == size:
            yield group
            group = []
    if group:
        yield group
