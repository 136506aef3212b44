"""What can happen to an example on its way to tokens: each note in words behind "N rows"."""

from __future__ import annotations

from collections import Counter
from enum import StrEnum

Notes = Counter[str]
"""By note, the amount in one example: answers or messages where the note says nothing else."""


class Note(StrEnum):
    """Something that happened to an example. Notes of an example are kept with it, so that each side of the
    data counts its own."""

    PROMPT_CUT = "prompt cut"  # amount: tokens
    ANSWER_CUT = "answer cut"  # amount: tokens
    SPLIT = "split"  # amount: documents
    TOO_LONG = "too long, dropped"  # amount: tokens
    UNSUPERVISED = "no supervised token"
    SAYS_CONTROL_TOKENS = "hold the text of special tokens, read as these tokens"
    QUOTES_CONTROL_TOKENS = "hold the text of special tokens, read as plain text"
    SEVERAL_TEXTS = (
        "make several texts: the chat template writes earlier turns otherwise than generation meets them "
        "(data.supervise: last_turn makes one of each)"
    )  # amount: tokens beyond those of the longest
    REWRITTEN = "have answers that the chat template cuts or rewrites: they are not there word for word"
    THOUGHT_CLOSED = (
        "have answers without a thought where the prompt opens one: an empty thought is trained "
        "(data.open_thought: refuse stops there)"
    )
    THOUGHT_FILLED = "have thoughts that go on from where the prompt opens one"
    THOUGHT_MOVED = "have thoughts inside answers, given to the chat template as 'reasoning_content'"
    DEVELOPER = "have messages of the role 'developer', written as 'system'"
    ANSWER_FIRST = "begin with the assistant: that message is context only, as nothing asks for it"
    UNANSWERED = "end in messages that nothing answers: these are left out"
    BY_MARKS = (
        "have answers that only the template's {% generation %} marks find: their context is not what "
        "generation sees"
    )
    NO_STOP_TOKEN = "have answers that end in EOS: the chat template writes no token behind them"


def lost(field: str) -> str:
    return f"lose {field!r}: the chat template does not show it"


def ends_in(token: str) -> str:
    return (
        f"have answers that end in {token!r}, as the chat template alone says: generation has to stop there"
    )
