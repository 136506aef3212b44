"""A tokenizer that panics at a row ends in a message; our own mistakes stay what they are."""

from __future__ import annotations

from typing import Any

import pytest

from qlora_train.data.tokenizing import tokenize
from qlora_train.errors import BaseModelError

PANIC = type("PanicException", (BaseException,), {})


class Broken:
    name_or_path = "some/base"

    def __init__(self, error: BaseException) -> None:
        self._error = error

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        raise self._error


@pytest.mark.parametrize(
    "error", [PANIC("regex gave up"), ValueError("no such piece"), KeyError("x")], ids=repr
)
def test_what_it_throws_is_a_message(error: BaseException) -> None:
    with pytest.raises(BaseModelError, match=r"the tokenizer of some/base: cannot be read \(.*Download"):
        tokenize(Broken(error), "text")  # type: ignore[arg-type]


@pytest.mark.parametrize("error", [KeyboardInterrupt(), MemoryError()], ids=repr)
def test_what_is_not_its_fault_passes(error: BaseException) -> None:
    with pytest.raises(type(error)):
        tokenize(Broken(error), ["text"])  # type: ignore[arg-type]
