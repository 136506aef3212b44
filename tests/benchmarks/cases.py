"""All cases by name, suite by suite. Imports no torch: `make bench ARGS=--list` answers at once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from benchmarks import speed_suite
from benchmarks.case import Case
from qlora_train.errors import UserError
from qlora_train.recipe.yaml_file import nearest

CASES: dict[str, Case] = {case.name: case for case in (*speed_suite.CASES,)}


def choose(names: Sequence[str], cases: Mapping[str, Case]) -> list[Case]:
    """The named cases, all of them where none is named. Raises `UserError` for a name that is not there."""
    for name in names:
        if name not in cases:
            raise UserError(f"{name}: no such case; see make bench ARGS=--list{nearest(name, cases)}")
    return [cases[name] for name in names] if names else list(cases.values())
