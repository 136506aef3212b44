"""Settings to paste for data that were not read as meant, with the data's own column names."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Collection, Mapping

from qlora_train.data.tables import ExampleTable, type_name
from qlora_train.recipe.checks import COLUMN_ROLES

_CALLED = {
    "instruction": "prompt question instruction query problem input inputs mr article document dialogue",
    "input": "context input passage article document",
    "output": "completion answer response output outputs reply solution generated_solution target targets "
    "summary highlights ref answers",
    "system": "system system_prompt system_message",
}
"""What people call the columns of the roles of `alpaca`, in small letters; the first ones are the surest."""
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
        return (
            "These are preferences: map `chosen` (the good answers) only, `rejected` is then not read:\n  "
            f"in the recipe, below data:  columns: {_as_yaml(_of_preferences(table))}"
        )
    if any(pair <= columns for pair in ({"role", "content"}, {"from", "value"}, {"role", "text"})):
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
        answer = _called("output", table.columns)
        lists = [answer] if answer else [c for c in table.columns if isinstance(table.first_value(c), list)]
        if len(lists) == 1:
            kind = type_name(table.first_value(lists[0]))
            return (
                f"The column {lists[0]!r} holds {kind} that no format reads: make it the text of the answer, "
                "or a list of messages {role: ..., content: ...}."
            )
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
    answer = _called("output", list(values))
    if answer and answer not in texts:
        return None
    if prompt_columns:
        answer = answer or (texts[0] if len(texts) == 1 else None)
        return ("prompt_completion", {"completion": answer}) if answer else None
    question = _called("instruction", texts)
    if len(texts) == 2:  # one name tells the other
        question = question or next(name for name in texts if name != answer)
        answer = answer or next(name for name in texts if name != question)
    if question and answer:
        return _pair(question, answer, texts)
    chats = [name for name, value in values.items() if _first_keys(value) & {"role", "from"}]
    if len(chats) == 1:
        return "messages", {"messages": chats[0]}
    return ("text", {"text": texts[0]}) if len(texts) == len(values) == 1 else None


def _pair(question: str, answer: str, texts: Collection[str]) -> tuple[str, dict[str, str]]:
    """The format of questions and answers, and its columns. texts: columns of text, of which another may
    belong to the question, which a bare prompt has no place for."""
    others = [name for name in texts if name not in (question, answer)]
    columns = {"instruction": question, "input": _called("input", others), "output": answer}
    columns["system"] = _called("system", others)
    if columns["input"] is None and columns["system"] is None:
        return "prompt_completion", {"prompt": question, "completion": answer}
    return "alpaca", {role: name for role, name in columns.items() if name is not None}


def _of_preferences(table: ExampleTable) -> dict[str, str]:
    """The columns of preferences without the bad answers."""
    if not isinstance(table.first_value("chosen"), str):
        return {"messages": "chosen"}
    texts = [name for name in table.columns if isinstance(table.first_value(name), str)]
    question = _called("instruction", texts)
    return _pair(question, "chosen", texts)[1] if question else {"text": "chosen"}


def _called(role: str, names: Collection[str]) -> str | None:
    """The name that a column of this role most likely has."""
    words = _CALLED[role].split()
    return next((name for word in words for name in names if name.strip().lower() == word), None)


def _first_keys(value: object) -> set[str]:
    """The keys of the first object in a list; none for anything else."""
    return set(value[0]) if isinstance(value, list) and value and isinstance(value[0], dict) else set()


def _as_yaml(columns: Mapping[str, str | None]) -> str:
    """A mapping on one line."""

    def name(column: str | None) -> str:
        is_plain = column is not None and _PLAIN.fullmatch(column)
        return str(column) if is_plain else json.dumps(column, ensure_ascii=False)

    return "{" + ", ".join(f"{role}: {name(column)}" for role, column in columns.items()) + "}"
