"""Conversations as people write them -> messages as OpenAI writes them, which is what templates know.

What is read, alone or mixed:

    {"role": "user", "content": "..."}                      OpenAI; roles may be called as in ShareGPT
    {"from": "human", "value": "..."}                       ShareGPT: human, gpt, system, function_call, ...
    content: [{"type": "text", "text": "..."}, ...]         content in parts, joined as templates join them
    function_call: {"name": ..., "arguments": ...}          OpenAI's older calls, and tools called functions
    "[{\\"role\\": ...}]"                                     any of these as JSON text (in CSV, for example)
    {"role": ["user", ...], "content": ["...", ...]}        turned inside out, as `datasets` stores sequences
    weight, loss, train: 0 | false                          turns that are read and not trained on

What comes out has `role` (system, developer, user, assistant, tool), `content`, and where the example says so
`tool_calls`, `reasoning_content`, `name`, `tool_call_id`, and `train` (bool). Every other key of a message is
kept as it is, for the template. What cannot be said in these words is a ExampleProblem, never left out.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from qlora_train.data.arrow_tables import without_nulls
from qlora_train.data.json_tables import parse_json
from qlora_train.data.tables import ExampleProblem, type_name

Message = dict[str, Any]

SYSTEM_ROLES = ("system", "developer")
_ROLES = {
    **{role: role for role in SYSTEM_ROLES},
    **dict.fromkeys(("user", "human"), "user"),
    **dict.fromkeys(("assistant", "gpt", "chatgpt", "bot", "model", "bing", "bard"), "assistant"),
    **dict.fromkeys(("tool", "function", "observation", "function_response", "tool_response"), "tool"),
}
_CALLS = ("function_call", "tool_call")
_ROLES_IN_WORDS = "system, user, assistant, tool (ShareGPT: system, human, gpt, function_call, observation)"
_FLAGS = ("train", "loss", "weight", "training")
_TEXT_PARTS = ("text", "input_text", "output_text")


def read_messages(value: Any, place: str) -> list[Message]:
    """The messages of a column's value. place: what to call it. Raises ExampleProblem."""
    value = decoded(value, place)
    if isinstance(value, dict):
        value = _turned_outside_in(value, place)
    if not isinstance(value, list):
        raise ExampleProblem(f"{place} are {type_name(value)}, not a list of objects with role and content.")
    if not value:
        raise ExampleProblem(f"{place}: the list of messages is empty.")
    return [_message(message, number) for number, message in enumerate(value, start=1)]


def read_history(value: Any) -> list[Message]:
    """The messages of earlier turns: pairs of question and answer (as LLaMA-Factory has them), or
    messages."""
    value = decoded(value, "the column 'history'") if value not in (None, "") else []
    if not isinstance(value, list):
        raise ExampleProblem(f"the column 'history' is {type_name(value)}, not a list of pairs.")
    if all(isinstance(pair, dict) for pair in value):
        return [_message(message, number) for number, message in enumerate(value, start=1)]
    messages: list[Message] = []
    for pair in value:
        if not (isinstance(pair, list) and len(pair) == 2 and all(isinstance(text, str) for text in pair)):
            raise ExampleProblem("the column 'history' is not a list of [question, answer] pairs.")
        messages += [{"role": "user", "content": pair[0]}, {"role": "assistant", "content": pair[1]}]
    return messages


def read_tools(value: Any, place: str) -> list[dict[str, Any]]:
    """Tool descriptions: a list of objects, or (where one column must hold tools of all kinds) that list as
    JSON text. OpenAI's older `functions` get the wrapping that templates look for."""
    tools = decoded(value, place) if value not in (None, "") else []
    if isinstance(tools, dict):
        tools = [tools]
    if not isinstance(tools, list):
        raise ExampleProblem(f"{place} is not a list of objects (tool descriptions).")
    tools = [parse_json(tool) if isinstance(tool, str) and tool.startswith("{") else tool for tool in tools]
    if not all(isinstance(tool, dict) for tool in tools):
        raise ExampleProblem(f"{place} is not a list of objects (tool descriptions).")
    is_bare = ["function" not in tool and "name" in tool and "type" not in tool for tool in tools]
    return [
        {"type": "function", "function": tool} if bare else tool
        for tool, bare in zip(tools, is_bare, strict=True)
    ]


def looks_like_messages(value: Any) -> bool:
    """Whether a value is a conversation rather than a text."""
    if isinstance(value, str) and value.lstrip().startswith("[{"):
        try:
            value = parse_json(value)
        except ExampleProblem:
            return False
        return bool(value) and isinstance(value[0], dict) and bool({"role", "from"} & set(value[0]))
    return isinstance(value, list | dict)


def decoded(value: Any, place: str) -> Any:
    """The value, which may be written as JSON text."""
    if not isinstance(value, str):
        return value
    text = value.strip()
    if not text.startswith(("[", "{")):
        raise ExampleProblem(f"{place} is text, and no JSON: a list of objects is needed.")
    try:
        return parse_json(text)
    except ExampleProblem as problem:
        hint = " It looks like Python's own notation; write it with json.dumps." if "{'" in text else ""
        what = str(problem).removeprefix("is ").rstrip(".")
        raise ExampleProblem(f"{place} is text, but {what}.{hint}") from problem


def _turned_outside_in(value: Mapping[str, Any], place: str) -> Any:
    """{"role": [a, b], "content": [c, d]} -> [{"role": a, "content": c}, ...]; one message -> [message]."""
    if isinstance(value.get("role", value.get("from")), str):
        return [value]
    if all(isinstance(item, list) for item in value.values()) and value:
        lengths = {len(item) for item in value.values()}
        if len(lengths) == 1:
            examples = zip(*value.values(), strict=True)
            return [without_nulls(dict(zip(value, example, strict=True))) for example in examples]
    raise ExampleProblem(f"{place} are an object, not a list of objects with role and content.")


def _message(message: Any, number: int) -> Message:
    if not isinstance(message, dict):
        raise ExampleProblem(
            f"message {number} is {type_name(message)}, not an object with role and content."
        )
    said = _without_unset_keys(message)
    role, content = _role_and_content(said, number)
    read: Message = {"role": role}
    if content is not None:
        read["content"] = content
    read |= said
    if role == "assistant" and "thinking" in read and "reasoning_content" not in read:
        read["reasoning_content"] = read.pop("thinking")
    if not read.get("tool_calls"):
        read.pop("tool_calls", None)
    _check_content(read, number)
    return read


def _without_unset_keys(message: Message) -> Message:
    """The message without keys that are null, in itself and its calls; what a call's arguments say is
    kept."""
    said = _set(message)
    if isinstance(calls := said.get("tool_calls"), list):
        said["tool_calls"] = [
            {k: _set(v) if k == "function" else v for k, v in _set(call).items()}
            if isinstance(call, dict)
            else call
            for call in calls
        ]
    return said


def _set(keys: Any) -> Any:
    """An object without the keys that are null; what is no object, as it is."""
    return {k: v for k, v in keys.items() if v is not None} if isinstance(keys, dict) else keys


def _role_and_content(said: Message, number: int) -> tuple[str, Any]:
    """Takes role and content out of `said`, whatever they are called there; calls become `tool_calls`, flags
    `train`."""
    for key, other in (("role", "from"), ("content", "value")):
        if key in said and other in said:
            raise ExampleProblem(f"message {number} has both {key!r} and {other!r}.")
    name = said.pop("role", said.pop("from", None))
    content = said.pop("content", said.pop("value", None))
    if name is None and said:
        known = ", ".join(map(repr, said))
        raise ExampleProblem(
            f"message {number} has no role (it has {known}): it needs role and content, or from and value."
        )
    if isinstance(name, str) and name.lower() in _CALLS:
        said["tool_calls"], name, content = _calls(content, number), "assistant", ""
    elif isinstance(call := said.get("function_call"), dict | str) and call:
        said["tool_calls"] = _calls(said.pop("function_call"), number)
    role = _ROLES.get(name.lower()) if isinstance(name, str) else None
    if role is None:
        raise ExampleProblem(f"message {number} has the role {name!r}; roles are {_ROLES_IN_WORDS}.")
    _read_flags(said, number)
    if isinstance(content, list):
        content = _joined_parts(content, said, number)
    return role, content


def _read_flags(said: Message, number: int) -> None:
    flags = {flag: said.pop(flag) for flag in _FLAGS if flag in said}
    for flag, value in flags.items():
        if value not in (0, 1):
            raise ExampleProblem(
                f"message {number} has the {flag} {value!r}; a {flag} is 0 or false (no loss), 1 or true."
            )
    if len(set(map(bool, flags.values()))) > 1:
        raise ExampleProblem(f"message {number} contradicts itself: {flags}.")
    if flags:
        said["train"] = bool(next(iter(flags.values())))


def _calls(value: Any, number: int) -> list[dict[str, Any]]:
    """One call, or several, as OpenAI writes them. Arguments stay as they are: text or an object."""
    calls = decoded(value, f"the call in message {number}")
    calls = calls if isinstance(calls, list) else [calls]
    for call in calls:
        if not isinstance(call, dict) or not isinstance(call.get("name"), str):
            raise ExampleProblem(f"message {number} holds a call without a name.")
    return [{"type": "function", "function": call} for call in calls]


def _joined_parts(parts: list[Any], said: Message, number: int) -> str:
    """Text parts one after another, as templates write them; a thought goes to `reasoning_content`."""
    texts: list[str] = []
    for part in parts:
        part = {"type": "text", "text": part} if isinstance(part, str) else part
        if not isinstance(part, dict):
            raise ExampleProblem(f"the content of message {number} holds {type_name(part)}, not a text part.")
        kind = part.get("type", "text")
        if kind in _TEXT_PARTS and isinstance(part.get("text"), str):
            texts.append(part["text"])
        elif kind == "thinking" and isinstance(part.get("thinking"), str):
            said["reasoning_content"] = said.get("reasoning_content", "") + part["thinking"]
        else:
            raise ExampleProblem(
                f"the content of message {number} holds a part of type {kind!r}; only text can be trained on."
            )
    return "".join(texts)


def _check_content(message: Message, number: int) -> None:
    role, content = message["role"], message.get("content")
    if content is None and role == "assistant" and "tool_calls" in message:
        return
    if not isinstance(content, str):
        raise ExampleProblem(f"the content of message {number} is {type_name(content)}, not a string.")
    may_be_empty = role in (*SYSTEM_ROLES, "tool") or "tool_calls" in message or message.get("train") is False
    if not may_be_empty and (not content or content.isspace()):
        raise ExampleProblem(f"the content of message {number} ({role}) is empty.")
