"""16-bit matrix products on a CPU without units for them.

There torch multiplies one number at a time: `g @ W` of [1024, 1024] takes 2 s in bfloat16 and 15 ms in
float32. Nobody trains so (`compute_dtype: auto` takes float32 there), but tests are about 16 bits on any
machine. In here each such product is taken in float32 and its result rounded, which is what the units do:
exact products, sums in float32, one rounding.

Kernels of torch's own operators are replaced for the CPU. A dispatch mode would do the same, but every
operation would go through Python, not only products: tests of small models take twice as long. The meter
sees nothing of it: it counts an operation's result.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import DispatchKeySet, Tensor
from torch.library import Library, get_kernel

SLOW = (torch.bfloat16, torch.float16)
NUM_ROUNDED = {
    "mm": 1,
    "bmm": 1,
    "addmm": 1,
    "baddbmm": 1,
    # out (or dq, dk, dv) in the dtype of the inputs; log-sums are float32 in any case
    "_scaled_dot_product_flash_attention_for_cpu": 1,
    "_scaled_dot_product_flash_attention_for_cpu_backward": 3,
}
"""Operator -> how many of its results have the dtype of its inputs."""
IN_PLACE = {"addmm_": "addmm", "baddbmm_": "baddbmm"}

Kernel = Callable[..., Any]


def cpu_multiplies_bfloat16() -> bool:
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


@contextmanager
def products_in_float32() -> Iterator[None]:
    """See the module docstring."""
    kernels = {name: get_kernel(f"aten::{name}", "CPU").call_boxed for name in (*NUM_ROUNDED, *IN_PLACE)}
    wide = {
        name: _wide_kernel(kernels[name], number, one_dtype=not name.startswith("_scaled"))
        for name, number in NUM_ROUNDED.items()
    }
    wide |= {name: _in_place(kernels[name], kernels[other]) for name, other in IN_PLACE.items()}
    library = Library("aten", "IMPL")
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*", UserWarning)  # that kernels are replaced: yes
            for name, kernel in wide.items():
                library.impl(name, kernel, "CPU", with_keyset=True)
        yield
    finally:
        library._destroy()


def _wide_kernel(kernel: Kernel, num_rounded: int, one_dtype: bool) -> Kernel:
    def run(keys: DispatchKeySet, first: Tensor, *args: Any, **kwargs: Any) -> Any:
        if first.dtype not in SLOW or (one_dtype and _differ(first, args)):  # torch says that they differ
            return kernel(keys, first, *args, **kwargs)
        result = kernel(keys, first.float(), *map(_wide, args), **_all_wide(kwargs))
        if isinstance(result, Tensor):
            return result.to(first.dtype)
        return tuple(t.to(first.dtype) if i < num_rounded else t for i, t in enumerate(result))

    return run


def _in_place(kernel: Kernel, functional: Kernel) -> Kernel:
    def run(keys: DispatchKeySet, first: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if first.dtype not in SLOW or _differ(first, args):
            return kernel(keys, first, *args, **kwargs)
        return first.copy_(functional(keys, first.float(), *map(_wide, args), **_all_wide(kwargs)))

    return run


def _differ(first: Tensor, others: Sequence[Any]) -> bool:
    return any(isinstance(other, Tensor) and other.dtype != first.dtype for other in others)


def _wide(value: Any) -> Any:
    return value.float() if isinstance(value, Tensor) and value.dtype in SLOW else value


def _all_wide(kwargs: dict[str, Any]) -> dict[str, Any]:
    return {name: _wide(value) for name, value in kwargs.items()}
