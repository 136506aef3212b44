"""Where in the program something happened: file and line of the innermost frame that is the program's."""

from __future__ import annotations

import sys
from functools import cache
from pathlib import Path

import torch

REPOSITORY = Path(__file__).resolve().parent.parent.parent
_TORCH = str(Path(torch.__file__).parent)
_HERE = str(Path(__file__).resolve().parent)
Placement = tuple[str, int] | None


@cache
def _is_machinery(file: str) -> bool:
    """torch's own code and the simulator's; its tests are a program like others."""
    is_program = Path(file).name.startswith("test_") or file.endswith("_program.py")
    inside = file.startswith(_HERE) and not is_program
    return inside or file.startswith(_TORCH) or "importlib" in file


def caller() -> Placement:
    """None in autograd's own thread, where no Python of the program is on the stack."""
    frame = sys._getframe(1)
    while frame is not None and _is_machinery(frame.f_code.co_filename):
        frame = frame.f_back  # type: ignore[assignment]
    return None if frame is None else (frame.f_code.co_filename, frame.f_lineno)


@cache
def _short(file: str) -> str:
    path = Path(file)
    if path.is_relative_to(REPOSITORY):
        return str(path.relative_to(REPOSITORY))
    return file.split("site-packages/")[-1]


def words(place: Placement) -> str:
    """`qlora_train/weights/ring.py:101`: relative to the repository, or to the installed packages."""
    return "autograd's engine" if place is None else f"{_short(place[0])}:{place[1]}"
