"""Where an answer begins when the rendered turn F does not begin with its prompt P.

P is what generation is handed, F what the template makes of the answered conversation; behind P the model
must say what F has behind their common part, made to fit:

    P   ...<|user|>Q<|end|><|bot|><think>\\n
    F   ...<|user|>Q<|end|><|bot|>A<|end|>                   the prompt opens a thought, the turn has none

Both are cut behind their common start, at a token's edge, before the turn's first text. The *header* is what
P has behind the history's last text. What is left of P, p, and of F, f, decides:

    p is white space                                   f
    f begins with the end of p                         f without it
    p stands behind the history in F                   what is behind it: F closes the last message otherwise
    p closes a thought                                 f, if it holds no thought, else the example is refused
    p is (part of) the header of any answer            f
    f begins with what closes a thought                f
    p opens a thought                                  the example's thought and what closes it, then f; where
                                                       the example has none, what closes it, then f
                                                       (`open_thought: refuse` refuses the example)

Where the cut lies before the header, the history itself is rendered otherwise once it is answered (tools only
in the last question): then f is what F has behind the header's longest end that it has before the turn's
first text. Everything else is refused: a guess would train on the wrong context in silence.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from os.path import commonprefix

from qlora_train.data.chat.stand_ins import REASONING
from qlora_train.data.chat.template import ChatProblem, ChatTemplate, Message
from qlora_train.data.chat.thoughts import Thoughts, is_closed_pair

_MAX_HEADER = 4000  # characters; searching its ends takes time with their number squared


class CannotAlign(ChatProblem):
    """A turn that cannot be made to follow its prompt; the template's marks may still tell where it
    begins."""


@dataclass(frozen=True)
class Aligned:
    """An answer that follows its prompt. `answer`: what follows the prompt, with all that F has behind it.
    `thought`: "filled" from the example, "closed" where the example has none, else None."""

    answer: str
    thought: str | None = None


@dataclass(frozen=True)
class Turn:
    """A rendered turn and its prompt. message: of which the text is rendered. prompt, text: P and F. before:
    what F has before the message's own first text. header: see the top of the file. between: what F has
    between the history's last text and the message's first; None where that is not known. behind_a_thought:
    what F would have behind a thought of this message; None where the template shows none.
    """

    message: Message
    prompt: str
    text: str
    before: str
    header: str | None
    between: str | None
    behind_a_thought: Callable[[], str | None]

    def behind(self, end: str) -> str | None:
        """What F has behind the last place before the message's text, but behind the history, where `end`
        stands."""
        place = self.before if self.between is None else self.between
        if end not in place:
            return None
        return self.text[len(self.before) - len(place) + place.rindex(end) + len(end) :]


def align(turn: Turn, template: ChatTemplate, thoughts: Thoughts) -> Aligned:
    """Finds what follows the prompt of a turn. Raises CannotAlign, and ChatProblem for a thought that the
    prompt forbids."""
    left_of_prompt, left_of_text = _cut(turn, template)
    if not left_of_prompt.strip():
        return Aligned(left_of_text)
    said_twice = _overlap(left_of_prompt, left_of_text)
    if said_twice.strip() and template.at_edge(left_of_text, len(said_twice)) == len(said_twice):
        return Aligned(left_of_text[len(said_twice) :])
    if template.first_tag(left_of_prompt.lstrip()):
        behind = turn.behind(left_of_prompt)
        if behind is not None:
            return Aligned(behind)
    if thoughts.close is None:
        return Aligned(_behind_header(left_of_prompt, left_of_text, template, thoughts))
    if thoughts.is_closed_in(left_of_prompt):
        return Aligned(_without_thought(turn.message, left_of_prompt, left_of_text, thoughts))
    if thoughts.is_plain_header(left_of_prompt) or left_of_text.lstrip().startswith(thoughts.close.strip()):
        return Aligned(left_of_text)
    return _filled(turn, left_of_prompt, left_of_text, thoughts)


def _cut(turn: Turn, template: ChatTemplate) -> tuple[str, str]:
    """What is left of prompt and text behind their common start: (p, f). p is empty where f was found behind
    the header's end."""
    prompt, text, header = turn.prompt, turn.text, turn.header
    if not header or not prompt.endswith(header) or len(header) > _MAX_HEADER:
        raise CannotAlign(_why(turn, "has no beginning that its prompt shares"))
    num_same = min(len(commonprefix([prompt, text])), len(turn.before))
    num_same = min(template.at_edge(prompt, num_same), template.at_edge(text, num_same))
    if num_same >= len(prompt) - len(header):
        return prompt[num_same:], text[num_same:]
    for start in range(len(header)):
        end = header[start:]
        if _says_something(end, template) and template.at_edge(header, start) == start:
            behind = turn.behind(end)
            if behind is not None:
                return "", behind
    begun = header
    while begun.strip() and turn.behind(begun) is None:
        begun = header[: template.at_edge(header, len(begun) - 1)]
    said = turn.behind(begun)
    if not begun.strip() or said is None:
        raise CannotAlign(_why(turn, "does not hold the header that the prompt ends in"))
    rest = header[len(begun) :]
    while rest and said and rest[0] == said[0] and rest[0].isspace():
        rest, said = rest[1:], said[1:]
    return rest, said


def _says_something(end: str, template: ChatTemplate) -> bool:
    return bool(end.strip()) and (template.control_tokens.search(end) is not None or len(end.strip()) > 3)


def _overlap(first: str, second: str) -> str:
    """The longest end of the first text that the second begins with."""
    longest = min(len(first), len(second))
    return next((second[:n] for n in range(longest, 0, -1) if first.endswith(second[:n])), "")


def _behind_header(rest: str, said: str, template: ChatTemplate, thoughts: Thoughts) -> str:
    """The answer (f) by a template without thoughts: p must be header, or tags that enclose nothing."""
    if thoughts.is_plain_header(rest) or is_closed_pair(rest):
        return said
    first = template.first_tag(said.lstrip())
    if first and is_closed_pair(rest.strip() + first):
        return said
    raise CannotAlign(
        f"the chat template ends the prompt with {rest!r} and renders the answer without it, so generation "
        "would go on from tokens that training never saw"
    )


def _without_thought(message: Message, rest: str, said: str, thoughts: Thoughts) -> str:
    """The answer (f) where the prompt says that there is no thought."""
    thought = (message.get(REASONING) or "").strip()
    close = (thoughts.close or "").strip()
    if close in said or (thought and thought in said):
        raise ChatProblem(
            f"the chat template's prompt ends the thought before the answer ({rest!r}), and this answer has "
            "one. Let the prompt open thoughts (often data.chat_template_kwargs: {enable_thinking: true}), "
            "or remove the thought from the row."
        )
    return said


def _filled(turn: Turn, rest: str, said: str, thoughts: Thoughts) -> Aligned:
    """The answer (f) behind the thought that the prompt opens."""
    content = turn.message.get("content") or ""
    thought = (turn.message.get(REASONING) or "").strip()
    end = next((mark for mark in thoughts.marks if mark in content), None)
    if not thought and end is not None:  # inside the answer: its own text, as it is
        raw = content.lstrip().removeprefix(rest.strip())
        raw = raw.lstrip() if rest[-1:].isspace() else raw
        if end in raw:
            at = raw.index(end) + len(end)
            at += len(raw[at:]) - len(raw[at:].lstrip())
            return Aligned(raw[:at] + said.lstrip(), "filled")
    if thought and thought in said:
        return Aligned(said.lstrip().removeprefix(rest.strip()).lstrip())
    if not thought and (behind := turn.behind_a_thought()) is not None:
        return Aligned(behind.lstrip(), "closed")
    behind = _closed(thoughts.close or "", said, content)
    return Aligned(thought + behind, "filled") if thought else Aligned(behind.lstrip(), "closed")


def _closed(close: str, said: str, content: str) -> str:
    """What closes a thought, then the answer (f); white space that both have, where it is not the answer's
    own, once."""
    if content.strip() and said.startswith(content):
        return close + said
    shared = _overlap(close, said)
    return close + (said[len(shared) :] if shared else said.lstrip())


def _why(turn: Turn, what: str) -> str:
    return (
        f"the text that the chat template makes of the answer {what}, so what the model must say behind its "
        f"prompt (...{turn.prompt[-40:]!r}) cannot be told"
    )
