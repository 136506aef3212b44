"""An Ollama Modelfile: the chat template as Ollama's own templates, and the texts that end an answer.

Ollama does not run Jinja. It has templates in Go's language, and for a GGUF file alone looks for the one of
its own that resembles the chat template most. So the template is written anew: what it puts before and
behind messages of each role is read off conversations that it renders, and used only if the result equals
the chat template's text on others.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from qlora_train.data.chat.template import ChatProblem, Message
from qlora_train.data.formats import PromptTemplate

Render = Callable[[Sequence[Message]], str]
"""Messages -> the text of the chat template, with what asks for an answer behind it, without BOS."""
_SYSTEM, _QUESTION, _ANSWER, _NEXT = "Be-0-kind", "What-1-is", "That-2-is", "And-3-what"


@dataclass(frozen=True)
class TurnTexts:
    """What a template writes around messages. around: role -> (text before, text behind). start: before
    everything, in conversations without a system message. prompt: what asks for an answer."""

    start: str
    around: dict[str, tuple[str, str]]
    prompt: str

    @staticmethod
    def read_off(render: Render, stops: Sequence[str]) -> TurnTexts | None:
        """The texts of a template; None for one that does more than to write texts around messages. stops:
        texts that end a turn, where one of them is between two."""
        plain = _between(render, [("user", _QUESTION), ("assistant", _ANSWER), ("user", _NEXT)])
        if plain is None:
            return None
        first, to_answer, to_question, last = plain
        before_user = _common_end(first, to_question[_end_of_turn(to_question, stops) :])
        after_user = os.path.commonprefix([to_answer, last])
        after_user = after_user[: _end_of_turn(after_user, stops) or len(after_user)]
        around = {
            "user": (before_user, after_user),
            "assistant": (to_answer[len(after_user) :], to_question[: len(to_question) - len(before_user)]),
        }
        system = _between(render, [("system", _SYSTEM), ("user", _QUESTION)])
        if system is not None:
            if not system[1].endswith(before_user):
                return None
            around["system"] = (system[0], system[1][: len(system[1]) - len(before_user)])
        found = TurnTexts(first[: len(first) - len(before_user)], around, last[len(after_user) :])
        return found if found._is_right(render) else None

    def _is_right(self, render: Render) -> bool:
        turns = [
            ("user", "Hi, you!"),
            ("assistant", "Yes?"),
            ("user", "2 + 2"),
            ("assistant", "4"),
            ("user", "Ok"),
        ]
        chats = [turns[:1], turns]
        if "system" in self.around:
            chats += [[("system", "Answer in short."), *chat] for chat in chats]
        return all(self._text(chat) == render(_messages(chat)) for chat in chats)

    def _text(self, turns: Sequence[tuple[str, str]]) -> str:
        start = "" if turns[0][0] == "system" else self.start
        return start + "".join(text.join(self.around[role]) for role, text in turns) + self.prompt

    def in_go(self) -> str | None:
        """The template in Go's language; None where a text of it cannot stand in one."""
        texts = [self.start, self.prompt, *(text for pair in self.around.values() for text in pair)]
        if any("{{" in text or '"""' in text for text in texts):
            return None
        start, messages = self.start, "{{ range .Messages }}"
        if start and "system" in self.around:  # .System is empty for an empty system message, too
            start, messages = "", "{{ range $i, $_ := .Messages }}"
            messages += '{{ if and (eq $i 0) (ne .Role "system") }}' + self.start + "{{ end }}"
        roles = "{{ else ".join(
            'if eq .Role "' + role + '" }}' + "{{ .Content }}".join(texts)
            for role, texts in self.around.items()
        )
        return start + messages + "{{ " + roles + "{{ end }}{{ end }}" + self.prompt


def go_prompt(template: PromptTemplate) -> str | None:
    """A prompt template with one column in Go's language; None for one with several."""
    if len(template.columns) != 1:
        return None
    text = template.fill({template.columns[0]: _QUESTION})
    return None if "{{" in text or '"""' in text else text.replace(_QUESTION, "{{ .Prompt }}")


def create_command(run: Path) -> str:
    """The command line that makes a model of a run's Modelfile, named after the run."""
    name = re.sub(r"[^a-z0-9]+", "-", run.resolve().name.lower()).strip("-")
    return f"ollama create {name or 'my-model'} -f Modelfile"


def modelfile(command: str, model: str, template: str | None, stops: Sequence[str]) -> str:
    """The text of a Modelfile. command: that reads it. model: the GGUF file's name."""
    lines = [f"# {command}", f"FROM ./{model}"]
    if template is not None:
        lines.append(f'TEMPLATE """{template}"""')
    return "\n".join([*lines, *(f'PARAMETER stop "{text}"' for text in stops)]) + "\n"


def _between(render: Render, turns: Sequence[tuple[str, str]]) -> list[str] | None:
    """The texts before, between and behind the contents of turns; None where the template refuses them, or
    does not write each once."""
    try:
        rest = render(_messages(turns))
    except ChatProblem:
        return None
    parts = []
    for _, text in turns:
        if rest.count(text) != 1:
            return None
        part, _, rest = rest.partition(text)
        parts.append(part)
    return [*parts, rest]


def _end_of_turn(text: str, stops: Sequence[str]) -> int:
    """The place behind the last text that ends a turn, and behind white space there; 0: there is none."""
    end = max(text.rfind(stop) + len(stop) if stop in text else 0 for stop in stops)
    return len(text) - len(text[end:].lstrip()) if end else 0


def _messages(turns: Sequence[tuple[str, str]]) -> list[Message]:
    return [{"role": role, "content": text} for role, text in turns]


def _common_end(first: str, second: str) -> str:
    return os.path.commonprefix([first[::-1], second[::-1]])[::-1]
