"""Conversations as people write them, each with the messages that it means, by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tiny_data import examples_in

from qlora_train.data.arrow_tables import ParquetTable
from qlora_train.data.conversations import read_messages, read_tools
from qlora_train.data.tables import ExampleProblem

Q, A = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
S = {"role": "system", "content": "s"}
CALL = {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}
AS_TEXT = {"type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}
WITH_NULL = {"type": "function", "function": {"name": "f", "arguments": {"x": None}}}


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        ([Q, A], [Q, A]),
        ([{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}], [Q, A]),
        ([{"from": "system", "value": "s"}, {"from": "user", "value": "q"}], [S, Q]),
        ([{"from": "Human", "value": "q"}, {"role": "model", "content": "a"}], [Q, A]),
        ([{"role": "developer", "content": "s"}, Q], [{**S, "role": "developer"}, Q]),
        (json.dumps([Q, A]), [Q, A]),
        (f"  {json.dumps([Q])}\n", [Q]),
        ({"role": ["user", "assistant"], "content": ["q", "a"]}, [Q, A]),
        (Q, [Q]),
        ([{"role": "user", "content": [{"type": "text", "text": "q"}]}], [Q]),
        ([{"role": "user", "content": ["q", {"type": "input_text", "text": "r"}]}], [{**Q, "content": "qr"}]),
        (
            [Q, {"role": "assistant", "content": [{"type": "thinking", "thinking": "t"}, {"text": "a"}]}],
            [Q, {**A, "reasoning_content": "t"}],
        ),
        ([Q, {**A, "thinking": "t"}], [Q, {**A, "reasoning_content": "t"}]),
        ([Q, {**A, "reasoning_content": "t", "name": None}], [Q, {**A, "reasoning_content": "t"}]),
        ([Q, {**A, "weight": 0}], [Q, {**A, "train": False}]),
        ([Q, {**A, "loss": False}], [Q, {**A, "train": False}]),
        ([Q, {**A, "train": True}], [Q, {**A, "train": True}]),
        ([{"from": "gpt", "value": "", "weight": 0}], [{**A, "content": "", "train": False}]),
        ([{**A, "content": None, "tool_calls": [CALL]}], [{"role": "assistant", "tool_calls": [CALL]}]),
        ([Q, {**A, "tool_calls": []}], [Q, A]),
        (
            [{"from": "function_call", "value": json.dumps({"name": "f", "arguments": {"x": 1}})}],
            [{"role": "assistant", "content": "", "tool_calls": [CALL]}],
        ),
        (
            [{"role": "assistant", "content": "", "function_call": {"name": "f", "arguments": '{"x": 1}'}}],
            [{"role": "assistant", "content": "", "tool_calls": [AS_TEXT]}],
        ),
        ([{"from": "observation", "value": "42"}], [{"role": "tool", "content": "42"}]),
        (
            [{"role": "function", "name": "f", "content": "42"}],
            [{"role": "tool", "content": "42", "name": "f"}],
        ),
        (
            [{**A, "tool_calls": [{"id": None, **WITH_NULL}]}],
            [{**A, "tool_calls": [WITH_NULL]}],
        ),
    ],
)  # fmt: skip
def test_what_messages_mean(written: Any, expected: list[dict]) -> None:
    assert read_messages(written, "the messages") == expected


@pytest.mark.parametrize(
    ("written", "problem"),
    [
        ("hi", "the messages is text, and no JSON"),
        ("[{'role': 'user', 'content': 'q'}]", "not valid JSON.*Python's own notation"),
        (3, "the messages are a number"),
        ([], "list of messages is empty"),
        (["hi"], "message 1 is a string"),
        ([Q, {"role": "narrator", "content": "a"}], "message 2 has the role 'narrator'"),
        ([{"speaker": "a", "text": "b"}], r"message 1 has no role \(it has 'speaker', 'text'\)"),
        ([{"role": "user", "from": "human", "content": "q"}], "both 'role' and 'from'"),
        ([{**Q, "content": [{"type": "image_url", "image_url": "x"}]}], "a part of type 'image_url'"),
        ([{**Q, "content": [3]}], "holds a number, not a text part"),
        ([{**Q, "content": ""}], r"content of message 1 \(user\) is empty"),
        ([{"role": "assistant"}], "content of message 1 is null"),
        ([Q, {**A, "weight": 0.5}], r"message 2 has the weight 0\.5; a weight is 0"),
        ([Q, {**A, "loss": "no"}], "message 2 has the loss 'no'"),
        ([Q, {**A, "weight": 1, "train": False}], "message 2 contradicts itself"),
        ([{"from": "function_call", "value": "now"}], "the call in message 1 is text, and no JSON"),
        ([{"from": "function_call", "value": "{}"}], "message 1 holds a call without a name"),
        ({"role": ["user"], "content": ["q", "r"]}, "are an object"),
    ],
)
def test_what_is_no_conversation(written: Any, problem: str) -> None:
    with pytest.raises(ExampleProblem, match=problem):
        read_messages(written, "the messages")


@pytest.mark.parametrize("empty", [None, "", [], "[]"])
def test_no_tools(empty: Any) -> None:
    assert read_tools(empty, "tools") == []


def test_tools_as_lists_text_and_functions() -> None:
    tool = {"type": "function", "function": {"name": "f"}}
    for written in ([tool], json.dumps([tool]), [json.dumps(tool)], tool, [{"name": "f"}]):
        assert read_tools(written, "tools") == [tool]
    for wrong, problem in (("{", "not valid JSON"), (["f"], "not a list of objects"), (3, "not a list")):
        with pytest.raises(ExampleProblem, match=problem):
            read_tools(wrong, "tools")


def test_nulls_that_parquet_fills_in_are_dropped_at_every_depth(tmp_path: Path) -> None:
    from datasets import Dataset

    def call(**arguments: Any) -> list[dict]:
        return [{"function": {"name": "f", "arguments": arguments}}]

    examples = [
        {"messages": [Q, {"role": "assistant", "content": None, "tool_calls": call(**arguments)}]}
        for arguments in ({"x": 1}, {"y": [{"z": "z"}, {"w": "w"}]})
    ]
    Dataset.from_list(examples).to_parquet(tmp_path / "rows.parquet")
    table = ParquetTable(str(tmp_path / "rows.parquet"))
    assert [read_messages(example["messages"], "the messages")[1] for _, example in examples_in(table)] == [
        {"role": "assistant", "tool_calls": call(x=1)},
        {"role": "assistant", "tool_calls": call(y=[{"z": "z"}, {"w": "w"}])},
    ]
