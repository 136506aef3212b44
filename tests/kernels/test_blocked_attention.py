"""Causal attention in blocks against fp64: output, every gradient, ragged blocks, grouped heads."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from qlora_train.kernels.blocked_attention import BLOCK_QUERIES, causal_attention

SHAPES = [  # N, query heads, key heads, n, d, e
    (1, 1, 1, 1, 4, 4),
    (2, 4, 2, 17, 8, 8),
    (3, 6, 1, BLOCK_QUERIES, 16, 24),
    (2, 4, 4, 2 * BLOCK_QUERIES + 5, 8, 8),
]
TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 2e-2}


def inputs(shape: tuple[int, ...], dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """q, k, v as the model hands them over (heads transposed to the front), and a gradient of the output."""
    number, q_heads, kv_heads, length, size, value_size = shape
    generator = torch.Generator().manual_seed(sum(shape))

    def heads(num_heads: int, width: int) -> Tensor:
        x = torch.randn(number, length, num_heads, width, generator=generator).to(dtype)
        return x.transpose(1, 2).requires_grad_()

    q, k, v = heads(q_heads, size), heads(kv_heads, size), heads(kv_heads, value_size)
    return q, k, v, heads(q_heads, value_size).detach()


def exact(q: Tensor, k: Tensor, v: Tensor, gradient: Tensor, scale: float) -> tuple[Tensor, ...]:
    q, k, v = (t.detach().double().requires_grad_() for t in (q, k, v))
    groups, length = q.shape[1] // k.shape[1], q.shape[2]
    scores = scale * q @ k.repeat_interleave(groups, 1).transpose(2, 3)
    later = torch.ones(length, length, dtype=torch.bool).triu(1)
    out = scores.masked_fill(later, float("-inf")).softmax(-1) @ v.repeat_interleave(groups, 1)
    out.backward(gradient.double())
    return out.detach(), q.grad, k.grad, v.grad


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_output_and_every_gradient(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    q, k, v, gradient = inputs(shape, dtype)
    out = causal_attention(q, k, v, 0.3)
    assert out.dtype == dtype and out.shape == (*q.shape[:3], v.shape[3])
    out.backward(gradient)
    found = (out.detach(), q.grad, k.grad, v.grad)
    for ours, theirs in zip(found, exact(q, k, v, gradient, 0.3), strict=True):
        worst = (ours.double() - theirs).abs().max()
        assert worst <= TOLERANCES[dtype] * theirs.abs().max().clamp(min=1e-12 if shape[3] > 1 else 1.0)


def test_a_later_token_is_not_seen() -> None:
    q, k, v, _ = inputs(SHAPES[3], torch.float32)
    before = causal_attention(q, k, v, 0.3)
    with torch.no_grad():
        k[:, :, 70:] += 1
        v[:, :, 70:] += 1
    after = causal_attention(q, k, v, 0.3)
    assert torch.equal(before[:, :, :70], after[:, :, :70])
    assert not torch.equal(before[:, :, 70:], after[:, :, 70:])


def test_what_is_saved() -> None:
    q, k, v, _ = inputs(SHAPES[1], torch.bfloat16)
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        causal_attention(q, k, v, 0.3)
    assert [t.data_ptr() for t in saved] == [q.data_ptr(), k.data_ptr(), v.data_ptr()]
