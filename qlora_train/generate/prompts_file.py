"""Reads prompts from a file: a line of text each, or JSON lines, which may hold whole conversations."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from qlora_train.errors import DataError

Messages = Sequence[Mapping[str, str]]
"""A conversation: {"role", "content"} each."""
_REMEDY = 'Write {"prompt": "..."} or {"messages": [{"role": "user", "content": "..."}]} on every line.'


def read_prompts(file: Path) -> list[str | Messages]:
    """The prompts of a file. `.jsonl`: an object with `prompt` or `messages` on each line; any other: each
    line that is not empty is a prompt. Raises `DataError` where a line is none, with its number."""
    try:
        lines = file.read_text(encoding="utf-8").split("\n")  # splitlines ends a line at U+2028, too
    except UnicodeDecodeError as error:
        raise DataError(f"{file}: is no UTF-8 text ({error}).") from error
    prompts: list[str | Messages] = []
    for number, line in enumerate(lines, 1):
        if line.strip():
            prompts.append(_parsed(line, f"{file}, line {number}") if file.suffix == ".jsonl" else line)
    if not prompts:
        raise DataError(f"{file}: holds no prompts.")
    return prompts


def _parsed(line: str, where: str) -> str | Messages:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: is no JSON ({error}). {_REMEDY}") from error
    if not isinstance(row, dict) or ("prompt" in row) == ("messages" in row):
        raise DataError(f"{where}: {_REMEDY}")
    if isinstance(prompt := row.get("prompt"), str):
        return prompt
    messages = row.get("messages")
    if not isinstance(messages, list) or not messages or not all(map(_is_message, messages)):
        raise DataError(f"{where}: {_REMEDY}")
    if messages[-1]["role"] == "assistant":
        raise DataError(f"{where}: ends with an answer. End with the message that is to be answered.")
    return [{"role": message["role"], "content": message["content"]} for message in messages]


def _is_message(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(value.get(key), str) for key in ("role", "content"))
