"""Dropout as a pure function: the mask depends on what is dropped, never on when or how often it is computed.

The mask bit of feature d of one token is a hash of (seed, optimizer step, module, row of the data order,
offset in the row, d). A stateful generator would give recompute other bits than the forward pass, micro-batch
splits other bits than one big batch, and a resume other bits than the straight run; each needs its own saved
state. A hash needs none, and nothing is saved for backward: the mask is computed again.

The maths: a 64-bit key per token from five chained rounds of the splitmix64 finaliser (Steele, Lea, Flood
2014), folded to 32 bits u[t]; a 32-bit key per feature v[d]; bits[t, d] = mix32(u[t] ^ v[d]) with the
two-round "lowbias32" finaliser (C. Wellons, hash prospector). Kept where bits (as an unsigned number) >= p *
2^32. Working memory: two int32 [T, D].
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

_MASK64 = (1 << 64) - 1


@dataclass(frozen=True)
class DropoutKeys:
    """Identity of the tokens of a micro-batch for dropout.

    seed, step: of the run and of the optimizer step. rows, offsets: int64 [T], position of the token's row in
    the data order and its offset in that row.
    """

    seed: int
    step: int
    rows: Tensor
    offsets: Tensor


def _signed(value: int) -> int:
    """A 64-bit pattern as the int64 that torch takes."""
    value &= _MASK64
    return value - (1 << 64) if value >> 63 else value


def _shift_right(x: Tensor, bits: int, width: int) -> Tensor:
    """Logical shift: torch's >> carries the sign along."""
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
    """Which inputs survive: bool [T, num_features], True with probability 1 - `probability`."""
    golden = _signed(0x9E3779B97F4A7C15)
    token = torch.full_like(keys.rows, _signed(keys.seed))
    for part in (keys.step, module_id, keys.rows, keys.offsets):
        token = _mix64((token + golden) ^ part)
    feature = _mix64(torch.arange(num_features, device=keys.rows.device) * golden + module_id)
    bits = _mix32(token.to(torch.int32)[:, None] ^ feature.to(torch.int32)[None, :])
    threshold = round(probability * (1 << 32)) - (1 << 31)  # unsigned comparison through the signed type
    return (bits ^ -(1 << 31)) >= threshold


def dropout(x: Tensor, keys: DropoutKeys, module_id: int, probability: float) -> Tensor:
    """x [..., T, D] with dropped features zeroed and the others divided by 1 - probability."""
    mask = keep_mask(keys, module_id, x.shape[-1], probability)
    return x * mask.to(x.dtype).mul_(1.0 / (1.0 - probability)).view(x.shape)
