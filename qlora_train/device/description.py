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
    expandable segments  what train would ask of torch's allocator on this system
    context              a stated size, by capability

which `plan` shows, so that nobody has to guess what it assumed. Imports no torch.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import metadata
from importlib.util import find_spec
from typing import Any, Literal, get_args

from qlora_train.device.cards import ASSUMED_CARD, CARDS, MOST_MULTIPROCESSORS, Capability, known_card
from qlora_train.device.system import is_wsl

Varlen = Literal["none", "equal heads", "grouped heads"]
DequantizeKernel = Literal["triton", "library", "parts"]
"""What torch's `varlen_attn` can do beside a scale and a window, if it has those at all."""

NO_CAPABILITY, FLASH_CAPABILITY = (0, 0), (8, 0)
BFLOAT16_CAPABILITY = (8, 0)
MAX_LIGER_COLUMNS = 65_536
"""A row is one block of its kernels."""
WORKSPACE_VARIABLE = "CUBLAS_WORKSPACE_CONFIG"
DETERMINISTIC_WORKSPACE = ":4096:8"
"""What `train` sets where nothing else is set (device/settings.py)."""
NUM_WORKSPACES = 2
ALLOCATOR_VARIABLES = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
STATED_CONTEXT_MIB = {7: 350, 8: 450, 9: 550, 10: 600, 12: 550}
"""By the first number of the capability: what a context with the kernels of a run is taken to hold, outside
torch's allocator, where it is not measured (device/context.py). It grows with the number of threads that a
card runs at once, for each of which a stack is set aside; so these are for the largest cards."""
MOST_CONTEXT_MIB = 600


@dataclass(frozen=True)
class DeviceDescription:
    """One compute device.

    type: torch's word for it ("cpu", "cuda", "xpu"). capability: CUDA's number for what a GPU can do, (0, 0)
    elsewhere. num_multiprocessors: of a GPU. varlen: torch's attention over documents of any length.
    has_triton, has_liger: whether their kernels run there. has_bfloat16: whether it multiplies bfloat16
    itself. blocks_documents: whether short documents are attended to by products of our own
    (kernels/blocked_attention.py) instead of SDPA. cublas_workspace: what CUBLAS_WORKSPACE_CONFIG says, None
    where it is not set. index: which of its type, always known for a GPU that is here. name: as the driver
    says it. memory_bytes: all of the device's memory, 0 where it is not known.
    measured_context_bytes: what this process holds beside tensors; None where the device is not here.
    has_expandable_segments: torch's allocator maps more memory behind what it has, instead of taking segments
    of fixed size. has_concurrent_managed_access: host and device may touch managed memory at the same time.
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
    measured_context_bytes: int | None = None
    has_expandable_segments: bool = True
    has_concurrent_managed_access: bool = True

    @staticmethod
    def from_dict(values: Mapping[str, Any]) -> DeviceDescription:
        """What `dataclasses.asdict` and JSON made of one."""
        major, minor = values["capability"]
        return DeviceDescription(**{**values, "capability": (major, minor)})

    @property
    def is_accelerator(self) -> bool:
        """Whether its memory is not the host's: tensors are copied there, work is queued on streams."""
        return self.type != "cpu"

    @property
    def dequantize_kernel(self) -> DequantizeKernel:
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

    @property
    def stated_context_bytes(self) -> int:
        """Of a device of this capability."""
        return STATED_CONTEXT_MIB.get(self.capability[0], MOST_CONTEXT_MIB) * 2**20

    @property
    def context_bytes(self) -> int:
        """Of this process on the device beside tensors: measured where it is here, else stated."""
        if not self.is_accelerator:
            return 0
        measured = self.measured_context_bytes
        return self.stated_context_bytes if measured is None else measured

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


def least_capable(devices: Sequence[DeviceDescription]) -> DeviceDescription:
    """What all of them can do, several of one type: kernels that each has, the smallest memory, the most
    multiprocessors, as they take scratch. Name and workspaces are the first one's."""
    kernels: tuple[Varlen, ...] = get_args(Varlen)
    return replace(
        devices[0],
        capability=min(device.capability for device in devices),
        num_multiprocessors=max(device.num_multiprocessors for device in devices),
        varlen=min((device.varlen for device in devices), key=kernels.index),
        has_liger=all(device.has_liger for device in devices),
        has_triton=all(device.has_triton for device in devices),
        has_bfloat16=all(device.has_bfloat16 for device in devices),
        memory_bytes=min(device.memory_bytes for device in devices),
        has_expandable_segments=all(device.has_expandable_segments for device in devices),
        has_concurrent_managed_access=all(device.has_concurrent_managed_access for device in devices),
    )


def planned_gpu(gpu_name: str | None, capability: Capability | None) -> DeviceDescription:
    """The GPU to plan for without torch; see the module docstring. gpu_name, capability: as the driver says
    them; None: no card is here."""
    name = known_card(gpu_name or ASSUMED_CARD)
    card = CARDS[name or ASSUMED_CARD]
    capability = capability or card.capability
    has_triton = find_spec("triton") is not None
    return DeviceDescription(
        type="cuda",
        capability=capability,
        num_multiprocessors=card.num_multiprocessors if name else MOST_MULTIPROCESSORS,
        varlen=varlen_of_version(metadata.version("torch")),
        has_liger=find_spec("liger_kernel") is not None and has_triton,
        cublas_workspace=cublas_workspace(),
        has_triton=has_triton,
        has_bfloat16=capability >= BFLOAT16_CAPABILITY,
        name=gpu_name or "",
        has_expandable_segments=segments_may_expand(),
    )


def cublas_workspace() -> str | None:
    """What this environment says."""
    return os.environ.get(WORKSPACE_VARIABLE) or None


def allocator_setting() -> str | None:
    """What this environment says of torch's allocator; the newer of the two names goes first."""
    return next((value for name in ALLOCATOR_VARIABLES if (value := os.environ.get(name))), None)


def segments_may_expand() -> bool:
    """Whether torch's allocator will be told to (device/settings.py), as far as the system decides it: on
    Linux, unless the environment configures the allocator otherwise. Under WSL only where the environment
    asks for it: drivers there say that they can map memory and fail at the first tensor (pytorch issue
    192330)."""
    setting = allocator_setting()
    if setting is None:
        return sys.platform == "linux" and not is_wsl()
    return sys.platform == "linux" and "expandable_segments:true" in setting.lower().replace(" ", "")


def varlen_of_version(version: str) -> Varlen:
    """What a torch version's `varlen_attn` can do: scale, window and grouped heads from 2.11 on."""
    major, minor = (int(part) for part in version.split(".")[:2])
    return "grouped heads" if (major, minor) >= (2, 11) else "none"
