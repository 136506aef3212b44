"""Arguments of tool calls, as objects or as JSON text: whichever a template can show.

Rows have them as objects, or as the JSON text in which OpenAI sends them. Most templates turn objects into JSON
themselves, and would quote a text a second time; some join texts, and fail on an object. A template is asked
once, and a row's arguments are written so.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cached_property
from typing import Any

from qlora_train.data.chat.stand_ins import stand_in
from qlora_train.data.chat.template import ChatProblem, ChatTemplate, Message
from qlora_train.data.chat.turn_facts import QUESTION, is_shown

_VALUE = stand_in(5)


class CallArguments:
    """Writes the arguments of calls as one template wants them."""

    def __init__(self, template: ChatTemplate) -> None:
        self._template = template

    def written(self, messages: Sequence[Message]) -> list[Message]:
        """Raises ChatProblem for arguments that are neither an object nor the JSON text of one."""
        return [
            {**m, "tool_calls": [self._written(call, number) for call in m["tool_calls"]]}
            if m.get("tool_calls")
            else m
            for number, m in enumerate(messages, start=1)
        ]

    def _written(self, call: Any, number: int) -> Any:
        function = call.get("function", call) if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise ChatProblem(f"the tool_calls of message {number} hold a call without a function's name")
        if "arguments" not in function:
            return call
        said = _as_object(function["arguments"], number)
        arguments = json.dumps(said, ensure_ascii=False) if self._as_text else said
        changed = {**function, "arguments": arguments}
        return {**call, "function": changed} if "function" in call else changed

    @cached_property
    def _as_text(self) -> bool:
        return not self._shows({"key": _VALUE}) and self._shows(
            json.dumps({"key": _VALUE}, ensure_ascii=False)
        )

    def _shows(self, arguments: Any) -> bool:
        function = {"name": "look", "arguments": arguments}
        call = {"id": "abcdefghi", "type": "function", "function": function}
        for content in ({}, {"content": ""}):
            try:
                text = self._template.render(
                    [QUESTION, {"role": "assistant", **content, "tool_calls": [call]}]
                )
            except ChatProblem:
                continue
            if is_shown(text, _VALUE):
                return True
        return False


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
