"""Text from data and models as a terminal may show it: escape sequences in it move no cursor and hide
nothing."""

from __future__ import annotations

import sys
from typing import TextIO


def printable(text: str) -> str:
    """The text with every character that is neither printable nor a newline or tab as its escape, such as
    \\x1b."""
    return "".join(
        letter if letter.isprintable() or letter in "\n\t" else ascii(letter)[1:-1] for letter in text
    )


def show(text: str, stream: TextIO | None = None) -> None:
    """Write to a stream (None: stdout) at once, `printable` where it is a terminal, as it is where it is not:
    a program that reads it is to get the model's own text."""
    stream = sys.stdout if stream is None else stream
    stream.write(printable(text) if stream.isatty() else text)
    stream.flush()
