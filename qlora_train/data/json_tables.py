"""Tables of JSON files: one object a line, or any other way in which people write examples as JSON.

    {"a": 1}\\n{"a": 2}\\n            one object a line: lines are parsed one by one, by whoever has time
    [{"a": 1}, {"a": 2}]            a list, in a .json or a .jsonl file
    {"data": [{"a": 1}, ...]}       an object that holds the list under its only list-valued key
    {\\n "a": 1\\n}\\n{\\n "a": 2\\n}     objects over several lines, one after another

All but the first are read value by value from a buffer that holds a little more than one value, so a list
of a gigabyte is never in memory as a whole (an object around a list is). In an object a name may stand once
only: of two values the parser of the standard library takes the last one and says nothing.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain, islice
from typing import Any

from qlora_train.data.tables import (
    Batch,
    Example,
    ExampleProblem,
    ExampleTable,
    NumberedExample,
    batched,
    type_name,
)
from qlora_train.data.text_files import MAX_CHARACTERS, undecoded
from qlora_train.errors import DataError

# Lists of objects that are part of an example: an object with one of them is an example, not a wrapper.
_PARTS_OF_EXAMPLES = {
    "messages",
    "conversations",
    "conversation",
    "prompt",
    "completion",
    "tools",
    "functions",
    "contents",
}
_PARTS_OF_EXAMPLES |= {"history", "chosen", "rejected"}
_NOT_EXAMPLES = (
    "where a row (a JSON object) is needed. A data file is a list of objects, or one object a line."
)
_SPACE = re.compile(r"[ \t\r\n]*")
_BUFFER_CHARACTERS = 1 << 16
_LONGEST_WORD = 16  # characters of what may be cut in two: true, \\u1234, -Infinity


class JsonTable(ExampleTable):
    """A .json, .jsonl or .ndjson file. The rows of a list are counted: it may well be a single line."""

    unit = "line"

    def _read(self) -> Iterator[Batch]:
        filled = ((number, line) for number, line in self._lines() if not line.isspace())
        begin = list(islice(filled, 2))
        first = _object_in(begin[0][1]) if begin else None
        is_wrapper = len(begin) == 1 and _wrapped_examples(first) is not None
        lines = chain(begin, filled)
        if first is not None and not is_wrapper:
            return map(JsonLines, batched(lines))
        return batched((number, _example_or_problem(value)) for number, value in self._values(lines))

    def _values(self, lines: Iterator[tuple[int, str]]) -> Iterator[tuple[int, Any]]:
        """The (number, value) of each row of a file that is not one object a line."""
        reader = _ValueReader(self.name, lines)
        if reader.peek() == "[":
            self.unit = "row"
            return enumerate(reader.elements(), start=1)
        values = reader.values()
        begin = list(islice(values, 2))
        if len(begin) == 1 and (wrapped := _wrapped_examples(begin[0][1])) is not None:
            self.unit = "row"
            self.rows_under, rows = wrapped
            return enumerate(rows, start=1)
        return chain(begin, values)


@dataclass(frozen=True)
class JsonLines:
    """A batch of lines that hold an object each, parsed when it is iterated."""

    lines: list[tuple[int, str]]

    def __iter__(self) -> Iterator[NumberedExample]:
        for number, line in self.lines:
            yield number, _example_of_line(line)


def _example_of_line(line: str) -> Example | ExampleProblem:
    if wrong := undecoded(line):
        return ExampleProblem(wrong)
    try:
        value = parse_json(line)
    except ExampleProblem as problem:
        return problem
    return _example_or_problem(value)


def _example_or_problem(value: Any) -> Example | ExampleProblem:
    return value if isinstance(value, dict) else ExampleProblem(f"holds {type_name(value)} {_NOT_EXAMPLES}")


def parse_json(text: str) -> Any:
    """The value of a JSON text. Raises ExampleProblem, which goes on from "this text"."""
    try:
        return _DECODER.decode(text)
    except RecursionError:
        raise ExampleProblem("is not valid JSON: it is nested too deeply.") from None
    except ValueError as error:
        raise ExampleProblem(f"is not valid JSON: {error}") from error


def _object_without_twins(pairs: list[tuple[str, Any]]) -> Example:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twin = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"an object names {twin!r} twice; remove one of them")
    return found


_DECODER = json.JSONDecoder(object_pairs_hook=_object_without_twins)


def _object_in(line: str) -> Example | None:
    """The object that the line is; an empty one where it is damaged (one over several lines only begins)."""
    text = line.strip()
    if not text.startswith("{"):
        return None
    try:
        found: Example = json.loads(text)
        return found
    except (ValueError, RecursionError):
        return {} if text.endswith("}") else None


def _wrapped_examples(value: Any) -> tuple[str, list[Any]] | None:
    """The only key that has a list of objects, and the list; None for an object that is an example itself: it
    has a key of one, or the objects are messages."""
    if not isinstance(value, dict) or _PARTS_OF_EXAMPLES & set(value):
        return None
    lists = [
        (key, item)
        for key, item in value.items()
        if isinstance(item, list) and item and isinstance(item[0], dict)
    ]
    if len(lists) != 1 or {"role", "from"} & set(lists[0][1][0]):
        return None
    return lists[0]


class _ValueReader:
    """JSON values, one after another or in a list, from lines; a few lines are held at a time."""

    def __init__(self, name: str, lines: Iterator[tuple[int, str]]) -> None:
        self._name, self._lines = name, lines
        self._text, self._at = "", 0
        self._line_starts: list[tuple[int, int]] = []  # (position in the text, line number)
        self._is_over = False

    def peek(self) -> str:
        """The next character that is no white space; "" at the end."""
        while True:
            end = _SPACE.match(self._text, self._at)
            assert end is not None
            self._at = end.end()
            if self._at < len(self._text) or not self._more():
                return self._text[self._at : self._at + 1]

    def values(self) -> Iterator[tuple[int, Any]]:
        """The values to the end of the file, (line, value) each."""
        while self.peek():
            yield self._value()

    def elements(self) -> Iterator[Any]:
        """The elements of the list that begins here, and of lists behind it."""
        while self.peek():
            self._take("[")
            if self.peek() == "]":
                self._take("]")
                continue
            while True:
                yield self._value()[1]
                if self.peek() == "]":
                    self._take("]")
                    break
                self._take(",")

    def _take(self, character: str) -> None:
        found = self.peek()
        if found != character:
            raise self._error(f"{character!r} is missing" + ("" if found else ": the file ends too early"))
        self._at += 1

    def _value(self) -> tuple[int, Any]:
        self.peek()
        line = self._line()
        while True:
            try:
                value, self._at = _DECODER.raw_decode(self._text, self._at)
            except RecursionError:
                raise self._error("it is nested too deeply") from None
            except ValueError as error:
                if self._is_damaged(error) or not self._more():
                    raise self._error(str(error)) from error
                continue
            # A number may go on in what has not been read.
            if self._at < len(self._text) or not isinstance(value, int | float) or not self._more():
                return line, value

    def _is_damaged(self, error: ValueError) -> bool:
        """Whether the value is wrong, rather than cut off at the end of what has been read."""
        if not isinstance(error, json.JSONDecodeError):
            return True
        return not error.msg.startswith("Unterminated") and error.pos < len(self._text) - _LONGEST_WORD

    def _more(self) -> bool:
        """Reads on in the file, twice as much each time for one value: a long one is not scanned over and
        over."""
        if self._is_over:
            return False
        wanted = max(_BUFFER_CHARACTERS, len(self._text) - self._at)
        kept = [(max(0, at - self._at), line) for at, line in self._line_starts]
        current = max((i for i, (at, _) in enumerate(kept) if at == 0), default=0)
        self._line_starts = kept[current:]
        parts = [self._text[self._at :]]
        size = len(parts[0])
        for number, line in self._lines:
            if problem := undecoded(line):
                raise DataError(f"{self._name} line {number} {problem}")
            self._line_starts.append((size, number))
            parts.append(line)
            size += len(line)
            wanted -= len(line)
            if size > 2 * MAX_CHARACTERS:
                raise self._error(f"a value is longer than {MAX_CHARACTERS:,} characters")
            if wanted <= 0:
                break
        else:
            self._is_over = True
        self._text, self._at = "".join(parts), 0
        return len(parts) > 1

    def _line(self) -> int:
        """The line of the file that the reader is at."""
        return max((line for at, line in self._line_starts if at <= self._at), default=1)

    def _error(self, problem: str) -> DataError:
        return DataError(f"{self._name} line {self._line()} is not valid JSON: {problem}")
