"""What a layer leaves behind for its backward pass: its whole graph (keep) or only its input (recompute).

    keep       saved tensors stay from forward to backward: no extra FLOPs (4 per token and parameter in all)
    recompute  only x_i [T, D] stays; the layer runs again in backward (6 per token and parameter;
               Chen et al. 2016, arXiv:1604.06174)

The choice is per layer, so memory between the two extremes is not wasted. The kept bytes of a layer are
measured, not guessed: one forward through a layer with a hook that sums what autograd saves. The last layers
are kept first: their graphs are born last and freed first, which shortens the time that most memory is in
use.
"""

from __future__ import annotations

from enum import StrEnum

import torch
from torch import Tensor

from qlora_train.model.decoder import FrozenDecoder
from qlora_train.model.packed_tokens import PackedTokens

SHARE_OF_FREE_MEMORY = 0.5  # for kept graphs; the rest is working set, optimizer and other programs


class Activation(StrEnum):
    """Policy of one layer."""

    KEEP = "keep"
    RECOMPUTE = "recompute"


def kept_bytes_of_layer(decoder: FrozenDecoder, tokens: PackedTokens) -> int:
    """Bytes that autograd saves for the last layer and one micro-batch, each storage counted once."""
    storages: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    x, arguments = decoder.embed_packed(tokens)
    last = len(decoder.layers) - 1
    for parameter in decoder.layers[last].parameters():  # weights are there anyway
        storages[parameter.untyped_storage().data_ptr()] = 0
    known = set(storages)
    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        decoder.run_layer(last, x.requires_grad_(), arguments[last])
    return sum(num_bytes for pointer, num_bytes in storages.items() if pointer not in known)


def choose_activations(
    num_layers: int, kept_bytes: int, num_micro_batches: int, free_bytes: int
) -> tuple[Activation, ...]:
    """Keep as many layers as fit into a share of the free memory, the last ones first; recompute the
    others."""
    budget_bytes = int(free_bytes * SHARE_OF_FREE_MEMORY)
    num_kept = min(num_layers, budget_bytes // max(1, kept_bytes * num_micro_batches))
    return (Activation.RECOMPUTE,) * (num_layers - num_kept) + (Activation.KEEP,) * num_kept
