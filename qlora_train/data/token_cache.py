"""The token cache: what reading, rendering and tokenising made of some sources, kept on disk.

A folder's name is a fingerprint of everything the tokens follow from: the contents of every file (all of
them: reading a gigabyte takes a second, and a time of change tells little), the data section, the tokenizer
with its chat template, and the versions of what reads and tokenises. A second start with the same ones maps
the arrays and reads nothing. Small data are not kept: they are tokenised in the time that looking takes.

A folder is written atomically (files/atomic_folder.py), so that one that is there is whole; of two that are
built at once the first one stays. It is locked while its examples are used, so that `cache clear` spares it.
"""

from __future__ import annotations

import errno
import hashlib
import json
import weakref
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import xxhash

from qlora_train.data.arrow_tables import HubTable
from qlora_train.data.open_sources import OpenSources
from qlora_train.data.reading_progress import reading_progress
from qlora_train.data.tables import ExampleTable
from qlora_train.data.tokenization import ExampleTokenizer
from qlora_train.data.tokenized_examples import FOLDER_PREFIX, TokenizedExamples
from qlora_train.errors import DataError, QloraTrainError
from qlora_train.files.atomic_folder import MadeByAnother, atomic_folder
from qlora_train.files.folder_lock import lock_folder, remove_leftovers

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from qlora_train.recipe import DataSection

VERSION = 4
LEAST_BYTES = 2**20
"""Of the files of data that are kept."""
_READ_BYTES = 2**20
_NOT_IN_TOKENS = {"train", "eval", "packing"}
_LIBRARIES = ("qlora-train", "tokenizers", "transformers", "jinja2", "pyarrow", "datasets")


def tokenized_or_kept(
    sources: OpenSources,
    tokenizer: ExampleTokenizer,
    section: DataSection,
    settings: Any,
    root: Path | None,
) -> TokenizedExamples:
    """The examples of the sources. root: the folder that holds the token cache; None: nothing is kept.
    settings: what the tokens follow from besides the sources, the section and the tokenizer, as plain values.
    """
    files = files_of(sources.tables) if root is not None else None

    def read(folder: Path | None = None) -> TokenizedExamples | None:
        with reading_progress() as progress:
            return sources.tokenized(tokenizer, folder=folder, progress=progress)

    if root is None or files is None or sum(file.stat().st_size for file in files) < LEAST_BYTES:
        examples = read()
        assert examples is not None, "no folder was given"
        return examples
    return kept_or_built(root, fingerprint(sources, files, section, tokenizer.tokenizer, settings), read)


def files_of(tables: Sequence[ExampleTable]) -> list[Path] | None:
    """The files that hold the examples; None where some examples are in none."""
    files: list[Path] = []
    for table in tables:
        if isinstance(table, HubTable):
            found = [Path(file["filename"]) for file in table.dataset.cache_files]
        else:
            found = [Path(table.name)]
        if not found or not all(file.is_file() for file in found):
            return None
        files += found
    return files


def fingerprint(
    sources: OpenSources,
    files: Sequence[Path],
    data: DataSection,
    tokenizer: PreTrainedTokenizerBase,
    settings: Any,
) -> str:
    """The name of a cache folder (see the module docstring)."""
    keys = {k: v for k, v in data.model_dump(mode="json").items() if k not in _NOT_IN_TOKENS}
    contents = [[t.name for t in sources.tables], sources.weights, [_content_hash(file) for file in files]]
    versions = [version(name) for name in _LIBRARIES]
    plain = json.dumps([VERSION, versions, keys, contents, settings], sort_keys=True)
    digest = hashlib.sha256(plain.encode())
    digest.update(_tokenizer_hash(tokenizer))
    return digest.hexdigest()[:24]


def kept_or_built(root: Path, name: str, build: Callable[[Path], Any]) -> TokenizedExamples:
    """The examples of the cache folder `name`, built first by build(empty folder) where they are not there.
    Raises DataError where the cache cannot be written, QloraTrainError where its disk is full."""
    folder = root / f"{FOLDER_PREFIX}{name}"
    if (examples := _opened(folder)) is not None:
        return examples
    try:
        remove_leftovers(root)
        with atomic_folder(folder) as partial:
            build(partial)
            if (examples := _opened(folder)) is not None:
                raise MadeByAnother
        examples = examples or _opened(folder)
        assert examples is not None, "it has just been written"
        return examples
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise QloraTrainError(
                f"The disk of the token cache {root} is full. Make room, name another folder with "
                "QLORA_TRAIN_CACHE, or use --no-cache."
            ) from error
        raise DataError(
            f"The token cache {root} cannot be written: {error.strerror or error}. Name another folder with "
            "QLORA_TRAIN_CACHE, or use --no-cache."
        ) from error


def _opened(folder: Path) -> TokenizedExamples | None:
    """The examples of a folder, which stays locked while they live; None: it is not there, or damaged."""
    try:
        with ExitStack() as held:
            if (lock := lock_folder(folder, shared=True)) is None:
                return None
            held.enter_context(lock)
            examples = TokenizedExamples.opened(folder)
            weakref.finalize(examples, held.pop_all().close)
            return examples
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _content_hash(file: Path) -> str:
    digest = xxhash.xxh3_128()
    with file.open("rb") as opened:
        while block := opened.read(_READ_BYTES):
            digest.update(block)
    return digest.hexdigest()


def _tokenizer_hash(tokenizer: PreTrainedTokenizerBase) -> bytes:
    settings = [tokenizer.chat_template, tokenizer.special_tokens_map, sorted(tokenizer.added_tokens_decoder)]
    text = tokenizer.backend_tokenizer.to_str() + json.dumps(settings, default=str, sort_keys=True)
    return hashlib.sha256(text.encode()).digest()
