"""The keys and values of B sequences, filled from one packed prefill row and then one token at a time.

Per layer two tensors [B, kv heads, capacity, d] in the compute dtype; 2 B heads capacity d elements per
layer. Sequence b's own length says how much of it is real: sequences of different lengths need no padding
tokens, and rotary positions are those of the sequence alone.

It is handed to the layers in the place of transformers' cache, of which they call `update` only.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class KeyValueCache:
    """boundaries: of the B prompts in the prefill row, 0 = b0 < ... < bB. capacity: longest prompt plus new
    tokens."""

    def __init__(self, boundaries: tuple[int, ...], capacity: int, device: torch.device) -> None:
        self._boundaries = boundaries
        self._capacity = capacity
        prompt_lengths = [stop - start for start, stop in zip(boundaries, boundaries[1:], strict=False)]
        self.lengths = torch.tensor(prompt_lengths, device=device)
        self._sequences = torch.arange(len(prompt_lengths), device=device)
        self._layers: dict[int, tuple[Tensor, Tensor]] = {}

    def update(
        self, keys: Tensor, values: Tensor, layer_index: int, *_: Any, **__: Any
    ) -> tuple[Tensor, Tensor]:
        """Prefill (first call per layer): keys, values [1, heads, T, d] are stored and returned as they are.

        Decoding: [B, heads, 1, d] are written behind each sequence's last token; returns all [B, heads,
        capacity, d].
        """
        if layer_index not in self._layers:
            self._layers[layer_index] = (self._scatter(keys), self._scatter(values))
            return keys, values
        stored = self._layers[layer_index]
        for tensor, new in zip(stored, (keys, values), strict=True):
            tensor[self._sequences, :, self.lengths] = new[:, :, 0]
        return stored

    def advance(self) -> None:
        """After a decoding step: every sequence is one token longer."""
        self.lengths = self.lengths + 1

    def _scatter(self, row: Tensor) -> Tensor:
        num_sequences, (_, heads, _, head_size) = len(self._boundaries) - 1, row.shape
        stored = row.new_zeros(num_sequences, heads, self._capacity, head_size)
        for b, (start, stop) in enumerate(zip(self._boundaries, self._boundaries[1:], strict=False)):
            stored[b, :, : stop - start] = row[0, :, start:stop]
        return stored
