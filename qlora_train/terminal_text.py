"""Text from data and models as a terminal may show it: escape sequences in it move no cursor and hide
nothing."""

from __future__ import annotations

import sys
import unicodedata
from typing import TextIO

_FIRST_LETTERS, _LAST_LETTERS = 1500, 500
_SHOWN = "\n\t\u200c\u200d"  # the last two join letters: Persian, emoji


def printable(text: str) -> str:
    """The text with every character that is neither printable nor white space as its escape, such as
    \\x1b."""
    if text.isprintable():
        return text
    return "".join(letter if _is_shown(letter) else ascii(letter)[1:-1] for letter in text)


def _is_shown(letter: str) -> bool:
    return letter.isprintable() or letter in _SHOWN or unicodedata.category(letter) == "Zs"


def message(text: str) -> str:
    """A message with names and texts of others in it, `printable`; of lines that nobody would read the middle
    is left out, as what to do stands at the end."""
    return printable("\n".join(map(_cut, text.split("\n"))))


def _cut(line: str) -> str:
    if len(line) <= _FIRST_LETTERS + _LAST_LETTERS:
        return line
    return f"{line[:_FIRST_LETTERS]} ... {line[-_LAST_LETTERS:]}"


def tell(text: str, stream: TextIO | None = None) -> None:
    """Print a message to a stream (None: stdout)."""
    print(message(text), file=stream)


def show(text: str, stream: TextIO | None = None) -> None:
    """Write to a stream (None: stdout) at once, `printable` where it is a terminal, as it is where it is not:
    a program that reads it is to get the model's own text."""
    stream = sys.stdout if stream is None else stream
    stream.write(printable(text) if stream.isatty() else text)
    stream.flush()
