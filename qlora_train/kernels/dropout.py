"""Dropout as a pure function: the mask is a hash of the token's identity and needs no generator state.

The mask bit of feature d of one token is a hash of (seed, optimizer step, module, row of the data order,
offset in the row, d). With a stateful generator, recomputation would differ from the forward pass,
micro-batches from one large batch, and a resumed run from an uninterrupted one, unless state was saved for
each. A hash needs no state, and nothing is saved for backward: the mask is recomputed.

The maths: a 64-bit key per token from four chained rounds of the splitmix64 finalizer (Steele, Lea, Flood
2014), truncated to 32 bits u[t]; a 32-bit key per feature v[d] from one round; bits[t, d] = mix32(u[t] ^
v[d]) with the two-round "lowbias32" finalizer (C. Wellons, hash prospector). A feature is kept if bits, as an
unsigned number, >= p * 2^32. Working memory: two int32 [T, D].
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

_MASK64 = (1 << 64) - 1


@dataclass(frozen=True)
class DropoutKeys:
    """Identity of the tokens of a micro-batch, which determines their dropout masks.

    seed: of the run. step: number of the optimizer step. rows, offsets: int64 [T], position of the token's
    row in the data order and the token's offset in that row.
    """

    seed: int
    step: int
    rows: Tensor
    offsets: Tensor

    def of(self, tokens: slice | Tensor) -> DropoutKeys:
        """The keys of some of the tokens, in their order."""
        return replace(self, rows=self.rows[tokens], offsets=self.offsets[tokens])


def _signed(value: int) -> int:
    """The int64 number, as torch needs it, with the bits of an unsigned 64-bit value."""
    value &= _MASK64
    return value - (1 << 64) if value >> 63 else value


def _shift_right(x: Tensor, bits: int, width: int) -> Tensor:
    """Logical right shift of `width`-bit integers; torch's >> copies the sign bit."""
    return (x >> bits) & ((1 << (width - bits)) - 1)


def _mix64(x: Tensor) -> Tensor:
    x = (x ^ _shift_right(x, 30, 64)) * _signed(0xBF58476D1CE4E5B9)
    x = (x ^ _shift_right(x, 27, 64)) * _signed(0x94D049BB133111EB)
    return x ^ _shift_right(x, 31, 64)


def _mix32(x: Tensor) -> Tensor:
    x = (x ^ _shift_right(x, 16, 32)) * 0x7FEB352D
    x = (x ^ _shift_right(x, 15, 32)) * (0x846CA68B - (1 << 32))
    return x ^ _shift_right(x, 16, 32)


def keep_mask(keys: DropoutKeys, module_id: int, num_features: int, probability: float) -> Tensor:
    """Mask of the kept features: bool [T, num_features], True with probability 1 - `probability`."""
    golden = _signed(0x9E3779B97F4A7C15)
    token = torch.full_like(keys.rows, _signed(keys.seed))
    for part in (keys.step, module_id, keys.rows, keys.offsets):
        token = _mix64((token + golden) ^ part)
    feature = _mix64(torch.arange(num_features, device=keys.rows.device) * golden + module_id)
    bits = _mix32(token.to(torch.int32)[:, None] ^ feature.to(torch.int32)[None, :])
    threshold = round(probability * (1 << 32)) - (1 << 31)  # unsigned comparison with signed numbers
    return (bits ^ -(1 << 31)) >= threshold


def dropout(x: Tensor, keys: DropoutKeys, module_id: int, probability: float) -> Tensor:
    """x [..., T, D] with dropped features set to 0 and the others divided by 1 - probability."""
    mask = keep_mask(keys, module_id, x.shape[-1], probability)
    return x * mask.to(x.dtype).mul_(1.0 / (1.0 - probability)).view(x.shape)
