"""How a template opens and closes thoughts, asked of the template.

    close    what it writes between a thought (`reasoning_content`) and the answer
    cuts     texts in its source at which it cuts an answer in two, or which it removes from it

A template that reads no `reasoning_content` may still know where a thought in the answer's own text ends: it
drops what is before `</think>`, say, from earlier turns. So each text of its source is tried out between two
stand-ins; where one of the three is lost, the template looks for that text. Then close is the first of those.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from os.path import commonprefix

from qlora_train.data.chat.stand_ins import REASONING, is_blank, stand_in
from qlora_train.data.chat.template import ChatTemplate, Message
from qlora_train.data.chat.turn_facts import ANSWER, QUESTION, ask

_MAX_TRIED = 200  # texts of the source that are tried, two renderings each
_MAX_LITERAL = 40  # characters; what closes a thought is a tag, not a sentence
_FIRST, _SECOND = stand_in(3), stand_in(4)
_CLOSING = re.compile(r"/|END|STOP")
_BRACKETED = re.compile(r"<[^<>]{1,60}>|\[[^\[\]]{1,60}\]|\([^()]{1,60}\)")


@dataclass(frozen=True)
class Thoughts:
    """How a template writes thoughts. `opening` is what is between the prompt's usual header and a thought;
    None, like `close`, where the template has no thoughts. `plain_header`: what an answer follows where
    nothing is said about thoughts."""

    opening: str | None
    close: str | None
    cuts: tuple[str, ...]
    plain_header: str | None

    def is_plain_header(self, rest: str) -> bool:
        return self.plain_header is not None and self.plain_header.endswith(rest)

    def is_closed_in(self, text: str) -> bool:
        """Whether a thought ends in the text."""
        return self.close is not None and any(mark in text for mark in self.marks)

    @property
    def marks(self) -> tuple[str, ...]:
        """Texts that end a thought, the one between thought and answer first."""
        return (*([self.close.strip()] if self.close else []), *self.cuts)


def find_thoughts(template: ChatTemplate) -> Thoughts:
    """Asks a template how it writes thoughts, in at most 2 x `_MAX_TRIED` + 3 renderings."""
    plain_header = _plain_header(template)
    cuts = tuple(mark for mark in _worth_trying(template.literals) if _looks_for(template, mark))
    opening, close = _around_a_thought(template)
    if close is None and cuts:
        first = min(cuts, key=lambda mark: (not mark.strip().startswith(("</", "[/")), len(mark)))
        opening, close = None, f"\n{first.strip()}\n\n"
    return Thoughts(opening, close, cuts, plain_header)


def with_thoughts_in_field(messages: Sequence[Message], thoughts: Thoughts) -> tuple[list[Message], int]:
    """Thoughts in an answer's own text moved to `reasoning_content`: (messages, how many).

    Only where the template writes thoughts from that field, in the marks the answer uses, and does not look
    for them in answers itself: to it they would be words of the answer, behind an empty thought.
    """
    close = (thoughts.close or "").strip()
    opening = (thoughts.opening or "").strip()
    if not close or not opening or any(close in cut or cut in close for cut in thoughts.cuts):
        return list(messages), 0
    moved = [_moved(message, opening, close) for message in messages]
    return moved, sum(new is not old for new, old in zip(moved, messages, strict=True))


def _moved(message: Message, opening: str, close: str) -> Message:
    content = message.get("content")
    if message["role"] != "assistant" or is_blank(content) or message.get(REASONING):
        return message
    assert isinstance(content, str)
    before, found, answer = content.partition(close)
    if not found or not before.lstrip().startswith(opening):
        return message
    thought = before.lstrip().removeprefix(opening).strip()
    moved = {**message, "content": answer.lstrip()}
    return {**moved, REASONING: thought} if thought else moved


def is_closed_pair(text: str) -> bool:
    """Whether a text is two tags of one name, of which the second closes: `<think></think>`,
    `[THINK] [/THINK]`, `<|START_THINKING|><|END_THINKING|>`."""
    tags = _BRACKETED.findall(text)
    if len(tags) != 2 or _CLOSING.search(tags[0].upper()) or not _CLOSING.search(tags[1].upper()):
        return False
    first, second = (re.sub(r"START|BEGIN|END|STOP|[^A-Z]", "", tag.upper()) for tag in tags)
    return bool(first) and first == second


def _around_a_thought(template: ChatTemplate) -> tuple[str | None, str | None]:
    """The texts around a thought: (what is between the header and the thought, what is between the thought
    and its answer)."""
    question = QUESTION["content"]
    thinking = {**ANSWER, "content": _SECOND, REASONING: _FIRST}
    text, prompt = ask(template, [QUESTION, thinking]), ask(template, [QUESTION], prompt=True)
    if text is None or prompt is None:
        return None, None
    before, found, behind = text.partition(_FIRST)
    between, answered, _ = behind.partition(_SECOND)
    if not found or not answered or not between.strip():
        return None, None
    header = before.rpartition(question)[2]
    usual = prompt.rpartition(question)[2]
    num_same = len(commonprefix([header, usual]))
    opening = header[template.at_edge(header, num_same) :]
    return opening or _last_tag(header), between


def _last_tag(header: str) -> str | None:
    """What opens a thought where the prompt holds it already: the last bracketed text before the thought."""
    tags = _BRACKETED.findall(header)
    return tags[-1] if tags and header.rstrip().endswith(tags[-1]) else None


def _worth_trying(literals: Sequence[str]) -> list[str]:
    short = [text for text in literals if len(text) <= _MAX_LITERAL]
    return sorted(short, key=lambda text: not text.strip().startswith(("</", "[/")))[:_MAX_TRIED]


def _looks_for(template: ChatTemplate, mark: str) -> bool:
    answer = {**ANSWER, "content": _FIRST + mark + _SECOND}
    for more in ([], [QUESTION]):
        text = ask(template, [QUESTION, answer, *more])
        if (
            text is not None
            and _SECOND in text
            and (_FIRST not in text or mark not in text[text.index(_FIRST) : text.rindex(_SECOND)])
        ):
            return True
    return False


def _plain_header(template: ChatTemplate) -> str | None:
    """The text that a prompt has behind a question, if an answer is rendered behind it as it is."""
    prompt, text = ask(template, [QUESTION], prompt=True), ask(template, [QUESTION, ANSWER])
    if prompt is None or text is None or not text.startswith(prompt):
        return None
    return prompt.rpartition(QUESTION["content"])[2]
