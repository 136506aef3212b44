"""Examples -> documents: token ids and, beside each, whether it is supervised (a target of the loss).

    Chat        one text, or several, that hold its answers (see `chat_tokens`); supervised: the answers, each
                with the token that stops generation
    Completion  prompt + completion + EOS; supervised: completion and EOS
    PlainText   text + EOS; all supervised but the first token

BOS: what the tokenizer itself puts before a text, at most one. A conversation whose template writes it gets
no other. EOS follows where nothing else ends an answer. The text of a special token in a message is text
(see `control_text`).

Longer than sequence_length: the prompt is cut first, from the left (behind BOS; one token always stays, so
that the answer's first token has something to be predicted from), then the end of the answer. A PlainText
is not cut but split into consecutive documents: each begins with BOS, or without one with the last token of
the piece before (not supervised again), so every token is a target once.

Token 0 of a document is never supervised: nothing predicts it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from qlora_train.data.chat import ChatFormat, ChatProblem
from qlora_train.data.chat_tokens import (
    QUOTES_CONTROL_TOKENS,
    SAYS_CONTROL_TOKENS,
    ChatTokenizer,
    Supervise,
    Tokens,
)
from qlora_train.data.control_text import ControlText
from qlora_train.data.encoding import TextEncoder
from qlora_train.data.formats import Chat, Completion, Example, PlainText
from qlora_train.data.report import TokenCounts
from qlora_train.data.tables import Origin, RowProblems
from qlora_train.data.tokenizer import BosRule
from qlora_train.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_TOKENIZER_BATCH = 512


@dataclass(frozen=True)
class Document:
    """token_ids int32 [n]; supervised bool [n]: token i is a target. supervised[0] is always False."""

    token_ids: np.ndarray
    supervised: np.ndarray

    def __len__(self) -> int:
        return len(self.token_ids)

    @property
    def num_supervised(self) -> int:
        return int(np.count_nonzero(self.supervised))


@dataclass
class TokenizedRows:
    """Documents in row order, `origins[i]` being the row that document i is from. `notes`: by note, how many
    rows it is true of; `amounts`: their amounts, summed. `remarks`: what is to be said of all."""

    documents: list[Document] = field(default_factory=list)
    origins: list[Origin] = field(default_factory=list)
    counts: TokenCounts = field(default_factory=TokenCounts)
    notes: Counter[str] = field(default_factory=Counter)
    amounts: Counter[str] = field(default_factory=Counter)
    remarks: tuple[str, ...] = ()


def tokenize_examples(
    examples: Sequence[Example],
    tokenizer: PreTrainedTokenizerBase,
    *,
    sequence_length: int,
    supervise: Supervise,
    chat_format: ChatFormat | None,
) -> TokenizedRows:
    """Every example as documents of at most `sequence_length` tokens.

    `supervise`: `completions`; `last_turn` for each conversation's last answer; or `all` for every token but
    the first. `chat_format`: how conversations are written; None where there are none. Rows without a
    supervised token are left out and counted. Raises DataError for conversations that the template refuses
    (with their lines), a tokenizer without EOS where one is needed, and when no row has a supervised token.
    """
    return _Tokenization(tokenizer, sequence_length, supervise, chat_format).run(examples)


class _Tokenization:
    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        sequence_length: int,
        supervise: Supervise,
        chat_format: ChatFormat | None,
    ) -> None:
        self.tokenizer = tokenizer
        self.sequence_length = sequence_length
        self.supervise = supervise
        self.chat_format = chat_format
        self.chats = None if chat_format is None else ChatTokenizer(tokenizer, chat_format, supervise)
        self.bos = BosRule(tokenizer)
        self.control_text = ControlText(tokenizer)
        self.encoder = TextEncoder(tokenizer)
        self.tally = dict.fromkeys(TokenCounts.__dataclass_fields__, 0)

    def run(self, examples: Sequence[Example]) -> TokenizedRows:
        rows, problems = TokenizedRows(), RowProblems()
        for first in range(0, len(examples), _TOKENIZER_BATCH):
            batch = examples[first : first + _TOKENIZER_BATCH]
            notes = [Counter[str]() for _ in batch]
            for example, texts, noted in zip(batch, self._texts(batch, notes), notes, strict=True):
                if isinstance(texts, ChatProblem):
                    problems.add(example.origin, str(texts))
                    continue
                self._add(rows, example, texts)
                rows.notes.update(note for note, amount in noted.items() if amount)
                rows.amounts.update(noted)
        problems.raise_if_any()
        if not rows.documents:
            raise DataError(
                f"None of the {len(examples):,} rows has a supervised token: conversations need assistant "
                "messages behind a question, or set data.supervise: all."
            )
        self.tally["num_rows"] = len(examples)
        self.tally["num_documents"] = len(rows.documents)
        self.tally["num_rows_saying_control_tokens"] = rows.notes.pop(SAYS_CONTROL_TOKENS, 0)
        self.tally["num_rows_quoting_control_tokens"] = rows.notes.pop(QUOTES_CONTROL_TOKENS, 0)
        rows.counts = TokenCounts(**self.tally)
        rows.remarks = () if self.chat_format is None else tuple(self.chat_format.remarks())
        return rows

    def _add(self, rows: TokenizedRows, example: Example, texts: list[Tokens]) -> None:
        may_split = isinstance(example.content, PlainText)
        documents = [document for text in texts for document in self._documents(text, may_split)]
        self.tally["num_unsupervised_rows"] += not documents
        for document in documents:
            rows.documents.append(document)
            rows.origins.append(example.origin)
            self.tally["num_tokens"] += len(document)
            self.tally["num_supervised"] += document.num_supervised

    def _texts(
        self, examples: Sequence[Example], notes: Sequence[Counter[str]]
    ) -> Iterator[list[Tokens] | ChatProblem]:
        """Of each example, in order."""
        are_chats = [isinstance(example.content, Chat) for example in examples]
        chats = [example.content for example in examples if isinstance(example.content, Chat)]
        chat_notes = [noted for noted, is_chat in zip(notes, are_chats, strict=True) if is_chat]
        found: Iterator[list[Tokens] | ChatProblem] = iter(())
        if chats:
            assert self.chats is not None, "conversations need a chat format"
            found = iter(self.chats.tokenize(chats, chat_notes))
        pairs, plain_notes = [], []
        for example, noted in zip(examples, notes, strict=True):
            content = example.content
            if isinstance(content, Completion):
                pairs.append((content.prompt, content.completion))
            elif isinstance(content, PlainText):
                pairs.append(("", content.text))
            else:
                continue
            plain_notes.append(noted)
        plain = iter(self._plain_texts(pairs, plain_notes))
        for is_chat in are_chats:
            yield next(found) if is_chat else next(plain)

    def _plain_texts(
        self, pairs: Sequence[tuple[str, str]], notes: Sequence[Counter[str]]
    ) -> Iterator[list[Tokens]]:
        """(prompt, answer) -> tokens, the prompt's as generation is handed them."""
        if not pairs:
            return
        wholes = self.encoder.batch([prompt + answer for prompt, answer in pairs])
        for (prompt, answer), whole, noted in zip(pairs, wholes, notes, strict=True):
            noted[SAYS_CONTROL_TOKENS] += self.control_text.is_in(prompt + answer)
            ids = whole.token_ids
            num = self.encoder.num_tokens_of_start(whole, prompt + answer, len(prompt)) if prompt else 0
            if num is None:
                before, behind = self.encoder.joined(prompt, answer)
                num, ids = len(before.token_ids), np.concatenate([before.token_ids, behind]).astype(np.int32)
            yield [Tokens(ids, [(num, len(ids))], adds_eos=True)]

    def _documents(self, text: Tokens, may_split: bool) -> list[Document]:
        ids, answers = self._ended(text)
        supervised = np.zeros(len(ids), dtype=bool)
        for first, last in answers:
            supervised[first:last] = True
        if not supervised.any():
            return []
        num_drop, before = self.bos.to_drop_and_add(ids.tolist())
        ids = np.concatenate([before, ids[num_drop:]]).astype(np.int32)
        supervised = np.concatenate([np.zeros(len(before), dtype=bool), supervised[num_drop:]])
        if self.supervise == "all":
            supervised[:] = True
        supervised[0] = False
        num_prompt = min(first for first, _ in answers) + len(before) - num_drop
        documents = self._fit(may_split, Document(ids, supervised), num_prompt)
        return documents if any(document.num_supervised for document in documents) else []

    def _ended(self, text: Tokens) -> tuple[np.ndarray, list[tuple[int, int]]]:
        """Token ids and answers, with EOS behind the last one if nothing else ends it."""
        if not text.adds_eos or not len(text.ids):
            return text.ids, text.answers
        eos_id = self.tokenizer.eos_token_id
        if eos_id is None:
            raise DataError(
                "The tokenizer defines no EOS token, so answers could never end. Set eos_token in it."
            )
        if int(text.ids[-1]) == eos_id:
            return text.ids, text.answers
        (start, end), *others = text.answers
        return np.append(text.ids, np.int32(eos_id)), [(start, end + 1), *others]

    def _fit(self, may_split: bool, document: Document, num_prompt: int) -> list[Document]:
        if len(document) <= self.sequence_length:
            return [document]
        self.tally["num_overlong_rows"] += 1
        if may_split:
            self.tally["num_texts_split"] += 1
            return self._split(document)
        return [self._cut(document, num_prompt)]

    def _cut(self, document: Document, num_prompt: int) -> Document:
        """Prompt from the left behind BOS (keeping one token), then the answer's end."""
        excess = len(document) - self.sequence_length
        begins_with_bos = int(document.token_ids[0]) == self.bos.bos_id
        num_left = min(excess, max(num_prompt - 1, 0))
        first = 1 if begins_with_bos else 0
        kept = np.r_[0:first, first + num_left : len(document)][: self.sequence_length]
        self.tally["num_prompts_cut"] += num_left > 0
        self.tally["num_answers_cut"] += num_left < excess
        self.tally["num_tokens_cut"] += excess
        supervised = document.supervised[kept]
        supervised[0] = False
        return Document(document.token_ids[kept], supervised)

    def _split(self, document: Document) -> list[Document]:
        """Pieces of sequence_length - 1 new tokens behind one token of context: BOS, or the token before
        them.
        """
        token_ids, step = document.token_ids, self.sequence_length - 1
        begins_with_bos = int(token_ids[0]) == self.bos.bos_id
        pieces = []
        for first in range(1, len(token_ids), step):
            head = token_ids[:1] if begins_with_bos else token_ids[first - 1 : first]
            ids = np.concatenate([head, token_ids[first : first + step]])
            supervised = np.ones(len(ids), dtype=bool)
            supervised[0] = False
            pieces.append(Document(ids, supervised))
        return pieces
