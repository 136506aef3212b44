"""Conversations as pieces: for each answer the prompt that generation would see, and what must follow it.

For the assistant's message i,

    P = render(messages[:i], prompt)       what generation is handed: its tokens are the context
    F = render(messages[:i + 1])           what the template makes of the answered conversation
    A = F without P, up to and with the token that stops generation (`stops`)

which is right by construction wherever F begins with P (six of seven turns of real templates). Elsewhere
`align` tells what follows P, or the example is refused. Nothing is known by name and no family of templates
has code of its own: a template is only ever asked for texts.

A plain turn takes these two renderings. What else is asked of a template depends on the shape of the
conversation alone (`turn_facts`), or on nothing (`stops`, `thoughts`), and is remembered.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from os.path import commonprefix
from typing import Literal

from qlora_train.data.chat.align import Aligned, CannotAlign, Turn, align
from qlora_train.data.chat.calls import CallWriter
from qlora_train.data.chat.frame import places_to_cut
from qlora_train.data.chat.stand_ins import REASONING, free_stand_in, is_blank, shape, with_texts
from qlora_train.data.chat.stops import StopTokens, control_token_at_end, find_stop_tokens, first_of
from qlora_train.data.chat.template import ChatProblem, ChatTemplate, Message, Messages, Span, Tools
from qlora_train.data.chat.thoughts import Thoughts, find_thoughts, with_thoughts_in_field
from qlora_train.data.chat.turn_facts import ShapeFacts, TurnFacts, following_messages
from qlora_train.data.notes import Note, Notes, ends_in, lost

OpenThought = Literal["close", "refuse"]
_THOUGHTS = ("thinking", "reasoning")
_BRACKET = re.compile(r"[<\[(]")  # without one there is no mark of a thought


@dataclass(frozen=True)
class Piece:
    """One answer with its prompt. `adds_eos`: the template writes nothing that stops generation, so EOS is to
    follow. `turn`: the message that is the answer; None for a whole conversation."""

    prompt: str
    answer: str
    adds_eos: bool = False
    turn: int | None = None

    @property
    def text(self) -> str:
        return self.prompt + self.answer


class ChatWriter:
    """Writes conversations by one template. named_stops: texts of the tokens that end an answer, as the model
    names them."""

    def __init__(
        self, template: ChatTemplate, named_stops: Sequence[str], open_thought: OpenThought = "close"
    ) -> None:
        self.template = template
        self.open_thought = open_thought
        self.shapes = ShapeFacts(template)
        self._named_stops = named_stops
        self._calls = CallWriter(template)

    @cached_property
    def stops(self) -> StopTokens:
        return find_stop_tokens(self.template, self._named_stops)

    @cached_property
    def thoughts(self) -> Thoughts:
        return find_thoughts(self.template)

    def new_stop_of_calls(self) -> str | None:
        """The control token that the template ends a tool call with, if it is none of those that end answers;
        None also for a template that knows no calls."""
        for arguments in ({"key": "value"}, {}):
            function = {"name": "look", "arguments": arguments}
            call = {"id": "abcdefghi", "type": "function", "function": function}
            messages: list[Message] = [
                {"role": "user", "content": "?"},
                {"role": "assistant", "content": "", "tool_calls": [call]},
            ]
            try:
                (piece,) = self.pieces(messages, (), [1], Notes())
            except ChatProblem:
                continue
            if piece.adds_eos or piece.answer.endswith(self.stops.texts):
                return None
            return self.template.control_tokens.findall(piece.answer)[-1]
        return None

    def messages(self, messages: Messages, notes: Notes) -> list[Message]:
        """The messages as the template is given them: no null fields, no flags, arguments of calls as it
        wants them, thoughts where it looks for them, developers as the system."""
        plain = [_plain(message) for message in messages]
        notes[Note.DEVELOPER] += sum(message["role"] == "developer" for message in messages)
        written = self._calls.written(plain)
        if not any(m["role"] == "assistant" and _BRACKET.search(m.get("content") or "") for m in plain):
            return written
        moved, num_moved = with_thoughts_in_field(written, self.thoughts)
        notes[Note.THOUGHT_MOVED] += num_moved
        return moved

    def render(self, messages: Messages, tools: Tools = (), *, prompt: bool = False) -> str:
        """The template's text of messages as examples have them."""
        return self.template.render(self.messages(messages, Notes()), tools, prompt=prompt)

    def pieces(self, messages: Messages, tools: Tools, trained: Sequence[int], notes: Notes) -> list[Piece]:
        """The pieces of the answers `trained` (indices of messages), in order; an answer that nothing asks
        for has none. What is lost on the way is added to `notes`.

        Raises ChatProblem for a conversation that the template refuses or of which it does not show a turn or
        a call.
        """
        chat = _Conversation(self, messages, tools, notes)
        return [chat.piece(turn) for turn in chat.checked_turns() if turn in trained and turn > 0]

    def places_to_cut(self, messages: Messages, tools: Tools, turn: int, prompt: str) -> list[Span]:
        """Spans of the prompt of the answer `turn` that may be cut (see `frame`)."""
        return places_to_cut(self.template, self.messages(messages, Notes())[:turn], tools, prompt)

    def whole(self, messages: Messages, tools: Tools, notes: Notes) -> Piece:
        """The whole conversation as one text to learn, its last answer with its end; the prompt is empty."""
        chat = _Conversation(self, messages, tools, notes)
        turns = list(chat.checked_turns())
        text = self.template.render(chat.messages, tools)
        if turns and turns[-1] == len(chat.messages) - 1 > 0:
            return chat.ended(turns[-1], "", text)
        text = text.rstrip()
        tokens = self.template.control_tokens.findall(text)
        return Piece("", text, adds_eos=not (tokens and text.endswith(tokens[-1])))


class _Conversation:
    """One example's messages while they are taken apart."""

    def __init__(self, writer: ChatWriter, messages: Messages, tools: Tools, notes: Notes) -> None:
        self.writer, self.template, self.notes = writer, writer.template, notes
        self.messages = writer.messages(messages, notes)
        self.tools = tools
        self._shapes = [shape(message) for message in self.messages]
        self._tools_are_checked = not tools

    def checked_turns(self) -> Iterator[int]:
        """The assistant's messages, each after the template was found to show it and what is before it."""
        previous = -1
        for turn, message in enumerate(self.messages):
            if message["role"] != "assistant":
                continue
            if turn == 0:
                self.notes[Note.ANSWER_FIRST] += 1
            else:
                self._check_shown(turn, previous)
            previous = turn
            yield turn
        if previous >= 0:
            self.notes[Note.UNANSWERED] += len(self.messages) - 1 - previous
            hidden = self.writer.shapes.hidden_beside(self.messages[: previous + 1], self.tools)
            self.notes.update(map(lost, hidden))

    def piece(self, turn: int) -> Piece:
        history, message = self.messages[:turn], self.messages[turn]
        prompt = self.template.render(history, self.tools, prompt=True)
        text = self.template.render([*history, message], self.tools)
        self._check_not_left_out(turn, text)
        self._count_tools(prompt)
        thought_is_filled = False
        if text.startswith(prompt):
            answer = text[len(prompt) :]
        else:
            prompt, aligned = self._aligned(turn, prompt, text)
            answer, thought_is_filled = aligned.answer, aligned.thought == "filled"
            self._count_thought(aligned)
        piece = self.ended(turn, prompt, answer)
        self._count_lost(turn, piece.answer, thought_is_filled)
        return replace(piece, turn=turn)

    def ended(self, turn: int, prompt: str, answer: str) -> Piece:
        """The piece with its answer up to and with the token that stops generation."""
        named = self.writer.stops.texts
        tail = _shared_end(answer, self._facts(turn).tail or "", self.template)
        said, behind = answer[: len(answer) - len(tail)], tail
        if stop := first_of(behind, named):
            self._check_ended(turn, behind[: stop[0]])
            return Piece(prompt, said + behind[: stop[0] + len(stop[1])])
        following = following_messages(self.messages[turn], self.messages[turn + 1 : turn + 2])
        afters = [self._after(turn, each) for each in following]
        for after in afters:
            if stop := first_of(after, named):
                return Piece(prompt, said + after[: stop[0] + len(stop[1])])
        asks = self.writer.stops.asks
        token = control_token_at_end(self.template, tail, afters[-1], (), asks)
        if token is None:
            self.notes[Note.NO_STOP_TOKEN] += 1
            return Piece(prompt, answer.rstrip(), adds_eos=True)
        self.notes[ends_in(token)] += 1
        behind = tail if token in tail else afters[-1]
        return Piece(prompt, said + behind[: behind.index(token) + len(token)])

    def _aligned(self, turn: int, prompt: str, text: str) -> tuple[str, Aligned]:
        """(prompt, what follows it): by alignment, else by the template's marks."""
        before = text[: self._first_text(turn, text)]
        between = self._facts(turn).between
        found = Turn(
            self.messages[turn],
            prompt,
            text,
            before,
            self._header(turn, prompt),
            between if between is not None and before.endswith(between) else None,
            lambda: self._behind_a_thought(turn, text),
        )
        try:
            return prompt, align(found, self.template, self.writer.thoughts)
        except CannotAlign as problem:
            if not self.template.has_marks:
                raise CannotAlign(
                    f"{problem}. Mark the answers in the template with {{% generation %}} ... "
                    "{% endgeneration %}, set another one with model.chat_template, or train on everything "
                    "with data.supervise: all."
                ) from problem
        marked, spans = self.template.render_marked(self.messages[: turn + 1], self.tools)
        start = next((start for start, end in spans if end > len(before)), None)
        if start is None or marked != text:
            raise ChatProblem(f"the chat template marks no text of message {turn + 1} as generated")
        self.notes[Note.BY_MARKS] += 1
        return text[:start], Aligned(text[start:])

    def _first_text(self, turn: int, text: str) -> int:
        """Position in the text at which the turn's own first text begins."""
        mark = free_stand_in(text)
        said = with_texts(self.messages[turn], lambda *_: mark)
        at = self.template.render([*self.messages[:turn], said], self.tools).find(mark)
        return min(at, len(text)) if at >= 0 else len(text)

    def _behind_a_thought(self, turn: int, text: str) -> str | None:
        """Text that the template would put behind a thought of this turn, which has none."""
        thought = free_stand_in(text)
        message = {**self.messages[turn], REASONING: thought}
        thinking = self.template.render([*self.messages[:turn], message], self.tools)
        return thinking.rpartition(thought)[2] if thought in thinking else None

    def _header(self, turn: int, prompt: str) -> str | None:
        """The text that the prompt has behind the history's last text."""
        header = self._facts(turn).header
        if header is not None and prompt.endswith(header):
            return header
        asked = free_stand_in(prompt)
        last = with_texts(self.messages[turn - 1], lambda *_: asked)
        text = self.template.render([*self.messages[: turn - 1], last], self.tools, prompt=True)
        return text.rpartition(asked)[2] if asked in text else None

    def _facts(self, turn: int) -> TurnFacts:
        history, message = self.messages[:turn], self.messages[turn]
        return self.writer.shapes.turn(history, self._shapes[: turn + 1], message, self.tools)

    def _after(self, turn: int, following: Message) -> str:
        history, message = self.messages[:turn], self.messages[turn]
        return self.writer.shapes.after(self._facts(turn), history, message, following, self.tools)

    def _check_shown(self, turn: int, previous: int) -> None:
        """Refuses a conversation of which a whole message or call would vanish."""
        facts, message = self._facts(turn), self.messages[turn]
        hidden = [i for i in facts.unseen if i > previous and self.messages[i]["role"] != "assistant"]
        if hidden:
            role = self.messages[hidden[0]]["role"]
            raise ChatProblem(
                f"the chat template does not show message {hidden[0] + 1} ({role}): what it says would be "
                "lost. Remove it from the row, or set another template with model.chat_template"
            )
        calls = [name for name in facts.fields if name.startswith("call ") and name not in facts.shown]
        if calls:
            raise ChatProblem(
                f"the chat template does not show the tool_calls of message {turn + 1}: the model would be "
                "taught to say nothing there. Use a template that knows them (model.chat_template), or "
                "remove the row"
            )
        if "content" in facts.fields and "content" not in facts.shown and not message.get("tool_calls"):
            raise ChatProblem(f"the chat template does not show message {turn + 1} (assistant)")

    def _check_ended(self, turn: int, behind: str) -> None:
        """Refuses a turn behind which the next one begins before anything ends it."""
        opener = self.writer.stops.next_turn
        if opener is not None and opener in behind:
            raise ChatProblem(
                f"the chat template does not end message {turn + 1} before {opener!r} begins another turn, "
                "so the model would be taught to go on with it"
            )

    def _check_not_left_out(self, turn: int, text: str) -> None:
        message = self.messages[turn]
        if not is_blank(message.get("content")) or message.get("tool_calls"):
            return
        if text == self.template.render(self.messages[:turn], self.tools):
            raise ChatProblem(f"the chat template leaves out message {turn + 1}, an empty answer")

    def _count_thought(self, aligned: Aligned) -> None:
        if aligned.thought == "closed" and self.writer.open_thought == "refuse":
            raise ChatProblem(
                "the chat template's prompt opens a thought and the answer has none (data.open_thought: "
                "refuse). Give it one in 'reasoning_content', or set data.open_thought: close to train an "
                "empty one"
            )
        self.notes[Note.THOUGHT_CLOSED] += aligned.thought == "closed"
        self.notes[Note.THOUGHT_FILLED] += aligned.thought == "filled"

    def _count_lost(self, turn: int, answer: str, thought_is_filled: bool) -> None:
        facts, message = self._facts(turn), self.messages[turn]
        for name in facts.fields:
            if name not in facts.shown and message[name].strip() not in answer:
                self.notes[lost(name)] += 1
        content = str(message.get("content") or "").strip()
        if "content" in facts.shown and content and not thought_is_filled:
            self.notes[Note.REWRITTEN] += content not in answer

    def _count_tools(self, prompt: str) -> None:
        """Notes, once a conversation, whether the first prompt names any of its tools."""
        if not self._tools_are_checked:
            names = [str(tool.get("function", tool).get("name", "")) for tool in self.tools]
            self.notes[lost("tools")] += not any(name and name in prompt for name in names)
            self._tools_are_checked = True


def _plain(message: Message) -> Message:
    plain = {key: value for key, value in message.items() if key != "train" and value is not None}
    for name in _THOUGHTS:  # names that the library hands over as this one
        if isinstance(plain.get(name), str):
            plain.setdefault(REASONING, plain[name])
            del plain[name]
    if plain["role"] == "developer":  # a role that few templates know
        plain["role"] = "system"
    return plain


def _shared_end(answer: str, tail: str, template: ChatTemplate) -> str:
    """The tail where the answer ends in it, else the longest end of it that the answer has."""
    num_shared = len(commonprefix([answer[::-1], tail[::-1]]))
    at = len(tail) - num_shared
    return tail[at:] if template.at_edge(tail, at) == at else ""
