"""Key-value cache of B sequences, filled from one packed prefill row and then one token at a time.

Per layer two tensors [B, kv heads, capacity, d] in the compute dtype: 2 B (kv heads) capacity d numbers. Each
sequence has its own length, so sequences of different lengths need no padding tokens, and rotary positions
are those of each sequence alone.

Layers get it in place of transformers' cache, of which they call only `update`. Layers with a memory get a
cache of transformers' own for each sequence (model/by_document.py).
"""

from __future__ import annotations

from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PretrainedConfig


class KeyValueCache:
    """Keys and values of all layers. boundaries: of the B prompts in the prefill row, 0 = b0 < ... < bB.
    capacity: tokens per sequence, the longest prompt plus new tokens. lengths: int64 [B], tokens so far.
    config: of the model."""

    def __init__(
        self, boundaries: tuple[int, ...], capacity: int, device: torch.device, config: PretrainedConfig
    ) -> None:
        self._boundaries, self._config = boundaries, config
        self._capacity = capacity
        prompt_lengths = [stop - start for start, stop in zip(boundaries, boundaries[1:], strict=False)]
        self.lengths = torch.tensor(prompt_lengths, device=device)
        self._sequences = torch.arange(len(prompt_lengths), device=device)
        self._layers: dict[int, tuple[Tensor, Tensor]] = {}

    @cached_property
    def states(self) -> list[DynamicCache]:
        """What layers with a memory keep of each sequence."""
        return [DynamicCache(config=self._config) for _ in self._sequences]

    def update(
        self, keys: Tensor, values: Tensor, layer_index: int, *_: Any, **__: Any
    ) -> tuple[Tensor, Tensor]:
        """Prefill (first call per layer): keys, values [1, heads, T, d] are stored and returned as they are.

        Decoding: [B, heads, 1, d] are written after each sequence's last token; returns all keys and values
        [B, heads, capacity, d].
        """
        if layer_index not in self._layers:
            self._layers[layer_index] = (self._scatter(keys), self._scatter(values))
            return keys, values
        stored = self._layers[layer_index]
        for tensor, new in zip(stored, (keys, values), strict=True):
            tensor[self._sequences, :, self.lengths] = new[:, :, 0]
        return stored

    def advance(self) -> None:
        """Make every sequence one token longer, after a decoding step."""
        self.lengths = self.lengths + 1

    def _scatter(self, row: Tensor) -> Tensor:
        """A packed row [1, heads, T, d] as [B, heads, capacity, d], zeros after each prompt."""
        num_sequences, (_, heads, _, head_size) = len(self._boundaries) - 1, row.shape
        stored = row.new_zeros(num_sequences, heads, self._capacity, head_size)
        for b, (start, stop) in enumerate(zip(self._boundaries, self._boundaries[1:], strict=False)):
            stored[b, :, : stop - start] = row[0, :, start:stop]
        return stored
