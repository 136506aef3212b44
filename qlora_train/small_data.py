"""What `init` learns from small data: the length that holds every row, and a batch that leaves steps enough.

Sixteen bins of 2,048 tokens a step are many rows where rows are short: a thousand chats of 90 tokens would
make three steps of an epoch.
"""

from __future__ import annotations

from pathlib import Path

from qlora_train.data.building import build_dataset
from qlora_train.data.dataset import PackedDataset
from qlora_train.data.statistics import batch_to_learn, length_that_holds_all
from qlora_train.data.tokenizer import read_stop_ids, tokenizer_of_run
from qlora_train.plan.base_config import find_base_folder
from qlora_train.recipe import Recipe

_SMALL_BYTES = 2**24  # tokenised in seconds; larger data make steps enough
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json")


def needed_length(recipe: Recipe) -> int | None:
    """The sequence length that holds every row; None where the data are large, or not here with a tokenizer.
    Raises `DataError` for bad data."""
    dataset = _read(recipe)
    return None if dataset is None else length_that_holds_all(dataset)


def needed_batch_size(recipe: Recipe) -> int | None:
    """Bins a step that leave steps enough, no more than the recipe has; None as in `needed_length`."""
    dataset = _read(recipe)
    if dataset is None:
        return None
    return min(batch_to_learn(dataset, recipe.training), recipe.training.bins_per_step)


def _read(recipe: Recipe) -> PackedDataset | None:
    folder = find_base_folder(recipe.model.base)
    paths = [Path(source.path) for source in recipe.data.train]
    if folder is None or not any((folder / name).is_file() for name in _TOKENIZER_FILES):
        return None
    if not all(path.exists() for path in paths) or sum(map(_num_bytes, paths)) > _SMALL_BYTES:
        return None
    tokenizer, _ = tokenizer_of_run(recipe.model, str(folder))
    stop_ids = read_stop_ids(str(folder))
    return build_dataset(recipe.data, tokenizer, seed=recipe.training.seed, stop_ids=stop_ids)[0]


def _num_bytes(path: Path) -> int:
    files = path.rglob("*") if path.is_dir() else [path]
    return sum(file.stat().st_size for file in files if file.is_file())
