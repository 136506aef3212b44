"""Contents -> documents: token ids and, beside each, whether it is supervised (a target of the loss).

    Chat        one text, or several, that hold its answers (see `chat_tokens`); supervised: the answers, each
                with the token that stops generation
    Completion  prompt + completion + EOS; supervised: completion and EOS
    PlainText   text + EOS; all supervised

A prompt's tokens are those that generation is handed (see `encoding`). Before a text stands what the
tokenizer itself puts there (BOS, for most), at most one BOS: the template of a conversation may write it,
too. EOS follows where nothing else ends an answer. The text of a special token in a message is text (see
`control_text`). What is longer than sequence_length becomes documents in `long_chats` and `fitting`.

Token 0 of a document is never supervised: nothing predicts it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from qlora_train.data.chat.chat_format import ChatFormat
from qlora_train.data.chat.template import ChatProblem
from qlora_train.data.chat_tokens import ChatTokenizer, Supervise, Tokens
from qlora_train.data.content import Chat, Completion, Content, PlainText
from qlora_train.data.control_text import ControlText
from qlora_train.data.encoding import TextEncoder
from qlora_train.data.fitting import Document, Text, TooLong, fit
from qlora_train.data.long_chats import LongChats
from qlora_train.data.notes import Note
from qlora_train.data.tables import ExampleProblem
from qlora_train.data.tokenizer import BosRule
from qlora_train.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass
class TokenizedExample:
    """One example's documents; none where it has nothing to learn from. `num_tokens`: of its longest text,
    before anything was cut."""

    documents: list[Document] = field(default_factory=list)
    num_tokens: int = 0
    notes: Counter[str] = field(default_factory=Counter)


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
        self._supervises_all = supervise == "all"
        self._bos = BosRule(tokenizer)
        self._control_text = ControlText(tokenizer)
        self._encoder = TextEncoder(tokenizer)
        self._chats = None if chat_format is None else ChatTokenizer(tokenizer, chat_format, supervise)

    def tokenize(self, contents: Sequence[Content]) -> list[TokenizedExample | ExampleProblem]:
        """One result for each content, in order. Raises DataError for a tokenizer without EOS, where one is
        needed."""
        notes = [Counter[str]() for _ in contents]
        examples = zip(contents, self._texts(contents, notes), notes, strict=True)
        return [
            ExampleProblem(str(texts))
            if isinstance(texts, ChatProblem)
            else self._example(content, texts, noted)
            for content, texts, noted in examples
        ]

    def _texts(
        self, contents: Sequence[Content], notes: Sequence[Counter[str]]
    ) -> Iterator[list[Tokens] | ChatProblem]:
        """Of each content, in order."""
        examples = list(zip(contents, notes, strict=True))
        chats = [(content, noted) for content, noted in examples if isinstance(content, Chat)]
        others = [(content, noted) for content, noted in examples if not isinstance(content, Chat)]
        found: Iterator[list[Tokens] | ChatProblem] = iter(())
        if chats:
            assert self._chats is not None, "conversations need a chat format"
            found = iter(self._chats.tokenize([chat for chat, _ in chats], [noted for _, noted in chats]))
        plain = self._plain_texts(others)
        for content in contents:
            yield next(found) if isinstance(content, Chat) else next(plain)

    def _plain_texts(
        self, contents: Sequence[tuple[Completion | PlainText, Counter[str]]]
    ) -> Iterator[list[Tokens]]:
        """Of completions and plain texts, which have no prompt."""
        pairs = [
            (content.prompt, content.completion) if isinstance(content, Completion) else ("", content.text)
            for content, _ in contents
        ]
        wholes = self._encoder.batch([prompt + answer for prompt, answer in pairs]) if pairs else []
        for (prompt, answer), whole, (_, noted) in zip(pairs, wholes, contents, strict=True):
            noted[Note.SAYS_CONTROL_TOKENS] += self._control_text.is_in(prompt + answer)
            ids = whole.token_ids
            num = self._encoder.num_tokens_of_start(whole, prompt + answer, len(prompt)) if prompt else 0
            if num is None:
                before, behind = self._encoder.joined(prompt, answer)
                num, ids = len(before.token_ids), np.concatenate([before.token_ids, behind]).astype(np.int32)
            yield [Tokens(ids, [(num, len(ids))], adds_eos=True)]

    def _example(
        self, content: Content, found: list[Tokens], notes: Counter[str]
    ) -> TokenizedExample | ExampleProblem:
        texts = [self._text(tokens) for tokens in found]
        for text in texts:
            if problem := self._unknown_token(text.document.token_ids):
                return problem
        lengths = [len(text.document) for text in texts]
        example = TokenizedExample(notes=notes, num_tokens=max(lengths, default=0))
        parts = [texts]
        if example.num_tokens > self._sequence_length:
            if self._too_long == "drop":
                notes[Note.TOO_LONG] += sum(lengths)
                return example
            if isinstance(content, Chat):
                parts = self._shorter_chats(content, found, texts, notes)
        for part in parts:
            documents = [self._fitted(text, content, notes) for text in part]
            example.documents += [document for of_text in documents for document in of_text]
            if len(part) > 1:
                sizes = [sum(map(len, of_text)) for of_text in documents]
                notes[Note.SEVERAL_TEXTS] += sum(sizes) - max(sizes)
        if not example.documents:
            notes[Note.UNSUPERVISED] += 1
        return example

    def _fitted(self, text: Text, content: Content, notes: Counter[str]) -> list[Document]:
        too_long: TooLong = "split" if isinstance(content, PlainText) else self._too_long
        return fit(text, self._sequence_length, too_long, notes)

    def _shorter_chats(
        self, chat: Chat, found: list[Tokens], texts: list[Text], notes: Counter[str]
    ) -> list[list[Text]]:
        """The texts of each part. found, texts: of the whole."""
        assert self._chats is not None
        long_chats = LongChats(self._chats, self._fits)
        if self._too_long == "split":
            parts = long_chats.split(self._chats.asked_for(chat), found)
        else:
            is_long = [len(text.document) > self._sequence_length for text in texts]
            parts = [
                [
                    long_chats.without_first_exchanges(tokens) if long else tokens
                    for tokens, long in zip(found, is_long, strict=True)
                ]
            ]
        if len(parts) > 1:
            notes[Note.SPLIT] += len(parts)
        elif len(parts[0]) == len(texts):
            after = [self._text(tokens) for tokens in parts[0]]
            before = sum(len(text.document) for text in texts)
            notes[Note.PROMPT_CUT] += before - sum(len(text.document) for text in after)
        return [[self._cuttable_text(tokens) for tokens in part] for part in parts]

    def _cuttable_text(self, tokens: Tokens) -> Text:
        if self._fits(tokens):
            return self._text(tokens)
        assert self._chats is not None
        return self._text(tokens, cuttable=self._chats.tokens_to_cut(tokens))

    def _fits(self, tokens: Tokens) -> bool:
        return len(self._text(tokens).document) <= self._sequence_length

    def _text(self, tokens: Tokens, cuttable: np.ndarray | None = None) -> Text:
        """With what stands before a text, and EOS where nothing else ends it. cuttable: of its tokens, those
        that a cut may take."""
        ids, answers = self._ended(tokens)
        supervised = np.zeros(len(ids), dtype=bool)
        for first, last in answers:
            supervised[first:last] = True
        num_drop, before = self._bos.to_drop_and_add(ids.tolist())
        ids = np.concatenate([before, ids[num_drop:]]).astype(np.int32)
        supervised = np.concatenate([np.zeros(len(before), dtype=bool), supervised[num_drop:]])
        if self._supervises_all:
            supervised[:] = True
        supervised[:1] = False
        shift = len(before) - num_drop
        begins_with_bos = len(ids) > 0 and int(ids[0]) == self._bos.bos_id
        num_before = max(len(before), int(begins_with_bos))
        if cuttable is not None:
            cuttable = cuttable[cuttable >= num_drop] + shift if len(cuttable) else None
        return Text(
            Document(ids, supervised), min(first for first, _ in answers) + shift, num_before, cuttable
        )

    def _ended(self, tokens: Tokens) -> tuple[np.ndarray, list[tuple[int, int]]]:
        """Token ids and answers, with EOS behind the last one if nothing else ends it."""
        if not tokens.adds_eos:
            return tokens.ids, tokens.answers
        eos_id: int | None = self.tokenizer.eos_token_id
        if eos_id is None:
            raise DataError(
                "The tokenizer defines no EOS token, so answers could never end. Set eos_token in it."
            )
        if len(tokens.ids) and int(tokens.ids[-1]) == eos_id:
            return tokens.ids, tokens.answers
        (start, end), *others = tokens.answers
        return np.append(tokens.ids, np.int32(eos_id)), [(start, end + 1), *others]

    def _unknown_token(self, token_ids: np.ndarray) -> ExampleProblem | None:
        largest = int(token_ids.max(initial=0))
        if self.vocabulary_size is None or largest < self.vocabulary_size:
            return None
        token = self.tokenizer.convert_ids_to_tokens(largest)
        return ExampleProblem(
            f"it holds the token {token!r}, number {largest} of the tokenizer, and the model's embedding has "
            f"{self.vocabulary_size} rows: check that tokenizer and weights belong together."
        )
