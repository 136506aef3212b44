"""The supervised tokens that a receipt is measured on: from the run's evaluation data, else its training
data; the receipt names which."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np

from qlora_train.data.building import build_dataset
from qlora_train.data.dataset import PackedDataset
from qlora_train.export.walked_model import HeldOut
from qlora_train.weights.cache_key import cache_root

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from qlora_train.recipe import Recipe

CONTEXT_FACTOR = 8  # tokens to run per supervised token at the most, as prompts can be long


def held_out(
    recipe: Recipe, tokenizer: PreTrainedTokenizerBase, stop_ids: Sequence[int], num_tokens: int
) -> HeldOut:
    """Documents with `num_tokens` supervised tokens at the most; the last one may be cut. recipe: of the run.
    stop_ids: see `build_dataset`. Raises `DataError` where the data cannot be read."""
    train, evaluation = build_dataset(
        recipe.data, tokenizer, seed=recipe.training.seed, stop_ids=stop_ids, cache=cache_root()
    )
    data, source = (train, "of the training data (the recipe holds none out: data.eval)")
    if evaluation is not None:
        data, source = evaluation, "held out by data.eval"
    parts = list(_documents(data, num_tokens))
    ids, places = [part[0] for part in parts], [part[1] for part in parts]
    labels = [row[at + 1] for row, at in parts]
    return HeldOut(ids, places, labels, source)


def _documents(data: PackedDataset, num_tokens: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """For each document: (token ids, positions whose next token is supervised)."""
    left, context_left = num_tokens, CONTEXT_FACTOR * num_tokens
    for index in range(len(data.lengths)):
        document = data.document(index)
        places = np.flatnonzero(document.supervised[1:])[:left]
        if not len(places):
            continue
        ids = document.token_ids[: places[-1] + 2].astype(np.int64)
        yield ids, places
        left, context_left = left - len(places), context_left - len(ids)
        if left <= 0 or context_left <= 0:
            return
