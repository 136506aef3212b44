"""Runs liger-kernel's kernels on CPU tensors and prints, as JSON, how far they are from our plain torch.

A program of its own, started by test_liger.py with TRITON_INTERPRET=1: Triton decides when it is imported
whether its own helpers (sum, sigmoid, ...), which these kernels use, are interpreted. Two things that a
launch on a GPU does and the interpreter does not are done here: numbers become float32 scalars, and the GPU's
library function rsqrt gets a body. One thing cannot be helped: it multiplies two bfloat16 numbers as if they
were integers, so SiLU-multiply forward is left out in bfloat16 (tests/gpu/test_elementwise.py has it).
"""

from __future__ import annotations

import json
import math
import sys
from importlib import import_module
from types import ModuleType

import numpy as np
import torch
import torch.nn.functional as F
import triton.language as tl
from torch import Tensor
from triton.runtime import interpreter

from qlora_train.kernels.liger import Liger, usable_liger
from qlora_train.kernels.rms_norm import rms_norm

SHAPES = [(1, 4), (1, 5, 3), (2, 3, 7, 16), (33, 130), (3, 514)]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def emulated() -> Liger:
    """liger-kernel, made ready for the interpreter."""
    convert = interpreter._implicit_cvt

    def convert_floats_too(argument: object) -> object:
        if not isinstance(argument, float):
            return convert(argument)
        handle = interpreter.TensorHandle(np.array([argument], dtype=np.float32), tl.float32)
        return tl.tensor(handle, tl.float32)

    def load(name: str) -> ModuleType:
        module = import_module(name)
        if hasattr(module, "rsqrt"):
            module.rsqrt = lambda x: tl.rsqrt(x)  # looked up while the interpreter is at work
        return module

    interpreter._implicit_cvt = convert_floats_too
    liger = usable_liger(load)
    assert liger is not None
    return liger


def distance(found: Tensor, expected: Tensor) -> float:
    """Relative to the largest value; infinite where shape or dtype is another, or a value is none."""
    if found.shape != expected.shape or found.dtype != expected.dtype:
        return math.inf
    worst = (found.double() - expected.double()).abs().max() / expected.double().abs().max()
    return worst.item() if worst.isfinite() else math.inf


def random(seed: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def norm_case(liger: Liger, shape: tuple[int, ...], dtype: torch.dtype, offset: float) -> dict[str, float]:
    x, weight = 3 * random(1, shape, dtype), random(2, shape[-1:], dtype)
    gradient = random(3, (*shape[:-1], 2 * shape[-1]), dtype)[..., ::2]  # not contiguous
    before = gradient.clone()
    results = []
    for kernels in (None, liger):
        leaf = x.clone().requires_grad_()
        y = rms_norm(leaf, weight, 1e-4, offset, kernels)
        y.backward(gradient)
        results.append((y.detach(), leaf.grad))
    (y, grad_input), (found_y, found_dx) = results
    assert torch.equal(gradient, before)
    return {"y": distance(found_y, y), "dx": distance(found_dx, grad_input)}


def silu_case(liger: Liger, shape: tuple[int, int], dtype: torch.dtype) -> dict[str, float]:
    gate, up, gradient = (random(seed, shape, dtype).mul_(3) for seed in (1, 2, 3))
    wide_gate, wide_up = gate.float().requires_grad_(), up.float().requires_grad_()
    expected = F.silu(wide_gate) * wide_up
    expected.backward(gradient.float())
    product = liger.silu_mul(gate, up)
    assert product.data_ptr() not in (gate.data_ptr(), up.data_ptr())
    liger.silu_mul_backward_(gate, up, gradient)
    found = {
        "d_gate": distance(gate, wide_gate.grad.to(dtype)),
        "d_up": distance(up, wide_up.grad.to(dtype)),
    }
    if dtype != torch.bfloat16:
        found["product"] = distance(product, expected.detach().to(dtype))
    return found


def main() -> None:
    liger = emulated()
    found: dict[str, dict[str, float]] = {}
    for name, dtype in DTYPES.items():
        for shape in SHAPES:
            for offset in (0.0, 1.0):
                found[f"norm {offset} {name} {shape}"] = norm_case(liger, shape, dtype, offset)
            found[f"silu {name} {shape[-2:]}"] = silu_case(liger, shape[-2:], dtype)
    json.dump(found, sys.stdout)


if __name__ == "__main__":
    main()
