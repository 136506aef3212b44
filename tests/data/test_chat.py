"""Which template writes conversations, what it is handed, and which tokens end its answers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from chat_kinds import CONVERSATIONS, TEMPLATES, bot, call, make_tokenizer, user, write

from qlora_train.data.chat.chat_format import ChatFormat
from qlora_train.data.chat.choice import BUILT_IN, choose_chat_template
from qlora_train.data.chat.template import ChatProblem, ChatTemplate, _with_fixed_day
from qlora_train.data.notes import Notes
from qlora_train.data.prompts import stop_token_ids
from qlora_train.data.tokenizer import read_stop_ids, tokenizer_of_run
from qlora_train.errors import BaseModelError, DataError
from qlora_train.recipe import ModelSection

MakeTokenizer = Callable[..., Any]

EXCHANGE = [user("q"), bot("a")]
TURNS = "{% for m in messages %}{{ m.role[0] + ':' + (m.content or '') + '<|end|>\\n' }}{% endfor %}"


def render(source: str, options: dict[str, Any] | None = None, **more: Any) -> str:
    return ChatTemplate(source, make_tokenizer(source), options).render(EXCHANGE, **more)


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
def test_every_day_is_the_same_day(template: str, expected: str) -> None:
    assert render(template) == expected


def test_a_fixed_day_changes_nothing_else() -> None:
    for before in ("", "{# strftime_now #}\n\n  "):
        template = before + TURNS + "{% if false %}{{ strftime_now('%Y') }}{% endif %}"
        library = make_tokenizer(template).apply_chat_template(EXCHANGE, tokenize=False)
        assert _with_fixed_day(template) != template
        assert render(template) == library


def test_tools_and_options_reach_the_template() -> None:
    source = "{% for t in tools or [] %}{{ t.function.name }};{% endfor %}{{ style }}" + TURNS
    tools = [{"type": "function", "function": {"name": "look"}}]
    assert render(source) == "u:q<|end|>\na:a<|end|>\n"
    assert render(source, {"style": "s"}, tools=tools) == "look;su:q<|end|>\na:a<|end|>\n"
    with pytest.raises(DataError, match=r"does not read 'stile' \(did you mean 'style'\?\)"):
        ChatFormat(make_tokenizer(source), (), options={"stile": "s"})
    with pytest.raises(DataError, match="does not read 'messages'"):
        ChatFormat(make_tokenizer(source), (), options={"messages": []})
    both = make_tokenizer({"default": TURNS, "tool_use": source})
    assert (
        ChatFormat(both, (), options={"style": "s"}).writer(with_tools=True).render(EXCHANGE, tools)[5] == "s"
    )


@pytest.mark.parametrize(
    "source",
    ["{{ 'x' + messages[0] }}", "{{ raise_exception('no') }}", "{{ messages[9].content }}", "{{ 1 / 0 }}"],
)
def test_a_template_that_cannot_take_a_message_is_the_examples_problem(source: str) -> None:
    with pytest.raises(ChatProblem, match="refuses the conversation"):
        render(source)


def test_a_template_that_is_none_is_refused() -> None:
    with pytest.raises(DataError, match="no valid Jinja template: line 2"):
        ChatFormat(make_tokenizer("{{ messages }}\n{% if %}"), (2,))


def test_messages_are_not_changed() -> None:
    messages = [user("Q?"), call('{"k": 1}', None), {**bot("a"), "train": False}]
    before = repr(messages)
    write(TEMPLATES["calls"], messages)
    assert repr(messages) == before


def test_thoughts_by_their_other_names() -> None:
    for name in ("thinking", "reasoning", "reasoning_content"):
        (piece,), _ = write(
            TEMPLATES["opens a thought, reads the field"], [user("q"), bot("a", **{name: "why"})]
        )
        assert piece.answer == "why\n(/thought)\n\na<|end|>"


@pytest.mark.parametrize("name", ["plain", "instruction", "chatml"])
def test_built_in_templates(name: str) -> None:
    tokenizer = make_tokenizer(None)
    if name == "chatml":
        with pytest.raises(
            DataError, match=r"needs the tokens <\|im_end\|>, <\|im_start\|>.*plain or instruction"
        ):
            choose_chat_template(tokenizer, name)
        tokenizer.add_tokens(["<|im_start|>", "<|im_end|>"], special_tokens=True)
    tokenizer.chat_template = choose_chat_template(tokenizer, name)
    end = "<|im_end|>" if name == "chatml" else "<|eos|>"
    system = {"role": "system", "content": "Short."}
    writer = ChatFormat(tokenizer, (tokenizer.eos_token_id,)).writer(with_tools=False)
    messages = [system, *CONVERSATIONS["two turns"]]
    first, second = writer.pieces(messages, (), [2, 4], Notes())
    assert [piece.answer.strip() for piece in (first, second)] == [f"One.{end}", f"Two.{end}"]
    assert second.text.startswith(first.text)
    assert "Short." in first.prompt
    with pytest.raises(ChatProblem, match="does not show the tool_calls"):
        writer.pieces(CONVERSATIONS["call"], (), [1, 3], Notes())


def test_a_template_by_name_or_file(tmp_path: Path) -> None:
    tokenizer = make_tokenizer({"default": "{{ 1 }}", "rag": "{{ 2 }}"})
    (tmp_path / "own.jinja").write_text("{{ messages }}", encoding="utf-8")
    (tmp_path / "empty.jinja").write_text("\n")
    assert choose_chat_template(tokenizer, "rag") == "{{ 2 }}"
    assert choose_chat_template(tokenizer, "plain") == BUILT_IN["plain"]
    assert choose_chat_template(tokenizer, str(tmp_path / "own.jinja")) == "{{ messages }}"
    with pytest.raises(DataError, match="is empty"):
        choose_chat_template(tokenizer, str(tmp_path / "empty.jinja"))
    with pytest.raises(
        DataError, match=r"model\.chat_template: plane is no template .*chatml, plain.*default, rag"
    ):
        choose_chat_template(tokenizer, "plane")
    tokenizer.save_pretrained(tmp_path / "base")
    section = ModelSection(base=str(tmp_path / "base"), chat_template="plain")
    assert tokenizer_of_run(section, section.base)[0].chat_template == BUILT_IN["plain"]


def test_of_several_templates_the_choice_is_said() -> None:
    tokenizer = make_tokenizer({"default": TEMPLATES["plain"], "tool_use": TEMPLATES["calls"]})
    chat_format = ChatFormat(tokenizer, (tokenizer.convert_tokens_to_ids("<|end|>"),))
    assert chat_format.writer(with_tools=True).template.source == TEMPLATES["calls"]
    assert chat_format.writer(with_tools=False).template.source == TEMPLATES["plain"]
    (line,) = chat_format.remarks()
    assert "'default'; rows with tools by 'tool_use'" in line
    with pytest.raises(DataError, match=r"several chat templates \(a, b\).*model\.chat_template"):
        ChatFormat(make_tokenizer({"a": "x", "b": "y"}), ())


@pytest.mark.parametrize(
    ("kind", "named", "ends"),
    [
        ("plain", ["<|end|>"], ["<|end|>", "<|eos|>"]),
        ("plain", [], ["<|eos|>", "<|end|>"]),
        ("other end in history", [], ["<|eos|>", "<|return|>"]),
        ("closers before the end", [], ["<|eos|>", "<|end|>"]),
        ("eos when closed", [], ["<|eos|>", "<|end|>"]),
        ("always asks", [], ["<|eos|>", "<|end|>"]),
        ("next role stops", ["<|user|>", "<|tool|>"], ["<|user|>", "<|tool|>", "<|eos|>"]),
        ("next role stops", [], ["<|eos|>", "<|user|>"]),
        ("end between turns only", [], ["<|eos|>", "<|end|>"]),
        ("no control token", [], ["<|eos|>"]),
        ("calls end otherwise", ["<|end|>"], ["<|end|>", "<|eos|>", "<|called|>"]),
        ("calls end otherwise", ["<|end|>", "<|called|>"], ["<|end|>", "<|called|>", "<|eos|>"]),
    ],
)
def test_tokens_that_end_an_answer(kind: str, named: list[str], ends: list[str]) -> None:
    tokenizer = make_tokenizer(TEMPLATES[kind])
    ids = tokenizer.convert_tokens_to_ids(named)
    assert tokenizer.convert_ids_to_tokens(list(stop_token_ids(tokenizer, ids))) == ends
    new = [token for token in ends if token not in named and token != "<|eos|>"]
    lines = ChatFormat(tokenizer, ids).remarks()
    assert [any(f"answers end in {token!r}" in line for line in lines) for token in new] == [True] * len(new)
    assert any("no generation_config.json" in line for line in lines) == (not named)


def test_a_template_for_other_conversations_ends_no_answer() -> None:
    for source in ("{{ raise_exception('tools only') }}", "{% if %}", None):
        tokenizer = make_tokenizer(source)
        assert stop_token_ids(tokenizer, (7, 8, 7)) == (7, 8, tokenizer.eos_token_id)


@pytest.mark.parametrize(
    ("content", "ids"),
    [('{"eos_token_id": 5}', (5,)), ('{"eos_token_id": [5, 3, 5]}', (5, 3)), ("{}", ()), (None, ())],
)
def test_what_generation_config_says(tmp_path: Path, content: str | None, ids: tuple[int, ...]) -> None:
    if content is not None:
        (tmp_path / "generation_config.json").write_text(content)
    assert read_stop_ids(str(tmp_path)) == ids


@pytest.mark.parametrize("content", ["{", "[]", '{"eos_token_id": "</s>"}', '{"eos_token_id": [-1]}', "\xff"])
def test_a_damaged_generation_config_is_named(tmp_path: Path, content: str) -> None:
    (tmp_path / "generation_config.json").write_bytes(content.encode("latin-1"))
    with pytest.raises(BaseModelError, match=r"generation_config\.json"):
        read_stop_ids(str(tmp_path))
