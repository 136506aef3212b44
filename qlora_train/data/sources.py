"""Finds what `data.train` and `data.eval` name: a file, a folder of files, or a data set on the hub.

Files are read where they lie and nothing is written beside them; only data sets of the hub go through the
`datasets` library and its cache. How each file type is read is in `tables`.

A folder is read with its sub-folders, in sorted order, and all its data files are joined: a clone of a hub
data set, or what `save_to_disk` wrote. What such folders hold beside their examples (dataset_infos.json,
state.json, a licence) is no data. Where file or folder names tell several splits apart (train-00000.parquet,
test/a.jsonl) the source must say which one it means, because test examples must not slip into training.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from qlora_train.data.arrow_tables import ArrowTable, HubTable, ParquetTable
from qlora_train.data.csv_table import CsvTable
from qlora_train.data.json_tables import JsonTable
from qlora_train.data.tables import ExampleTable, TextTable, first_line
from qlora_train.data.text_files import PACKED_SUFFIXES, data_suffix
from qlora_train.errors import DataError

if TYPE_CHECKING:
    from qlora_train.recipe import DataSource

_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
_SPLIT_NAME = re.compile(
    r"(train|training|test|testing|validation|valid|val|dev|eval)(?![a-z])", re.IGNORECASE
)
_SAME_SPLIT = {
    "training": "train",
    "testing": "test",
    "valid": "validation",
    "val": "validation",
    "dev": "validation",
}
_READERS: dict[str, Callable[[str], ExampleTable]] = {
    ".jsonl": JsonTable,
    ".ndjson": JsonTable,
    ".json": JsonTable,
    ".csv": CsvTable,
    ".tsv": CsvTable,
    ".parquet": ParquetTable,
    ".arrow": ArrowTable,
    ".feather": ArrowTable,
    ".txt": TextTable,
}
# In a folder: written by `datasets` and the hub, or by people beside their data.
_METADATA = re.compile(
    r"(dataset_infos?|dataset_dict|state|croissant|metadata|config|tokenizer_config)\.json"
    r"|(readme|licen[cs]e|copying|notice|changelog|citation|requirements|authors|description)[-\w.]*\.txt",
    re.IGNORECASE,
)


def load_source(source: DataSource) -> list[ExampleTable]:
    """The tables of one source, opened. Raises DataError for what is missing, unreadable or empty."""
    tables = _tables_of(source)
    for table in tables:
        if table.is_empty:
            raise DataError(f"{table.name} holds no rows.")
    return tables


def require_source(source: DataSource) -> None:
    """Raise DataError for a source that is no file or folder and cannot be a data set on the hub."""
    path = Path(source.path).expanduser()
    is_file = data_suffix(path) in _READERS or path.suffix[1:].isalpha() and path.parent.is_dir()
    if not path.exists() and (is_file or not _HUB_ID.fullmatch(source.path)):
        raise DataError(
            f"The data file {source.path} does not exist (looked in {Path.cwd()}). Name the one to read: "
            "in the recipe, or as data.train=PATH or data.eval=PATH on the command line."
        )


def _tables_of(source: DataSource) -> list[ExampleTable]:
    path = Path(source.path).expanduser()
    if path.exists() and source.name is not None:
        raise DataError(
            f"{path} is no hub data set, which alone may have a configuration {source.name!r}: remove `name` "
            "from the source, or name a sub-folder."
        )
    if path.is_dir():
        return [_load_file(file) for file in _files_of(path, source.split)]
    if path.exists():
        if source.split is not None:
            raise DataError(
                f"{path} is one file and has no split {source.split!r}: remove `split` from the source."
            )
        return [_load_file(path)]
    require_source(source)
    return [_load_hub(source)]


def _files_of(folder: Path, split: str | None) -> list[Path]:
    found = sorted(
        file
        for file in folder.rglob("*")
        if data_suffix(file) in _READERS
        and file.is_file()
        and not any(part.startswith(".") for part in file.relative_to(folder).parts)
    )
    files = [file for file in found if not _METADATA.fullmatch(file.name)]
    if not files:
        metadata = f"; {found[0].name} is metadata" if found else ""
        raise DataError(f"The folder {folder} holds no data file ({_supported()}{metadata}).")
    by_split: dict[str, list[Path]] = {}
    for file in files:
        by_split.setdefault(_split_of(file.relative_to(folder)), []).append(file)
    if split is not None:
        chosen = by_split.get(_SAME_SPLIT.get(split, split))
        if not chosen:
            raise DataError(
                f"The folder {folder} has no split {split!r}; its splits are {', '.join(by_split)}."
            )
        return chosen
    if len(by_split) > 1:
        raise DataError(
            f"The folder {folder} holds several splits ({', '.join(by_split)}). Say which one to use: "
            "{path: " + str(folder) + ", split: train}, or name the file itself."
        )
    return files


def _split_of(file: Path) -> str:
    """The split that a file's or its folders' names begin with; `train` where none does, as on the hub."""
    for part in reversed(file.parts):
        if match := _SPLIT_NAME.match(part):
            name = match.group(1).lower()
            return _SAME_SPLIT.get(name, name)
    return "train"


def _load_file(path: Path) -> ExampleTable:
    reader = _READERS.get(data_suffix(path))
    if reader is None:
        kind = "".join(path.suffixes[-2:]) or "(none)"
        raise DataError(f"{path}: the file type {kind!r} is not known. Use {_supported()}.")
    if not path.is_file():
        raise DataError(f"{path} is neither a file nor a folder.")
    try:
        if path.stat().st_size == 0:
            raise DataError(f"{path} is empty.")
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}.") from error
    return reader(str(path))


def _supported() -> str:
    return f"{' '.join(_READERS)}, text also packed ({' '.join(PACKED_SUFFIXES)})"


def _load_hub(source: DataSource) -> ExampleTable:
    from datasets import load_dataset
    from datasets.exceptions import DatasetNotFoundError, DatasetsError

    name, split = source.path, source.split or "train"

    try:
        return HubTable(f"{name} [{split}]", load_dataset(name, source.name, split=split))
    except DatasetNotFoundError as error:
        raise DataError(
            f"There is no file or folder {name}, and no data set of that name on the hub that you may read: "
            f"{first_line(error)}"
        ) from error
    except OSError as error:
        raise DataError(
            f"There is no file or folder {name}, and the hub cannot be reached to look for a data set of "
            f"that name ({first_line(error)}). Check the path, or the network."
        ) from error
    except (DatasetsError, ValueError) as error:
        reason = first_line(error.__cause__ or error)
        if configurations := re.search(r"available configs: \[(.*)\]", str(error)):
            reason = (
                f"it has several configurations ({configurations[1]}). Write {{path: {name}, name: ...}}."
            )
        raise DataError(f"The hub data set {name} cannot be read: {reason}") from error
