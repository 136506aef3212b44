"""Evaluation: the forward half of the walk. Mean loss over all supervised tokens, each counted once."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from qlora_train.model.decoder import FrozenDecoder
from qlora_train.model.loss import chunked_loss
from qlora_train.model.packed_tokens import PackedTokens


@torch.no_grad()
def loss_sum(decoder: FrozenDecoder, micro_batches: Iterable[PackedTokens]) -> Tensor:
    """Sum of the supervised losses over the micro-batches, fp32 scalar on the device, factors included, no
    dropout."""
    total = torch.zeros((), dtype=torch.float32, device=decoder.device)
    for tokens in micro_batches:
        x, arguments = decoder.embed_packed(tokens)
        for i in range(len(decoder.layers)):
            x = decoder.run_layer(i, x, arguments[i])
        total += chunked_loss(decoder, x, tokens, gradient_scale=None)[0]
    return total
