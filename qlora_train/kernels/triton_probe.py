"""A minimal Triton kernel, which triton_support.py launches to test whether Triton works."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def add_one(pointer):  # type: ignore[no-untyped-def]
    """Add 1 to one int32 at `pointer`."""
    tl.store(pointer, tl.load(pointer) + 1)
