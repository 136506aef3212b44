"""Conversations with their texts replaced by characters that no text has, to see what a template does.

Rendered so, a conversation tells where its texts stand, and with it everything a template does that does not
depend on what is said: what it writes before and behind a text, and which texts it leaves out. Roles, ids,
the names of arguments and values that are no text stay as they are, because templates ask for them. Two
conversations of the same *shape* give the same, so it is looked at once per shape, not once per example.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from itertools import count
from typing import Any

from qlora_train.data.chat.template import Message

REASONING = "reasoning_content"
_NOT_SAID = frozenset({"role", "content", "tool_calls", "tool_call_id", "id", "type", REASONING})

# Private-use characters: one that opens, two digits to the base 1,000, one that closes.
_OPEN, _CLOSE, _DIGITS = "\ue010", "\ue011", 0xE100


def stand_in(number: int) -> str:
    """A text that is found in a rendering if and only if this stand-in was rendered. number < 1,000,000."""
    high, low = divmod(number, 1000)
    return _OPEN + chr(_DIGITS + high) + chr(_DIGITS + low) + _CLOSE


def free_stand_in(text: str) -> str:
    """A stand-in that an example's text does not hold: people may write anything."""
    return next(mark for mark in map(stand_in, count()) if mark not in text)


def is_blank(text: Any) -> bool:
    return not isinstance(text, str) or not text or text.isspace()


def with_texts(message: Message, replace: Callable[[str, str], str], *, numbers_too: bool = False) -> Message:
    """The message with `replace(field, text)` for each of its texts.

    Fields are content, reasoning_content, the names of further text fields, and for call i `call i name` and
    `call i arguments`. A blank content is a text only where nothing else is said. numbers_too: arguments that
    hold no text have their numbers (and true, false, null) replaced, so that each field has a text.
    """
    changed = dict(message)
    for key, value in message.items():
        may_be_blank = key == "content" and not message.get("tool_calls")
        is_said = key in ("content", REASONING) or (key not in _NOT_SAID and key != "name")
        if is_said and isinstance(value, str) and (may_be_blank or not is_blank(value)):
            changed[key] = replace(key, value)
    if message.get("tool_calls"):
        changed["tool_calls"] = [
            _with_call_texts(call, f"call {number}", replace, numbers_too)
            for number, call in enumerate(message["tool_calls"])
        ]
    return changed


def _with_call_texts(call: Any, field: str, replace: Callable[[str, str], str], numbers_too: bool) -> Any:
    function = call.get("function", call)
    changed = dict(function)
    if isinstance(function.get("name"), str):
        changed["name"] = replace(f"{field} name", function["name"])
    if "arguments" in function:
        said = function["arguments"]
        kinds: tuple[type, ...] = (str,)
        if numbers_too and not any(isinstance(leaf, str) for leaf in _leaves(said)):
            kinds = (str, int, float, type(None))
        changed["arguments"] = _with_leaves(
            said, lambda leaf: replace(f"{field} arguments", str(leaf)), kinds
        )
    return {**call, "function": changed} if "function" in call else changed


def _with_leaves(value: Any, replace: Callable[[Any], str], kinds: tuple[type, ...]) -> Any:
    if isinstance(value, Mapping):
        return {key: _with_leaves(item, replace, kinds) for key, item in value.items()}
    if isinstance(value, list):
        return [_with_leaves(item, replace, kinds) for item in value]
    return replace(value) if isinstance(value, kinds) else value


def _leaves(value: Any) -> Iterator[Any]:
    if isinstance(value, Mapping | list):
        for item in value.values() if isinstance(value, Mapping) else value:
            yield from _leaves(item)
    else:
        yield value


def numbered(message: Message, numbers: Iterator[int]) -> tuple[Message, dict[str, str]]:
    """The message with a stand-in of its own for each field: (message, field -> stand-in)."""
    fields: dict[str, str] = {}

    def replace(field: str, _: str) -> str:
        if field not in fields:
            fields[field] = stand_in(next(numbers))
        return fields[field]

    return with_texts(message, replace, numbers_too=True), fields


def fields_beside(message: Message) -> list[str]:
    """The text fields of a message besides what is said. The assistant's other ones are among those of its
    turn; the name in a tool's result only repeats its call's."""
    keys = {"name"} if message["role"] == "assistant" else set(message) - _NOT_SAID
    if message["role"] == "tool":
        keys -= {"name"}
    return [key for key, value in message.items() if key in keys and not is_blank(value)]


def shape(message: Message) -> str:
    """A key that is equal for messages that differ in nothing but their texts (and the characters of their
    ids)."""
    if message.keys() <= {"role", "content"} and "content" in message:
        return f"{message['role']}:{'blank' if is_blank(message['content']) else 'said'}"
    reduced = without_ids(with_texts(message, lambda _, text: "blank" if is_blank(text) else "said"))
    if "tool_calls" in reduced:  # numbers differ from example to example, too
        calls = _with_leaves(reduced["tool_calls"], lambda leaf: type(leaf).__name__, (int, float))
        reduced = {**reduced, "tool_calls": calls}
    return json.dumps(reduced, sort_keys=True, default=str)


def without_ids(message: Message) -> Message:
    """The message with ids that only tell their length: templates check it, and little else."""
    changed = dict(message)
    if isinstance(changed.get("tool_call_id"), str):
        changed["tool_call_id"] = _plain_id(changed["tool_call_id"])
    if changed.get("tool_calls"):
        changed["tool_calls"] = [
            {**call, "id": _plain_id(call["id"])} if isinstance(call.get("id"), str) else call
            for call in changed["tool_calls"]
        ]
    return changed


def _plain_id(text: str) -> str:
    return ("abcdefghi" * (len(text) // 9 + 1))[: len(text)]
