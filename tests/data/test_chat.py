"""Chat templates that look at the clock, at tools, at weights, or open a thinking block."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from qlora_train.data.chat import ChatProblem, _with_fixed_day, render, render_with_spans
from qlora_train.data.content import Chat

MakeTokenizer = Callable[..., Any]

EXCHANGE = Chat(({"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}))
TURNS = "{% for m in messages %}{{ m.role[0] + ':' + (m.content or '') + '<|end|>\\n' }}{% endfor %}"
OPENED = "{% if add_generation_prompt %}{{ 'a:<think>\\n' }}{% endif %}"


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("{{ strftime_now('%d %b %Y') }}", "26 Jul 2024"),
        ('{{ strftime_now("%A, %B %-d. %Y-%m-%dT%H:%M 100%") }}', "Friday, July 26. 2024-07-26T00:00 100%"),
        ("{% set form = '%Y' %}{{ strftime_now(form) | int + 1 }}", "2025"),
        (
            "{% if strftime_now is defined %}{% for m in messages[:1] %}{{ strftime_now('%y') }}{% endfor %}"
            "{% endif %}",
            "24",
        ),
        ("{% macro day() %}{{ strftime_now('%j') }}{% endmacro %}{{ day() }}", "208"),
        (
            "  {% if true %}\n{{ strftime_now('%e') }}{% endif %}",
            "26",
        ),  # white space before a block is dropped
        ("{{ date_string }}", "26 Jul 2024"),
        ("\n{{ messages | length }}", "\n2"),
    ],
)
def test_every_day_is_the_same_day(make_tokenizer: MakeTokenizer, template: str, expected: str) -> None:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = template
    assert render(tokenizer, EXCHANGE) == expected


def test_a_fixed_day_changes_nothing_else(make_tokenizer: MakeTokenizer) -> None:
    tokenizer = make_tokenizer()
    for before in ("", " ", "\n", "{# strftime_now #}\n\n  "):
        template = before + TURNS + "{% if false %}{{ strftime_now('%Y') }}{% endif %}"
        tokenizer.chat_template = template
        library = tokenizer.apply_chat_template(list(EXCHANGE.messages), tokenize=False)
        assert _with_fixed_day(template) != template
        assert render(tokenizer, EXCHANGE) == library


def test_tools_reach_the_template(make_tokenizer: MakeTokenizer) -> None:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = "{% for t in tools or [] %}{{ t.function.name }};{% endfor %}" + TURNS
    tools = ({"type": "function", "function": {"name": "look"}},)
    assert render(tokenizer, EXCHANGE) == "u:q<|end|>\na:a<|end|>\n"
    text, spans = render_with_spans(tokenizer, Chat(EXCHANGE.messages, tools))
    assert text == "look;u:q<|end|>\na:a<|end|>\n"
    assert [text[start:end] for start, end in spans] == [
        "a:a<|end|>"
    ]  # this template has no generation prompt


def test_a_turn_that_only_calls_a_tool_is_supervised(make_tokenizer: MakeTokenizer) -> None:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.role[0] + ':' + (m.content or '') }}"
        "{% for c in m.tool_calls or [] %}{{ c.function.name }}{% endfor %}{{ '<|end|>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'a:' }}{% endif %}"
    )
    calls = [{"function": {"name": "look"}}]
    messages = (
        {"role": "user", "content": "q"},
        {"role": "assistant", "tool_calls": calls},
        {"role": "tool", "content": ""},
        {"role": "assistant", "content": "a"},
    )
    text, spans = render_with_spans(tokenizer, Chat(messages))
    assert [text[start:end] for start, end in spans] == ["look<|end|>", "a<|end|>"]


@pytest.mark.parametrize("template", ["chatml", "thinking", "counting, marked"])
def test_a_turn_of_weight_0_is_not_supervised(make_tokenizer: MakeTokenizer, template: str) -> None:
    tokenizer = make_tokenizer(template)
    more = ({"role": "user", "content": "r"}, {"role": "assistant", "content": "b"})
    text, both = render_with_spans(tokenizer, Chat(EXCHANGE.messages + more))
    turns = list(EXCHANGE.messages + more)
    turns[1] = {**turns[1], "train": False}
    silenced = Chat(tuple(turns))
    assert render_with_spans(tokenizer, silenced) == (text, both[1:])
    assert len(both) == 2


def test_a_prompt_that_opens_thinking_is_told_as_what_it_is(make_tokenizer: MakeTokenizer) -> None:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = TURNS + OPENED
    with pytest.raises(
        ChatProblem, match=r"opens an answer with '<think>\\n'.*message 2 without it"
    ) as caught:
        render_with_spans(tokenizer, EXCHANGE)
    assert "differently once more messages follow" not in str(caught.value)
    said = ({"role": "user", "content": "q"}, {"role": "assistant", "content": "<think>\nwhy</think>a"})
    text, spans = render_with_spans(tokenizer, Chat(said))  # as the message advises
    assert [text[start:end] for start, end in spans] == ["why</think>a<|end|>"]


def test_a_template_that_cannot_take_a_message_is_the_rows_problem(make_tokenizer: MakeTokenizer) -> None:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = "{{ 'x' + messages[0] }}"
    with pytest.raises(ChatProblem, match="refuses the conversation"):
        render(tokenizer, EXCHANGE)
