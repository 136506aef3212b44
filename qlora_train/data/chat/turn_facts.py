"""What a template writes around an answer, and which fields of the turn it shows: looked up once per shape.

For the answer m behind the history H, with stand-ins for all texts:

    header   what render(H, prompt) has behind the history's last text
    between  what render(H + m) has between the history's last text and m's first
    tail     what render(H + m) has behind m's last text
    after    what render(H + m + next) has between m's last text and the next message's first
    shown    the fields of m whose stand-ins are in render(H + m)
    unseen   the messages of H that are not in render(H, prompt)
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import count

from qlora_train.data.chat.stand_ins import (
    fields_beside,
    is_blank,
    numbered,
    shape,
    stand_in,
    with_texts,
    without_ids,
)
from qlora_train.data.chat.template import ChatProblem, ChatTemplate, Message, Tools

_MAX_SHAPES = 4096
_ASKED, _SAID = stand_in(0), stand_in(1)
_Numbered = tuple[Message, dict[str, str]]  # a message and the stand-in of each of its fields
QUESTION: Message = {"role": "user", "content": _ASKED}
ANSWER: Message = {"role": "assistant", "content": _SAID}


_TOOL = {
    "type": "function",
    "function": {
        "name": "look",
        "description": "Looks.",
        "parameters": {
            "type": "object",
            "properties": {"key": {"type": "string", "description": "Where."}},
            "required": ["key"],
        },
    },
}


def ask(template: ChatTemplate, messages: Sequence[Message], *, prompt: bool = False) -> str | None:
    """The template's text of messages of our own; with a tool, where it cannot do without. None where it
    takes no such conversation."""
    for tools in ((), (_TOOL,)):
        try:
            return template.render(messages, tools, prompt=prompt)
        except ChatProblem:
            continue
    return None


def is_shown(text: str, mark: str) -> bool:
    """Whether a rendering holds a stand-in, as it is or escaped as JSON."""
    return any(form in text for form in _forms(mark))


@dataclass(frozen=True)
class TurnFacts:
    """What the template does with one turn (see the top of the file). `fields` are all fields of the turn;
    `header` is None where no text of the history is shown, `tail` where none of the turn's is, `between` in
    both cases."""

    header: str | None
    between: str | None
    tail: str | None
    fields: tuple[str, ...]
    shown: frozenset[str]
    unseen: tuple[int, ...]
    afters: dict[str, str] = field(default_factory=dict, compare=False)


class ShapeFacts:
    """The turn facts of one template, looked up once per shape; remembers `_MAX_SHAPES` shapes."""

    def __init__(self, template: ChatTemplate) -> None:
        self.template = template
        self._known: dict[tuple[object, ...], TurnFacts] = {}

    def turn(
        self, history: Sequence[Message], shapes: Sequence[str], message: Message, tools: Tools
    ) -> TurnFacts:
        """Facts of `message` behind `history`. shapes: of the history and the message. Raises ChatProblem
        where the template takes no such conversation.
        """
        key = (*shapes, bool(tools))
        if (facts := self._known.get(key)) is None:
            numbers = count(2)
            try:
                replaced = [numbered(without_ids(each), numbers) for each in history]
                facts = self._look(replaced, *numbered(without_ids(message), numbers), tools)
            except ChatProblem:  # a template that asks what a text says: the history keeps its own
                untouched: list[_Numbered] = [(each, {}) for each in history]
                facts = self._look(untouched, *numbered(without_ids(message), numbers), tools)
            if len(self._known) == _MAX_SHAPES:
                self._known.clear()
            self._known[key] = facts
        return facts

    def after(
        self, facts: TurnFacts, history: Sequence[Message], message: Message, following: Message, tools: Tools
    ) -> str:
        """The text between the turn and the message that follows; empty where the template takes no such
        conversation."""
        key = shape(following)
        if key not in facts.afters:
            facts.afters[key] = self._look_after(history, message, following, tools)
        return facts.afters[key]

    def hidden_beside(self, messages: Sequence[Message], tools: Tools) -> list[str]:
        """The fields beside what the messages say (a name) that the template does not show, each as often as
        messages have it; none where it takes no such conversation."""
        numbers = count(2)
        marks = [{key: stand_in(next(numbers)) for key in fields_beside(message)} for message in messages]
        if not any(marks):
            return []
        try:
            replaced = [{**message, **of_it} for message, of_it in zip(messages, marks, strict=True)]
            text = self.template.render(replaced, tools)
        except ChatProblem:
            return []
        return [key for of_it in marks for key, mark in of_it.items() if not is_shown(text, mark)]

    def _look(
        self, history: Sequence[_Numbered], message: Message, fields: dict[str, str], tools: Tools
    ) -> TurnFacts:
        """Renders the turn with its stand-ins. history: with the stand-ins of each message; none where it has
        its own texts, which tell little."""
        before = [each for each, _ in history]
        all_before = [mark for _, marks in history for mark in marks.values()]
        prompt = self.template.render(before, tools, prompt=True) if all_before else ""
        text = self.template.render([*before, message], tools)
        unseen = tuple(
            index
            for index, (each, marks) in enumerate(history)
            if marks
            and not is_blank(each.get("content"))
            and not any(is_shown(prompt, mark) for mark in marks.values())
        )
        of_turn = list(fields.values())
        return TurnFacts(
            header=_behind_last(prompt, all_before),
            between=_behind_last(_before_first(text, of_turn), all_before),
            tail=_behind_last(text, of_turn),
            fields=tuple(fields),
            shown=frozenset(name for name, mark in fields.items() if is_shown(text, mark)),
            unseen=unseen,
        )

    def _look_after(
        self, history: Sequence[Message], message: Message, following: Message, tools: Tools
    ) -> str:
        before = [with_texts(without_ids(each), lambda *_: _ASKED) for each in history]
        said = with_texts(without_ids(message), lambda *_: _SAID)
        then = with_texts(without_ids(following), lambda *_: stand_in(2))
        try:
            alone = self.template.render([*before, said], tools)
            text = self.template.render([*before, said, then], tools)
        except ChatProblem:
            return ""
        # The next message may repeat a text of the turn: a tool's answer, the name of the call.
        start = alone[: len(alone) - len(_behind_last(alone, [_SAID]) or "")]
        if text.startswith(start):
            return text[len(start) :].partition(stand_in(2))[0]
        return _behind_last(text.partition(stand_in(2))[0], [_SAID]) or ""


def _behind_last(text: str, marks: Sequence[str]) -> str | None:
    """The part of the text behind the last of the marks; None where there is none."""
    ends = [text.rfind(form) + len(form) for mark in marks for form in _forms(mark) if form in text]
    return text[max(ends) :] if ends else None


def _before_first(text: str, marks: Sequence[str]) -> str:
    """The part of the text before the first of the marks; nothing where there is none."""
    starts = [text.find(form) for mark in marks for form in _forms(mark) if form in text]
    return text[: min(starts)] if starts else ""


def _forms(mark: str) -> tuple[str, str]:
    return mark, json.dumps(mark)[1:-1]


def following_messages(message: Message, real: Sequence[Message]) -> list[Message]:
    """Messages that may come after a turn: the one that does, then a question or the result of its call."""
    calls = message.get("tool_calls") or []
    if calls:
        function = calls[0].get("function", calls[0])
        usual = {"role": "tool", "content": _ASKED, "name": function.get("name", "")}
        if "id" in calls[0]:
            usual["tool_call_id"] = calls[0]["id"]
    else:
        usual = QUESTION
    return [*real, usual]
