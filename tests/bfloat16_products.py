"""16-bit matrix products on a CPU without units for them.

There torch multiplies one number at a time: `g @ W` of [1024, 1024] takes 2 s in bfloat16 and 15 ms in
float32. Nobody trains so (`compute_dtype: auto` takes float32 there), but tests are about 16 bits on any
machine. Inside this mode each such product is taken in float32 and its result rounded, which is what the
units do: exact products, sums in float32, one rounding.

The meter sees nothing of it: it is entered later, so it is asked first, and counts the operation's results.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten
SLOW = (torch.bfloat16, torch.float16)
PRODUCTS = {
    aten.mm.default,
    aten.bmm.default,
    aten.addmm.default,
    aten.baddbmm.default,
    aten._scaled_dot_product_flash_attention_for_cpu.default,
    aten._scaled_dot_product_flash_attention_for_cpu_backward.default,
}
IN_PLACE = {aten.addmm_.default: aten.addmm.default, aten.baddbmm_.default: aten.baddbmm.default}


def cpu_multiplies_bfloat16() -> bool:
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


class ProductsInFloat32(TorchDispatchMode):
    """See the module docstring."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        first = args[0] if args and isinstance(args[0], Tensor) else None
        if first is None or first.device.type != "cpu" or first.dtype not in SLOW:
            return func(*args, **kwargs)
        if func in IN_PLACE:
            return first.copy_(IN_PLACE[func](*map(_wide, args), **_all_wide(kwargs)))
        if func not in PRODUCTS:
            return func(*args, **kwargs)
        result = func(*map(_wide, args), **_all_wide(kwargs))
        if isinstance(result, Tensor):
            return result.to(first.dtype)
        # attention: out (or dq, dk, dv) in the dtype of the inputs; log-sums are float32 in any case
        is_forward = func is aten._scaled_dot_product_flash_attention_for_cpu.default
        rounded = 1 if is_forward else 3
        return tuple(t.to(first.dtype) if i < rounded else t for i, t in enumerate(result))


def _wide(value: Any) -> Any:
    return value.float() if isinstance(value, Tensor) and value.dtype in SLOW else value


def _all_wide(kwargs: dict[str, Any]) -> dict[str, Any]:
    return {name: _wide(value) for name, value in kwargs.items()}
