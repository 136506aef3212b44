"""RMSNorm with a frozen weight: the library's bits forward, the formula's gradient back, x alone saved."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from qlora_train.kernels.rms_norm import rms_norm

SHAPES = [(1, 4), (1, 5, 3), (2, 3, 7, 16), (33, 130)]
TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}
FAMILIES = {"llama": (LlamaRMSNorm, 0.0), "gemma": (GemmaRMSNorm, 1.0)}


def inputs(shape: tuple[int, ...], family: str, dtype: torch.dtype) -> tuple[nn.Module, Tensor, Tensor]:
    """The library's norm with a random frozen weight, x, and a gradient of y."""
    generator = torch.Generator().manual_seed(sum(shape))
    norm = FAMILIES[family][0](shape[-1], eps=1e-4).to(dtype).requires_grad_(False)
    norm.weight.copy_(torch.randn(shape[-1], generator=generator))
    x, gradient = (torch.randn(shape, generator=generator).to(dtype) for _ in range(2))
    return norm, 3 * x, gradient


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_output_and_gradient(shape: tuple[int, ...], dtype: torch.dtype, family: str) -> None:
    norm, x, gradient = inputs(shape, family, dtype)
    offset, weight = FAMILIES[family][1], norm.weight.clone()
    leaf, wide = x.clone().requires_grad_(), x.double().requires_grad_()
    y = rms_norm(leaf, norm.weight, 1e-4, offset)
    assert torch.equal(y, norm(x))
    y.backward(gradient)
    scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-4)
    (wide * scale * (weight.double() + offset)).backward(gradient.double())
    assert leaf.grad.dtype == dtype
    worst = (leaf.grad.double() - wide.grad).abs().max() / wide.grad.abs().max()
    assert worst <= TOLERANCES[dtype]
    assert torch.equal(norm.weight, weight)


def test_what_is_saved() -> None:
    norm, x, _ = inputs((6, 32), "llama", torch.bfloat16)
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        rms_norm(x.requires_grad_(), norm.weight, 1e-4, 0.0)
    assert [tuple(t.shape) for t in saved] == [(6, 32), (6, 1), (32,)]
    assert saved[0].data_ptr() == x.data_ptr() and saved[2].data_ptr() == norm.weight.data_ptr()
