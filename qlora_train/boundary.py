"""Turns whatever libraries raise while they read a user's files into one message of this package.

Configs, tokenizers and weights are read by libraries, which may raise anything for a damaged file: a
ZeroDivisionError in a model's constructor, a RecursionError in `json`, or, where Rust code panics, pyo3's
PanicException, which is no `Exception`. They cannot be listed, so every kind of file is read in one place,
inside `parsing`. Assertions and errors raised by a line of this package pass: they are bugs, and need their
traceback.

`os_error` makes the message for every OSError that reaches the command line.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from qlora_train.errors import DiskFailure, QloraTrainError, UserError

_OF_A_PATH = {
    errno.ENOENT,
    errno.ENOTDIR,
    errno.EISDIR,
    errno.EACCES,
    errno.EPERM,
    errno.EEXIST,
    errno.ELOOP,
    errno.ENAMETOOLONG,
}
"""Errors of a path or its permissions; all others are failures of the disk or the system."""
_MISTAKES = (AssertionError, NameError, AttributeError, TypeError, NotImplementedError)
_PANIC = "PanicException"  # each Rust library has a class of its own of this name
_PACKAGE = __name__.partition(".")[0]
_MAX_REASON_LETTERS = 300
SPARE_DISK_BYTES = 64 * 2**20  # file headers, overhead of the filesystem


@contextlib.contextmanager
def parsing(file: Path | str, refusal: type[UserError], remedy: str) -> Iterator[None]:
    """Context for a library's reading of `file`: its exceptions are raised as `refusal`, "file: cannot be
    read (reason). remedy".

    This package's exceptions and bugs (see the module docstring), MemoryError and disk failures pass.
    """
    try:
        yield
    except (QloraTrainError, MemoryError):
        raise
    except BaseException as error:
        if _is_ours(error) or (isinstance(error, OSError) and is_disk_failure(error)):
            raise
        raise refusal(f"{file}: cannot be read ({reason_of(error)}). {remedy}") from error


def _is_ours(error: BaseException) -> bool:
    """Whether an exception is not about the file: a signal, or a bug in a line of this package."""
    if not isinstance(error, Exception):
        return type(error).__name__ != _PANIC
    return isinstance(error, _MISTAKES) and _raised_in(error).partition(".")[0] == _PACKAGE


def _raised_in(error: BaseException) -> str:
    """The name of the module whose line raised an exception."""
    trace = error.__traceback__
    assert trace is not None
    while trace.tb_next is not None:
        trace = trace.tb_next
    return str(trace.tb_frame.f_globals.get("__name__", ""))


def reason_of(error: BaseException) -> str:
    """An exception's text as one short line for a message."""
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    line = one_line(text) or type(error).__name__
    if isinstance(error, KeyError | ZeroDivisionError | RecursionError | AttributeError):
        line = f"{type(error).__name__}: {line}"  # the text alone is unclear
    return line


def one_line(text: str) -> str:
    """The text of a library as a short line."""
    begin = text[: 10 * _MAX_REASON_LETTERS]
    line = " ".join(begin.split())
    return line if line == text or len(text) <= _MAX_REASON_LETTERS else line[:_MAX_REASON_LETTERS] + " ..."


def read_json(file: Path, refusal: type[UserError], remedy: str) -> dict[str, Any]:
    """The JSON object in a file. Raises `refusal` for a file that holds none or cannot be read."""
    with parsing(file, refusal, remedy):
        if not file.is_file():  # reading a pipe would block
            raise refusal(f"{file}: is {'not a file' if file.exists() else 'not there'}. {remedy}")
        values = json.loads(file.read_bytes())
    if not isinstance(values, dict):
        raise refusal(f"{file}: must hold a JSON object. {remedy}")
    return values


def require_creatable(folder: Path, refusal: type[QloraTrainError], remedy: str) -> None:
    """Raise `refusal` where a folder neither is at a path nor can be made there."""
    path = folder.absolute()
    lies_in = next(parent for parent in (path, *path.parents) if os.path.lexists(parent))
    if not lies_in.is_dir():
        kind = "a file" if lies_in.exists() else "a link to nowhere"
        raise refusal(f"{folder}: {lies_in} is {kind}, so no folder can be made in it. {remedy}")
    if not os.access(lies_in, os.W_OK | os.X_OK):
        raise refusal(f"{folder}: {lies_in} may not be written to. {remedy}")


def require_free_disk(
    folder: Path, num_bytes: int, what: str, refusal: type[QloraTrainError], remedy: str
) -> None:
    """Raise `refusal` unless the disk of `folder`, which need not exist yet, has num_bytes and a reserve
    free. what: the things to write, for the message."""
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    needed_bytes, free_bytes = num_bytes + SPARE_DISK_BYTES, shutil.disk_usage(existing).free
    if free_bytes < needed_bytes:
        raise refusal(
            f"{folder}: {what} needs {needed_bytes / 1e9:.2f} GB, the disk has {free_bytes / 1e9:.2f} GB "
            f"free. Make room, or {remedy}."
        )


def is_disk_failure(error: OSError) -> bool:
    """Whether an error is a failure of the disk or the system, not a wrong path."""
    return error.errno is not None and error.errno not in _OF_A_PATH


def os_error(error: OSError) -> QloraTrainError:
    """The exception with a message for an OSError that was not explained closer to its cause."""
    where = f"{error.filename}: " if error.filename is not None else ""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return DiskFailure(f"no space left on the disk: {where}{reason_of(error)}")
    if is_disk_failure(error):
        return DiskFailure(f"{where}{reason_of(error)}")
    return UserError(f"{where}{reason_of(error)}")
