r"""Names and patterns of modules in a recipe or an adapter's config, matched with module paths as in PEFT.

    name endings      [q_proj, mlp.up_proj]     the path ends with one of them, from a dot on
    an expression     .*\.(q|v)_proj            a regular expression for the whole path
    pattern keys      {q_proj: 8, up_.*: 4}     expressions for the end of the path, from a dot on

The first two choose modules (`lora.target_modules`, `exclude_modules`). A pattern gives modules a number
(`rank_pattern`, `alpha_pattern`): of the keys that match a path the first decides.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from typing import TypeVar

Number = TypeVar("Number", int, float)

Names = str | Sequence[str]
"""A regular expression, or name endings."""


@lru_cache(maxsize=4096)
def expression(text: str, *, is_key: bool = False) -> re.Pattern[str]:
    """For whole paths. Raises ValueError, with the reason, for a text that is no regular expression. is_key:
    the text is a pattern key."""
    try:
        return re.compile(rf"(.*\.)?({text})" if is_key else text)
    except (re.error, RecursionError, OverflowError) as error:
        raise ValueError(f"{text!r} is no regular expression: {getattr(error, 'msg', error)}") from error


def matching_names(path: str, names: Names) -> set[str]:
    """The name endings that match this path, or the one expression if it does."""
    if isinstance(names, str):
        return {names} if expression(names).fullmatch(path) else set()
    parts = path.split(".")
    return {".".join(parts[i:]) for i in range(len(parts))}.intersection(names)


def deciding_key(keys: Iterable[str], path: str) -> str | None:
    """The first pattern key that matches the path; None: none does."""
    return next((key for key in keys if expression(key, is_key=True).fullmatch(path)), None)


def by_pattern(pattern: Mapping[str, Number], path: str, usual: Number) -> Number:
    """The value of a path; usual: of those that no key matches."""
    key = deciding_key(pattern, path)
    return usual if key is None else pattern[key]


def pattern_of(values: Mapping[str, Number], usual: Number) -> dict[str, Number]:
    """The pattern that gives these paths their values: by last name where all paths of that name have one
    value, else by whole path. usual: needs no key."""
    by_name: dict[str, set[Number]] = {}
    for path, value in values.items():
        by_name.setdefault(last_name(path), set()).add(value)
    return {
        re.escape(last_name(path) if len(by_name[last_name(path)]) == 1 else path): value
        for path, value in values.items()
        if value != usual
    }


def last_name(path: str) -> str:
    return path.rpartition(".")[2]
