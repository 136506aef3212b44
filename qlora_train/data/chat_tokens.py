"""Conversations -> tokens of texts, with the places of the answers in them.

From the last answer back, an answer shares a text where the text's token ids begin with its prompt's and its
own; else it gets a text of its own. A text ends with its last answer: nothing behind it is kept. Each answer
stands behind exactly the tokens that generation is handed (see `encoding`), and the text of a special token
in a message is text (see `control_text`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np

from qlora_train.data.chat.chat_format import ChatFormat
from qlora_train.data.chat.pieces import Piece
from qlora_train.data.chat.template import ChatProblem
from qlora_train.data.content import Chat
from qlora_train.data.control_text import ControlText, without_marks
from qlora_train.data.documents import Text, TextEnds
from qlora_train.data.encoding import CannotEncode, TextEncoder
from qlora_train.data.notes import Note, Notes
from qlora_train.data.tokenizing import Encoded, encode

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Supervise = Literal["completions", "last_turn", "all"]


class Written(NamedTuple):
    """How a text was made: `turns`, the messages of `chat` that are its answers, in order; `prompt`, the one
    of the first of them; `encoded`, tokens that begin with the prompt's. is_marked: the prompt holds marks.
    """

    chat: Chat
    turns: tuple[int, ...]
    prompt: str
    encoded: Encoded
    is_marked: bool


class _Prepared(NamedTuple):
    """A conversation ready to be tokenised. groups: each a text's pieces, the one that is the whole text
    first. plain: the same without marks, where the texts have some, should these not be exact."""

    chat: Chat
    notes: Notes
    groups: list[list[Piece]]
    plain: list[list[Piece]] | None = None


class ChatTokenizer:
    """Writes and tokenises conversations. supervise: which of their answers (`all`: everything is one)."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        chat_format: ChatFormat,
        supervise: Supervise,
        ends: TextEnds,
    ) -> None:
        self._tokenizer, self.format = tokenizer, chat_format
        self._supervise, self._ends = supervise, ends
        self._control_text = ControlText(tokenizer)
        self._encoder = TextEncoder(tokenizer)
        self._encoder_of_marked = TextEncoder(tokenizer, self._control_text)

    def tokenize(self, chats: Sequence[Chat]) -> list[tuple[list[Text], Notes] | ChatProblem]:
        """The texts of each conversation, earlier answers first (none where it has no answer to train), and
        what happened to it."""
        prepared: list[_Prepared | ChatProblem] = []
        for chat in chats:
            try:
                prepared.append(self._prepare(self.asked_for(chat)))
            except ChatProblem as problem:
                prepared.append(problem)
        unmarked = [each for each in prepared if isinstance(each, _Prepared) and each.plain is None]
        plain = [group[0].text for each in unmarked for group in each.groups]
        encoded = dict(zip(plain, encode(self._tokenizer, plain), strict=True))
        return [
            each if isinstance(each, ChatProblem) else (self._texts_of(each, encoded), each.notes)
            for each in prepared
        ]

    def again(self, chat: Chat) -> list[Text]:
        """The texts of a part of a conversation that was tokenised before. Raises ChatProblem."""
        (found,) = self.tokenize([chat])
        if isinstance(found, ChatProblem):
            raise found
        return found[0]

    def cuttable(self, text: Text) -> Text:
        """The text, knowing which tokens of its prompt may be cut (see `frame`), where the template tells."""
        if text.written is None:
            return text
        chat, turns, prompt, encoded, is_marked = text.written
        messages, tools = chat.messages, chat.tools
        if is_marked:
            messages, tools = self._control_text.mark(messages), self._control_text.mark(tools)
        writer = self.format.writer(with_tools=bool(tools))
        is_cut = np.zeros(len(encoded.token_ids), dtype=bool)
        for start, end in writer.places_to_cut(messages, tools, turns[0], prompt):
            is_cut |= (encoded.starts >= start) & (encoded.ends <= end)
        if not is_cut.any():
            return text
        places = np.flatnonzero(is_cut) + text.shift
        return replace(text, cuttable=places[places >= max(text.shift, 0)])

    def asked_for(self, chat: Chat) -> Chat:
        """The conversation with flags for what `last_turn` leaves out, so that parts of it ask for the same
        answers."""
        turns = [i for i, message in enumerate(chat.messages) if message["role"] == "assistant"]
        if self._supervise != "last_turn" or len(turns) < 2:
            return chat
        return replace(
            chat,
            messages=tuple(
                {**message, "train": False} if i in turns[:-1] else message
                for i, message in enumerate(chat.messages)
            ),
        )

    def _prepare(self, chat: Chat) -> _Prepared:
        notes = Notes()
        pieces = self._pieces(chat, notes)
        if not self._control_text.is_in([chat.messages, chat.tools]):
            return _Prepared(chat, notes, _grouped(pieces))
        mark = self._control_text.mark
        try:
            marked = self._pieces(Chat(mark(chat.messages), mark(chat.tools)), Notes())
        except ChatProblem:  # a template that knows what a content is, and the marked one is not
            marked = []
        if [_unmarked(piece) for piece in marked] != pieces:
            notes[Note.SAYS_CONTROL_TOKENS] += 1
            return _Prepared(chat, notes, _grouped(pieces))
        return _Prepared(chat, notes, _grouped(marked), plain=_grouped(pieces))

    def _pieces(self, chat: Chat, notes: Notes) -> list[Piece]:
        writer = self.format.writer(with_tools=bool(chat.tools))
        messages = chat.messages
        turns = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        trained = [turn for turn in turns if messages[turn].get("train", True)]
        if self._supervise == "all":
            if len(trained) < len(turns):
                raise ChatProblem(
                    "a message is not to be trained on (train, loss or weight), which data.supervise: all "
                    "contradicts."
                )
            return [writer.whole(messages, chat.tools, notes)]
        if wrong := [i for i, m in enumerate(messages) if m.get("train") and m["role"] != "assistant"]:
            raise ChatProblem(
                f"message {wrong[0] + 1} ({messages[wrong[0]]['role']}) is to be trained on; only what the "
                "assistant says can be. Remove its flag, or set data.supervise: all."
            )
        return writer.pieces(messages, chat.tools, trained, notes)

    def _texts_of(self, prepared: _Prepared, encoded: Mapping[str, Encoded]) -> list[Text]:
        chat, notes, groups, plain = prepared

        def texts(groups: list[list[Piece]], encoder: TextEncoder) -> list[Text]:
            return [text for group in groups for text in self._texts(chat, group, encoder, encoded)]

        if plain is None:
            return texts(groups, self._encoder)
        try:
            found = texts(groups, self._encoder_of_marked)
            notes[Note.QUOTES_CONTROL_TOKENS] += 1
        except CannotEncode:
            found = texts(plain, self._encoder)
            notes[Note.SAYS_CONTROL_TOKENS] += 1
        return found

    def _texts(
        self, chat: Chat, group: Sequence[Piece], encoder: TextEncoder, encoded: Mapping[str, Encoded]
    ) -> Iterator[Text]:
        """The group's text and, before it, texts of their own for pieces whose tokens are not how the text's
        begin. encoded: texts whose tokens are known."""
        last, *others = group
        whole = encoded[last.text] if last.text in encoded else encoder.one(last.text)
        ids, num_prompt, text, whole = encoder.at_edge(last.prompt, last.answer, whole)
        answers, said, left = [(num_prompt, len(ids))], [last], []
        for piece in others:
            start = encoder.num_tokens_of_start(whole, text, len(piece.prompt))
            end = encoder.num_tokens_of_start(whole, text, len(piece.text))
            if start is None or end is None or end <= start:
                left.append(piece)
            else:
                answers.append((start, end))
                said.append(piece)
        for piece in reversed(left):
            yield from self._texts(chat, [piece], encoder, {})
        turns = tuple(piece.turn for piece in reversed(said) if piece.turn is not None)
        is_marked = encoder is self._encoder_of_marked
        written = Written(chat, turns, said[-1].prompt, whole, is_marked) if turns else None
        yield self._ends.text(ids, answers, adds_eos=last.adds_eos, written=written)


def _grouped(pieces: Sequence[Piece]) -> list[list[Piece]]:
    """The pieces by text: from the last one back, each goes to the first text that begins with its own."""
    groups: list[list[Piece]] = []
    for piece in reversed(pieces):
        fitting = (group for group in groups if not piece.adds_eos and group[0].text.startswith(piece.text))
        if (group := next(fitting, None)) is not None:
            group.append(piece)
        else:
            groups.append([piece])
    return groups[::-1]


def _unmarked(piece: Piece) -> Piece:
    return replace(piece, prompt=without_marks(piece.prompt), answer=without_marks(piece.answer))
