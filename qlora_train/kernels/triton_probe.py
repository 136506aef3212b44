"""The smallest Triton kernel there is: what triton_support.py launches to see whether any can be."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def add_one(pointer):  # type: ignore[no-untyped-def]
    """pointer: one int32."""
    tl.store(pointer, tl.load(pointer) + 1)
