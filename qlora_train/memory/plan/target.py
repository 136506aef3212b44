"""The machine that a plan is for, as far as it decides which operations a step runs there and what they take.

A GPU takes other paths than a CPU (flash attention over all documents in one call, liger-kernel's norms), and
which ones depends on the card, on torch's version and on what is installed. `train` reads all of that off the
device (machine_plan.py). `plan` imports no torch and may be for a card that is not here, so:

    capability           what the driver says; of another card what the table says; else that of an RTX 3060
    multiprocessors      by the card's name; of an unknown one as many as any has (they decide how many sums
                         of dq a deterministic flash attention keeps side by side, so this is the most)
    varlen attention     what the installed version of torch offers
    liger-kernel         whether it and Triton are installed here
    workspace_config     CUBLAS_WORKSPACE_CONFIG of this environment

which `plan` shows, so that nobody has to guess what it assumed.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from importlib import metadata
from importlib.util import find_spec
from typing import Literal

DeviceKind = Literal["cuda", "cpu"]
Capability = tuple[int, int]
Varlen = Literal["none", "equal heads", "grouped heads"]
"""What torch's `varlen_attn` can do beside a scale and a window, if it has those at all."""

FLASH_CAPABILITY = (8, 0)
MAX_LIGER_COLUMNS = 65_536
"""Of kernels/liger.py."""
WORKSPACE_VARIABLE = "CUBLAS_WORKSPACE_CONFIG"
DETERMINISTIC_WORKSPACE = ":4096:8"
"""What `train` sets where nothing else is set (train/setup.py)."""
NUM_WORKSPACES = 2


@dataclass(frozen=True)
class Target:
    """capability, num_multiprocessors: of a GPU. varlen, has_liger: what is installed for it.
    workspace_config: what CUBLAS_WORKSPACE_CONFIG says, None where it is not set."""

    kind: DeviceKind
    capability: Capability
    num_multiprocessors: int
    varlen: Varlen
    has_liger: bool
    workspace_config: str | None

    @property
    def on_cuda(self) -> bool:
        return self.kind == "cuda"

    def flash_serves(self, itemsize: int, head_dim: int) -> bool:
        """As model/varlen_attention.py decides it for heads whose queries and values are of one size."""
        has_size = head_dim % 8 == 0 and (head_dim <= 192 or 224 < head_dim <= 256)
        return self.on_cuda and self.capability >= FLASH_CAPABILITY and itemsize == 2 and has_size

    def varlen_serves(self, itemsize: int, head_dim: int, *, grouped: bool, has_softcap: bool) -> bool:
        """Whether one call attends to all documents. grouped: query heads share key heads."""
        expressible = self.varlen == "grouped heads" or (self.varlen == "equal heads" and not grouped)
        return expressible and not has_softcap and self.flash_serves(itemsize, head_dim)

    def workspace_bytes(self, *, deterministic: bool) -> int:
        """cuBLAS's workspaces, which it takes from torch's allocator and keeps: one for the thread of the
        forward pass, one for autograd's. torch takes two pieces of 4 MiB and eight of 16 KiB for each, from
        Hopper on 32 MiB, or what CUBLAS_WORKSPACE_CONFIG says (`:SIZE:COUNT` pairs, SIZE in KiB)."""
        if not self.on_cuda:
            return 0
        config = self.workspace_config or (DETERMINISTIC_WORKSPACE if deterministic else "")
        pieces = [(int(size), int(number)) for size, number in re.findall(r":(\d+):(\d+)", config)]
        if not pieces:
            pieces = [(4096, 8)] if self.capability >= (9, 0) else [(4096, 2), (16, 8)]
        return NUM_WORKSPACES * 1024 * sum(size * number for size, number in pieces)

    def in_words(self, *, deterministic: bool) -> str:
        """What a plan for it takes as given."""
        if not self.on_cuda:
            return "CPU"
        has_varlen = self.varlen != "none" and self.capability >= FLASH_CAPABILITY
        parts = [
            f"compute capability {self.capability[0]}.{self.capability[1]}",
            "flash attention over all documents at once" if has_varlen else "attention document by document",
            "liger-kernel" if self.has_liger else "no liger-kernel",
        ]
        if deterministic:
            parts.append(f"deterministic on {self.num_multiprocessors} multiprocessors")
        return ", ".join(parts)


CPU = Target("cpu", (0, 0), 0, "none", False, None)

CARDS: dict[str, tuple[Capability, int]] = {
    "RTX 5090": ((12, 0), 170),
    "RTX 4090": ((8, 9), 128),
    "RTX 4080": ((8, 9), 80),
    "RTX 4070": ((8, 9), 66),
    "RTX 4060": ((8, 9), 34),
    "RTX 3090": ((8, 6), 84),
    "RTX 3080": ((8, 6), 80),
    "RTX 3070": ((8, 6), 48),
    "RTX 3060": ((8, 6), 38),
    "T4": ((7, 5), 40),
    "L4": ((8, 9), 60),
    "A10": ((8, 6), 72),
    "A100": ((8, 0), 108),
    "H100": ((9, 0), 132),
    "H200": ((9, 0), 132),
}
"""By part of the name that the driver gives: capability, and multiprocessors of the largest variant."""
ASSUMED_CARD = "RTX 3060"
MOST_MULTIPROCESSORS = 192


def known_card(gpu_name: str | None) -> str | None:
    """The entry of CARDS that a driver's name for a GPU stands for."""
    names = sorted(CARDS, key=len, reverse=True)
    return next((name for name in names if re.search(rf"\b{name}\b", gpu_name or "")), None)


def planned_gpu(gpu_name: str | None, capability: Capability | None) -> Target:
    """The GPU to plan for without torch; see the module docstring. gpu_name, capability: as the driver says
    them; None: no card is here."""
    name = known_card(gpu_name or ASSUMED_CARD)
    stated_capability, num_multiprocessors = CARDS[name or ASSUMED_CARD]
    return Target(
        kind="cuda",
        capability=capability or stated_capability,
        num_multiprocessors=num_multiprocessors if name else MOST_MULTIPROCESSORS,
        varlen=varlen_of_version(metadata.version("torch")),
        has_liger=find_spec("liger_kernel") is not None and find_spec("triton") is not None,
        workspace_config=workspace_config(),
    )


def workspace_config() -> str | None:
    """What this environment says."""
    return os.environ.get(WORKSPACE_VARIABLE) or None


def varlen_of_version(version: str) -> Varlen:
    """What a torch version's `varlen_attn` can do: scale and window from 2.11 on, grouped heads from 2.12."""
    major, minor = (int(part) for part in version.split(".")[:2])
    if (major, minor) >= (2, 12):
        return "grouped heads"
    return "equal heads" if (major, minor) == (2, 11) else "none"
