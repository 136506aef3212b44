"""Where files come in that others wrote: whatever their parser throws leaves as one message.

Configs, tokenizers and weights are read by libraries, and a damaged file makes those throw anything: a
ZeroDivisionError deep in a model's constructor, a RecursionError in `json`, and where Rust code panics
pyo3's PanicException, which is not even an `Exception`. There is no list of it all. So every kind of file has
one place where it is read, inside `parsing`. Assertions, and what a wrong line of this package raises, pass:
a mistake of ours is no damaged file, and only its traceback helps to mend it.

`os_error` is the last such place: every OSError that reaches the command line becomes a message there.
"""

from __future__ import annotations

import contextlib
import errno
import json
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
"""What another path or its permissions would mend. The rest is the disk's or the system's."""
_MISTAKES = (AssertionError, NameError, AttributeError, TypeError, NotImplementedError)
_PANIC = "PanicException"  # each Rust library has a class of its own of this name
_PACKAGE = __name__.partition(".")[0]
_MAX_REASON_LETTERS = 300
SPARE_DISK_BYTES = 64 * 2**20  # file headers, overhead of the filesystem


@contextlib.contextmanager
def parsing(file: Path | str, refusal: type[UserError], remedy: str) -> Iterator[None]:
    """Around a library's reading of `file`: what it throws is raised as `refusal`, "file: cannot be read
    (reason). remedy".

    Passes on our own exceptions and mistakes (see the module docstring), MemoryError, and disks that fail.
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
    """Whether it says nothing about the file: a signal, or a mistake in a line of this package."""
    if not isinstance(error, Exception):
        return type(error).__name__ != _PANIC
    return isinstance(error, _MISTAKES) and _raised_in(error).partition(".")[0] == _PACKAGE


def _raised_in(error: BaseException) -> str:
    """Name of the module of the innermost line."""
    trace = error.__traceback__
    assert trace is not None
    while trace.tb_next is not None:
        trace = trace.tb_next
    return str(trace.tb_frame.f_globals.get("__name__", ""))


def reason_of(error: BaseException) -> str:
    """What an exception says, in one line that is short enough to stand in a message."""
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    line = " ".join(text.split()) or type(error).__name__
    if isinstance(error, KeyError | ZeroDivisionError | RecursionError | AttributeError):
        line = f"{type(error).__name__}: {line}"  # a bare key says nothing
    return line if len(line) <= _MAX_REASON_LETTERS else line[:_MAX_REASON_LETTERS] + " ..."


def read_json(file: Path, refusal: type[UserError], remedy: str) -> dict[str, Any]:
    """The object in a JSON file. Raises `refusal` for a file that is no such thing, or does not read."""
    with parsing(file, refusal, remedy):
        if not file.is_file():  # a pipe would be waited for
            raise refusal(f"{file}: is {'not a file' if file.exists() else 'not there'}. {remedy}")
        values = json.loads(file.read_bytes())
    if not isinstance(values, dict):
        raise refusal(f"{file}: must hold a JSON object. {remedy}")
    return values


def require_free_disk(
    folder: Path, num_bytes: int, what: str, refusal: type[QloraTrainError], remedy: str
) -> None:
    """Raise `refusal` unless the disk of `folder`, which need not exist yet, has room for `what` of so many
    bytes and some to spare."""
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    needed_bytes, free_bytes = num_bytes + SPARE_DISK_BYTES, shutil.disk_usage(existing).free
    if free_bytes < needed_bytes:
        raise refusal(
            f"{folder}: {what} needs {needed_bytes / 1e9:.2f} GB, the disk has {free_bytes / 1e9:.2f} GB "
            f"free. Make room, or {remedy}."
        )


def is_disk_failure(error: OSError) -> bool:
    """Whether the disk or the system gave way, rather than a path being wrong."""
    return error.errno is not None and error.errno not in _OF_A_PATH


def os_error(error: OSError) -> QloraTrainError:
    """The message for an error of the system that nobody nearer to it could explain."""
    where = f"{error.filename}: " if error.filename is not None else ""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return DiskFailure(f"no space left on the disk: {where}{reason_of(error)}")
    if is_disk_failure(error):
        return DiskFailure(f"{where}{reason_of(error)}")
    return UserError(f"{where}{reason_of(error)}")
