"""What `init` learns from small data: the length that holds every row, and a batch that leaves steps enough.

Sixteen bins of 2,048 tokens a step are many rows where rows are short: a thousand chats of 90 tokens would
make three steps of an epoch. Data are small if they are tokenised in a few seconds; larger ones make steps
enough.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from qlora_train.data.building import build_dataset
from qlora_train.data.dataset import PackedDataset
from qlora_train.data.packing import pack_best_fit
from qlora_train.data.statistics import batch_to_learn, length_that_holds_all
from qlora_train.data.tokenizer import has_tokenizer, read_stop_ids, tokenizer_of_run
from qlora_train.plan.base_config import find_base_folder
from qlora_train.recipe import DataSection, DataSource, Recipe

_SMALL_BYTES = 2**22
_BYTES_UNPACKED: Mapping[str, int] = dict.fromkeys((".gz", ".zst", ".bz2", ".xz", ".parquet", ".arrow"), 8)
"""By suffix, about how many bytes of text one byte of a file is."""
_LEAST_HELD_OUT, _LEAST_SPLIT = 2, 10
_SHARE, _LARGE_SHARE = 0.02, 0.1


@dataclass(frozen=True)
class SmallData:
    """Small data, read once. section: of the recipe. train: all rows, those to be held out among them.
    evaluation: of other files."""

    section: DataSection
    train: PackedDataset
    evaluation: PackedDataset | None

    @cached_property
    def needed_length(self) -> int:
        """The sequence length that holds every row."""
        return max(length_that_holds_all(side) for side in (self.train, self.evaluation) if side is not None)

    def bins_per_epoch(self, recipe: Recipe) -> int:
        """Bins that the rows of a recipe make that are not held out, about."""
        held_out = recipe.data.eval if isinstance(recipe.data.eval, float) else 0.0
        num_bins = len(self.train.lengths)
        if self.section.packing:
            length = recipe.data.sequence_length
            num_bins = len(pack_best_fit(np.minimum(self.train.lengths, length), length))
        return max(1, round(num_bins * (1 - held_out)))

    def needed_batch_size(self, recipe: Recipe) -> int:
        """Bins of a step that leave steps enough in a run of the recipe, no more than it has."""
        num_bins = recipe.training.num_bins(self.bins_per_epoch(recipe))
        return min(batch_to_learn(num_bins), recipe.training.bins_per_step())

    @property
    def eval_share(self) -> float | None:
        """The share to hold out: larger where there are few rows; None: too few to hold any out."""
        num_rows = self.train.report.num_examples
        if num_rows < _LEAST_SPLIT:
            return None
        return _SHARE if num_rows * _SHARE >= _LEAST_HELD_OUT else _LARGE_SHARE


def read_small(recipe: Recipe) -> SmallData | None:
    """The data of a recipe; None where they are large, or not here with a tokenizer. Raises `DataError` for
    bad data, and `BaseModelError` for a tokenizer that is damaged."""
    model, data = recipe.model, recipe.data
    folder = find_base_folder(model.base, model.revision)
    named = data.eval if not isinstance(data.eval, float) and data.eval is not None else ()
    sizes = [_num_bytes(source) for source in (*data.train, *named)]
    if folder is None or not has_tokenizer(folder) or None in sizes:
        return None
    if sum(size for size in sizes if size is not None) > _SMALL_BYTES:
        return None
    tokenizer, _ = tokenizer_of_run(model, str(folder))
    section = data if named else data.model_copy(update={"eval": None})
    sides = build_dataset(section, tokenizer, seed=recipe.training.seed, stop_ids=read_stop_ids(str(folder)))
    return SmallData(section, *sides)


def _num_bytes(source: DataSource) -> int | None:
    """About the bytes of text in a file or folder; None where it is not here."""
    path = Path(source.path)
    if not path.exists():
        return None
    files = path.rglob("*") if path.is_dir() else [path]
    return sum(file.stat().st_size * _BYTES_UNPACKED.get(file.suffix, 1) for file in files if file.is_file())
