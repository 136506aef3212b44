"""The device that a step computes on, as plain values: what it is, and which kernels it has.

A GPU takes other paths than a CPU (flash attention over all documents in one call, liger-kernel's norms), and
which ones depends on the card, on torch's version and on what is installed. All that any decision needs is
said once, here, and handed down; find.py reads it off the device that is there. `plan` may be for a card that
is not here, so then:

    capability           what the driver says; of another card what the table says; else that of an RTX 3060
    multiprocessors      by the card's name; of an unknown one as many as any has (they decide how many sums
                         of dq a deterministic flash attention keeps side by side, so this is the most)
    varlen attention     what the installed version of torch offers
    Triton, liger-kernel whether they are installed here
    cublas_workspace     CUBLAS_WORKSPACE_CONFIG of this environment

which `plan` shows, so that nobody has to guess what it assumed. Imports no torch.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from importlib import metadata
from importlib.util import find_spec
from typing import Literal

Capability = tuple[int, int]
Varlen = Literal["none", "equal heads", "grouped heads"]
UnpackKernel = Literal["triton", "library", "parts"]
"""What torch's `varlen_attn` can do beside a scale and a window, if it has those at all."""

NO_CAPABILITY, FLASH_CAPABILITY = (0, 0), (8, 0)
BFLOAT16_CAPABILITY = (8, 0)
MAX_LIGER_COLUMNS = 65_536
"""A row is one block of its kernels."""
WORKSPACE_VARIABLE = "CUBLAS_WORKSPACE_CONFIG"
DETERMINISTIC_WORKSPACE = ":4096:8"
"""What `train` sets where nothing else is set (device/settings.py)."""
NUM_WORKSPACES = 2


@dataclass(frozen=True)
class DeviceDescription:
    """One compute device.

    type: torch's word for it ("cpu", "cuda", "xpu"). capability: CUDA's number for what a GPU can do, (0, 0)
    elsewhere. num_multiprocessors: of a GPU. varlen:
    torch's attention over documents of any length. has_triton, has_liger: whether their kernels run there.
    has_bfloat16: whether it multiplies bfloat16 itself. blocks_documents: whether short documents are
    attended to by products of our own (kernels/blocked_attention.py) instead of SDPA. cublas_workspace: what CUBLAS_WORKSPACE_CONFIG says,
    None where it is not set. index: which of its type, always known for a GPU that is here. name:
    as the driver says it. memory_bytes: all of the device's memory, 0 where it is not known.
    """

    type: str
    capability: Capability
    num_multiprocessors: int
    varlen: Varlen
    has_liger: bool
    cublas_workspace: str | None
    has_triton: bool = False
    has_bfloat16: bool = False
    blocks_documents: bool = False
    index: int | None = None
    name: str = ""
    memory_bytes: int = 0

    @property
    def is_accelerator(self) -> bool:
        """Whether its memory is not the host's: tensors are copied there, work is queued on streams."""
        return self.type != "cpu"

    @property
    def unpack_kernel(self) -> UnpackKernel:
        """What writes a 4-bit weight out as numbers; see quantize.py."""
        if not self.is_accelerator:
            return "parts"
        return "triton" if self.has_triton else "library"

    def flash_serves(self, itemsize: int, head_dim: int) -> bool:
        """Whether torch's flash kernels, forward and backward, run for heads whose queries, keys and values
        are of one size, without a cap on scores. 193 to 224 lacks a backward on capabilities 8.6, 8.9 and
        12.0: too little shared memory."""
        has_size = head_dim % 8 == 0 and (head_dim <= 192 or 224 < head_dim <= 256)
        return self.capability >= FLASH_CAPABILITY and itemsize == 2 and has_size

    def varlen_serves(self, itemsize: int, head_dim: int, *, grouped: bool, has_softcap: bool) -> bool:
        """Whether one call attends to all documents. grouped: query heads share key heads."""
        expressible = self.varlen == "grouped heads" or (self.varlen == "equal heads" and not grouped)
        return expressible and not has_softcap and self.flash_serves(itemsize, head_dim)

    def workspace_bytes(self, *, deterministic: bool) -> int:
        """cuBLAS's workspaces, which it takes from torch's allocator and keeps: one for the thread of the
        forward pass, one for autograd's. torch takes two pieces of 4 MiB and eight of 16 KiB for each, from
        Hopper on 32 MiB, or what CUBLAS_WORKSPACE_CONFIG says (`:SIZE:COUNT` pairs, SIZE in KiB)."""
        if not self.is_accelerator:
            return 0
        config = self.cublas_workspace or (DETERMINISTIC_WORKSPACE if deterministic else "")
        pieces = [(int(size), int(number)) for size, number in re.findall(r":(\d+):(\d+)", config)]
        if not pieces:
            pieces = [(4096, 8)] if self.capability >= (9, 0) else [(4096, 2), (16, 8)]
        return NUM_WORKSPACES * 1024 * sum(size * number for size, number in pieces)

    def in_words(self, *, deterministic: bool) -> str:
        """What a plan for it takes as given."""
        if not self.is_accelerator:
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


CPU = DeviceDescription(
    "cpu", NO_CAPABILITY, 0, "none", has_liger=False, cublas_workspace=None, blocks_documents=True
)

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


def planned_gpu(gpu_name: str | None, capability: Capability | None) -> DeviceDescription:
    """The GPU to plan for without torch; see the module docstring. gpu_name, capability: as the driver says
    them; None: no card is here."""
    name = known_card(gpu_name or ASSUMED_CARD)
    stated_capability, num_multiprocessors = CARDS[name or ASSUMED_CARD]
    has_triton = find_spec("triton") is not None
    return DeviceDescription(
        type="cuda",
        capability=capability or stated_capability,
        num_multiprocessors=num_multiprocessors if name else MOST_MULTIPROCESSORS,
        varlen=varlen_of_version(metadata.version("torch")),
        has_liger=find_spec("liger_kernel") is not None and has_triton,
        cublas_workspace=cublas_workspace(),
        has_triton=has_triton,
        has_bfloat16=(capability or stated_capability) >= BFLOAT16_CAPABILITY,
        name=gpu_name or "",
    )


def cublas_workspace() -> str | None:
    """What this environment says."""
    return os.environ.get(WORKSPACE_VARIABLE) or None


def varlen_of_version(version: str) -> Varlen:
    """What a torch version's `varlen_attn` can do: scale, window and grouped heads from 2.11 on."""
    major, minor = (int(part) for part in version.split(".")[:2])
    return "grouped heads" if (major, minor) >= (2, 11) else "none"
