"""Conversations through the tokenizer's own chat template, and which characters of them the assistant says.

A template is a program: it gives text, not turns. Where turn i is said follows from rendering prefixes. With
R = render(all messages),

    start = len(render(messages[:i], add_generation_prompt=True))     what generation would be handed
    end   = len(render(messages[:i + 1]))                             less white space at its end

are right exactly when both renderings begin R, which is checked. So a span holds the end-of-turn token, not
the header that the generation prompt already gives. Some templates render an earlier turn differently once
a later one follows (a thinking block that is only shown in the last turn): there the end is looked up as
the turn's content followed by what the template put behind it. Where that fails too, the template's own
`{% generation %}` marks are used, and without marks the template is refused: a guess would train on the wrong
tokens in silence.

Two renderings a turn are cheaper than they look (50 to 100 us each), and unlike searching for role markers
they need to know no template.
"""

from __future__ import annotations

import re
from datetime import datetime
from functools import lru_cache
from os.path import commonprefix
from typing import TYPE_CHECKING, Any

from qlora_train.data.content import Chat
from qlora_train.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Span = tuple[int, int]

_GENERATION_MARK = re.compile(r"\{%-?\s*generation\s*-?%\}")
# Templates that print today's date would make a resumed run see other tokens than the one it continues.
_FIXED_DAY = datetime(2024, 7, 26)
_FIXED_DATE = _FIXED_DAY.strftime("%d %b %Y")
_DATE_CODES = [f"%{code}" for code in "aAbBcCdDeFGgHhIjklmMnpPrRStTuUVwWxXyYzZ"] + [
    f"%-{code}" for code in "deHIjklmMSUVWy"
]
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


@lru_cache(maxsize=8)
def _with_fixed_day(template: str) -> str:
    """The template with its `strftime_now`, if it calls one, telling a fixed day.

    The function is the library's own global and only plain data can be handed to a template, so a macro of
    that name goes in front: it puts the fixed day's value in the place of each code of the format.
    """
    if "strftime_now" not in template:
        return template
    replaced = "".join(f" | replace({code!r}, {_FIXED_DAY.strftime(code)!r})" for code in _DATE_CODES)
    # The line break goes with the block, and the template still begins at the beginning of a line.
    return "{% macro strftime_now(format) %}{{ format" + replaced + " }}{% endmacro %}\n" + template


def render(
    tokenizer: PreTrainedTokenizerBase,
    chat: Chat,
    *,
    num_messages: int | None = None,
    generation_prompt: bool = False,
) -> str:
    """The template's text for the first `num_messages` (default: all) messages, with the chat's tools.

    Raises ChatProblem with the template's own complaint.
    """
    from jinja2 import TemplateError

    try:
        text = tokenizer.apply_chat_template(
            _for_template(chat.messages[:num_messages]),
            tokenize=False,
            add_generation_prompt=generation_prompt,
            **_template_options(tokenizer, chat),
        )
    except (TemplateError, TypeError) as error:  # TypeError: such as adding text to an object
        raise ChatProblem(f"the chat template refuses the conversation: {error}") from error
    assert isinstance(text, str)
    return text


def _for_template(messages: tuple[dict[str, Any], ...]) -> list[dict[str, Any]]:
    """Whether a message is trained on is not for the template."""
    return [{key: item for key, item in message.items() if key != "train"} for message in messages]


def _template_options(tokenizer: PreTrainedTokenizerBase, chat: Chat) -> dict[str, Any]:
    tools = list(chat.tools) or None
    template = tokenizer.get_chat_template(tools=tools)
    return {"tools": tools, "chat_template": _with_fixed_day(template), "date_string": _FIXED_DATE}


def render_with_spans(tokenizer: PreTrainedTokenizerBase, chat: Chat) -> tuple[str, list[Span]]:
    """The whole text, and the spans of characters [start, end) that the assistant says, in order, without the
    turns that are context only.
    """
    text = render(tokenizer, chat)
    turns = _assistant_turns(chat)
    spans = _spans_by_prefix(tokenizer, chat, turns, text)
    if spans is None:
        spans = _spans_by_marks(tokenizer, chat, turns, text)
    context = {turn for turn in turns if chat.messages[turn].get("train") is False}
    if not context:
        return text, spans
    if len(spans) != len(turns):
        raise ChatProblem(
            "a message has the weight 0, but the chat template does not mark one span per assistant message, "
            "so its tokens cannot be told apart. Leave the weights out."
        )
    return text, [span for turn, span in zip(turns, spans, strict=True) if turn not in context]


def prompt_length(tokenizer: PreTrainedTokenizerBase, chat: Chat, text: str) -> int:
    """Characters of `text` before the assistant's first turn; 0 where the template does not tell."""
    first = next(iter(_assistant_turns(chat)), 0)
    prompt = render(tokenizer, chat, num_messages=first, generation_prompt=True) if first else ""
    return len(prompt) if text.startswith(prompt) else 0


def prompt_frame(tokenizer: PreTrainedTokenizerBase, chat: Chat, prompt: str) -> Span:
    """Characters of `prompt`, what is before the first answer: of its head (BOS, system prompt, the first
    question's role) and of its end (the answer's header). (0, 0) where the template does not tell."""
    first = next(iter(_assistant_turns(chat)), 0)
    asked = [i for i in range(first) if chat.messages[i]["role"] != "system"]
    if not asked:
        return 0, 0
    stand_ins = tuple(
        {**message, "content": _STAND_IN} if i in asked else message
        for i, message in enumerate(chat.messages[:first])
    )
    try:
        text = render(tokenizer, Chat(stand_ins, chat.tools), generation_prompt=True)
    except ChatProblem:
        return 0, 0
    head, found, _ = text.partition(_STAND_IN)
    header = text.rpartition(_STAND_IN)[2]
    if not found or not prompt.startswith(head) or not prompt.endswith(header):
        return 0, 0
    return len(head), len(header)


def _assistant_turns(chat: Chat) -> list[int]:
    return [i for i, message in enumerate(chat.messages) if message["role"] == "assistant"]


def _spans_by_prefix(
    tokenizer: PreTrainedTokenizerBase, chat: Chat, turns: list[int], text: str
) -> list[Span] | None:
    if not turns:
        return []
    if turns[0] == 0:
        raise ChatProblem("the conversation begins with the assistant; put a system or user message before.")
    prompts = [render(tokenizer, chat, num_messages=i, generation_prompt=True) for i in turns]
    if not all(text.startswith(prompt) for prompt in prompts):
        return None
    starts = [len(prompt) for prompt in prompts]
    spans = []
    for i, start, limit in zip(turns, starts, [*starts[1:], len(text)], strict=True):
        end = _end_of_turn(tokenizer, chat, i, text, start, limit)
        if end is None:
            return None
        spans.append((start, end))
    return spans


def _end_of_turn(
    tokenizer: PreTrainedTokenizerBase, chat: Chat, turn: int, text: str, start: int, limit: int
) -> int | None:
    messages = chat.messages
    upto = text if turn == len(messages) - 1 else render(tokenizer, chat, num_messages=turn + 1)
    if text.startswith(upto):
        end = len(upto.rstrip())
        return end if start < end <= limit else None
    content = messages[turn].get("content", "").strip()
    stand_in = Chat((*messages[:turn], {**messages[turn], "content": _STAND_IN}), chat.tools)
    _, found, behind = render(tokenizer, stand_in).rpartition(_STAND_IN)
    if not (content and found and behind.strip()):
        return None  # nothing that marks the end for certain
    said = content + behind.rstrip()
    at = text.find(said, start, limit)
    return at + len(said) if at >= 0 else None


def _spans_by_marks(
    tokenizer: PreTrainedTokenizerBase, chat: Chat, turns: list[int], text: str
) -> list[Span]:
    options = _template_options(tokenizer, chat)
    if not _GENERATION_MARK.search(options["chat_template"]):
        raise ChatProblem(_why_no_span(tokenizer, chat, turns, text))
    encoded: Any = tokenizer.apply_chat_template(
        _for_template(chat.messages),
        return_dict=True,
        return_assistant_tokens_mask=True,
        tokenizer_kwargs={"return_offsets_mapping": True},
        **options,
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


def _why_no_span(tokenizer: PreTrainedTokenizerBase, chat: Chat, turns: list[int], text: str) -> str:
    for turn in turns:
        before = render(tokenizer, chat, num_messages=turn)
        prompt = render(tokenizer, chat, num_messages=turn, generation_prompt=True)
        if text.startswith(before) and prompt.startswith(before) and not text.startswith(prompt):
            opened = prompt[len(commonprefix([prompt, text])) :]
            return (
                f"the chat template opens an answer with {opened!r} when it asks for one, but renders "
                f"message {turn + 1} without it, so generation would go on from tokens that training never "
                "saw. Begin the assistant messages with it, if the template keeps it there, or put a "
                "chat_template.jinja that does not open answers so into the base's folder."
            )
    return (
        "the chat template renders the beginning of this conversation differently once more messages follow, "
        "so the assistant's tokens cannot be told apart. Mark them in the template with {% generation %} ... "
        "{% endgeneration %}, train on everything with data.supervise: all, or use one exchange per row."
    )


def _with_end_token(tokenizer: PreTrainedTokenizerBase, text: str, start: int, end: int) -> int:
    """Marks often stop short of the end-of-turn token, which the model must learn to say."""
    end = start + len(text[start:end].rstrip())
    for token in tokenizer.added_tokens_decoder.values():
        if token.special and text.startswith(token.content, end):
            return end + len(token.content)
    return end
