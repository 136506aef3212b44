"""Registers kernels with torch's dispatcher, once per process. Without tensors of the device none is
called."""

from __future__ import annotations

import functools
import warnings
from typing import Any

import torch
from torch import Tensor

from simulated_gpu import attention, flash, kernels, private_names
from simulated_gpu.operators import call_on_cpu
from simulated_gpu.registration import register

_KERNELS = {
    "empty.memory_format": kernels.empty,
    "empty_strided": kernels.empty_strided,
    "_copy_from": kernels.copy_from,
    "_copy_from_and_resize": kernels.copy_from_and_resize,
    "_local_scalar_dense": kernels.item,
    "resize_": kernels.resize,
    "set_": kernels.set_nothing,
    "set_.source_Storage": kernels.set_storage,
    "scaled_dot_product_attention": attention.attention,
    "_flash_attention_forward": flash.flash_forward,
    "_flash_attention_backward": flash.flash_backward,
}
_OF_SHAPES_ALONE = ("as_strided", "view", "_reshape_alias", "unfold", "set_.source_Storage_storage_offset")
"""Views and the like: the CPU's kernels touch no element."""
_KEY = "PrivateUse1"
aten_ops = torch.ops.aten
_COMPOSITE_KEYS = ("CompositeImplicitAutograd", "CompositeExplicitAutograd")
_libraries: list[torch.library.Library] = []
"""Registrations live as long as these."""


@functools.cache
def install() -> None:
    """Everything of torch's own; libraries.py and collectives.py add others'."""
    register()
    aten = library("aten")
    for name, kernel in _KERNELS.items():
        aten.impl(name, kernel, _KEY)
    aten.impl("scaled_dot_product_attention", attention.attention, f"Autograd{_KEY}")
    for name in _OF_SHAPES_ALONE:
        op = private_names.operator(f"aten::{name}")
        aten.impl(name, functools.partial(private_names.call_cpu_kernel, op), _KEY)
    for name in _hidden_cpu_kernels():
        aten.impl(name.removeprefix("aten::"), on_cpu(private_names.operator(name)), _KEY)
    for name, run in (("convolution", aten_ops.convolution), ("convolution_backward", _convolution_backward)):
        op = private_names.operator(f"aten::{name}_overrideable")
        aten.impl(f"{name}_overrideable", functools.partial(call_on_cpu, op, run=run), _KEY)
    library("_").fallback(call_on_cpu, _KEY)


def _convolution_backward(gradient: Tensor, x: Tensor, weight: Tensor, *settings: Any) -> Any:
    """The CPU's, which is told of the bias's size besides."""
    return aten_ops.convolution_backward(gradient, x, weight, None, *settings)


def library(namespace: str) -> torch.library.Library:
    """To register kernels for a namespace's operators; "_" is all."""
    made = torch.library.Library(namespace, "IMPL")
    _libraries.append(made)
    return made


def on_cpu(op: Any) -> Any:
    """A kernel that is the CPU's."""
    return functools.partial(call_on_cpu, op)


def use_cpu_kernels_of(namespace: str) -> None:
    """The same for a library's operators: their composite kernels, for any device, would hide the CPU's."""
    target = library(namespace)
    with warnings.catch_warnings():  # of torch: that some of these had kernels for PrivateUse1 before
        warnings.simplefilter("ignore")
        for op in private_names.operators_of(namespace):
            name = private_names.schema(op).name.split("::")[1]
            overload = private_names.schema(op).overload_name
            target.impl(f"{name}.{overload}" if overload else name, on_cpu(op), _KEY)


def _hidden_cpu_kernels() -> list[str]:
    """Operators of torch with a CPU kernel and a composite one, which would come before the fallback:
    silu_backward, native_layer_norm, _stack, ... Other kernels, other bits."""
    has = private_names.has_kernel
    return [
        name
        for name in private_names.operator_names()
        if name.startswith("aten::")
        and has(name, "CPU")
        and not has(name, _KEY)
        and any(has(name, key) for key in _COMPOSITE_KEYS)
    ]
