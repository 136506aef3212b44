"""Known GPUs by name with the makers' figures, for plans and until rates are measured."""

from __future__ import annotations

import re
from dataclasses import dataclass
from operator import ne

Capability = tuple[int, int]


@dataclass(frozen=True)
class Card:
    """One GPU model. capability: CUDA compute capability. num_multiprocessors: of the largest variant with
    this name. memory_gib: GiB of device memory. flops: FLOP/s in 16 bits. memory: bytes/s of device memory.
    copy: bytes/s over PCIe in each direction, of a laptop's card over 8 lanes. Rates are rounded, about
    three quarters of the makers' figures."""

    capability: Capability
    num_multiprocessors: int
    memory_gib: int
    flops: float
    memory: float
    copy: float


CARDS: dict[str, Card] = {
    "RTX 5090": Card((12, 0), 170, 32, 165e12, 1500e9, 45e9),
    "RTX 5090 Laptop": Card((12, 0), 82, 24, 70e12, 750e9, 22e9),
    "RTX 5080": Card((12, 0), 84, 16, 90e12, 800e9, 45e9),
    "RTX 5080 Laptop": Card((12, 0), 60, 16, 52e12, 750e9, 22e9),
    "RTX 5070 Ti": Card((12, 0), 70, 16, 70e12, 750e9, 45e9),
    "RTX 5070 Ti Laptop": Card((12, 0), 46, 12, 40e12, 560e9, 22e9),
    "RTX 5070": Card((12, 0), 48, 12, 50e12, 560e9, 45e9),
    "RTX 5070 Laptop": Card((12, 0), 36, 8, 32e12, 320e9, 22e9),
    "RTX 5060 Ti 16GB": Card((12, 0), 36, 16, 38e12, 370e9, 22e9),
    "RTX 5060 Ti 8GB": Card((12, 0), 36, 8, 38e12, 370e9, 22e9),
    "RTX 5060": Card((12, 0), 30, 8, 30e12, 370e9, 22e9),
    "RTX 4090": Card((8, 9), 128, 24, 130e12, 850e9, 22e9),
    "RTX 4090 Laptop": Card((8, 9), 76, 16, 60e12, 480e9, 11e9),
    "RTX 4090 D": Card((8, 9), 114, 24, 115e12, 850e9, 22e9),
    "RTX 4080 SUPER": Card((8, 9), 80, 16, 82e12, 610e9, 22e9),
    "RTX 4080": Card((8, 9), 76, 16, 80e12, 600e9, 22e9),
    "RTX 4080 Laptop": Card((8, 9), 58, 12, 50e12, 360e9, 11e9),
    "RTX 4070 Ti SUPER": Card((8, 9), 66, 16, 70e12, 560e9, 22e9),
    "RTX 4070 Ti": Card((8, 9), 60, 12, 65e12, 420e9, 22e9),
    "RTX 4070 SUPER": Card((8, 9), 56, 12, 58e12, 420e9, 22e9),
    "RTX 4070": Card((8, 9), 46, 12, 50e12, 420e9, 22e9),
    "RTX 4070 Laptop": Card((8, 9), 36, 8, 30e12, 210e9, 11e9),
    "RTX 4060 Ti 8GB": Card((8, 9), 34, 8, 36e12, 240e9, 11e9),
    "RTX 4060 Ti 16GB": Card((8, 9), 34, 16, 36e12, 240e9, 11e9),
    "RTX 4060": Card((8, 9), 24, 8, 26e12, 230e9, 11e9),
    "RTX 4060 Laptop": Card((8, 9), 24, 8, 22e12, 210e9, 11e9),
    "RTX 4050": Card((8, 9), 20, 6, 14e12, 150e9, 11e9),
    "RTX 4050 Laptop": Card((8, 9), 20, 6, 14e12, 150e9, 11e9),
    "RTX 3090 Ti": Card((8, 6), 84, 24, 66e12, 850e9, 22e9),
    "RTX 3090": Card((8, 6), 82, 24, 60e12, 800e9, 22e9),
    "RTX 3080 Ti": Card((8, 6), 80, 12, 57e12, 780e9, 22e9),
    "RTX 3080 Ti Laptop": Card((8, 6), 58, 16, 35e12, 430e9, 11e9),
    "RTX 3080 10GB": Card((8, 6), 70, 10, 50e12, 650e9, 22e9),
    "RTX 3080 12GB": Card((8, 6), 70, 12, 52e12, 780e9, 22e9),
    "RTX 3080 Laptop 8GB": Card((8, 6), 48, 8, 32e12, 370e9, 11e9),
    "RTX 3080 Laptop 16GB": Card((8, 6), 48, 16, 32e12, 370e9, 11e9),
    "RTX 3070 Ti": Card((8, 6), 48, 8, 37e12, 510e9, 22e9),
    "RTX 3070": Card((8, 6), 46, 8, 35e12, 380e9, 22e9),
    "RTX 3070 Laptop": Card((8, 6), 40, 8, 25e12, 320e9, 11e9),
    "RTX 3060 Ti": Card((8, 6), 38, 8, 28e12, 380e9, 22e9),
    "RTX 3060 12GB": Card((8, 6), 28, 12, 22e12, 310e9, 22e9),
    "RTX 3060 8GB": Card((8, 6), 28, 8, 22e12, 200e9, 22e9),
    "RTX 3060 Laptop": Card((8, 6), 30, 6, 20e12, 280e9, 11e9),
    "RTX A6000": Card((8, 6), 84, 48, 115e12, 600e9, 22e9),
    "T4": Card((7, 5), 40, 16, 35e12, 260e9, 11e9),
    "L4": Card((8, 9), 58, 24, 70e12, 260e9, 22e9),
    "A10": Card((8, 6), 72, 24, 75e12, 500e9, 22e9),
    "A10G": Card((8, 6), 80, 24, 50e12, 500e9, 22e9),
    "A100 40GB": Card((8, 0), 108, 40, 220e12, 1400e9, 22e9),
    "A100 80GB": Card((8, 0), 108, 80, 220e12, 1700e9, 22e9),
    "A100 PCIe 40GB": Card((8, 0), 108, 40, 220e12, 1400e9, 22e9),
    "A100 PCIe 80GB": Card((8, 0), 108, 80, 220e12, 1600e9, 22e9),
    "H100": Card((9, 0), 132, 80, 550e12, 2600e9, 45e9),
    "H100 PCIe": Card((9, 0), 114, 80, 450e12, 1600e9, 45e9),
    "H100 NVL": Card((9, 0), 132, 94, 500e12, 3000e9, 45e9),
    "H200": Card((9, 0), 132, 141, 550e12, 3800e9, 45e9),
    "H200 NVL": Card((9, 0), 132, 141, 500e12, 3800e9, 45e9),
}
"""Cards by name. Of cards that differ in their memory, the usual one comes first."""
ASSUMED_CARD = "RTX 3060 12GB"
MOST_MULTIPROCESSORS = 192
_MEMORY = re.compile(r"\b(\d+) ?gi?b?\b")
_NOT_COMPARED = re.compile(r"nvidia|geforce|tesla|gpu|rtx|sxm\d?|hbm\d?e?|[^a-z0-9]")
"""Words that say whose a card is or how it is built in, spaces and hyphens."""
_LEAST_BEGINNING = 4
"""Characters of a beginning that says something: an L40S is no L4."""


def known_card(gpu_name: str | None) -> str | None:
    """The key in CARDS for a GPU's name as a driver or a user writes it, or None. The whole name is compared,
    and the memory if it says one, as in `A100-SXM4-80GB`."""
    model, memory_gib = _model_and_memory(gpu_name or "")
    return next((name for name in _of_model(model) if memory_gib in (None, CARDS[name].memory_gib)), None)


def cards_of_any_memory(gpu_name: str) -> list[str]:
    """The keys in CARDS for a GPU's name, whatever memory it says."""
    return _of_model(_model_and_memory(gpu_name)[0])


def nearest_cards(gpu_name: str) -> list[str]:
    """The keys in CARDS whose names differ in one character or begin this one, three at most."""
    asked, _ = _model_and_memory(gpu_name)
    models = {_model_and_memory(name)[0]: name for name in reversed(CARDS)}
    near = [model for model in models if len(model) >= _LEAST_BEGINNING and asked.startswith(model)]
    near += [model for model in models if len(model) == len(asked) and sum(map(ne, model, asked)) == 1]
    return [models[model] for model in sorted(near, key=len, reverse=True)[:3]]


def _of_model(model: str) -> list[str]:
    return [name for name in CARDS if _model_and_memory(name)[0] == model]


def _model_and_memory(gpu_name: str) -> tuple[str, int | None]:
    """(what is compared of a GPU's name, the GB of memory that it says)."""
    name = re.sub(r"[\s_-]+", " ", gpu_name.lower().replace("mobile", "laptop"))
    memory = _MEMORY.search(name)
    return _NOT_COMPARED.sub("", _MEMORY.sub("", name, count=1)), int(memory[1]) if memory else None
