"""Conversations through the tokenizer's own chat template, and which characters of them the assistant says.

A template is a program: it gives text, not turns. Where turn i is said follows from rendering prefixes. With
R = render(all messages),

    start = len(render(messages[:i], add_generation_prompt=True))     what generation would be handed
    end   = len(render(messages[:i + 1]))                             less white space at its end

are right exactly when both renderings begin R, which is checked. So a span holds the end-of-turn token, not
the header that the generation prompt already gives. Some templates render an earlier turn differently once
a later one follows (a thinking block that is only shown in the last turn): there the end is looked up as
the turn's content followed by what the template put behind it. Where that fails too, the template's own {%
generation %} marks are used, and without marks the template is refused: a guess would train on the wrong
tokens in silence.

Two renderings a turn are cheaper than they look (50 to 100 us each), and unlike searching for role markers
they need to know no template.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from qlora_train.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Span = tuple[int, int]
Message = dict[str, Any]

_GENERATION_MARK = re.compile(r"\{%-?\s*generation\s*-?%\}")
# Templates that print today's date would make a resumed run see other tokens than the one it continues.
_FIXED_DATE = "26 Jul 2024"
# A character no text has: shows what a template puts behind a content.
_STAND_IN = "\ue000"


class ChatProblem(Exception):
    """A conversation that the template refuses or hides; becomes a DataError that names the row."""


def require_chat_template(tokenizer: PreTrainedTokenizerBase) -> None:
    """Raises DataError where the tokenizer has no chat template."""
    if not tokenizer.chat_template:
        raise DataError(
            "The tokenizer has no chat template, which conversations (format messages or alpaca) need. Use "
            "the instruction-tuned variant of the base, put a chat_template.jinja into the base's folder, "
            "or use data.format prompt_completion with a prompt_template."
        )


def render(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], *, generation_prompt: bool = False
) -> str:
    """The template's text for the messages. Raises ChatProblem with the template's own complaint."""
    from jinja2 import TemplateError

    try:
        text = tokenizer.apply_chat_template(
            list(messages), tokenize=False, add_generation_prompt=generation_prompt, date_string=_FIXED_DATE
        )
    except TemplateError as error:
        raise ChatProblem(f"the chat template refuses the conversation: {error}") from error
    assert isinstance(text, str)
    return text


def render_with_spans(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message]
) -> tuple[str, list[Span]]:
    """The whole text, and the spans of characters [start, end) that the assistant says, in order."""
    text = render(tokenizer, messages)
    spans = _spans_by_prefix(tokenizer, messages, text)
    if spans is None:
        spans = _spans_by_marks(tokenizer, messages, text)
    return text, spans


def prompt_length(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], text: str) -> int:
    """Characters of `text` before the assistant's first turn; 0 where the template does not tell."""
    first = next((i for i, message in enumerate(messages) if message["role"] == "assistant"), 0)
    prompt = render(tokenizer, messages[:first], generation_prompt=True) if first else ""
    return len(prompt) if text.startswith(prompt) else 0


def _spans_by_prefix(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], text: str
) -> list[Span] | None:
    turns = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    if not turns:
        return []
    if turns[0] == 0:
        raise ChatProblem("the conversation begins with the assistant; put a system or user message before.")
    prompts = [render(tokenizer, messages[:i], generation_prompt=True) for i in turns]
    if not all(text.startswith(prompt) for prompt in prompts):
        return None
    starts = [len(prompt) for prompt in prompts]
    spans = []
    for i, start, limit in zip(turns, starts, [*starts[1:], len(text)], strict=True):
        end = _end_of_turn(tokenizer, messages, i, text, start, limit)
        if end is None:
            return None
        spans.append((start, end))
    return spans


def _end_of_turn(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Message],
    turn: int,
    text: str,
    start: int,
    limit: int,
) -> int | None:
    upto = text if turn == len(messages) - 1 else render(tokenizer, messages[: turn + 1])
    if text.startswith(upto):
        end = len(upto.rstrip())
        return end if start < end <= limit else None
    content = messages[turn].get("content", "").strip()
    stand_in = [*messages[:turn], {**messages[turn], "content": _STAND_IN}]
    _, found, behind = render(tokenizer, stand_in).rpartition(_STAND_IN)
    if not (content and found and behind.strip()):
        return None  # nothing that marks the end for certain
    said = content + behind.rstrip()
    at = text.find(said, start, limit)
    return at + len(said) if at >= 0 else None


def _spans_by_marks(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], text: str) -> list[Span]:
    if not _GENERATION_MARK.search(tokenizer.get_chat_template()):
        raise ChatProblem(
            "the chat template renders the beginning of this conversation differently once more messages "
            "follow, so the assistant's tokens cannot be told apart. Mark them in the template with "
            "{% generation %} ... {% endgeneration %}, train on everything with data.supervise: all, or use "
            "one exchange per row."
        )
    encoded: Any = tokenizer.apply_chat_template(
        list(messages),
        return_dict=True,
        return_assistant_tokens_mask=True,
        date_string=_FIXED_DATE,
        tokenizer_kwargs={"return_offsets_mapping": True},
    )
    spans: list[Span] = []
    previous = 0
    for said, (start, end) in zip(encoded["assistant_masks"], encoded["offset_mapping"], strict=True):
        if said and previous:
            spans[-1] = (spans[-1][0], max(end, spans[-1][1]))
        elif said:
            spans.append((start, end))
        previous = said
    return [(start, _with_end_token(tokenizer, text, start, end)) for start, end in spans]


def _with_end_token(tokenizer: PreTrainedTokenizerBase, text: str, start: int, end: int) -> int:
    """Marks often stop short of the end-of-turn token, which the model must learn to say."""
    end = start + len(text[start:end].rstrip())
    for token in tokenizer.added_tokens_decoder.values():
        if token.special and text.startswith(token.content, end):
            return end + len(token.content)
    return end
