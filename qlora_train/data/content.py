"""The content of an example, once its columns are read: a conversation, a completion or a text."""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass
from typing import Any

from qlora_train.data.tables import ExampleProblem

# JSON can spell halves of characters ("\ud83d" without its other half); no tokenizer takes them.
LONE_SURROGATE = re.compile("[\ud800-\udfff]")
MAX_DEPTH = 100
MAX_CHARACTERS = 16_000_000
"""A tokenizer takes some hundred bytes of memory for each."""


@dataclass(frozen=True, slots=True)
class Chat:
    """A conversation. `messages`: as OpenAI writes them (role, content, tool_calls, reasoning_content, name,
    tool_call_id); `train` false in one: it is context only. `tools`: descriptions that the chat template may
    show.
    """

    messages: tuple[dict[str, Any], ...]
    tools: tuple[dict[str, Any], ...] = ()


@dataclass(frozen=True, slots=True)
class Completion:
    prompt: str
    completion: str


@dataclass(frozen=True, slots=True)
class PlainText:
    text: str


Content = Chat | Completion | PlainText


def content_key(content: Content) -> bytes:
    """A key that is equal for two examples that say the same, whatever file they are in: 32 bytes."""
    fields = {name: value for name in content.__slots__ if (value := getattr(content, name))}
    canonical = json.dumps([type(content).__name__, fields], sort_keys=True, default=str)
    return hashlib.sha256(canonical.encode()).digest()


def check_texts(content: Content) -> None:
    """Checks a content. Raises ExampleProblem for half a character in any text of the content, a text that no
    tokenizer could take at once, and for what is nested so deeply that nobody could have meant it."""
    if isinstance(content, Chat):
        for number, message in enumerate(content.messages, start=1):
            _check(message, f"message {number}")
        _check(content.tools, "a tool description")
    else:
        for name in content.__slots__:
            _check(getattr(content, name), f"the {name}")


def _check(value: Any, place: str, depth: int = 0) -> None:
    if depth > MAX_DEPTH:
        raise ExampleProblem(f"{place} is nested more than {MAX_DEPTH} levels deep.")
    if isinstance(value, str):
        if len(value) > MAX_CHARACTERS:
            raise ExampleProblem(
                f"{place} has {len(value):,} characters, more than the {MAX_CHARACTERS:,} that are tokenised "
                "at once: make several rows of it."
            )
        if not value.isascii() and (found := LONE_SURROGATE.search(value)):
            raise ExampleProblem(
                f"{place} holds {found[0]!r}, half a character: write both halves, or the character itself."
            )
    elif isinstance(value, dict):
        for key, item in value.items():
            _check(key, place, depth + 1)
            _check(item, place, depth + 1)
    elif isinstance(value, list | tuple):
        for item in value:
            _check(item, place, depth + 1)
