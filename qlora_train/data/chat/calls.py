"""Tool calls as a template can show them: arguments as objects or as JSON text, and what is beside a call.

Examples have arguments as objects, or as the JSON text in which OpenAI sends them. Most templates turn
objects into JSON themselves, and would quote a text a second time; some join texts, and fail on an object. A
call that nothing is said beside has an empty content, a null or none at all, and some templates show calls in
one of these cases only. A template is asked once which of them it shows, and examples are written so.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cached_property
from typing import Any

from qlora_train.data.chat.stand_ins import is_blank, stand_in
from qlora_train.data.chat.template import ChatProblem, ChatTemplate, Message
from qlora_train.data.chat.turn_facts import QUESTION, ask, is_shown

_VALUE = stand_in(5)
_ARGUMENTS = {"key": _VALUE}
_BESIDE: dict[str, Message] = {"empty": {"content": ""}, "missing": {}, "null": {"content": None}}


class CallWriter:
    """Writes the calls of messages as one template wants them."""

    def __init__(self, template: ChatTemplate) -> None:
        self._template = template

    def written(self, messages: Sequence[Message]) -> list[Message]:
        """The messages with their calls as the template wants them. Raises ChatProblem for arguments that are
        neither an object nor the JSON text of one."""
        return [
            self._message(message, number) if message.get("tool_calls") else message
            for number, message in enumerate(messages, start=1)
        ]

    def _message(self, message: Message, number: int) -> Message:
        said = message["tool_calls"]
        if not isinstance(said, list | tuple):
            raise ChatProblem(f"the tool_calls of message {number} are not a list")
        calls = [self._call(call, number) for call in said]
        if not is_blank(message.get("content")):
            return {**message, "tool_calls": calls}
        beside = "empty" if "content" in message else "missing"
        if beside not in self._shown:  # where no call is shown, `pieces` says so: no template fails on ""
            beside = next(iter(self._shown), "empty")
        others = {key: value for key, value in message.items() if key != "content"}
        words = _BESIDE[beside] if beside != "empty" else {"content": message.get("content", "")}
        return {**others, **words, "tool_calls": calls}

    def _call(self, call: Any, number: int) -> Any:
        function = call.get("function", call) if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise ChatProblem(f"the tool_calls of message {number} hold a call without a function's name")
        if "arguments" not in function:
            return call
        said = _as_object(function["arguments"], number)
        arguments = _as_text(said) if self._as_text else said
        changed = {**function, "arguments": arguments}
        return {**call, "function": changed} if "function" in call else changed

    @cached_property
    def _as_text(self) -> bool:
        return not self._beside_shown(_ARGUMENTS) and bool(self._beside_shown(_as_text(_ARGUMENTS)))

    @cached_property
    def _shown(self) -> list[str]:
        """The keys of `_BESIDE` with which the template shows a call."""
        return self._beside_shown(_as_text(_ARGUMENTS) if self._as_text else _ARGUMENTS)

    def _beside_shown(self, arguments: Any) -> list[str]:
        function = {"name": "look", "arguments": arguments}
        calls = [{"id": "abcdefghi", "type": "function", "function": function}]
        texts = {
            name: ask(self._template, [QUESTION, {"role": "assistant", **said, "tool_calls": calls}])
            for name, said in _BESIDE.items()
        }
        return [name for name, text in texts.items() if text is not None and is_shown(text, _VALUE)]


def _as_text(arguments: Any) -> str:
    return json.dumps(arguments, ensure_ascii=False)


def _as_object(arguments: Any, number: int) -> dict[str, Any]:
    value = arguments
    if isinstance(arguments, str):
        try:
            value = json.loads(arguments) if arguments.strip() else {}
        except ValueError as error:
            raise ChatProblem(
                f"the arguments of a call in message {number} are text, but not valid JSON: {error}"
            ) from error
    if value is None:
        value = {}
    if not isinstance(value, dict):
        raise ChatProblem(
            f"the arguments of a call in message {number} are neither an object nor the JSON text of one: "
            f"{str(arguments)[:60]!r}"
        )
    return value
