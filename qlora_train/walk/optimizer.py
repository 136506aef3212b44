"""AdamW on the flat fp32 LoRA parameters ("masters"), with state that checkpoints save and restore.

`adamw` is torch's; the others are bitsandbytes': 32-bit or block-wise 8-bit state (Dettmers et al. 2022,
arXiv:2110.02861), paged (in CUDA managed memory, moved to the host by the driver when the GPU runs full) or
not. State per LoRA parameter: 8 bytes in 32 bits, 2 + 8/256 in 8 bits.

Paging needs a driver that lets host and device access managed memory at the same time. Elsewhere (Windows,
WSL, some virtual GPUs) all of it moves to the device whenever a kernel starts, so nothing is paged, and host
access while the device is busy (copying the next layer's weights, for instance) ends the process. Waiting
before a checkpoint is written would not help, because those copies continue. So there, and on a CPU, a paged
optimizer is replaced by the unpaged one: the same numbers, the same checkpoints.

Without a GPU the library dequantizes 8-bit state of a whole tensor to fp32 to update it, 20 bytes per element
beside the 12 that stay: 0.8 GB for an 8B model at rank 16. So there the flat buffers are updated a slice at
a time; blocks of 256 share a scale and slices are whole blocks, so the bytes are the same.

On resume the saved state is copied into the tensors that the optimizer allocated, because a loaded tensor
would not be paged.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import bitsandbytes as bnb
import torch
from torch import Tensor, nn

from qlora_train.device.compute import ComputeDevice
from qlora_train.device.description import DeviceDescription
from qlora_train.errors import RunFolderError
from qlora_train.model.lora_parameters import LoraParameters

_BITSANDBYTES = {
    "adamw_8bit": bnb.optim.AdamW8bit,
    "paged_adamw_8bit": bnb.optim.PagedAdamW8bit,
    "paged_adamw_32bit": bnb.optim.PagedAdamW32bit,
}
_NOT_PAGED = {"paged_adamw_8bit": bnb.optim.AdamW8bit, "paged_adamw_32bit": bnb.optim.AdamW32bit}
CPU_SLICE_ELEMENTS = 2**20  # whole blocks of 256
_BETAS, _EPSILON = (0.9, 0.999), 1e-8


def can_page(device: DeviceDescription) -> bool:
    """Whether optimizer state can be paged on this device."""
    return device.is_accelerator and device.has_concurrent_managed_access


def paging_lines(name: str, device: DeviceDescription) -> list[str]:
    """The log lines for a paged optimizer that runs unpaged. name: the value of `training.optimizer`."""
    if name not in _NOT_PAGED or can_page(device) or not device.is_accelerator:
        return []
    return [
        f"training.optimizer: the state of {name} stays on the device, unpaged: this driver offers no "
        "concurrent access to managed memory (none does under Windows and WSL, and on some virtual GPUs)"
    ]


class FlatOptimizer:
    """Updates `lora.masters` from `lora.gradient`, then refreshes the working copy.

    name: a value of `training.optimizer`. lora_b_lr_ratio: learning rate of B over that of A and of tokens'
    rows (LoRA+); 1 makes one parameter group, any other value two.
    """

    def __init__(
        self,
        name: str,
        lora: LoraParameters,
        device: ComputeDevice,
        *,
        lora_b_lr_ratio: float,
        weight_decay: float,
    ) -> None:
        self._lora = lora
        num_elements = lora.masters.numel()
        cuts = [0, num_elements] if lora_b_lr_ratio == 1.0 else [0, lora.first_b, num_elements]
        whole = device.is_accelerator or name == "adamw"
        slice_elements = num_elements if whole else CPU_SLICE_ELEMENTS
        self._parameters: list[nn.Parameter] = []
        groups = []
        for start, stop, ratio in zip(cuts, cuts[1:], (1.0, lora_b_lr_ratio), strict=False):
            parts = list(_slices(start, stop, slice_elements))
            members = [nn.Parameter(lora.masters[part]) for part in parts]
            for parameter, part in zip(members, parts, strict=True):
                parameter.grad = lora.gradient[part]
            self._parameters += members
            groups.append({"params": members, "lr_ratio": ratio})
        options: dict[str, Any] = {"lr": 0.0, "betas": _BETAS, "eps": _EPSILON, "weight_decay": weight_decay}
        self._optimizer: torch.optim.Optimizer
        if name == "adamw":
            self._optimizer = torch.optim.AdamW(groups, **options)
        else:
            classes = _BITSANDBYTES if can_page(device.description) else _BITSANDBYTES | _NOT_PAGED
            self._optimizer = classes[name](groups, **options)

    def step(self, learning_rate: float) -> None:
        """One update with this learning rate; the gradient is not changed."""
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate * group["lr_ratio"]
        self._optimizer.step()
        self._lora.refresh_working()

    def state(self) -> dict[str, Tensor]:
        """The optimizer's state as named tensors; empty before the first step."""
        flat: dict[str, Tensor] = {}
        for i, parameter in enumerate(self._parameters):
            for key, value in self._optimizer.state[parameter].items():
                flat[f"{i}.{key}"] = value.detach() if isinstance(value, Tensor) else torch.tensor(value)
        return flat

    @property
    def managed_bytes(self) -> int:
        """Bytes of state in CUDA managed memory, which the plan counts on the device and torch's allocator
        does not see: the large moments of a paged optimizer, marked by bitsandbytes."""
        states = (
            value for parameter in self._parameters for value in self._optimizer.state[parameter].values()
        )
        return sum(value.nbytes for value in states if getattr(value, "is_paged", False))

    def layout(self) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """dtype and shape of each tensor that `state` returns after the first step. Allocates them."""
        for parameter in self._parameters:
            if not self._optimizer.state[parameter]:
                self._allocate(parameter)
        return {key: (value.dtype, tuple(value.shape)) for key, value in self.state().items()}

    def load_state(self, saved: dict[str, Tensor]) -> None:
        """Restore what `state` returned, which may be empty. Raises `RunFolderError` if it belongs to another
        optimizer."""
        if not saved:
            return
        if {key: (value.dtype, tuple(value.shape)) for key, value in saved.items()} != self.layout():
            raise RunFolderError(
                "the checkpoint holds the state of another optimizer than training.optimizer"
            )
        for i, parameter in enumerate(self._parameters):
            state = self._optimizer.state[parameter]
            for key, value in list(state.items()):
                if isinstance(value, Tensor):
                    value.copy_(saved[f"{i}.{key}"])
                else:
                    state[key] = int(saved[f"{i}.{key}"])

    def _allocate(self, parameter: nn.Parameter) -> None:
        optimizer: Any = self._optimizer
        if isinstance(optimizer, torch.optim.AdamW):
            optimizer.state[parameter] = {
                "step": torch.zeros(()),
                "exp_avg": torch.zeros_like(parameter),
                "exp_avg_sq": torch.zeros_like(parameter),
            }
        else:
            for g, group in enumerate(optimizer.param_groups):
                for p, member in enumerate(group["params"]):
                    if member is parameter:
                        optimizer.init_state(group, parameter, g, p)


def _slices(start: int, stop: int, num_elements: int) -> Iterator[slice]:
    """Split start..stop into slices of num_elements; the last one takes the rest, since bitsandbytes keeps
    32-bit state below 4,096 elements."""
    while stop - start >= 2 * num_elements:
        yield slice(start, start + num_elements)
        start += num_elements
    yield slice(start, stop)
