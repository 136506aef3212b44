"""Documents of a packed row as right-padded batches, and back.

A row of T tokens is taken apart into one batch [N, L] for each length class (model/attention.py says which),
attended to, and put together again. Both ways are gathers by rows:

    take apart    batch[n, l] = x[index[n, l]]          index of a padded place: the document's last token
    put together  x[t] = concatenated batches[place[t]]

What autograd would write for their backward adds up rows that meet, one thread at a time on a CPU. No two
tokens share a place, so here each backward is the other way's gather: a token's gradient is that of its
place, a place's that of its token, and zero where the place is padding. (A padded query has no gradient, so
neither has a padded key: nothing is lost with the gradients of padded places.)

Where all documents are of one length and fill their class, the batch is a view of the row, and nothing is
copied. Saved for backward: nothing but the index tensors, which belong to the micro-batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def gather_documents(x: Tensor, indices: Sequence[Tensor], places: Tensor) -> tuple[Tensor, ...]:
    """x [T, heads, d] -> for each class its documents [N, L, heads, d].

    indices: of each class, int64 [N, L]. places: int64 [T], where each token stands in the concatenation of
    the flattened batches.
    """
    if _is_view(indices, places):
        return (x.unflatten(0, indices[0].shape),)
    return _GatherDocuments.apply(x, places, *indices)


def scatter_documents(batches: Sequence[Tensor], indices: Sequence[Tensor], places: Tensor) -> Tensor:
    """The inverse of `gather_documents`; what padded places hold is dropped."""
    if _is_view(indices, places):
        return batches[0].flatten(0, 1)
    return _ScatterDocuments.apply(places, *batches)


def _is_view(indices: Sequence[Tensor], places: Tensor) -> bool:
    """One class without padding: documents lie in the row as in the batch."""
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
