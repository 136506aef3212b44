"""Examples -> documents: token ids and, beside each, whether it is supervised (a target of the loss).

A document's whole text is tokenised ONCE and the mask is found by character offsets. Tokenising prompt and
answer apart and joining them would give tokens at the seam that the model never sees in generation. A token
that straddles the boundary belongs to the answer.

    Chat        the template's text; supervised: what the assistant says, with its end-of-turn token
    Completion  BOS + prompt + completion + EOS; supervised: completion and EOS
    PlainText   BOS + text + EOS; all supervised but BOS

BOS: exactly one, at the start. Plain documents get it if the tokenizer defines one; conversations if the
template writes it or the tokenizer puts it before every text by itself; two in a row become one. EOS: a
conversation whose last supervised token is no special token (the template has no end-of-turn token) gets a
supervised EOS, so that the model learns to stop. The text of a special token in a message is text (see
`control_text`).

Longer than sequence_length: the prompt is cut first, from the left (behind BOS; one token always stays, so
that the answer's first token has something to be predicted from), then the end of the answer. A PlainText
is not cut but split into consecutive documents: each begins with BOS, or without one with the last token of
the piece before (not supervised again), so every token is a target once.

Token 0 of a document is never supervised: nothing predicts it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from qlora_train.data.chat import (
    ChatProblem,
    Span,
    prompt_length,
    render,
    render_with_spans,
    require_chat_template,
)
from qlora_train.data.control_text import ControlText, Encoded, unmarked_positions, without_marks
from qlora_train.data.formats import Chat, Completion, Example, PlainText
from qlora_train.data.report import TokenCounts
from qlora_train.data.tables import Origin, RowProblems
from qlora_train.data.tokenizer import special_token_ids
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
    """Documents in row order, `origins[i]` being the row that document i is from."""

    documents: list[Document] = field(default_factory=list)
    origins: list[Origin] = field(default_factory=list)
    counts: TokenCounts = field(default_factory=TokenCounts)


class _Prepared(NamedTuple):
    """An example as text. Characters: `answers` are what the loss may look at, `prompt_end` is where they
    begin.
    """

    origin: Origin
    text: str
    answers: list[Span]
    prompt_end: int
    is_chat: bool
    may_split: bool
    encoded: Encoded | None = None  # where tokenising `text` would not do


class BosRule:
    """When a token sequence gets a BOS, and that it has only one."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.bos_id: int | None = tokenizer.bos_token_id
        self._automatic = self.bos_id is not None and tokenizer("").input_ids[:1] == [self.bos_id]

    def num_to_drop_and_add(self, token_ids: Sequence[int], *, is_chat: bool) -> tuple[int, bool]:
        """(leading tokens to drop, whether to put a BOS before what is left)."""
        if self.bos_id is None:
            return 0, False
        num_leading = next((i for i, token in enumerate(token_ids) if token != self.bos_id), len(token_ids))
        if num_leading:
            return num_leading - 1, False
        return 0, self._automatic or not is_chat

    def apply(self, token_ids: list[int], *, is_chat: bool) -> list[int]:
        num_drop, add = self.num_to_drop_and_add(token_ids, is_chat=is_chat)
        return ([self.bos_id] if add and self.bos_id is not None else []) + token_ids[num_drop:]


def tokenize_examples(
    examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase, *, sequence_length: int, supervise: str
) -> TokenizedRows:
    """Every example as one document of at most `sequence_length` tokens (a long PlainText: as several).

    `supervise`: `completions`, or `all` for every token but the first. Rows without a supervised token are
    left out and counted. Raises DataError for conversations that the template refuses (with their lines), a
    tokenizer without chat template or EOS where one is needed, and when no row has a supervised token.
    """
    if any(isinstance(example.content, Chat) for example in examples):
        require_chat_template(tokenizer)
    return _Tokenization(tokenizer, sequence_length, supervise == "all").run(examples)


class _Tokenization:
    def __init__(self, tokenizer: PreTrainedTokenizerBase, sequence_length: int, supervise_all: bool) -> None:
        self.tokenizer = tokenizer
        self.sequence_length = sequence_length
        self.supervise_all = supervise_all
        self.bos = BosRule(tokenizer)
        self.special_ids = special_token_ids(tokenizer)
        self.control_text = ControlText(tokenizer)
        self.tally = dict.fromkeys(TokenCounts.__dataclass_fields__, 0)

    def run(self, examples: Sequence[Example]) -> TokenizedRows:
        rows = TokenizedRows()
        for prepared, token_ids, starts, ends in self._encode(self._prepare(examples)):
            for document in self._documents(prepared, token_ids, starts, ends):
                rows.documents.append(document)
                rows.origins.append(prepared.origin)
                self.tally["num_tokens"] += len(document)
                self.tally["num_supervised"] += document.num_supervised
        if not rows.documents:
            raise DataError(
                f"None of the {len(examples):,} rows has a supervised token: conversations need assistant "
                "messages, or set data.supervise: all."
            )
        self.tally["num_rows"] = len(examples)
        self.tally["num_documents"] = len(rows.documents)
        rows.counts = TokenCounts(**self.tally)
        return rows

    def _prepare(self, examples: Sequence[Example]) -> list[_Prepared]:
        problems = RowProblems()
        prepared = []
        for example in examples:
            try:
                prepared.append(self._as_text(example))
            except ChatProblem as problem:
                problems.add(example.origin, str(problem))
        problems.raise_if_any()
        return prepared

    def _as_text(self, example: Example) -> _Prepared:
        content = example.content
        if isinstance(content, Chat):
            return self._chat_as_text(example.origin, content)
        if isinstance(content, Completion):
            text, boundary = content.prompt + content.completion, len(content.prompt)
        else:
            text, boundary = content.text, 0
        self.tally["num_rows_saying_control_tokens"] += self.control_text.is_in(text)
        # + 1: some tokenizers report a token of spaces at the very end as empty, at len(text).
        answers = [(boundary, len(text) + 1)]
        return _Prepared(example.origin, text, answers, boundary, False, isinstance(content, PlainText))

    def _chat_as_text(self, origin: Origin, chat: Chat) -> _Prepared:
        if not self.control_text.is_in([chat.messages, chat.tools]):
            return self._rendered(origin, chat)
        marked_chat = self.control_text.marked(chat)
        marked = self._rendered(origin, marked_chat) if marked_chat is not None else None
        encoded = self.control_text.encode(marked.text) if marked is not None else None
        if marked is None or encoded is None:
            self.tally["num_rows_saying_control_tokens"] += 1
            return self._rendered(origin, chat)
        self.tally["num_rows_quoting_control_tokens"] += 1
        position = unmarked_positions(marked.text).tolist()
        position.append(position[-1] + 1)
        return marked._replace(
            text=without_marks(marked.text),
            answers=[(position[start], position[end]) for start, end in marked.answers],
            prompt_end=position[marked.prompt_end],
            encoded=encoded,
        )

    def _rendered(self, origin: Origin, chat: Chat) -> _Prepared:
        if self.supervise_all:
            if chat.unsupervised:
                raise ChatProblem("a message has the weight 0, which data.supervise: all contradicts.")
            text = render(self.tokenizer, chat)
            boundary = prompt_length(self.tokenizer, chat, text)
            return _Prepared(origin, text, [(boundary, len(text) + 1)], boundary, True, False)
        text, answers = render_with_spans(self.tokenizer, chat)
        return _Prepared(origin, text, answers, answers[0][0] if answers else len(text), True, False)

    def _encode(
        self, prepared: Sequence[_Prepared]
    ) -> Iterator[tuple[_Prepared, np.ndarray, np.ndarray, np.ndarray]]:
        """(row, token ids, first and past-the-last character of each token), tokenised in batches."""
        for first in range(0, len(prepared), _TOKENIZER_BATCH):
            batch = prepared[first : first + _TOKENIZER_BATCH]
            encoded = self.tokenizer(
                [row.text for row in batch],
                add_special_tokens=False,
                return_offsets_mapping=True,
                verbose=False,
            )
            for row, token_ids, offsets in zip(
                batch, encoded["input_ids"], encoded["offset_mapping"], strict=True
            ):
                bounds = np.asarray(offsets, dtype=np.int64).reshape(-1, 2)
                found = Encoded(np.asarray(token_ids, dtype=np.int32), bounds[:, 0], bounds[:, 1])
                yield row, *(row.encoded or found)

    def _documents(
        self, row: _Prepared, token_ids: np.ndarray, starts: np.ndarray, ends: np.ndarray
    ) -> list[Document]:
        supervised = np.zeros(len(token_ids), dtype=bool)
        for first, last in row.answers:
            supervised |= (ends > first) & (starts < last)
        num_prompt = int(np.count_nonzero(ends <= row.prompt_end)) if row.prompt_end else 0
        if not supervised.any():
            self.tally["num_unsupervised_rows"] += 1
            return []
        token_ids, supervised = self._with_end(row, token_ids, supervised)
        if self.supervise_all:
            supervised[:] = True
        num_drop, add_bos = self.bos.num_to_drop_and_add(token_ids.tolist(), is_chat=row.is_chat)
        token_ids, supervised = token_ids[num_drop:], supervised[num_drop:]
        if add_bos:
            token_ids = np.concatenate([[self.bos.bos_id], token_ids]).astype(np.int32)
            supervised = np.concatenate([[False], supervised])
        supervised[0] = False
        num_prompt += int(add_bos) - num_drop
        documents = self._fit(row, Document(token_ids, supervised), num_prompt)
        if not any(document.num_supervised for document in documents):
            self.tally["num_unsupervised_rows"] += 1
            return []
        return documents

    def _with_end(
        self, row: _Prepared, token_ids: np.ndarray, supervised: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Sees to it that the last supervised token ends the answer."""
        last = int(np.flatnonzero(supervised)[-1])
        if row.is_chat and self.supervise_all:
            last = self._last_visible(token_ids)
        if row.is_chat and int(token_ids[last]) in self.special_ids:
            return token_ids, supervised
        eos_id = self.tokenizer.eos_token_id
        if eos_id is None:
            raise DataError(
                "The tokenizer defines no EOS token, so answers could never end. Set eos_token in it."
            )
        if int(token_ids[last]) == eos_id:
            return token_ids, supervised
        self.tally["num_chats_without_turn_ends"] += len(row.answers) > 1
        ids = np.append(token_ids[: last + 1], np.int32(eos_id))
        return ids, np.append(supervised[: last + 1], True)

    def _last_visible(self, token_ids: np.ndarray) -> int:
        """The last token that is more than white space."""
        last = len(token_ids) - 1
        while last > 0 and str(self.tokenizer.decode([int(token_ids[last])])).isspace():
            last -= 1
        return last

    def _fit(self, row: _Prepared, document: Document, num_prompt: int) -> list[Document]:
        if len(document) <= self.sequence_length:
            return [document]
        self.tally["num_overlong_rows"] += 1
        if row.may_split:
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
