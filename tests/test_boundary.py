"""What parsers throw leaves as one message; what is ours does not."""

from __future__ import annotations

import errno
import json
from pathlib import Path

import pytest

from qlora_train.boundary import os_error, parsing, read_json, reason_of
from qlora_train.errors import BaseModelError, DataError, Interrupted, QloraTrainError, UserError

PanicException = type("PanicException", (BaseException,), {})


def raised_in_a_line_of(module: str, error: BaseException) -> None:
    """As if a function of that module had raised it."""
    exec(compile("raise error", "x.py", "exec"), {"__name__": module, "error": error})


@pytest.mark.parametrize(
    "error",
    [
        ValueError("bad"),
        KeyError("bad"),
        ZeroDivisionError("bad"),
        RecursionError("bad"),
        AttributeError("bad"),
        TypeError("bad"),
        AssertionError("bad"),
        RuntimeError("bad"),
        Exception("bad"),
        PanicException("bad"),
        OSError("bad"),
        FileNotFoundError(errno.ENOENT, "bad"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_what_a_library_throws_is_one_message(error: BaseException) -> None:
    message = r"^x\.json: cannot be read \(.*bad.*\)\. Get it again\.$"
    with (
        pytest.raises(BaseModelError, match=message) as caught,
        parsing("x.json", BaseModelError, "Get it again."),
    ):
        raised_in_a_line_of("transformers.models.x", error)
    assert caught.value.__cause__ is error and caught.value.exit_code == 2


@pytest.mark.parametrize(
    "error",
    [AssertionError("ours"), NameError("ours"), TypeError("ours"), AttributeError("ours")],
    ids=lambda error: type(error).__name__,
)
def test_mistakes_in_our_own_lines_pass(error: Exception) -> None:
    with pytest.raises(type(error), match="ours") as caught, parsing("x", BaseModelError, ""):
        raised_in_a_line_of("qlora_train.model.base", error)
    assert not isinstance(caught.value, QloraTrainError)


@pytest.mark.parametrize(
    "error",
    [
        Interrupted(15),
        KeyboardInterrupt(),
        SystemExit(3),
        MemoryError(),
        DataError("ours"),
        OSError(errno.EIO, "Input/output error"),
        OSError(errno.ENOSPC, "full"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_signals_memory_disks_and_our_own_messages_pass(error: BaseException) -> None:
    with pytest.raises(type(error)) as caught, parsing("x", BaseModelError, ""):
        raised_in_a_line_of("transformers.models.x", error)
    assert caught.value is error


def test_a_reason_is_short_and_says_something() -> None:
    assert reason_of(ValueError("one:\n   two")) == "one: two"
    assert reason_of(ValueError("")) == "ValueError"
    assert reason_of(KeyError("k")) == "KeyError: 'k'"
    assert len(reason_of(ValueError("x" * 10**6))) < 400
    assert reason_of(PermissionError(errno.EACCES, "Permission denied", "secret")) == "Permission denied"


@pytest.mark.parametrize(
    "content", [b"", b"[]", b"null", b"{", b"\xff\xfe", b"\0\0", b'{"a":' * 10**5, b"9" * 10**5]
)
def test_json_that_is_no_object(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "x.json"
    file.write_bytes(content)
    with pytest.raises(BaseModelError, match=r"x\.json.*Get it again"):
        read_json(file, BaseModelError, "Get it again.")


def test_json_that_is_one_and_what_is_no_file(tmp_path: Path) -> None:
    file = tmp_path / "x.json"
    file.write_text(json.dumps({"é": [1]}), encoding="utf-8")
    assert read_json(file, BaseModelError, "") == {"é": [1]}
    for odd in (tmp_path, tmp_path / "absent", tmp_path / "loop"):
        if odd.name == "loop":
            odd.symlink_to(odd)
        with pytest.raises(BaseModelError, match=odd.name):
            read_json(odd, BaseModelError, "")


@pytest.mark.parametrize(
    ("number", "code"),
    [(errno.ENOSPC, 1), (errno.EIO, 1), (errno.EROFS, 1), (errno.EMFILE, 1), (errno.EFBIG, 1)]
    + [(errno.ENOENT, 2), (errno.EACCES, 2), (errno.EISDIR, 2), (errno.ENAMETOOLONG, 2), (errno.ELOOP, 2)],
)
def test_errors_of_the_system_name_the_path(number: int, code: int) -> None:
    error = os_error(OSError(number, "why", "a/path"))
    assert error.exit_code == code and "a/path" in str(error) and "why" in str(error)
    assert isinstance(error, UserError) == (code == 2)
