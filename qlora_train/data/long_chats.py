"""Conversations that are too long, as conversations that are shorter.

An exchange is a question with all that follows it up to the next one. What is left is always rendered anew,
as a conversation of its own: system prompt and tools stand where the template puts them, and roles alternate.

    split   parts of as many whole exchanges as fit, each behind the same system prompt; where there is one
            answer to train only, the last exchanges that fit
    cut     of a text whose answers are the last ones (earlier ones are context, or have texts of their own):
            the first exchanges go, as many as it takes

One exchange that is too long alone is cut inside, by tokens (see `fitting`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from qlora_train.data.chat.template import ChatProblem
from qlora_train.data.chat_tokens import ChatTokenizer
from qlora_train.data.content import Chat
from qlora_train.data.conversations import SYSTEM_ROLES
from qlora_train.data.documents import Text


class LongChats:
    def __init__(self, chats: ChatTokenizer, sequence_length: int) -> None:
        self._chats, self._sequence_length = chats, sequence_length

    def _fits(self, text: Text) -> bool:
        return len(text) <= self._sequence_length

    def split(self, chat: Chat, texts: list[Text]) -> list[list[Text]]:
        """The texts of each part. chat: as it is asked for (see `ChatTokenizer`). texts: of the whole."""
        edges = _beginnings(chat.messages)
        if not edges or all(map(self._fits, texts)):
            return [texts]
        if len(texts) == 1 and texts[0].num_answers == 1:
            return [[self.without_first_exchanges(texts[0])]]
        try:
            first, edge = self._longest_beginning(chat, edges)
            rest = replace(chat, messages=(*_system(chat), *chat.messages[edge:]))
            others = self.split(rest, self._chats.again(rest))
        except ChatProblem:  # a template for other conversations than these parts
            return [texts]
        return [part for part in (first, *others) if part]

    def _longest_beginning(self, chat: Chat, edges: Sequence[int]) -> tuple[list[Text], int]:
        """The texts of as many exchanges as fit, one at least, and where the next one begins."""
        found, edge = self._chats.again(replace(chat, messages=chat.messages[: edges[0]])), edges[0]
        low, high = 1, len(edges) - 1
        while low <= high:
            middle = (low + high) // 2
            texts = self._chats.again(replace(chat, messages=chat.messages[: edges[middle]]))
            if all(map(self._fits, texts)):
                found, edge, low = texts, edges[middle], middle + 1
            else:
                high = middle - 1
        return found, edge

    def without_first_exchanges(self, text: Text) -> Text:
        """The text without as many of the exchanges before its first answer's own as it takes to fit; without
        all of them where it takes more."""
        if text.written is None:
            return text
        chat, turns = text.written.chat, text.written.turns
        messages = tuple(
            {**message, "train": False} if message["role"] == "assistant" and i not in turns else message
            for i, message in enumerate(chat.messages[: turns[-1] + 1])
        )
        edges = _beginnings(messages[: turns[0]])
        longest, shortest = None, text
        low, high = 0, len(edges) - 1
        while low <= high:
            middle = (low + high) // 2
            part = replace(chat, messages=(*_system(chat), *messages[edges[middle] :]))
            try:
                found = self._chats.again(part)
            except ChatProblem:
                break
            if len(found) != 1 or found[0].num_answers != len(turns):
                break
            if self._fits(found[0]):
                longest, high = found[0], middle - 1
            else:
                shortest, low = found[0], middle + 1
        return longest or shortest


def _system(chat: Chat) -> tuple[dict[str, Any], ...]:
    return chat.messages[:1] if chat.messages[0]["role"] in SYSTEM_ROLES else ()


def _beginnings(messages: Sequence[dict[str, Any]]) -> list[int]:
    """Indices of the messages that begin an exchange: questions that follow an answer."""
    roles = [message["role"] for message in messages]
    first = roles.index("assistant") if "assistant" in roles else len(roles)
    return [i for i in range(first + 1, len(roles)) if roles[i] == "user" and roles[i - 1] != "user"]
