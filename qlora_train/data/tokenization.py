"""Contents -> documents: token ids and, beside each, whether it is supervised (a target of the loss).

    Chat        one text, or several, that hold its answers (see `chat_tokens`); supervised: the answers, each
                with the token that stops generation
    Completion  prompt + completion + EOS; supervised: completion and EOS
    PlainText   text + EOS; all supervised

A prompt's tokens are those that generation is handed (see `encoding`). What stands before and behind a text
is in `documents`. The text of a special token in a message is text (see `control_text`). What is longer than
sequence_length becomes documents in `long_chats` and `fitting`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from qlora_train.data.chat.chat_format import ChatFormat
from qlora_train.data.chat_tokens import ChatTokenizer, Supervise
from qlora_train.data.content import Chat, Completion, Content, PlainText
from qlora_train.data.control_text import ControlText
from qlora_train.data.documents import Document, Text, TextEnds
from qlora_train.data.encoding import TextEncoder
from qlora_train.data.fitting import TooLong, fit
from qlora_train.data.long_chats import LongChats
from qlora_train.data.notes import Note, Notes
from qlora_train.data.tables import ExampleProblem
from qlora_train.data.tokenizing import encode

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass
class TokenizedExample:
    """One example's documents; none where it has nothing to learn from. `num_tokens`: of its longest text,
    before anything was cut."""

    documents: list[Document] = field(default_factory=list)
    num_tokens: int = 0
    notes: Notes = field(default_factory=Notes)


class ExampleTokenizer:
    """Turns contents into documents of at most `sequence_length` tokens.

    chat_format: how conversations are written; None where there are none. supervise: `completions`;
    `last_turn` for each conversation's last answer; or `all` for every token but the first. too_long: see
    `fitting`. vocabulary_size: rows of the model's embedding, where it is known.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        chat_format: ChatFormat | None,
        *,
        sequence_length: int,
        supervise: Supervise = "completions",
        too_long: TooLong = "cut",
        vocabulary_size: int | None = None,
    ) -> None:
        self.tokenizer, self.vocabulary_size = tokenizer, vocabulary_size
        self._sequence_length, self._too_long = sequence_length, too_long
        self._ends = TextEnds(tokenizer, supervises_all=supervise == "all")
        self._control_text = ControlText(tokenizer)
        self._encoder = TextEncoder(tokenizer)
        self._chats: ChatTokenizer | None = None
        if chat_format is not None:
            self._chats = ChatTokenizer(tokenizer, chat_format, supervise, self._ends)

    @property
    def runs_templates(self) -> bool:
        """Whether conversations are written by a template that came with the model, which is to be run in an
        expendable process."""
        return self._chats is not None and self._chats.format.runs_templates

    def tokenize(self, contents: Sequence[Content]) -> list[TokenizedExample | ExampleProblem]:
        """One result for each content, in order; either all or none are conversations. Raises DataError for a
        tokenizer without EOS, where one is needed."""
        chats = [content for content in contents if isinstance(content, Chat)]
        others = [content for content in contents if not isinstance(content, Chat)]
        assert not (chats and others), "one table has one format"
        found: Sequence[tuple[list[Text], Notes] | ExampleProblem]
        if chats:
            assert self._chats is not None, "conversations need a chat format"
            found = self._chats.tokenize(chats)
        else:
            found = self._plain_texts(others)
        return [
            texts if isinstance(texts, ExampleProblem) else self._example(content, *texts)
            for content, texts in zip(contents, found, strict=True)
        ]

    def _plain_texts(self, contents: Sequence[Completion | PlainText]) -> list[tuple[list[Text], Notes]]:
        """The texts of completions and plain texts."""
        pairs = [
            (content.prompt, content.completion) if isinstance(content, Completion) else ("", content.text)
            for content in contents
        ]
        found = []
        wholes = encode(self.tokenizer, [prompt + answer for prompt, answer in pairs])
        for (prompt, answer), whole in zip(pairs, wholes, strict=True):
            ids, num_prompt, *_ = self._encoder.at_edge(prompt, answer, whole)
            text = self._ends.text(ids, [(num_prompt, len(ids))], adds_eos=True)
            says_control = int(self._control_text.is_in(prompt + answer))
            found.append(([text], Notes({Note.SAYS_CONTROL_TOKENS: says_control})))
        return found

    def _example(
        self, content: Content, texts: list[Text], notes: Notes
    ) -> TokenizedExample | ExampleProblem:
        for text in texts:
            if problem := self._unknown_token(text.document.token_ids):
                return problem
        lengths = [len(text) for text in texts]
        example = TokenizedExample(notes=notes, num_tokens=max(lengths, default=0))
        parts = [texts]
        if example.num_tokens > self._sequence_length:
            if self._too_long == "drop":
                notes[Note.TOO_LONG] += sum(lengths)
                return example
            if isinstance(content, Chat):
                parts = self._shorter_chats(content, texts, notes)
        too_long: TooLong = "split" if isinstance(content, PlainText) else self._too_long
        for part in parts:
            documents = [fit(text, self._sequence_length, too_long, notes) for text in part]
            example.documents += [document for of_text in documents for document in of_text]
            if len(part) > 1:
                sizes = [sum(map(len, of_text)) for of_text in documents]
                notes[Note.SEVERAL_TEXTS] += sum(sizes) - max(sizes)
        if not example.documents:
            notes[Note.UNSUPERVISED] += 1
        return example

    def _shorter_chats(self, chat: Chat, texts: list[Text], notes: Notes) -> list[list[Text]]:
        """The texts of each part. texts: of the whole."""
        assert self._chats is not None
        long_chats, limit = LongChats(self._chats, self._sequence_length), self._sequence_length
        if self._too_long == "split":
            parts = long_chats.split(self._chats.asked_for(chat), texts)
        else:
            parts = [[long_chats.without_first_exchanges(t) if len(t) > limit else t for t in texts]]
        if len(parts) > 1:
            notes[Note.SPLIT] += len(parts)
        elif len(parts[0]) == len(texts):
            notes[Note.PROMPT_CUT] += sum(map(len, texts)) - sum(map(len, parts[0]))
        return [[self._chats.cuttable(t) if len(t) > limit else t for t in part] for part in parts]

    def _unknown_token(self, token_ids: np.ndarray) -> ExampleProblem | None:
        largest = int(token_ids.max(initial=0))
        if self.vocabulary_size is None or largest < self.vocabulary_size:
            return None
        token = self.tokenizer.convert_ids_to_tokens(largest)
        return ExampleProblem(
            f"it holds the token {token!r}, number {largest} of the tokenizer, and the model's embedding has "
            f"{self.vocabulary_size} rows: check that tokenizer and weights belong together."
        )
