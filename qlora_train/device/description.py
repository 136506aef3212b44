"""Description of the compute device as plain values: its properties and the kernels that run on it.

Which kernels run (flash attention over all documents in one call, liger-kernel's norms) depends on the card,
on torch's version and on what is installed. All values that decide it are in one description, which
kernels/on_device.py detects. `plan` may be for a card that is not in this machine, and then assumes:

    capability           the driver's; for another card that in cards.py; else that of an RTX 3060
    multiprocessors      by the card's name; for an unknown one the largest number of any card, an upper bound
                         (they decide how many sums of dq a deterministic flash attention keeps)
    varlen attention     that of the installed version of torch
    Triton, liger-kernel whether they are installed here
    cublas_workspace     CUBLAS_WORKSPACE_CONFIG of this environment
    expandable segments  the setting of torch's allocator that `train` would use on this system
    context              a stated size, by capability

`plan` prints these assumptions. Imports no torch.
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
"""What torch's `varlen_attn` supports: "none" without scale and window; whether key heads can be shared."""
DequantizeKernel = Literal["triton", "library", "parts"]
"""How 4-bit weights are dequantized: our Triton kernel, bitsandbytes' kernel, or in parts on a CPU."""

NO_CAPABILITY, FLASH_CAPABILITY = (0, 0), (8, 0)
BFLOAT16_CAPABILITY = (8, 0)
MAX_LIGER_COLUMNS = 65_536
"""Largest row of liger's kernels, which process a row as one block."""
WORKSPACE_VARIABLE = "CUBLAS_WORKSPACE_CONFIG"
DETERMINISTIC_WORKSPACE = ":4096:8"
"""Set by `train` in deterministic mode unless the environment has another value (device/settings.py)."""
NUM_WORKSPACES = 2
ALLOCATOR_VARIABLES = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
STATED_CONTEXT_MIB = {7: 350, 8: 450, 9: 550, 10: 600, 12: 550}
"""Assumed MiB of a context with the kernels of a run, outside torch's allocator, by the major number of the
capability, if it is not measured (device/context.py). A context reserves a stack per concurrent thread of the
card, so these are for the largest cards."""
MOST_CONTEXT_MIB = 600


@dataclass(frozen=True)
class DeviceDescription:
    """The properties of one compute device.

    type: torch's device type ("cpu", "cuda", "xpu"). capability: CUDA compute capability, (0, 0) for others.
    num_multiprocessors: of a GPU. varlen: support of torch's attention over documents of any length.
    has_triton, has_liger: whether their kernels run. has_bfloat16: whether the hardware multiplies bfloat16.
    blocks_documents: whether kernels/blocked_attention.py replaces SDPA for short documents.
    cublas_workspace: the value of CUBLAS_WORKSPACE_CONFIG; None: not set. index: among the devices of its
    type, always given for a GPU of this machine. name: the driver's. memory_bytes: total memory; 0: unknown.
    measured_context_bytes: device memory of this process outside torch's allocator; None: not measured.
    has_expandable_segments: torch's allocator extends its memory by mapping more, instead of allocating
    segments of fixed size. has_concurrent_managed_access: host and device may access managed memory at the
    same time.
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
        """The description from its `dataclasses.asdict` values, also after JSON."""
        major, minor = values["capability"]
        return DeviceDescription(**{**values, "capability": (major, minor)})

    @property
    def is_accelerator(self) -> bool:
        """Whether the device has its own memory, to which tensors are copied, and streams of queued work."""
        return self.type != "cpu"

    @property
    def dequantize_kernel(self) -> DequantizeKernel:
        """The kernel that dequantizes 4-bit weights; see quant/weight.py."""
        if not self.is_accelerator:
            return "parts"
        return "triton" if self.has_triton else "library"

    def flash_serves(self, itemsize: int, head_dim: int) -> bool:
        """Whether torch's flash kernels, forward and backward, support heads of this size and number format,
        with queries, keys and values of one size and no cap on scores. Sizes 193 to 224 have no backward on
        capabilities 8.6, 8.9 and 12.0, which have too little shared memory."""
        has_size = head_dim % 8 == 0 and (head_dim <= 192 or 224 < head_dim <= 256)
        return self.capability >= FLASH_CAPABILITY and itemsize == 2 and has_size

    def varlen_serves(self, itemsize: int, head_dim: int, *, grouped: bool, has_softcap: bool) -> bool:
        """Whether varlen attention supports a layer: all documents in one call. grouped: query heads share
        key heads."""
        expressible = self.varlen == "grouped heads" or (self.varlen == "equal heads" and not grouped)
        return expressible and not has_softcap and self.flash_serves(itemsize, head_dim)

    def workspace_bytes(self, *, deterministic: bool) -> int:
        """Bytes of cuBLAS's workspaces, allocated from torch's allocator and kept: one for the thread of the
        forward pass, one for autograd's. Each has two pieces of 4 MiB and eight of 16 KiB, from Hopper on 32
        MiB, or the pieces in CUBLAS_WORKSPACE_CONFIG (`:SIZE:COUNT` pairs, SIZE in KiB)."""
        if not self.is_accelerator:
            return 0
        config = self.cublas_workspace or (DETERMINISTIC_WORKSPACE if deterministic else "")
        pieces = [(int(size), int(number)) for size, number in re.findall(r":(\d+):(\d+)", config)]
        if not pieces:
            pieces = [(4096, 8)] if self.capability >= (9, 0) else [(4096, 2), (16, 8)]
        return NUM_WORKSPACES * 1024 * sum(size * number for size, number in pieces)

    @property
    def stated_context_bytes(self) -> int:
        """Assumed context bytes for this capability."""
        return STATED_CONTEXT_MIB.get(self.capability[0], MOST_CONTEXT_MIB) * 2**20

    @property
    def context_bytes(self) -> int:
        """Device memory of this process outside torch's allocator, bytes: measured if here, else stated."""
        if not self.is_accelerator:
            return 0
        measured = self.measured_context_bytes
        return self.stated_context_bytes if measured is None else measured

    def in_words(self, *, deterministic: bool) -> str:
        """The assumptions of a plan for this device, as text for the user."""
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
    """A description that holds for all `devices` of one type: kernels that each has, the smallest memory, the
    largest number of multiprocessors (more need more scratch). Other values are those of the first device."""
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
    """The GPU to plan for, described without torch as in the module docstring. gpu_name, capability: the
    driver's; None: unknown, no card is in this machine."""
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
    """The value of CUBLAS_WORKSPACE_CONFIG, None if it is unset or empty."""
    return os.environ.get(WORKSPACE_VARIABLE) or None


def allocator_setting() -> str | None:
    """The environment's settings of torch's allocator, the newer variable first; None: unset."""
    return next((value for name in ALLOCATOR_VARIABLES if (value := os.environ.get(name))), None)


def segments_may_expand() -> bool:
    """Whether the system and the environment allow expandable segments (device/settings.py): on Linux, unless
    the environment configures the allocator otherwise. Under WSL only if the environment asks for them, since
    drivers there claim to support them and fail at the first tensor (pytorch issue 192330)."""
    setting = allocator_setting()
    if setting is None:
        return sys.platform == "linux" and not is_wsl()
    return sys.platform == "linux" and "expandable_segments:true" in setting.lower().replace(" ", "")


def varlen_of_version(version: str) -> Varlen:
    """Support of `varlen_attn` in a torch version: scale, window and grouped heads from 2.11 on."""
    major, minor = (int(part) for part in version.split(".")[:2])
    return "grouped heads" if (major, minor) >= (2, 11) else "none"
