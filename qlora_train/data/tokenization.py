"""Contents -> documents: token ids and, beside each, whether it is supervised (a target of the loss).

    Chat        the template's text; supervised: what the assistant says, with its end-of-turn token
    Completion  prompt + completion + EOS; supervised: completion and EOS
    PlainText   text + EOS; all supervised

A conversation's text is tokenised once and the mask is found by character offsets; prompt and completion are
joined as generation meets them (see `seams`). BOS: what the tokenizer itself does with a text, and never two
in a row; the template of a conversation may write it too. EOS: a conversation whose last supervised token is
no special token (the template has no end-of-turn token) gets a supervised EOS, so that the model learns to
stop. The text of a special token in a message is text (see `control_text`). What is longer than
sequence_length becomes documents in `fitting`.

Token 0 of a document is never supervised: nothing predicts it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from qlora_train.data.chat import (
    ChatProblem,
    Span,
    prompt_frame,
    prompt_length,
    render,
    render_with_spans,
    require_chat_template,
)
from qlora_train.data.content import Chat, Completion, Content, PlainText
from qlora_train.data.control_text import ControlText, Encoded, unmarked_positions, without_marks
from qlora_train.data.fitting import Document, Text, TooLong, fit
from qlora_train.data.report import Note
from qlora_train.data.seams import joined_at_seams
from qlora_train.data.tables import RowProblem
from qlora_train.data.tokenizer import special_token_ids
from qlora_train.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass
class TokenizedRow:
    """One row's documents; none where it has nothing to learn from. `num_tokens`: of its longest text, before
    anything was cut."""

    documents: list[Document] = field(default_factory=list)
    num_tokens: int = 0
    notes: Counter[str] = field(default_factory=Counter)


class _Prepared(NamedTuple):
    """A conversation as text. Characters: `answers` are what the loss may look at, `prompt_end` is where they
    begin.
    """

    chat: Chat
    text: str
    answers: list[Span]
    prompt_end: int
    encoded: Encoded | None = None  # where tokenising `text` would not do


class BosRule:
    """When a token sequence gets a BOS, and that it has only one."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.bos_id: int | None = tokenizer.bos_token_id
        self._automatic = self.bos_id is not None and tokenizer("").input_ids[:1] == [self.bos_id]

    def num_to_drop_and_add(self, token_ids: Sequence[int]) -> tuple[int, bool]:
        """(leading tokens to drop, whether to put a BOS before what is left)."""
        if self.bos_id is None:
            return 0, False
        num_leading = next((i for i, token in enumerate(token_ids) if token != self.bos_id), len(token_ids))
        if num_leading:
            return num_leading - 1, False
        return 0, self._automatic

    def apply(self, token_ids: list[int]) -> list[int]:
        num_drop, add = self.num_to_drop_and_add(token_ids)
        return ([self.bos_id] if add and self.bos_id is not None else []) + token_ids[num_drop:]


class RowTokenizer:
    """Turns contents into documents of at most `sequence_length` tokens.

    supervise: `completions`, or `all` for every token but the first. too_long: see `fitting`.
    vocabulary_size: rows of the model's embedding, where it is known. Raises DataError for a tokenizer
    without EOS.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        sequence_length: int,
        supervise: str = "completions",
        too_long: TooLong = "cut",
        vocabulary_size: int | None = None,
    ) -> None:
        self.tokenizer = tokenizer
        self.sequence_length, self.too_long = sequence_length, too_long
        self.supervise_all = supervise == "all"
        self.vocabulary_size = vocabulary_size
        self.bos = BosRule(tokenizer)
        self.special_ids = special_token_ids(tokenizer)
        self.control_text = ControlText(tokenizer)

    def tokenize(self, contents: Sequence[Content]) -> list[TokenizedRow | RowProblem]:
        """One result for each content, in order. Raises DataError where the tokenizer lacks what all rows
        need: a chat template for conversations, an EOS."""
        if any(isinstance(content, Chat) for content in contents):
            require_chat_template(self.tokenizer)
        notes = [Counter[str]() for _ in contents]
        texts: list[list[Text] | RowProblem] = [[] for _ in contents]
        self._add_plain(contents, texts, notes)
        self._add_chats(contents, texts, notes)
        return [self._row(found, noted) for found, noted in zip(texts, notes, strict=True)]

    def _row(self, texts: list[Text] | RowProblem, notes: Counter[str]) -> TokenizedRow | RowProblem:
        if isinstance(texts, RowProblem):
            return texts
        row = TokenizedRow(notes=notes, num_tokens=max((len(text.document) for text in texts), default=0))
        for text in texts:
            if problem := self._unknown_token(text.document.token_ids):
                return problem
            row.documents += fit(text, self.sequence_length, self.too_long, notes)
        if not row.documents and not notes[Note.TOO_LONG]:
            notes[Note.UNSUPERVISED] += 1
        return row

    def _unknown_token(self, token_ids: np.ndarray) -> RowProblem | None:
        largest = int(token_ids.max(initial=0))
        if self.vocabulary_size is None or largest < self.vocabulary_size:
            return None
        token = self.tokenizer.convert_ids_to_tokens(largest)
        return RowProblem(
            f"it holds the token {token!r}, number {largest} of the tokenizer, and the model's embedding has "
            f"{self.vocabulary_size} rows: check that tokenizer and weights belong together."
        )

    def _add_plain(
        self,
        contents: Sequence[Content],
        texts: list[list[Text] | RowProblem],
        notes: list[Counter[str]],
    ) -> None:
        """Completions and plain texts; these have no prompt."""
        indices = [i for i, content in enumerate(contents) if not isinstance(content, Chat)]
        pairs = []
        for i in indices:
            content = contents[i]
            assert isinstance(content, Completion | PlainText)
            if isinstance(content, PlainText):
                pairs.append(("", content.text))
            else:
                pairs.append((content.prompt, content.completion))
            notes[i][Note.SAYS_CONTROL_TOKENS] += self.control_text.is_in("".join(pairs[-1]))
        for i, (ids, num_prompt) in zip(indices, joined_at_seams(self.tokenizer, pairs), strict=True):
            num_drop, add_bos = self.bos.num_to_drop_and_add(ids)
            head = [self.bos.bos_id] if add_bos and self.bos.bos_id is not None else []
            token_ids = np.array([*head, *ids[num_drop:]], dtype=np.int32)
            num_prompt += len(head) - num_drop
            supervised = np.arange(len(token_ids)) >= (0 if self.supervise_all else num_prompt)
            document = self._ended(token_ids, supervised)
            begins_with_bos = int(document.token_ids[0]) == self.bos.bos_id
            is_plain = isinstance(contents[i], PlainText)
            texts[i] = [Text(document, num_prompt, num_head=int(begins_with_bos), is_plain=is_plain)]

    def _ended(self, token_ids: np.ndarray, supervised: np.ndarray) -> Document:
        """With EOS as the last supervised token, and token 0 not supervised."""
        eos_id = self._eos_id()
        if not len(token_ids) or int(token_ids[-1]) != eos_id:
            token_ids = np.append(token_ids, np.int32(eos_id))
            supervised = np.append(supervised, True)
        supervised[0] = False
        return Document(token_ids, supervised)

    def _eos_id(self) -> int:
        eos_id: int | None = self.tokenizer.eos_token_id
        if eos_id is None:
            raise DataError(
                "The tokenizer defines no EOS token, so answers could never end. Set eos_token in it."
            )
        return eos_id

    def _add_chats(
        self,
        contents: Sequence[Content],
        texts: list[list[Text] | RowProblem],
        notes: list[Counter[str]],
    ) -> None:
        prepared: list[tuple[int, _Prepared]] = []
        for i, content in enumerate(contents):
            if not isinstance(content, Chat):
                continue
            try:
                prepared.append((i, self._chat_as_text(content, notes[i])))
            except ChatProblem as problem:
                texts[i] = RowProblem(str(problem))
        for (i, chat), encoded in zip(prepared, self._encode([chat for _, chat in prepared]), strict=True):
            texts[i] = self._chat_texts(chat, encoded, notes[i])

    def _chat_texts(self, row: _Prepared, encoded: Encoded, notes: Counter[str]) -> list[Text]:
        text = self._chat_text(row, encoded, notes)
        if text is None:
            return []
        if self.too_long != "split" or len(text.document) <= self.sequence_length:
            return [text]
        first, rest = self._largest_part_that_fits(row.chat)
        if rest is None:
            return [text]
        notes[Note.SPLIT] += 1
        return [found for part in (first, rest) for found in self._again(part, notes)]

    def _again(self, chat: Chat, notes: Counter[str]) -> list[Text]:
        row = self._chat_as_text(chat, Counter())
        return self._chat_texts(row, next(self._encode([row])), notes)

    def _largest_part_that_fits(self, chat: Chat) -> tuple[Chat, Chat | None]:
        """The longest beginning of whole exchanges that fits (one at least), and what is left, behind
        the same system prompt. Exchanges are cut before a question."""
        messages = chat.messages
        system = messages[:1] if messages[0]["role"] == "system" else ()
        roles = [message["role"] for message in messages]
        edges = [i for i in range(1, len(roles)) if roles[i] == "user" and "assistant" in roles[:i]]
        if not edges:
            return chat, None
        fitting, too_many = 0, len(edges)  # how many exchanges behind the first fit
        while fitting + 1 < too_many:
            middle = (fitting + too_many) // 2
            part = self._chat_as_text(replace(chat, messages=messages[: edges[middle]]), Counter())
            num_tokens = len(next(self._encode([part])).token_ids) + 2  # BOS and EOS may be added
            if num_tokens <= self.sequence_length:
                fitting = middle
            else:
                too_many = middle
        edge = edges[fitting]
        return replace(chat, messages=messages[:edge]), replace(chat, messages=(*system, *messages[edge:]))

    def _chat_as_text(self, chat: Chat, notes: Counter[str]) -> _Prepared:
        if not self.control_text.is_in([chat.messages, chat.tools]):
            return self._rendered(chat)
        marked_chat = self.control_text.marked(chat)
        marked = self._rendered(marked_chat) if marked_chat is not None else None
        encoded = self.control_text.encode(marked.text) if marked is not None else None
        if marked is None or encoded is None:
            notes[Note.SAYS_CONTROL_TOKENS] += 1
            return self._rendered(chat)
        notes[Note.QUOTES_CONTROL_TOKENS] += 1
        position = unmarked_positions(marked.text).tolist()
        position.append(position[-1] + 1)
        return _Prepared(
            chat,
            without_marks(marked.text),
            [(position[start], position[end]) for start, end in marked.answers],
            position[marked.prompt_end],
            encoded,
        )

    def _rendered(self, chat: Chat) -> _Prepared:
        if self.supervise_all:
            if any(message.get("train") is False for message in chat.messages):
                raise ChatProblem("a message has the weight 0, which data.supervise: all contradicts.")
            text = render(self.tokenizer, chat)
            boundary = prompt_length(self.tokenizer, chat, text)
            # + 1: some tokenizers report a token of spaces at the very end as empty, at len(text).
            return _Prepared(chat, text, [(boundary, len(text) + 1)], boundary)
        text, answers = render_with_spans(self.tokenizer, chat)
        return _Prepared(chat, text, answers, answers[0][0] if answers else len(text))

    def _encode(self, prepared: Sequence[_Prepared]) -> Iterator[Encoded]:
        if not prepared:
            return
        encoded = self.tokenizer(
            [row.text for row in prepared],
            add_special_tokens=False,
            return_offsets_mapping=True,
            verbose=False,
        )
        for row, token_ids, offsets in zip(
            prepared, encoded["input_ids"], encoded["offset_mapping"], strict=True
        ):
            bounds = np.asarray(offsets, dtype=np.int64).reshape(-1, 2)
            found = Encoded(np.asarray(token_ids, dtype=np.int32), bounds[:, 0], bounds[:, 1])
            yield row.encoded or found

    def _chat_text(self, row: _Prepared, encoded: Encoded, notes: Counter[str]) -> Text | None:
        token_ids, starts, ends = encoded
        supervised = np.zeros(len(token_ids), dtype=bool)
        for first, last in row.answers:
            supervised |= (ends > first) & (starts < last)
        if not supervised.any():
            return None
        num_prompt = int(np.count_nonzero(ends <= row.prompt_end)) if row.prompt_end else 0
        num_head = num_header = 0
        if len(token_ids) + 2 > self.sequence_length:
            head, header = prompt_frame(self.tokenizer, row.chat, row.text[: row.prompt_end])
            num_head = int(np.count_nonzero(ends <= head)) if head else 0
            num_header = int(np.count_nonzero((starts >= row.prompt_end - header) & (ends <= row.prompt_end)))
        token_ids, supervised = self._with_turn_end(row, token_ids, supervised, notes)
        if self.supervise_all:
            supervised[:] = True
        num_drop, add_bos = self.bos.num_to_drop_and_add(token_ids.tolist())
        token_ids, supervised = token_ids[num_drop:], supervised[num_drop:]
        if add_bos:
            token_ids = np.concatenate([[self.bos.bos_id], token_ids]).astype(np.int32)
            supervised = np.concatenate([[False], supervised])
        supervised[0] = False
        shift = int(add_bos) - num_drop
        begins_with_bos = int(token_ids[0]) == self.bos.bos_id
        return Text(
            Document(token_ids, supervised),
            num_prompt + shift,
            max(num_head + shift, int(begins_with_bos)),
            num_header,
        )

    def _with_turn_end(
        self, row: _Prepared, token_ids: np.ndarray, supervised: np.ndarray, notes: Counter[str]
    ) -> tuple[np.ndarray, np.ndarray]:
        """Sees to it that the last supervised token ends the answer."""
        last = self._last_visible(token_ids) if self.supervise_all else int(np.flatnonzero(supervised)[-1])
        if int(token_ids[last]) in self.special_ids or int(token_ids[last]) == self._eos_id():
            return token_ids, supervised
        notes[Note.ENDS_ONCE] += len(row.answers) > 1
        ids = np.append(token_ids[: last + 1], np.int32(self._eos_id()))
        return ids, np.append(supervised[: last + 1], True)

    def _last_visible(self, token_ids: np.ndarray) -> int:
        """The last token that is more than white space."""
        last = len(token_ids) - 1
        while last > 0 and str(self.tokenizer.decode([int(token_ids[last])])).isspace():
            last -= 1
        return last
