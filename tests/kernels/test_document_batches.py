"""Documents into batches and back against plain indexing: outputs and gradients, ragged classes, padding."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from qlora_train.kernels.document_gather import gather_documents, scatter_documents
from qlora_train.model.attention import DocumentLayout

LENGTHS = {
    "one": [48],
    "one, padded": [41],
    "alike": [32, 32, 32],
    "alike, padded": [30, 29, 31],
    "ragged": [1, 17, 16, 130, 16, 40, 128],
}


def scaled(batches: tuple[Tensor, ...], layout: DocumentLayout) -> list[Tensor]:
    """Something that differs from place to place, and is nothing where a place is padding."""
    real = torch.zeros(sum(index.numel() for index in layout.buckets))
    real[layout.inverse] = torch.arange(1.0, len(layout.inverse) + 1)
    sizes = [index.numel() for index in layout.buckets]
    weights = [part.view(i.shape) for part, i in zip(real.split(sizes), layout.buckets, strict=True)]
    return [b * w[..., None, None].to(b.dtype) for b, w in zip(batches, weights, strict=True)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
def test_as_plain_indexing_does(lengths: list[int], dtype: torch.dtype) -> None:
    layout = DocumentLayout.of(np.cumsum([0, *lengths]), "cpu")
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(3, sum(lengths), 5, generator=generator).to(dtype).transpose(0, 1)  # [T, heads, d]
    gradient = torch.randn(sum(lengths), 3, 5, generator=generator).to(dtype)
    ours, theirs = (x.clone().requires_grad_() for _ in range(2))

    batches = gather_documents(ours, layout.buckets, layout.inverse)
    plain = [theirs[index] for index in layout.buckets]
    assert all(torch.equal(a, b) for a, b in zip(batches, plain, strict=True))

    result = scatter_documents(scaled(batches, layout), layout.buckets, layout.inverse)
    rows = [batch.flatten(0, 1) for batch in scaled(tuple(plain), layout)]
    expected = torch.cat(rows)[layout.inverse]
    assert torch.equal(result, expected)

    result.backward(gradient)
    expected.backward(gradient)
    assert torch.equal(ours.grad, theirs.grad)


def test_what_padded_places_hold_is_dropped_and_gets_no_gradient() -> None:
    layout = DocumentLayout.of(np.array([0, 3, 20]), "cpu")
    batches = [torch.full((*index.shape, 1, 1), float("nan"), requires_grad=True) for index in layout.buckets]
    filled = [batch.detach().clone() for batch in batches]
    flat = torch.cat([batch.flatten(0, 1) for batch in filled])
    flat[layout.inverse] = 1.0
    sizes = [batch.shape[0] * batch.shape[1] for batch in filled]
    parts = [p.view(b.shape).requires_grad_() for p, b in zip(flat.split(sizes), filled, strict=True)]
    result = scatter_documents(parts, layout.buckets, layout.inverse)
    assert torch.equal(result, torch.ones(20, 1, 1))
    gradients = torch.autograd.grad(result, parts, torch.ones_like(result))
    assert sum(float(g.sum()) for g in gradients) == 20


def test_equal_unpadded_documents_are_views() -> None:
    layout = DocumentLayout.of(np.array([0, 32, 64]), "cpu")
    x = torch.randn(64, 2, 4)
    (batch,) = gather_documents(x, layout.buckets, layout.inverse)
    assert batch.data_ptr() == x.data_ptr()
    assert scatter_documents([batch], layout.buckets, layout.inverse).data_ptr() == x.data_ptr()
