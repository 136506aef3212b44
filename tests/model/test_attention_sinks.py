"""Attention with sinks against its formula: outputs and every gradient, windows, decoding, 16 bits."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from qlora_train.model.attention import DocumentLayout, packed_attention

LENGTHS = [5, 1, 23, 9]


def formula(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor, scale: float, window: int | None) -> Tensor:
    """One document, q [Hq, n, d]: softmax over its keys and the sink, which has no value."""
    k, v = (t.repeat_interleave(len(q) // len(k), 0) for t in (k, v))
    distance = torch.arange(q.shape[1])[:, None] - torch.arange(k.shape[1])
    seen = (distance >= 0) & (distance < (window or len(distance)))
    scores = (q @ k.transpose(1, 2) * scale).masked_fill(~seen, float("-inf"))
    column = sinks[:, None, None].expand(-1, q.shape[1], 1)
    return torch.softmax(torch.cat([scores, column], dim=2), dim=2)[..., :-1] @ v


def random_row(dtype: torch.dtype, heads: int, kv_heads: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    total = sum(LENGTHS)
    return [
        torch.randn(1, n, total, 8, generator=generator, dtype=torch.float64).to(dtype)
        for n in (heads, kv_heads, kv_heads)
    ]


@pytest.mark.parametrize("window", [None, 6])
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (4, 2)])
def test_outputs_and_gradients_are_the_formulas(heads: int, kv_heads: int, window: int | None) -> None:
    row = [t.requires_grad_() for t in random_row(torch.float64, heads, kv_heads)]
    sinks = torch.tensor([0.5, -2.0, 3.0, 0.0], dtype=torch.float64)
    documents = DocumentLayout.of(np.cumsum([0, *LENGTHS]), "cpu")
    y, _ = packed_attention(
        nn.Identity(), *row, None, documents=documents, s_aux=sinks, scaling=0.3, sliding_window=window
    )
    apart = zip(*(t[0].split(LENGTHS, dim=1) for t in row), strict=True)
    expected = torch.cat([formula(*one, sinks, 0.3, window) for one in apart], dim=1).transpose(0, 1)[None]
    torch.testing.assert_close(y, expected, rtol=1e-6, atol=1e-6)  # sinks are kept in fp32
    weight = torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    ours = torch.autograd.grad((y * weight).sum(), row)
    theirs = torch.autograd.grad((expected * weight).sum(), row)
    for found, wanted in zip(ours, theirs, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-6)


def test_decoding_gives_the_last_row() -> None:
    q, k, v = random_row(torch.float32, 4, 2)
    sinks, length = torch.tensor([0.5, -2.0, 3.0, 0.0]), torch.tensor([k.shape[2]])
    y, _ = packed_attention(
        nn.Identity(),
        q[:, :, -1:],
        k,
        v,
        None,
        kv_lengths=length,
        s_aux=sinks,
        scaling=0.3,
    )
    expected = formula(q[0], k[0], v[0], sinks, 0.3, None)[:, -1]
    torch.testing.assert_close(y[0, 0], expected, rtol=1e-5, atol=1e-6)


def test_in_16_bits_a_large_sink_is_not_rounded_away() -> None:
    """17.3 / scale has more digits than bfloat16 holds: two columns hold it."""
    q, k, v = random_row(torch.bfloat16, 4, 4)
    sinks = torch.full((4,), 17.3, dtype=torch.bfloat16)
    documents = DocumentLayout.of(np.array([0, q.shape[2]]), "cpu")
    y, _ = packed_attention(nn.Identity(), q, k, v, None, documents=documents, s_aux=sinks, scaling=0.3)
    expected = formula(*(t[0].double() for t in (q, k, v)), sinks.double(), 0.3, None)
    ratio = y[0].transpose(0, 1).double() / expected
    assert (ratio - 1).abs().median() < 0.01
