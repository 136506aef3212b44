"""What the columns of a row mean: messages, alpaca, prompt_completion or text.

A format is a set of *roles* (instruction, completion, ...); `data.columns` maps a role to a column, an
unmapped role is the column of its own name. `auto` takes the one format whose roles the table has. A row
becomes one of three contents, and everything behind this file knows only those:

    messages           {"messages": [{"role": "user", "content": ...}, ...]}    -> Chat
    alpaca             instruction, input (may be empty or absent), output      -> Chat: a user, an assistant
    prompt_completion  prompt, completion                                       -> Completion
    text               text                                                     -> PlainText

Beside `messages`, a column `tools` goes to the chat template; an assistant message with "train": false,
"loss": false or "weight": 0 has no loss. Without `prompt_template` a prompt is followed by its completion
exactly as the two columns are: no space or line is put between them, because for the model that is a
different text. To get a line, say

    prompt_template: "{question}\\n"
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from string import Formatter
from typing import TYPE_CHECKING, Any, NamedTuple

from qlora_train.data.tables import HubTable, Origin, ParquetTable, Row, RowProblems, RowTable, type_name
from qlora_train.errors import DataError
from qlora_train.recipe_checks import COLUMN_ROLES as ROLES

if TYPE_CHECKING:
    from qlora_train.recipe import DataSection

CHAT_FORMATS = frozenset({"messages", "alpaca"})
_OPTIONAL = {"input"}
# JSON can spell halves of characters ("\ud83d" without its other half); no tokenizer takes them.
LONE_SURROGATE = re.compile("[\ud800-\udfff]")
_SPEAKERS = ("system", "user", "assistant", "tool")
_FLAGS = ("train", "training", "loss", "weight")


@dataclass(frozen=True, slots=True)
class Chat:
    """`messages`: as OpenAI writes them (role, content, tool_calls, reasoning_content, name, tool_call_id);
    `train` false in one: it is context only. `tools`: descriptions that the chat template may show.
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


class Example(NamedTuple):
    origin: Origin
    content: Content


class _RowProblem(Exception):
    """A row that cannot be used; caught where rows are read, never seen outside."""


def content_key(content: Content) -> bytes:
    """Equal for two rows that say the same, whatever file they are in."""
    fields = {name: value for name, value in asdict(content).items() if value}
    canonical = json.dumps([type(content).__name__, fields], sort_keys=True, default=str)
    return hashlib.sha256(canonical.encode()).digest()


class PromptTemplate:
    """`"Describe: {mr}\\n"`: literal text and column names; `{{` and `}}` are braces."""

    def __init__(self, template: str) -> None:
        try:
            parts = list(Formatter().parse(template))
        except ValueError as error:
            raise DataError(f"data.prompt_template: {error} (write {{{{ and }}}} for braces).") from error
        if any(spec or conversion for _, _, spec, conversion in parts) or any(
            name == "" for _, name, _, _ in parts
        ):
            raise DataError(
                "data.prompt_template: write plain column names, like {question}, between the braces."
            )
        self._parts = [(literal, name) for literal, name, _, _ in parts]
        self.columns = tuple(dict.fromkeys(name for _, name in self._parts if name is not None))
        if not self.columns:
            raise DataError("data.prompt_template names no column: every prompt would be the same text.")

    def fill(self, values: Mapping[str, str]) -> str:
        return "".join(literal + ("" if name is None else values[name]) for literal, name in self._parts)


@dataclass(frozen=True)
class RowFormat:
    """A format with its columns found: `columns` maps the roles that the table has to column names.
    fills_gaps: the table gives every object every key that any of them has, as null (Arrow does)."""

    name: str
    columns: Mapping[str, str]
    template: PromptTemplate | None = None
    fills_gaps: bool = False

    def read(self, row: Row) -> Content:
        """Raises _RowProblem for a row that lacks a column or holds anything but text there."""
        if self.name == "messages":
            messages = _value(row, self.columns["messages"])
            return _chat(_without_nulls(messages) if self.fills_gaps else messages, row.get("tools"))
        if self.name == "alpaca":
            return self._read_alpaca(row)
        if self.name == "prompt_completion":
            return Completion(self._prompt(row), _text(row, self.columns["completion"]))
        return PlainText(_text(row, self.columns["text"]))

    def _read_alpaca(self, row: Row) -> Chat:
        instruction = _text(row, self.columns["instruction"])
        column = self.columns.get("input")
        extra = row.get(column) if column else None
        if extra is not None and not isinstance(extra, str):
            raise _RowProblem(f"the column {column!r} is {type_name(extra)}, not a string.")
        _check_characters(extra, f"the column {column!r}")
        question = f"{instruction}\n\n{extra}" if extra else instruction
        answer = _text(row, self.columns["output"])
        return Chat(({"role": "user", "content": question}, {"role": "assistant", "content": answer}))

    def _prompt(self, row: Row) -> str:
        if self.template is None:
            return _text(row, self.columns["prompt"])
        return self.template.fill(
            {name: _text(row, name, may_be_empty=True) for name in self.template.columns}
        )


def resolve_format(data: DataSection, table: RowTable) -> RowFormat:
    """Finds the format of one table. Raises DataError: none or several fit, unknown roles or columns."""
    template = PromptTemplate(data.prompt_template) if data.prompt_template is not None else None
    _check_roles(data)
    _check_mapped_columns(data.columns, template, table)
    name = data.format if data.format != "auto" else _detect(data.columns, template, table)
    if template is not None and name != "prompt_completion":
        raise DataError(
            f"data.prompt_template is for data.format prompt_completion, but the format is {name}."
        )
    columns = {role: data.columns.get(role, role) for role in ROLES[name]}
    missing = [c for role, c in columns.items() if c not in table.columns and _is_needed(role, template)]
    if missing:
        raise DataError(
            f"{_first_row(table)}: there is no column {missing[0]!r}, which the format {name} needs. "
            f"{_found(table)} Map it: data.columns: {{{_role_of(columns, missing[0])}: <column>}}."
        )
    found = {role: c for role, c in columns.items() if c in table.columns}
    return RowFormat(name, found, template, fills_gaps=isinstance(table, ParquetTable | HubTable))


def _check_roles(data: DataSection) -> None:
    known = (
        sorted({role for roles in ROLES.values() for role in roles})
        if data.format == "auto"
        else ROLES[data.format]
    )
    unknown = [role for role in data.columns if role not in known]
    if unknown:
        raise DataError(
            f"data.columns: unknown role {unknown[0]!r} for format {data.format}; roles: {', '.join(known)}."
        )


def _check_mapped_columns(
    columns: Mapping[str, str], template: PromptTemplate | None, table: RowTable
) -> None:
    for role, column in columns.items():
        if column not in table.columns:
            raise DataError(
                f"{_first_row(table)}: data.columns maps {role} to {column!r}, which is no column. "
                f"{_found(table)}"
            )
    prompt = columns.get("prompt")
    if template is not None and prompt is not None and prompt not in template.columns:
        raise DataError(
            f"data.columns maps prompt to {prompt!r}, but data.prompt_template, which makes the prompt, "
            f"does not name {{{prompt}}}: name it there, or remove the mapping."
        )
    for column in template.columns if template else ():
        if column not in table.columns:
            raise DataError(
                f"{_first_row(table)}: data.prompt_template names {{{column}}}, which is no column. "
                f"{_found(table)}"
            )


def _detect(columns: Mapping[str, str], template: PromptTemplate | None, table: RowTable) -> str:
    fitting = [
        name
        for name, roles in ROLES.items()
        if set(columns) <= set(roles)
        and (template is None or name == "prompt_completion")
        and all(columns.get(role, role) in table.columns for role in roles if _is_needed(role, template))
    ]
    if len(fitting) == 1:
        return fitting[0]
    problem = f"several formats fit ({', '.join(fitting)})" if fitting else "no format fits"
    raise DataError(
        f"{table.name}: data.format is auto, but {problem}. {_found(table)} Set data.format to one of "
        f"{', '.join(ROLES)} and map its roles, for example "
        "data.columns: {prompt: question, completion: answer}."
    )


def _is_needed(role: str, template: PromptTemplate | None) -> bool:
    return role not in _OPTIONAL and not (role == "prompt" and template is not None)


def _role_of(columns: Mapping[str, str], column: str) -> str:
    return next(role for role, name in columns.items() if name == column)


def _found(table: RowTable) -> str:
    return f"Columns found: {', '.join(table.columns)}."


def _first_row(table: RowTable) -> str:
    index, _ = next(iter(table))
    return table.describe(index)


def read_examples(tables: Sequence[RowTable], data: DataSection) -> list[Example]:
    """All rows of all tables, in order. Raises DataError naming the first rows that cannot be used."""
    problems = RowProblems()
    examples: list[Example] = []
    for table in tables:
        row_format = resolve_format(data, table)
        for index, row in table:
            origin = Origin(table, index)
            try:
                examples.append(Example(origin, row_format.read(row)))
            except _RowProblem as problem:
                problems.add(origin, str(problem))
    problems.raise_if_any()
    return examples


def _value(row: Row, column: str) -> Any:
    if column not in row:
        raise _RowProblem(f"there is no column {column!r} in this row (it has {', '.join(row) or 'none'}).")
    if row[column] is None:
        raise _RowProblem(f"the column {column!r} is null.")
    return row[column]


def _text(row: Row, column: str, may_be_empty: bool = False) -> str:
    value = _value(row, column)
    if not isinstance(value, str):
        raise _RowProblem(f"the column {column!r} is {type_name(value)}, not a string.")
    if not may_be_empty and (not value or value.isspace()):
        raise _RowProblem(f"the column {column!r} is empty.")
    _check_characters(value, f"the column {column!r}")
    return value


def _check_characters(value: Any, place: str) -> None:
    """Of a text, or of all texts in a message."""
    if isinstance(value, str) and (found := LONE_SURROGATE.search(value)):
        raise _RowProblem(
            f"{place} holds {found[0]!r}, half a character: write both halves, or the character itself."
        )
    if isinstance(value, dict | list):
        for item in value.values() if isinstance(value, dict) else value:
            _check_characters(item, place)


def _chat(messages: Any, tools: Any) -> Chat:
    if isinstance(messages, str):
        try:
            messages = json.loads(messages)
        except ValueError as error:
            raise _RowProblem(f"the messages are text, but not valid JSON: {error}.") from error
    if not isinstance(messages, list):
        raise _RowProblem(
            f"the messages are {type_name(messages)}, not a list of objects with role and content."
        )
    if not messages:
        raise _RowProblem("the list of messages is empty.")
    checked = [_message(message, number) for number, message in enumerate(messages, start=1)]
    for number, message in enumerate(checked, start=1):
        _read_flags(message, number)
    return Chat(tuple(checked), _tools(tools))


def _read_flags(message: dict[str, Any], number: int) -> None:
    """`train` from what other trainers call it; flags that say different things are refused."""
    flags = {flag: message.pop(flag) for flag in _FLAGS if flag in message}
    for flag, value in flags.items():
        if value not in (0, 1):  # false and true are these
            raise _RowProblem(
                f"message {number} has the {flag} {value!r}; a {flag} is 0 or false (no loss), 1 or true."
            )
    if len({bool(value) for value in flags.values()}) > 1:
        raise _RowProblem(f"message {number} contradicts itself: {flags}.")
    if flags:
        message["train"] = bool(next(iter(flags.values())))


def _tools(value: Any) -> tuple[dict[str, Any], ...]:
    """A list of objects, or (where one column must hold tools of all kinds) that list as JSON text."""
    if isinstance(value, str) and value:
        try:
            value = json.loads(value)
        except ValueError as error:
            raise _RowProblem(f"the column 'tools' is text, but not valid JSON: {error}.") from error
    value = _without_nulls(value or [])
    if not isinstance(value, list) or not all(isinstance(tool, dict) for tool in value):
        raise _RowProblem("the column 'tools' is not a list of objects (tool descriptions).")
    _check_characters(value, "the column 'tools'")
    return tuple(value)


def _message(message: Any, number: int) -> dict[str, Any]:
    if not isinstance(message, dict):
        raise _RowProblem(f"message {number} is {type_name(message)}, not an object with role and content.")
    _check_characters(message, f"message {number}")
    message = {key: item for key, item in message.items() if item is not None}
    if not message.get("tool_calls"):
        message.pop("tool_calls", None)
    role, content = message.get("role"), message.get("content")
    if role not in _SPEAKERS:
        raise _RowProblem(f"message {number} has the role {role!r}; roles are {', '.join(_SPEAKERS)}.")
    if content is None and role == "assistant" and "tool_calls" in message:
        return message
    if not isinstance(content, str):
        raise _RowProblem(f"the content of message {number} is {type_name(content)}, not a string.")
    may_be_empty = role in ("system", "tool") or "tool_calls" in message
    if not may_be_empty and (not content or content.isspace()):
        raise _RowProblem(f"the content of message {number} ({role}) is empty.")
    return message


def _without_nulls(value: Any) -> Any:
    """Without the keys that are null, at any depth: Arrow gives every object every key that any of them has,
    and templates ask "is the key there".
    """
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value
