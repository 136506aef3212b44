"""Known GPUs by name with the makers' figures, for plans and until rates are measured."""

from __future__ import annotations

import re
from dataclasses import dataclass

Capability = tuple[int, int]


@dataclass(frozen=True)
class Card:
    """One GPU model. capability: CUDA compute capability. num_multiprocessors: of the largest variant.
    memory_gib: GiB of the smallest variant. flops: FLOP/s in 16 bits. memory: bytes/s of device memory. copy:
    bytes/s over PCIe in each direction. Rates are rounded, about three quarters of the makers' figures."""

    capability: Capability
    num_multiprocessors: int
    memory_gib: int
    flops: float
    memory: float
    copy: float


CARDS: dict[str, Card] = {
    "RTX 5090": Card((12, 0), 170, 32, 165e12, 1500e9, 45e9),
    "RTX 4090": Card((8, 9), 128, 24, 130e12, 850e9, 22e9),
    "RTX 4080": Card((8, 9), 80, 16, 80e12, 600e9, 22e9),
    "RTX 4070": Card((8, 9), 66, 12, 50e12, 420e9, 22e9),
    "RTX 4060": Card((8, 9), 34, 8, 26e12, 230e9, 11e9),
    "RTX 4050": Card((8, 9), 20, 6, 14e12, 150e9, 11e9),
    "RTX 3090": Card((8, 6), 84, 24, 60e12, 800e9, 22e9),
    "RTX 3080": Card((8, 6), 80, 10, 50e12, 650e9, 22e9),
    "RTX 3070": Card((8, 6), 48, 8, 35e12, 380e9, 22e9),
    "RTX 3060": Card((8, 6), 38, 8, 22e12, 310e9, 22e9),
    "RTX A6000": Card((8, 6), 84, 48, 115e12, 600e9, 22e9),
    "T4": Card((7, 5), 40, 16, 35e12, 260e9, 11e9),
    "L4": Card((8, 9), 60, 24, 70e12, 260e9, 22e9),
    "A10": Card((8, 6), 72, 24, 75e12, 500e9, 22e9),
    "A100": Card((8, 0), 108, 40, 220e12, 1400e9, 22e9),
    "H100": Card((9, 0), 132, 80, 550e12, 2600e9, 45e9),
    "H200": Card((9, 0), 132, 141, 550e12, 3800e9, 45e9),
}
"""Cards by a part of the name that the driver reports."""
ASSUMED_CARD = "RTX 3060"
MOST_MULTIPROCESSORS = 192


def known_card(gpu_name: str | None) -> str | None:
    """The key in CARDS for a driver's name of a GPU, or None; the longest match is taken."""
    names = sorted(CARDS, key=len, reverse=True)
    return next((name for name in names if re.search(rf"\b{name}\b", gpu_name or "", re.IGNORECASE)), None)
