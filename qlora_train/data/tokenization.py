"""Examples -> documents: token ids and, beside each, whether it is supervised (a target of the loss).

    Chat        one piece (prompt, answer) per answer (see `chat`); supervised: the answers, each with the
                token that stops generation
    Completion  prompt + completion + EOS; supervised: completion and EOS
    PlainText   text + EOS; all supervised but the first token

An answer is trained behind exactly the tokens that generation is handed (see `encoding`). From the last
answer of a conversation back, an answer shares a document where the document's token ids begin with its
prompt's and its own; else it gets a document to itself. A document ends with its last answer: nothing behind
it is kept.

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

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from qlora_train.data.chat import ChatCounts, ChatFormat, ChatProblem, Piece
from qlora_train.data.control_text import ControlText, Encoded, without_marks
from qlora_train.data.encoding import CannotEncode, TextEncoder
from qlora_train.data.formats import Chat, Completion, Example, PlainText
from qlora_train.data.report import TokenCounts
from qlora_train.data.tables import Origin, RowProblems
from qlora_train.data.tokenizer import BosRule, special_token_ids
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
    """Documents in row order, `origins[i]` being the row that document i is from. `chat`: what became of the
    conversations."""

    documents: list[Document] = field(default_factory=list)
    origins: list[Origin] = field(default_factory=list)
    counts: TokenCounts = field(default_factory=TokenCounts)
    chat: ChatCounts = field(default_factory=ChatCounts)


class _Prepared(NamedTuple):
    """An example as pieces. groups: each a text's pieces, the one that is the whole text first."""

    origin: Origin
    groups: list[list[Piece]]
    is_chat: bool
    may_split: bool
    plain: list[list[Piece]] | None = None  # without marks, should the marked texts not be exact


class Tokens(NamedTuple):
    """ids int32 [n]; answers: (first token, past the last) of each answer."""

    ids: np.ndarray
    answers: list[tuple[int, int]]


def tokenize_examples(
    examples: Sequence[Example],
    tokenizer: PreTrainedTokenizerBase,
    *,
    sequence_length: int,
    supervise: str,
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
        supervise: str,
        chat_format: ChatFormat | None,
    ) -> None:
        self.tokenizer = tokenizer
        self.sequence_length = sequence_length
        self.supervise = supervise
        self.chat_format = chat_format
        self.bos = BosRule(tokenizer)
        self.special_ids = special_token_ids(tokenizer)
        self.control_text = ControlText(tokenizer)
        self.encoder = TextEncoder(tokenizer)
        self.encoder_of_marked = TextEncoder(tokenizer, self.control_text)
        self.tally = dict.fromkeys(TokenCounts.__dataclass_fields__, 0)
        self.chat = ChatCounts()

    def run(self, examples: Sequence[Example]) -> TokenizedRows:
        rows = TokenizedRows(chat=self.chat)
        for prepared, texts in self._encode(self._prepare(examples)):
            documents = [document for text in texts for document in self._documents(prepared, text)]
            if not documents:
                self.tally["num_unsupervised_rows"] += 1
            for document in documents:
                rows.documents.append(document)
                rows.origins.append(prepared.origin)
                self.tally["num_tokens"] += len(document)
                self.tally["num_supervised"] += document.num_supervised
            if prepared.is_chat and documents:
                self.chat.num_chats += 1
                self.chat.num_texts += len(texts)
                self.chat.num_tokens += sum(len(text.ids) for text in texts)
                self.chat.num_tokens_of_longest += max(len(text.ids) for text in texts)
        if not rows.documents:
            raise DataError(
                f"None of the {len(examples):,} rows has a supervised token: conversations need assistant "
                "messages behind a question, or set data.supervise: all."
            )
        if self.chat.num_chats and self.chat_format is not None:
            self.chat.notes = {**dict.fromkeys(self.chat_format.lines()), **self.chat.notes}
        self.tally["num_rows"] = len(examples)
        self.tally["num_documents"] = len(rows.documents)
        rows.counts = TokenCounts(**self.tally)
        return rows

    def _prepare(self, examples: Sequence[Example]) -> list[_Prepared]:
        problems = RowProblems()
        prepared = []
        for example in examples:
            try:
                prepared.append(self._as_pieces(example))
            except ChatProblem as problem:
                problems.add(example.origin, str(problem))
        problems.raise_if_any()
        return prepared

    def _as_pieces(self, example: Example) -> _Prepared:
        content = example.content
        if isinstance(content, Chat):
            return self._chat_as_pieces(example.origin, content)
        if isinstance(content, Completion):
            piece = Piece(content.prompt, content.completion, adds_eos=True)
        else:
            piece = Piece("", content.text, adds_eos=True)
        self.tally["num_rows_saying_control_tokens"] += self.control_text.is_in(piece.text)
        return _Prepared(example.origin, [[piece]], False, isinstance(content, PlainText))

    def _chat_as_pieces(self, origin: Origin, chat: Chat) -> _Prepared:
        counts = ChatCounts()
        pieces = self._pieces(chat, counts)
        self.chat.add(counts)
        groups = _grouped(pieces)
        if not self.control_text.is_in([chat.messages, chat.tools]):
            return _Prepared(origin, groups, True, False)
        try:
            marked = self._pieces(
                Chat(self.control_text.mark(chat.messages), self.control_text.mark(chat.tools)), ChatCounts()
            )
        except ChatProblem:  # a template that knows what a content is, and the marked one is not
            marked = []
        if [_unmarked(piece) for piece in marked] != pieces:
            self.tally["num_rows_saying_control_tokens"] += 1
            return _Prepared(origin, groups, True, False)
        return _Prepared(origin, _grouped(marked), True, False, plain=groups)

    def _pieces(self, chat: Chat, counts: ChatCounts) -> list[Piece]:
        assert self.chat_format is not None, "conversations need a chat format"
        writer = self.chat_format.writer(with_tools=bool(chat.tools))
        turns = [i for i, message in enumerate(chat.messages) if message["role"] == "assistant"]
        trained = [turn for turn in turns if chat.messages[turn].get("train", True)]
        if wrong := [i for i, m in enumerate(chat.messages) if m.get("train") and m["role"] != "assistant"]:
            raise ChatProblem(
                f"message {wrong[0] + 1} ({chat.messages[wrong[0]]['role']}) is to be trained on; only what "
                "the assistant says can be. Remove its flag, or set data.supervise: all."
            )
        if self.supervise == "all":
            if len(trained) < len(turns):
                raise ChatProblem(
                    "a message is not to be trained on (train, loss or weight), which data.supervise: all "
                    "contradicts."
                )
            return [writer.whole(chat.messages, chat.tools, counts)]
        if self.supervise == "last_turn":
            trained = [turn for turn in trained if turn == turns[-1]]
        return writer.pieces(chat.messages, chat.tools, trained, counts)

    def _encode(self, rows: Sequence[_Prepared]) -> Iterator[tuple[_Prepared, list[Tokens]]]:
        """Each row with the tokens of its texts; texts without marks are tokenised in batches."""
        at = 0
        while at < len(rows):
            end, num_texts = at, 0
            while end < len(rows) and num_texts < _TOKENIZER_BATCH:
                num_texts += len(rows[end].groups)
                end += 1
            plain = [group[0].text for row in rows[at:end] if row.plain is None for group in row.groups]
            encoded = dict(zip(plain, self.encoder.batch(plain), strict=True)) if plain else {}
            for row in rows[at:end]:
                yield row, self._tokens_of_row(row, encoded)
            at = end

    def _tokens_of_row(self, row: _Prepared, encoded: dict[str, Encoded]) -> list[Tokens]:
        if row.plain is None:
            return [
                tokens for group in row.groups for tokens in self._tokens_of(group, self.encoder, encoded)
            ]
        try:
            tokens = [each for g in row.groups for each in self._tokens_of(g, self.encoder_of_marked, {})]
        except CannotEncode:
            self.tally["num_rows_saying_control_tokens"] += 1
            return [each for group in row.plain for each in self._tokens_of(group, self.encoder, {})]
        self.tally["num_rows_quoting_control_tokens"] += 1
        return tokens

    def _tokens_of(
        self, group: list[Piece], encoder: TextEncoder, encoded: dict[str, Encoded]
    ) -> Iterator[Tokens]:
        """The group's text and, where a piece's tokens are not how the text's begin, texts of their own.
        encoded: texts whose tokens are known."""
        first, *others = group
        text = first.text
        whole = encoded[text] if text in encoded else encoder.one(text)
        num_prompt = encoder.num_tokens_of_start(whole, text, len(first.prompt)) if first.prompt else 0
        ids = whole.token_ids
        if num_prompt is None:
            whole, answer_ids = encoder.joined(first.prompt, first.answer)
            text, num_prompt = first.prompt, len(whole.token_ids)
            ids = np.concatenate([whole.token_ids, answer_ids]).astype(np.int32)
        answers, left = [(num_prompt, len(ids))], []
        for piece in others:
            start = encoder.num_tokens_of_start(whole, text, len(piece.prompt))
            end = encoder.num_tokens_of_start(whole, text, len(piece.text))
            if start is None or end is None or end <= start:
                left.append(piece)
            else:
                answers.append((start, end))
        for piece in reversed(left):  # earlier answers first
            yield from self._tokens_of([piece], encoder, encoded)
        yield self._ended(Tokens(ids, answers), first.adds_eos)

    def _ended(self, tokens: Tokens, adds_eos: bool) -> Tokens:
        """With EOS behind it, if nothing else ends the answer."""
        if not adds_eos or not len(tokens.ids):
            return tokens
        eos_id = self.tokenizer.eos_token_id
        if eos_id is None:
            raise DataError(
                "The tokenizer defines no EOS token, so answers could never end. Set eos_token in it."
            )
        if int(tokens.ids[-1]) == eos_id:
            return tokens
        (start, end), *others = tokens.answers
        return Tokens(np.append(tokens.ids, np.int32(eos_id)), [(start, end + 1), *others])

    def _documents(self, row: _Prepared, tokens: Tokens) -> list[Document]:
        ids = tokens.ids
        supervised = np.zeros(len(ids), dtype=bool)
        for first, last in tokens.answers:
            supervised[first:last] = True
        if not supervised.any():
            return []
        num_drop, before = self.bos.to_drop_and_add(ids.tolist())
        ids = np.concatenate([before, ids[num_drop:]]).astype(np.int32)
        supervised = np.concatenate([np.zeros(len(before), dtype=bool), supervised[num_drop:]])
        if self.supervise == "all":
            supervised[:] = True
        supervised[0] = False
        num_prompt = min(first for first, _ in tokens.answers) + len(before) - num_drop
        documents = self._fit(row, Document(ids, supervised), num_prompt)
        return documents if any(document.num_supervised for document in documents) else []

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


def _grouped(pieces: Sequence[Piece]) -> list[list[Piece]]:
    """From the last piece back, each with the first text that begins with its own."""
    groups: list[list[Piece]] = []
    for piece in reversed(pieces):
        fitting = (group for group in groups if not piece.adds_eos and group[0].text.startswith(piece.text))
        if (group := next(fitting, None)) is not None:
            group.append(piece)
        else:
            groups.append([piece])
    return groups[::-1]


def _unmarked(piece: Piece) -> Piece:
    return Piece(without_marks(piece.prompt), without_marks(piece.answer), piece.adds_eos)
