"""Gather the documents of a packed row into right-padded batches, and scatter them back.

A row of T tokens is split into one batch [N, L] for each length class (see model/attention.py), attention
runs on the batches, and the results are put back into one row. Both directions are gathers of rows:

    gather     batch[n, l] = x[index[n, l]]          a padded place repeats the document's last token
    scatter    x[t] = concatenated_batches[place[t]]

The backward that autograd would derive adds up rows with equal indices, in one thread on a CPU. No two tokens
share a place, so here each backward is the other direction: a token's gradient is that of its place, a
place's gradient is that of its token, and zero for padding. (Outputs of padded queries are dropped, so padded
queries and keys have no gradient: none is lost.)

If all documents have one length that fills their class, the batch is a view of the row and nothing is copied.
Saved for backward: only the index tensors, which belong to the micro-batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def gather_documents(x: Tensor, indices: Sequence[Tensor], places: Tensor) -> tuple[Tensor, ...]:
    """Split x [T, heads, d] into one right-padded batch of documents [N, L, heads, d] per length class.

    indices: int64 [N, L] per class, the token of each place. places: int64 [T], index of each token in the
    concatenation of the flattened batches.
    """
    if _is_view(indices, places):
        return (x.unflatten(0, indices[0].shape),)
    return _GatherDocuments.apply(x, places, *indices)


def scatter_documents(batches: Sequence[Tensor], indices: Sequence[Tensor], places: Tensor) -> Tensor:
    """Inverse of `gather_documents`: batches -> [T, heads, d]; values at padded places are dropped."""
    if _is_view(indices, places):
        return batches[0].flatten(0, 1)
    return _ScatterDocuments.apply(places, *batches)


def _is_view(indices: Sequence[Tensor], places: Tensor) -> bool:
    """Whether there is one class without padding, so that the batch is the row in another shape."""
    return len(indices) == 1 and indices[0].numel() == len(places)


def _gathered(batches: Sequence[Tensor], places: Tensor) -> Tensor:
    return torch.cat([batch.flatten(0, 1) for batch in batches]).index_select(0, places)


class _GatherDocuments(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, places: Tensor, *indices: Tensor) -> tuple[Tensor, ...]:
        ctx.save_for_backward(places)
        return tuple(x[index] for index in indices)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (places,) = ctx.saved_tensors
        return _gathered(gradients, places), None, *([None] * len(gradients))


class _ScatterDocuments(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, places: Tensor, *batches: Tensor) -> Tensor:
        ctx.save_for_backward(places)
        ctx.shapes = [batch.shape for batch in batches]
        return _gathered(batches, places)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        (places,) = ctx.saved_tensors
        sizes = [shape[0] * shape[1] for shape in ctx.shapes]
        spread = gradient.new_zeros(sum(sizes), *gradient.shape[1:]).index_copy_(0, places, gradient)
        parts = spread.split(sizes)
        return None, *(part.view(shape) for part, shape in zip(parts, ctx.shapes, strict=True))
