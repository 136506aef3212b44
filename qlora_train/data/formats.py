"""The meaning of an example's columns: messages, sharegpt, alpaca, prompt_completion or text.

A format is a set of *roles* (instruction, completion, ...); `data.columns` maps a role to a column, an
unmapped role is the column of its own name, and an optional role that is mapped to null is not read. `auto`
takes the one format whose needed roles the table has. An example becomes one of three contents, and
everything behind this file knows only those:

    messages           messages; or prompt and completion that hold messages      -> Chat
    sharegpt           conversations                                              -> Chat
    alpaca             instruction, output (input, history)                       -> Chat
    prompt_completion  prompt, completion                                         -> Completion
    text               text                                                       -> PlainText

Read where a table has them, with every chat: `system` (the first message), `tools` or `functions`. With
every format but text: `label`; an example whose label is false (KTO) shows a bad answer and is left out. How
messages may be written is in `conversations`. Without `prompt_template` a prompt is followed by its
completion exactly as the two columns are: no space or line is put between them, because for the model that
is a different text. To get a line, say

    prompt_template: "{question}\\n"
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from string import Formatter
from typing import TYPE_CHECKING, Any

from qlora_train.data.column_advice import known_form, mapping
from qlora_train.data.content import Chat, Completion, Content, PlainText, check_texts
from qlora_train.data.conversations import (
    SYSTEM_ROLES,
    Message,
    looks_like_messages,
    read_history,
    read_messages,
    read_tools,
)
from qlora_train.data.tables import Example, ExampleProblem, ExampleTable, listed, type_name
from qlora_train.errors import DataError
from qlora_train.recipe.checks import COLUMN_ROLES as ROLES
from qlora_train.recipe.checks import OPTIONAL_ROLES

if TYPE_CHECKING:
    from qlora_train.recipe import DataSection

CHAT_FORMATS = frozenset({"messages", "sharegpt", "alpaca"})
_MESSAGE_COLUMNS = {"messages": "messages", "sharegpt": "conversations"}
_LABELS = {"true": True, "false": False}


class EmptyExample(Exception):
    """An example that says nothing at all (a blank line, the end of a spreadsheet): skipped and counted."""


class RejectedExample(Exception):
    """An example whose label says that its answer is a bad one."""


class PromptTemplate:
    """A prompt template, like `"Describe: {mr}\\n"`: literal text and column names; `{{` and `}}` are
    braces."""

    def __init__(self, template: str) -> None:
        try:
            parts = list(Formatter().parse(template))
        except ValueError as error:
            raise DataError(f"data.prompt_template: {error} (write {{{{ and }}}} for braces).") from error
        if any(spec or conversion or name == "" for _, name, spec, conversion in parts):
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
class ExampleFormat:
    """A format with its columns found: `columns` maps its roles to column names; optional roles may have
    columns that only later examples have, or none."""

    name: str
    columns: Mapping[str, str]
    template: PromptTemplate | None = None
    label_is_asked_for: bool = False

    @cached_property
    def columns_read(self) -> tuple[str, ...]:
        """The columns that an example's meaning may depend on."""
        template = self.template.columns if self.template else ()
        return tuple(dict.fromkeys([*self.columns.values(), *template]))

    def read(self, example: Example) -> Content:
        """The content of an example. Raises ExampleProblem for an example that lacks a column or holds what
        cannot be used there, EmptyExample and RejectedExample for an example that is left out."""
        if all(_is_blank(example.get(column)) for column in self._said_columns):
            if any(column in example for column in self._said_columns):
                raise EmptyExample
        elif self._is_rejected(example):
            raise RejectedExample
        content = self._read(example)
        check_texts(content)
        return content

    @cached_property
    def _said_columns(self) -> tuple[str, ...]:
        label = self.columns.get("label")
        return tuple(column for column in self.columns_read if column != label)

    def _read(self, example: Example) -> Content:
        if self.name == "text":
            return PlainText(_text(example, self.columns["text"]))
        if self.name == "prompt_completion":
            return Completion(self._prompt(example), _text(example, self.columns["completion"]))
        messages = self._alpaca(example) if self.name == "alpaca" else self._messages(example)
        return Chat(tuple(self._with_system(example, messages)), tuple(self._tools(example)))

    def _messages(self, example: Example) -> list[Message]:
        column = self.columns.get(_MESSAGE_COLUMNS.get(self.name, ""))
        if column is not None:
            return read_messages(_value(example, column), f"the column {column!r}: its messages")
        prompt = _as_messages(example, self.columns["prompt"], "user")
        said = _as_messages(example, self.columns["completion"], "assistant")
        # Only the completion is an answer: what the assistant says in the prompt is context.
        before = [{**m, "train": False} if m["role"] == "assistant" else m for m in prompt]
        return [*before, *said]

    def _alpaca(self, example: Example) -> list[Message]:
        instruction = _optional_text(example, self.columns["instruction"])
        extra = _optional_text(example, self.columns.get("input"))
        question = "\n\n".join(part for part in (instruction, extra) if not _is_blank(part))
        if not question:
            raise ExampleProblem(f"the column {self.columns['instruction']!r} is empty.")
        answer = _text(example, self.columns["output"])
        history = read_history(example.get(self.columns.get("history", "")))
        return [*history, {"role": "user", "content": question}, {"role": "assistant", "content": answer}]

    def _with_system(self, example: Example, messages: list[Message]) -> list[Message]:
        column = self.columns.get("system")
        system = _optional_text(example, column)
        if not system or system.isspace():
            return messages
        first = messages[0]
        if first["role"] not in SYSTEM_ROLES:
            return [{"role": "system", "content": system}, *messages]
        if first["content"] != system:
            raise ExampleProblem(
                f"the column {column!r} and the first message are two different system prompts."
            )
        return messages

    def _tools(self, example: Example) -> list[dict[str, Any]]:
        columns = [self.columns[role] for role in ("tools", "functions") if role in self.columns]
        filled = [column for column in columns if example.get(column) not in (None, "", [])]
        if len(filled) > 1:
            raise ExampleProblem(f"both {filled[0]!r} and {filled[1]!r} describe tools.")
        return read_tools(example[filled[0]], f"the column {filled[0]!r}") if filled else []

    def _is_rejected(self, example: Example) -> bool:
        column = self.columns.get("label")
        value = example.get(column) if column else None
        if value is None:
            return False
        if isinstance(value, str):
            value = _LABELS.get(value.strip().lower(), value.strip())
        if isinstance(value, bool):
            return not value
        if self.label_is_asked_for and str(value) in ("0", "1"):
            return str(value) == "0"
        if self.label_is_asked_for or str(value) not in ("0", "1"):
            raise ExampleProblem(f"the column {column!r} holds {value!r}; a label is true or false, 1 or 0.")
        raise ExampleProblem(
            f"the column {column!r} holds {value!r}: if 0 marks bad answers, write data.columns: {{label: "
            f"{column}}}, and they are left out; if it marks anything else, data.columns: {{label: null}}."
        )

    def _prompt(self, example: Example) -> str:
        if self.template is None:
            return _text(example, self.columns["prompt"])
        names = self.template.columns
        return self.template.fill({name: _text(example, name, may_be_empty=True) for name in names})


def resolve_format(data: DataSection, table: ExampleTable) -> ExampleFormat:
    """Finds the format of one table. Raises DataError: none or several fit, unknown roles or columns."""
    template = PromptTemplate(data.prompt_template) if data.prompt_template is not None else None
    _check_head(table)
    mapped = {role: column for role, column in data.columns.items() if column is not None}
    _check_roles(data)
    _check_mapped_columns(mapped, template, table)
    name = data.format if data.format != "auto" else _detect(mapped, template, table)
    if template is not None and name != "prompt_completion":
        raise DataError(
            f"data.prompt_template is for data.format prompt_completion, but the format is {name}."
        )
    if name in ("prompt_completion", "messages"):
        name = _text_or_messages(name, mapped, template, table)
    columns = {role: mapped.get(role, role) for role in _roles_of(name, mapped, table)}
    columns = {role: column for role, column in columns.items() if data.columns.get(role, "") is not None}
    if "label" in columns and "label" not in mapped and not _is_label(table.first_value("label")):
        columns.pop("label")
    missing = [c for role, c in columns.items() if c not in table.columns and _is_needed(role, template)]
    if missing:
        raise DataError(
            f"{table.first_example}: there is no column {missing[0]!r}, which the format {name} needs. "
            f"{_found(table)} Map it: data.columns: {{{_role_of(columns, missing[0])}: <column>}}."
        )
    if template is not None:  # the template makes the prompt
        columns.pop("prompt", None)
    return ExampleFormat(name, columns, template, label_is_asked_for="label" in mapped)


def _roles_of(name: str, mapped: Mapping[str, str], table: ExampleTable) -> tuple[str, ...]:
    """The roles of a format. Of messages there are two kinds: one column of them, or prompt and completion
    that hold them."""
    if name != "messages":
        return ROLES[name]
    in_one_column = mapped.get("messages", "messages") in table.columns or not _has_pair(mapped, table)
    left_out = ("prompt", "completion") if in_one_column else ("messages",)
    return tuple(role for role in ROLES[name] if role not in left_out)


def _has_pair(mapped: Mapping[str, str], table: ExampleTable) -> bool:
    return all(mapped.get(role, role) in table.columns for role in ("prompt", "completion"))


def _is_label(value: Any) -> bool:
    """Whether the values of a column called `label` may tell good answers from bad ones (or are unknown)."""
    return value is None or str(value).strip().lower() in (*_LABELS, "0", "1")


def _text_or_messages(
    name: str, mapped: Mapping[str, str], template: PromptTemplate | None, table: ExampleTable
) -> str:
    """The format's name: `messages` where prompt or completion are conversations, whatever they were
    called."""
    if name == "messages" or template is not None or not _has_pair(mapped, table):
        return name
    values = [table.first_value(mapped.get(role, role)) for role in ("prompt", "completion")]
    return "messages" if any(map(looks_like_messages, values)) else name


def _check_head(table: ExampleTable) -> None:
    """Checks the first batch: where not one of the first examples can be parsed, what is wrong with the first
    tells more than a format that does not fit."""
    if not table.columns:
        number, problem = next(iter(table.head), (1, "has no columns."))
        raise DataError(
            f"{table.describe(number)} {problem if isinstance(problem, ExampleProblem) else 'is empty.'}"
        )


def _check_roles(data: DataSection) -> None:
    of_any = sorted({role for roles in ROLES.values() for role in roles})
    known = of_any if data.format == "auto" else ROLES[data.format]
    if unknown := [role for role in data.columns if role not in known]:
        raise DataError(
            f"data.columns: unknown role {unknown[0]!r} for format {data.format}; roles: {', '.join(known)}."
        )


def _check_mapped_columns(
    columns: Mapping[str, str], template: PromptTemplate | None, table: ExampleTable
) -> None:
    for role, column in columns.items():
        if column not in table.columns:
            raise DataError(
                f"{table.first_example}: data.columns maps {role} to {column!r}, which is no column. "
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
                f"{table.first_example}: data.prompt_template names {{{column}}}, which is no column. "
                f"{_found(table)}"
            )


def _detect(columns: Mapping[str, str], template: PromptTemplate | None, table: ExampleTable) -> str:
    # Prompts and completions that hold messages are found as prompt_completion, and told apart later.
    roles_of = {name: set(roles) - {"prompt", "completion"} for name, roles in ROLES.items()}
    roles_of["prompt_completion"] = set(ROLES["prompt_completion"])
    fitting = [
        name
        for name, roles in roles_of.items()
        if set(columns) <= roles
        and (template is None or name == "prompt_completion")
        and all(columns.get(role, role) in table.columns for role in roles if _is_needed(role, template))
    ]
    if len(fitting) > 1:
        settings = " or ".join(f"data.format={name}" for name in fitting)
        problem = f"several formats fit. {_found(table)} Set {settings}."
    elif fitting and (fitting != ["text"] or columns or "role" not in table.columns):  # messages are no texts
        return fitting[0]
    else:
        advice = known_form(table) or mapping(table, template.columns if template else ())
        problem = f"no format fits. {_found(table)} {advice}"
    raise DataError(f"{table.name}: data.format is auto, but {problem}")


def _is_needed(role: str, template: PromptTemplate | None) -> bool:
    return role not in OPTIONAL_ROLES and not (role == "prompt" and template is not None)


def _role_of(columns: Mapping[str, str], column: str) -> str:
    return next(role for role, name in columns.items() if name == column)


def _found(table: ExampleTable) -> str:
    where = "" if table.rows_under is None else f" in the rows under {table.rows_under!r}"
    return f"Columns found{where}: {listed(table.columns)}."


def _value(example: Example, column: str) -> Any:
    if column not in example:
        raise ExampleProblem(f"there is no column {column!r} in this row (it has {listed(example)}).")
    if example[column] is None:
        raise ExampleProblem(f"the column {column!r} is null.")
    return example[column]


def _text(example: Example, column: str, may_be_empty: bool = False) -> str:
    value = _value(example, column)
    if not isinstance(value, str):
        raise ExampleProblem(f"the column {column!r} is {type_name(value)}, not a string.")
    if not may_be_empty and _is_blank(value):
        raise ExampleProblem(f"the column {column!r} is empty.")
    return value


def _optional_text(example: Example, column: str | None) -> str:
    """The text of a column that may be empty, null or not there."""
    value = example.get(column) if column else None
    if value is not None and not isinstance(value, str):
        raise ExampleProblem(f"the column {column!r} is {type_name(value)}, not a string.")
    return value or ""


def _as_messages(example: Example, column: str, role: str) -> list[Message]:
    """The messages of a column; of a text, one message."""
    value = _value(example, column)
    if isinstance(value, str) and not looks_like_messages(value):
        return [{"role": role, "content": _text(example, column)}]
    return read_messages(value, f"the column {column!r}: its messages")


def _is_blank(value: Any) -> bool:
    return value is None or (isinstance(value, str) and (not value or value.isspace()))
