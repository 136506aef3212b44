"""Settings to paste for data that were not read as meant, with the data's own column names."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Collection, Mapping

from qlora_train.data.tables import ExampleTable
from qlora_train.recipe.checks import COLUMN_ROLES

_QUESTIONS = ("prompt", "question", "instruction", "query", "input", "mr")
_ANSWERS = ("completion", "answer", "response", "output", "reply", "target", "ref")
"""What people call the two columns of a pair, in small letters; the first ones are the surest."""
_PLAIN = re.compile(r"(?!(?:true|false|null)$)[^\W\d]\w*", re.IGNORECASE)


def override(format_name: str, columns: Mapping[str, str | None]) -> str:
    """The format and its columns as a command line sets them."""
    return f"data.format={format_name} {shlex.quote('data.columns=' + _as_yaml(columns))}"


def chats_of_pairs(columns: Mapping[str, str | None]) -> str:
    """The override that makes chats of prompts and completions. columns: as `data.columns` maps them."""
    pair = {
        "instruction": columns.get("prompt", "prompt"),
        "output": columns.get("completion", "completion"),
    }
    others = {role: column for role, column in columns.items() if role not in ("prompt", "completion")}
    return override("alpaca", {**pair, **others})


def known_form(table: ExampleTable) -> str | None:
    """What the rows are and what to make of them, where their columns are those of a known form that is not
    read."""
    columns = set(table.columns)
    if {"chosen", "rejected"} <= columns:
        return "These are preferences: map `chosen` (the good answers) only, `rejected` is then not read."
    if {"role", "content"} <= columns or {"from", "value"} <= columns:
        return "These are single messages: a row holds a whole conversation, as {messages: [...]}."
    if {"mapping", "current_node"} <= columns:
        return (
            "This is ChatGPT's export, where `mapping` is a tree of messages: make each conversation a row "
            "{messages: [{role, content}, ...]}, of the messages from the root to `current_node`."
        )
    if "contents" in columns and _first_keys(table.first_value("contents")) >= {"parts"}:
        return "These are Gemini's contents: rename `contents` to messages, and `parts` in them to content."
    return None


def mapping(table: ExampleTable, prompt_columns: Collection[str]) -> str:
    """How to map the columns of a table that no format fits, to be pasted where they tell. prompt_columns: of
    the prompt template; empty where there is none."""
    found = _mapped(table, prompt_columns)
    if found is None:
        return (
            f"Set data.format to one of {', '.join(COLUMN_ROLES)} and map its roles: "
            "data.columns: {prompt: <column>, completion: <column>}, for example."
        )
    name, columns = found
    lines = [
        "Say what they are, if this is what you mean:",
        f"in the recipe, below data:  columns: {_as_yaml(columns)}",
        f"or on the command line:     {override(name, columns)}",
    ]
    if "prompt" in columns:
        lines.append(f"or by a chat template:      {chats_of_pairs(columns)}")
    return "\n  ".join(lines)


def _mapped(table: ExampleTable, prompt_columns: Collection[str]) -> tuple[str, dict[str, str]] | None:
    """The format that a table's columns most likely are, and its columns; None where nothing tells."""
    values = {name: table.first_value(name) for name in table.columns if name not in prompt_columns}
    texts = [name for name, value in values.items() if isinstance(value, str)]
    answer = _called(_ANSWERS, texts)
    if prompt_columns:
        answer = answer or (texts[0] if len(texts) == 1 else None)
        return ("prompt_completion", {"completion": answer}) if answer else None
    question = _called(_QUESTIONS, texts)
    if len(texts) == 2:  # one name tells the other
        question = question or next(name for name in texts if name != answer)
        answer = answer or next(name for name in texts if name != question)
    if question and answer:
        return "prompt_completion", {"prompt": question, "completion": answer}
    chats = [name for name, value in values.items() if _first_keys(value) & {"role", "from"}]
    if len(chats) == 1:
        return "messages", {"messages": chats[0]}
    return ("text", {"text": texts[0]}) if len(texts) == len(values) == 1 else None


def _called(known: Collection[str], names: Collection[str]) -> str | None:
    """The first of the names that is a known one, in the order of these."""
    return next((name for word in known for name in names if name.strip().lower() == word), None)


def _first_keys(value: object) -> set[str]:
    """The keys of the first object in a list; none for anything else."""
    return set(value[0]) if isinstance(value, list) and value and isinstance(value[0], dict) else set()


def _as_yaml(columns: Mapping[str, str | None]) -> str:
    """A mapping on one line."""

    def name(column: str | None) -> str:
        is_plain = column is not None and _PLAIN.fullmatch(column)
        return str(column) if is_plain else json.dumps(column, ensure_ascii=False)

    return "{" + ", ".join(f"{role}: {name(column)}" for role, column in columns.items()) + "}"
