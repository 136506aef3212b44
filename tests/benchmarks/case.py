"""What a case is: one thing measured, and the contenders that are to do it. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Contender:
    """module: a piece (process.py), run with the case's settings, then `arguments`, as its arguments.
    requires, commands: packages that must be importable and programs that must be there, else the contender
    is skipped with a word."""

    name: str
    module: str
    arguments: Mapping[str, Any] = field(default_factory=dict)
    requires: tuple[str, ...] = ()
    commands: tuple[str, ...] = ()


@dataclass(frozen=True)
class Case:
    """suite: the file that its records go to. settings: what all contenders share. inputs: what has to be
    made on disk before, once (inputs.py); pieces find it below `settings["inputs"]`. reference: the contender
    that ratios are against. target: what is aimed at, in words, printed and never asserted."""

    name: str
    about: str
    contenders: tuple[Contender, ...]
    reference: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    inputs: Mapping[str, Any] = field(default_factory=dict)
    target: str = ""
    needs_cuda: bool = False
    timeout_seconds: float = 900.0
    suite: str = "speed"

    def __post_init__(self) -> None:
        names = [contender.name for contender in self.contenders]
        assert len(set(names)) == len(names) and self.reference in names, (self.name, names)
