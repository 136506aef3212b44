from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qlora_train.data.formats import Chat, Completion, PlainText, content_key, read_examples
from qlora_train.data.sources import load_tables
from qlora_train.errors import DataError
from qlora_train.recipe import DataSection

Write = Callable[..., str]
Section = Callable[..., DataSection]


def contents(data: DataSection) -> list[Any]:
    return [example.content for example in read_examples(load_tables(data.train), data)]


def test_auto_finds_each_format(jsonl: Write, section: Section) -> None:
    user = {"role": "user", "content": "q"}
    cases: list[tuple[dict, Any]] = [
        ({"messages": [user], "id": 1}, Chat((user,))),
        ({"prompt": "p ", "completion": "c"}, Completion("p ", "c")),
        ({"text": " t\n"}, PlainText(" t\n")),
        ({"instruction": "do", "output": "o"}, Chat((_user("do"), _assistant("o")))),
        ({"instruction": "do", "input": "", "output": "o"}, Chat((_user("do"), _assistant("o")))),
        ({"instruction": "do", "input": "this", "output": "o"}, Chat((_user("do\n\nthis"), _assistant("o")))),
    ]
    for number, (row, expected) in enumerate(cases):
        assert contents(section(jsonl(row, name=f"{number}.jsonl"))) == [expected]


def _user(text: str) -> dict:
    return {"role": "user", "content": text}


def _assistant(text: str) -> dict:
    return {"role": "assistant", "content": text}


def test_auto_refuses_none_and_several(jsonl: Write, section: Section) -> None:
    with pytest.raises(DataError, match=r"no format fits\. Columns found: question, answer"):
        contents(section(jsonl({"question": "q", "answer": "a"})))
    with pytest.raises(DataError, match=r"several formats fit \(prompt_completion, text\)"):
        contents(section(jsonl({"prompt": "q", "completion": "a", "text": "t"})))


def test_mapped_columns_and_template(jsonl: Write, section: Section) -> None:
    path = jsonl({"question": "q", "answer": "a", "hint": ""})
    mapped = section(path, columns={"prompt": "question", "completion": "answer"})
    assert contents(mapped) == [Completion("q", "a")]
    filled = section(path, columns={"completion": "answer"}, prompt_template="{{Q}} {question}|{hint}\n")
    assert contents(filled) == [Completion("{Q} q|\n", "a")]


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"columns": {"prompts": "q"}}, "unknown role 'prompts'"),
        ({"columns": {"text": "q"}, "format": "messages"}, "unknown role 'text' for format messages"),
        (
            {"columns": {"prompt": "x", "completion": "a"}},
            r"line 1: data\.columns maps prompt to 'x'.*found: q, a",
        ),
        ({"format": "text"}, r"line 1: there is no column 'text'.*columns: \{text: <column>\}"),
        ({"columns": {"completion": "a"}, "prompt_template": "{z}"}, r"names \{z\}, which is no column"),
        ({"columns": {"completion": "a"}, "prompt_template": "{q!r}"}, "plain column names"),
        ({"columns": {"prompt": "a", "completion": "a"}, "prompt_template": "{q}"}, r"does not name \{a\}"),
        ({"columns": {"completion": "a"}, "prompt_template": "{}"}, "plain column names"),
        ({"columns": {"completion": "a"}, "prompt_template": "{q"}, "prompt_template: "),
        ({"columns": {"completion": "a"}, "prompt_template": "same"}, "names no column"),
    ],
)
def test_wrong_sections(jsonl: Write, section: Section, keys: dict, message: str) -> None:
    # Written past the recipe's own checks: these hold for any caller.
    data = section(jsonl({"q": "1", "a": "2"})).model_copy(update=keys)
    with pytest.raises(DataError, match=message):
        contents(data)


def test_bad_rows_are_named_by_line_up_to_five_at_once(jsonl: Write, section: Section) -> None:
    good = {"prompt": "p", "completion": "c"}
    bad = [{"prompt": "p"}, {**good, "completion": None}, {**good, "completion": 3}, {**good, "prompt": " "}]
    with pytest.raises(DataError) as caught:
        contents(section(jsonl(good, *bad, good, *bad)))
    lines = str(caught.value).splitlines()
    assert lines[0] == "8 rows cannot be used:"
    assert [line.split("rows.jsonl ")[1] for line in lines[1:-1]] == [
        "line 2: there is no column 'completion' in this row (it has prompt).",
        "line 3: the column 'completion' is null.",
        "line 4: the column 'completion' is a number, not a string.",
        "line 5: the column 'prompt' is empty.",
        "line 7: there is no column 'completion' in this row (it has prompt).",
    ]
    assert lines[-1] == "... and 3 more"


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ("hi", "the messages are text, but not valid JSON"),
        ('"hi"', "the messages are a string"),
        ([{"role": "user", "content": "q", "loss": 2}], "message 1 has the loss 2"),
        ([{"role": "user", "content": "q", "loss": 0, "train": True}], "message 1 contradicts itself"),
        ([], "list of messages is empty"),
        (["hi"], "message 1 is a string"),
        ([{"role": "user", "content": "q"}, {"role": "bot", "content": "a"}], "message 2 has the role 'bot'"),
        ([{"from": "human", "value": "q"}], "message 1 has the role None"),
        ([{"role": "user", "content": ["q"]}], "content of message 1 is a list"),
        ([{"role": "user", "content": ""}], r"content of message 1 \(user\) is empty"),
        ([{"role": "assistant"}], "content of message 1 is null"),
        ([{"role": "user", "content": "a\ud83d"}], r"message 1 holds '\\ud83d', half a character"),
    ],
)
def test_bad_messages(jsonl: Write, section: Section, messages: Any, message: str) -> None:
    with pytest.raises(DataError, match=rf"rows\.jsonl line 1: .*{message}"):
        contents(section(jsonl({"messages": messages})))


@pytest.mark.parametrize(
    "row",
    [
        {"text": "a\udc00"},
        {"prompt": "p", "completion": "\ud83d"},
        {"instruction": "i", "input": "\ud83d", "output": "o"},
    ],
)
def test_half_characters_are_refused_and_whole_ones_are_not(
    jsonl: Write, section: Section, row: dict
) -> None:
    whole = dict.fromkeys(row, "\U0001f642")  # json writes it as two halves
    with pytest.raises(DataError, match=r"rows\.jsonl line 2: the column '\w+' holds .*half a character"):
        contents(section(jsonl(whole, row)))


def test_null_keys_of_messages_are_dropped(jsonl: Write, section: Section) -> None:
    row = {"messages": [{"role": "system", "content": "", "name": None}, {"role": "user", "content": "q"}]}
    assert contents(section(jsonl(row))) == [Chat(({"role": "system", "content": ""}, _user("q")))]


TOOL_CALLS = [{"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}]


def test_tool_calls_tools_and_weights(jsonl: Write, section: Section) -> None:
    messages = [
        _user("q"),
        {"role": "assistant", "content": "", "tool_calls": TOOL_CALLS, "weight": 0},
        {"role": "tool", "content": "", "weight": None},
        {"role": "assistant", "content": "a", "tool_calls": [], "weight": 1},
    ]
    expected = (
        _user("q"),
        {"role": "assistant", "content": "", "tool_calls": TOOL_CALLS, "train": False},
        {"role": "tool", "content": ""},
        {**_assistant("a"), "train": True},
    )
    tools = [{"type": "function", "function": {"name": "f"}}]
    rows = [{"messages": messages, "tools": written} for written in (tools, json.dumps(tools), None, "", [])]
    assert contents(section(jsonl(*rows))) == [
        Chat(expected, tuple(tools)),
        Chat(expected, tuple(tools)),
        *[Chat(expected)] * 3,
    ]


def test_messages_as_text_and_nulls_that_are_said(jsonl: Write, section: Section) -> None:
    call = {"function": {"name": "f", "arguments": {"x": None}}}
    messages = [_user("q"), {"role": "assistant", "tool_calls": [call], "name": None}]
    for written in (messages, json.dumps(messages)):
        (chat,) = contents(section(jsonl({"messages": written})))
        assert chat.messages[1] == {"role": "assistant", "tool_calls": [call]}


def test_nulls_that_parquet_fills_in_are_dropped_at_every_depth(tmp_path: Path, section: Section) -> None:
    from datasets import Dataset

    def call(**arguments: Any) -> list[dict]:
        return [{"function": {"name": "f", "arguments": arguments}}]

    rows = [
        {"messages": [_user("q"), {"role": "assistant", "content": None, "tool_calls": call(**arguments)}]}
        for arguments in ({"x": 1}, {"y": [{"z": "z"}, {"w": "w"}]})
    ]
    Dataset.from_list(rows).to_parquet(tmp_path / "rows.parquet")
    said = [chat.messages[1] for chat in contents(section(str(tmp_path / "rows.parquet")))]
    assert said == [
        {"role": "assistant", "tool_calls": call(x=1)},
        {"role": "assistant", "tool_calls": call(y=[{"z": "z"}, {"w": "w"}])},
    ]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"messages": [{**_user("q"), "weight": 0.5}]}, r"message 1 has the weight 0\.5; a weight is 0"),
        ({"messages": [_user("q")], "tools": "{"}, "'tools' is text, but not valid JSON"),
        ({"messages": [_user("q")], "tools": ["f"]}, "'tools' is not a list of objects"),
        ({"messages": [_user("q")], "tools": {"f": 1}}, "'tools' is not a list of objects"),
        ({"messages": [{"role": "user", "content": "", "name": "n"}]}, r"message 1 \(user\) is empty"),
    ],
)
def test_bad_weights_and_tools(jsonl: Write, section: Section, row: dict, message: str) -> None:
    with pytest.raises(DataError, match=rf"rows\.jsonl line 1: .*{message}"):
        contents(section(jsonl(row)))


def test_content_key_is_by_value() -> None:
    assert content_key(Chat(({"role": "user", "content": "q"},))) == content_key(
        Chat(({"content": "q", "role": "user"},))
    )
    assert content_key(Completion("ab", "c")) != content_key(Completion("a", "bc"))
    assert content_key(PlainText("a")) != content_key(PlainText("b"))
    assert content_key(Chat((_user("q"),))) != content_key(Chat((_user("q"),), ({"name": "f"},)))
