"""Bucketed attention against softmax written out, one document at a time."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from qlora_train.errors import UnsupportedModelError
from qlora_train.model.attention import DocumentLayout, packed_attention

ROWS = [[7], [1], [5, 1, 12, 3, 8, 9, 2], [16, 17, 31, 1, 1]]
RULES = [
    {},
    {"scaling": 0.3},
    {"sliding_window": 4},
    {"softcap": 2.0},
    {"sliding_window": 5, "softcap": 1.5, "scaling": 0.7},
]


def naive(q: Tensor, k: Tensor, v: Tensor, scaling=None, sliding_window=None, softcap=None) -> Tensor:
    """softmax over a dense mask: q [Hq, n, d], k and v [Hkv, n, d] -> [n, Hq, d]."""
    k, v = (t.repeat_interleave(q.shape[0] // k.shape[0], dim=0) for t in (k, v))
    scores = q @ k.transpose(1, 2) * (scaling if scaling is not None else q.shape[-1] ** -0.5)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    distance = torch.arange(q.shape[1])[:, None] - torch.arange(q.shape[1])[None]
    visible = (distance >= 0) & (distance < (sliding_window or q.shape[1]))
    return (torch.softmax(scores.masked_fill(~visible, float("-inf")), -1) @ v).transpose(0, 1)


def random_qkv(total: int, heads: int, kv_heads: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(total)
    shapes = [(1, heads, total, 6), (1, kv_heads, total, 6), (1, kv_heads, total, 6)]
    return [torch.randn(s, generator=generator, requires_grad=True) for s in shapes]


@pytest.mark.parametrize("lengths", ROWS, ids=str)
@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (4, 2), (3, 1)])
def test_packed_equals_softmax_per_document(lengths, rule, heads, kv_heads) -> None:
    total = sum(lengths)
    ours, theirs = random_qkv(total, heads, kv_heads), random_qkv(total, heads, kv_heads)
    documents = DocumentLayout.of(np.cumsum([0, *lengths]), "cpu")
    out, weights = packed_attention(nn.Identity(), *ours, None, documents=documents, **rule)
    parts = zip(*(t[0].split(lengths, dim=1) for t in theirs), strict=True)
    expected = torch.cat([naive(q, k, v, **rule) for q, k, v in parts])[None]
    assert weights is None and out.shape == (1, total, heads, 6)
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-6)

    direction = torch.randn(out.shape, generator=torch.Generator().manual_seed(9))
    out.backward(direction)
    expected.backward(direction)
    for mine, reference in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine.grad, reference.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (4, 2)])
def test_decoding_gives_the_last_row_of_the_whole_document(rule, heads, kv_heads) -> None:
    lengths, capacity = [3, 11, 1, 8], 13
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(len(lengths), heads, 1, 6, generator=generator)
    key, value = (torch.randn(len(lengths), kv_heads, capacity, 6, generator=generator) for _ in range(2))
    for b, length in enumerate(lengths):
        key[b, :, length:] = value[b, :, length:] = 1e4  # not yet written: must not be seen
    kv_lengths = torch.tensor(lengths)
    out, _ = packed_attention(nn.Identity(), query, key, value, None, kv_lengths=kv_lengths, **rule)
    assert out.shape == (len(lengths), 1, heads, 6)
    for b, length in enumerate(lengths):
        q = query[b].expand(heads, length, 6)  # every row asks the same; only the last one is compared
        expected = naive(q, key[b, :, :length], value[b, :, :length], **rule)[-1]
        torch.testing.assert_close(out[b, 0], expected, rtol=1e-5, atol=1e-6)


def test_layout_pads_by_a_quarter_and_inverts() -> None:
    lengths = [5, 1, 48, 3, 130, 9, 191, 65, 33]
    layout = DocumentLayout.of(np.cumsum([0, *lengths]), "cpu")
    assert layout.boundaries == tuple(np.cumsum([0, *lengths]).tolist())
    assert layout.cu_seqlens.tolist() == list(layout.boundaries) and layout.cu_seqlens.dtype == torch.int32
    assert layout.longest == 191
    places = torch.cat([bucket.flatten() for bucket in layout.buckets])
    assert torch.equal(places[layout.inverse], torch.arange(sum(lengths)))
    assert sorted({bucket.shape[1] for bucket in layout.buckets}) == [16, 48, 80, 160, 192]
    assert sum(len(bucket) for bucket in layout.buckets) == len(lengths)
    for bucket in layout.buckets:
        assert (bucket >= 0).all() and (bucket < sum(lengths)).all()


def test_what_a_document_is_padded_to_is_its_own_affair() -> None:
    widths = []
    for neighbours in ([], [50], [60, 64, 7]):
        layout = DocumentLayout.of(np.cumsum([0, 49, *neighbours]), "cpu")
        widths.append(next(b.shape[1] for b in layout.buckets if 48 in b))
    assert widths == [64, 64, 64]


@pytest.mark.parametrize("bounds", [[1, 4], [0, 4, 4], [0, 5, 3]])
def test_bad_boundaries_are_our_own_mistake(bounds) -> None:
    with pytest.raises(AssertionError, match="increase"):
        DocumentLayout.of(np.array(bounds), "cpu")


def test_what_packing_cannot_honour_is_an_error() -> None:
    q, k, v = random_qkv(4, 2, 2)
    layer, documents = nn.Linear(1, 1), DocumentLayout.of(np.array([0, 4]), "cpu")
    with pytest.raises(UnsupportedModelError, match="Linear passes head_bias to attention"):
        packed_attention(layer, q, k, v, None, documents=documents, head_bias=torch.ones(2))
    with pytest.raises(UnsupportedModelError, match="passes attention_mask"):
        packed_attention(layer, q, k, v, torch.ones(4, 4), documents=documents)
    with pytest.raises(UnsupportedModelError, match="passes attention dropout"):
        packed_attention(layer, q, k, v, None, documents=documents, dropout=0.1)
    for both in ({}, {"documents": documents, "kv_lengths": torch.tensor([4])}):
        with pytest.raises(UnsupportedModelError, match="does not hand the document boundaries on"):
            packed_attention(layer, q, k, v, None, **both)


def test_arguments_without_effect_are_accepted() -> None:
    q, k, v = random_qkv(4, 2, 2)
    documents = DocumentLayout.of(np.array([0, 4]), "cpu")
    plain, _ = packed_attention(nn.Identity(), q, k, v, None, documents=documents)
    with_extras, _ = packed_attention(
        nn.Identity(), q, k, v, None, documents=documents, position_ids=torch.arange(4), s_aux=None
    )
    assert torch.equal(plain, with_extras)
