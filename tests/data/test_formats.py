from __future__ import annotations

import json
import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML
from tiny_data import examples_in

from qlora_train.data.building import build_dataset
from qlora_train.data.content import Chat, Completion, PlainText, content_key
from qlora_train.data.formats import EmptyExample, RejectedExample, resolve_format
from qlora_train.data.sources import load_source
from qlora_train.data.tables import ExampleProblem, ExampleTable
from qlora_train.errors import DataError
from qlora_train.recipe import DataSection

Write = Callable[..., str]
Section = Callable[..., DataSection]


def tables_of(data: DataSection) -> list[ExampleTable]:
    return [table for source in data.train for table in load_source(source)]


def contents(data: DataSection) -> list[Any]:
    """Of every example of all tables; an example that cannot be used is a DataError that names it."""
    found = []
    for table in tables_of(data):
        example_format = resolve_format(data, table)
        for number, example in examples_in(table):
            try:
                found.append(example_format.read(example))
            except ExampleProblem as problem:
                raise DataError(f"{table.describe(number)}: {problem}") from problem
    return found


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
    for number, (example, expected) in enumerate(cases):
        assert contents(section(jsonl(example, name=f"{number}.jsonl"))) == [expected]


def _user(text: str) -> dict:
    return {"role": "user", "content": text}


def _assistant(text: str) -> dict:
    return {"role": "assistant", "content": text}


def test_auto_refuses_none_and_several(jsonl: Write, section: Section) -> None:
    with pytest.raises(DataError, match=r"no format fits\. Columns found: question, answer"):
        contents(section(jsonl({"question": "q", "answer": "a"})))
    with pytest.raises(
        DataError, match="several formats fit.*Set data.format=prompt_completion or data.format=text"
    ):
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


def test_bad_examples_are_named_by_line_up_to_five_at_once(
    jsonl: Write, section: Section, tokenizer: Any
) -> None:
    good = {"prompt": "p", "completion": "c"}
    bad = [{"prompt": "p"}, {**good, "completion": None}, {**good, "completion": 3}, {**good, "prompt": " "}]
    path = jsonl(good, *bad, good, *bad)
    with pytest.raises(DataError) as caught:
        build_dataset(section(path), tokenizer, seed=0)
    lines = str(caught.value).splitlines()
    assert lines[0].startswith("8 of the first 10 rows cannot be used (data.on_bad_row: skip")
    named = [line.split("rows.jsonl ")[1] for line in lines[1:-1]]
    assert named == [
        "line 2: there is no column 'completion' in this row (it has prompt).",
        "line 3: the column 'completion' is null.",
        "line 4: the column 'completion' is a number, not a string.",
        "line 5: the column 'prompt' is empty.",
        "line 7: there is no column 'completion' in this row (it has prompt).",
    ]
    assert lines[-1] == "... and 3 more"
    (train, _) = build_dataset(section(path, on_bad_row="skip"), tokenizer, seed=0)
    assert train.report.num_examples == 2
    said = train.report.lines()
    assert said[3] == "8 rows skipped (data.on_bad_row: skip):"
    assert [line.split("rows.jsonl ")[1] for line in said[4:9]] == named
    assert said[9] == "  ... and 3 more"


def test_skipping_takes_lines_that_are_no_json_too_but_not_all_examples(
    tmp_path: Path, section: Section, tokenizer: Any
) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"text": "a b"}\n{"text": \n["text"]\n{"text": "\xe9"}\n{"text": "a", "text": "b"}\n')
    (train, _) = build_dataset(section(str(path), on_bad_row="skip"), tokenizer, seed=0)
    assert (train.report.num_examples, train.report.reading.num_skipped) == (1, 4)
    problems = [line.split("rows.jsonl ")[1] for line in train.report.reading.skipped]
    assert problems[0].startswith("line 2 is not valid JSON")
    assert problems[1].startswith("line 3 holds a list where a row")
    assert problems[2].startswith("line 4 is not UTF-8: its character 11 is the byte 0xe9")
    assert problems[3].startswith("line 5 is not valid JSON: an object names 'text' twice")
    path.write_text('{"text": 1}\n')
    with pytest.raises(DataError, match=r"No row of 1 can be trained on: 1 unusable.* a number"):
        build_dataset(section(str(path), on_bad_row="skip"), tokenizer, seed=0)
    path.write_bytes(b'{"text": ""}\n{"text": "\xe9"}\n')
    with pytest.raises(DataError, match="1 empty, 1 unusable.*not UTF-8.*iconv -f cp1252 -t utf-8") as caught:
        build_dataset(section(str(path), on_bad_row="skip"), tokenizer, seed=0)
    assert "assistant" not in str(caught.value)


@pytest.mark.parametrize(
    "example",
    [
        {"text": "a\udc00"},
        {"prompt": "p", "completion": "\ud83d"},
        {"instruction": "i", "input": "\ud83d", "output": "o"},
    ],
)
def test_half_characters_are_refused_and_whole_ones_are_not(
    jsonl: Write, section: Section, example: dict
) -> None:
    whole = dict.fromkeys(example, "\U0001f642")  # json writes it as two halves
    with pytest.raises(DataError, match=r"rows\.jsonl line 2: .* holds .*half a character"):
        contents(section(jsonl(whole, example)))


def test_content_key_is_by_value() -> None:
    assert content_key(Chat(({"role": "user", "content": "q"},))) == content_key(
        Chat(({"content": "q", "role": "user"},))
    )
    assert content_key(Completion("ab", "c")) != content_key(Completion("a", "bc"))
    assert content_key(PlainText("a")) != content_key(PlainText("b"))
    assert content_key(Chat((_user("q"),))) != content_key(Chat((_user("q"),), ({"name": "f"},)))


def test_alpaca_with_system_history_and_empty_parts(jsonl: Write, section: Section) -> None:
    example = {"instruction": "do", "input": "", "output": "o"}
    history = [["q", "a"], ["r", "b"]]
    before = (_user("q"), _assistant("a"), _user("r"), _assistant("b"))
    system = {"role": "system", "content": "S"}
    for number, (extra, expected) in enumerate(
        (
            ({"system": "S", "history": history}, (system, *before, _user("do"), _assistant("o"))),
            ({"history": json.dumps(history)}, (*before, _user("do"), _assistant("o"))),
            ({"system": None, "history": None}, (_user("do"), _assistant("o"))),
            ({"system": " ", "history": []}, (_user("do"), _assistant("o"))),
            ({"instruction": "", "input": "this"}, (_user("this"), _assistant("o"))),
            ({"instruction": "a", "input": " \n"}, (_user("a"), _assistant("o"))),
        )
    ):
        assert contents(section(jsonl({**example, **extra}, name=f"{number}.jsonl"))) == [Chat(expected)]
    with pytest.raises(DataError, match="'history' is not a list of"):
        contents(section(jsonl({**example, "history": [["q"]]})))
    with pytest.raises(DataError, match="the column 'instruction' is empty"):
        contents(section(jsonl({**example, "instruction": ""})))


def test_an_optional_column_may_appear_late(jsonl: Write, section: Section) -> None:
    examples = [{"instruction": "do", "output": "o"}] * 1500
    late = contents(section(jsonl(*examples, {"instruction": "do", "input": "it", "output": "o"})))[-1]
    assert late == Chat((_user("do\n\nit"), _assistant("o")))


def test_a_system_column_is_the_first_message(jsonl: Write, section: Section) -> None:
    system = {"role": "system", "content": "S"}
    example = {"system": "S", "messages": [_user("q"), _assistant("a")]}
    same = {"system": "S", "messages": [system, *example["messages"]]}
    assert contents(section(jsonl(example, same))) == [Chat((system, _user("q"), _assistant("a")))] * 2
    assert contents(section(jsonl(example), columns={"system": None})) == [
        Chat((_user("q"), _assistant("a")))
    ]
    mapped = {"prompt_text": "S", "conversations": [{"from": "human", "value": "q"}]}
    assert contents(section(jsonl(mapped), columns={"system": "prompt_text"})) == [Chat((system, _user("q")))]
    with pytest.raises(DataError, match="line 1: .*two different system prompts"):
        contents(section(jsonl({**same, "system": "T"})))


def test_prompts_and_completions_may_be_conversations(jsonl: Write, section: Section) -> None:
    prompt = [_user("q"), _assistant("old"), _user("r")]
    expected = Chat((_user("q"), {**_assistant("old"), "train": False}, _user("r"), _assistant("a")))
    answer = [_assistant("a")]
    example = {"prompt": prompt, "completion": answer}
    as_text = {"prompt": json.dumps(prompt), "completion": json.dumps(answer)}
    for number, (written, keys) in enumerate(
        (
            (example, {}),
            (as_text, {}),
            ({"prompt": prompt, "completion": "a"}, {}),
            (example, {"format": "prompt_completion"}),
            (example, {"format": "messages"}),
            ({"p": prompt, "c": answer}, {"columns": {"prompt": "p", "completion": "c"}}),
        )
    ):
        data = section(jsonl(written, name=f"{number}.jsonl"), **keys)
        assert contents(data) == [expected]
        assert {resolve_format(data, table).name for table in tables_of(data)} == {"messages"}
    assert contents(section(jsonl({"prompt": "[{", "completion": "c"}))) == [Completion("[{", "c")]


@pytest.mark.parametrize("label", [False, "false", "False"])
def test_answers_labelled_as_bad_are_left_out(
    jsonl: Write, section: Section, tokenizer: Any, label: Any
) -> None:
    good, bad = ({"prompt": "p", "completion": text} for text in ("good", "bad"))
    path = jsonl({**good, "label": True}, {**bad, "label": label}, {**bad, "label": None})
    (train, _) = build_dataset(section(path), tokenizer, seed=0)
    assert (train.report.num_examples, train.report.reading.num_rejected) == (2, 1)
    assert "1 row labelled as bad answers, left out" in train.report.lines()
    with pytest.raises(DataError, match="No row of 1 .*: 1 labelled as bad answers"):
        build_dataset(section(jsonl({**bad, "label": label}, name="bad.jsonl")), tokenizer, seed=0)


def test_a_label_of_numbers_is_asked_about(jsonl: Write, section: Section) -> None:
    examples = [{"prompt": "p", "completion": "c", "label": label} for label in (0, 1)]
    path = jsonl(*examples)
    with pytest.raises(DataError, match=r"line 1: .*'label' holds 0: .*\{label: label\}.*\{label: null\}"):
        contents(section(path))
    assert len(contents(section(path, columns={"label": None}))) == 2
    with pytest.raises(RejectedExample):
        contents(section(path, columns={"label": "label"}))
    assert len(contents(section(jsonl({**examples[1], "label": "positive"})))) == 1  # a class: not read


def test_examples_that_say_nothing_are_skipped_and_counted(
    jsonl: Write, section: Section, tokenizer: Any
) -> None:
    (train, _) = build_dataset(
        section(jsonl({"text": ""}, {"text": "ab"}, {"text": " \n"}, {"text": None})), tokenizer, seed=0
    )
    assert (train.report.num_examples, train.report.reading.num_empty) == (1, 3)
    pair = jsonl({"prompt": "p", "completion": "c"}, {"prompt": "", "completion": ""}, name="pairs.jsonl")
    assert build_dataset(section(pair), tokenizer, seed=0)[0].report.reading.num_empty == 1
    with pytest.raises(EmptyExample):
        contents(section(pair))


def test_what_nobody_could_have_meant_is_a_problem_of_its_example(
    jsonl: Write, section: Section, monkeypatch: pytest.MonkeyPatch
) -> None:
    from qlora_train.data import content

    deep: Any = []
    for _ in range(150):
        deep = [deep]
    with pytest.raises(DataError, match="line 1: message 1 is nested more than 100 levels deep"):
        contents(section(jsonl({"messages": [{**_user("q"), "extra": deep}]})))
    monkeypatch.setattr(content, "MAX_CHARACTERS", 10)
    with pytest.raises(DataError, match="line 1: the text has 11 characters, more than the 10"):
        contents(section(jsonl({"text": "x" * 11})))


def test_where_no_example_can_be_parsed_the_first_is_named(jsonl: Write, section: Section) -> None:
    with pytest.raises(DataError, match=r"rows\.jsonl line 1 is not valid JSON: it is nested too deeply"):
        path = Path(jsonl({}))
        path.write_text('{"text": ' + "[" * 9000 + "]" * 9000 + "}\n")
        contents(section(str(path)))
    with pytest.raises(DataError, match="line 1 is empty"):
        contents(section(jsonl({})))


def test_columns_that_are_not_read_are_listed(jsonl: Write, section: Section, tokenizer: Any) -> None:
    path = jsonl({"id": 1, "text": "ab"}, {"text": "cd", "source": "web"})
    (train, _) = build_dataset(section(path), tokenizer, seed=0)
    assert "columns not read: id, source" in train.report.lines()


def test_hints_for_columns_of_other_kinds(jsonl: Write, section: Section) -> None:
    with pytest.raises(DataError, match="These are preferences: map `chosen`"):
        contents(section(jsonl({"prompt": "p", "chosen": "c", "rejected": "r"})))
    with pytest.raises(DataError, match="These are single messages"):
        contents(section(jsonl({"role": "user", "content": "c"})))
    gemini = {"contents": [{"role": "user", "parts": [{"text": "q"}]}]}
    with pytest.raises(DataError, match=r"found: contents\. These are Gemini's contents: rename"):
        contents(section(jsonl(gemini)))
    with pytest.raises(DataError, match="This is ChatGPT's export.*{messages: "):
        contents(section(jsonl({"title": "t", "mapping": {}, "current_node": "n"})))
    with pytest.raises(DataError, match="found in the rows under 'data': q, r, s"):
        contents(section(jsonl({"version": 1, "data": [{"q": "1", "r": "2", "s": "3"}]})))


@pytest.mark.parametrize(
    ("row", "columns"),
    [
        ({"id": "1", "answer": "b", "question": "a"}, "{prompt: question, completion: answer}"),
        ({"Prompt": "a", "Completion": "b", "n": 1}, "{prompt: Prompt, completion: Completion}"),
        ({"output": "b", "input": "a"}, "{prompt: input, completion: output}"),
        ({"mr": "a", "ref": "b"}, "{prompt: mr, completion: ref}"),
        ({"left": "a", "right": "b", "n": 1}, "{prompt: left, completion: right}"),
        ({"reply": "b", "said: it's": "a"}, '{prompt: "said: it\'s", completion: reply}'),
        ({"dialog": [{"role": "user", "content": "a"}], "id": "1"}, "{messages: dialog}"),
        ({"body": "a"}, "{text: body}"),
        ({"a": "a", "b": "b", "c": "c"}, "{prompt: <column>, completion: <column>}"),
        (  # Dolly
            {"instruction": "a", "context": "c", "response": "b", "category": "d"},
            "{instruction: instruction, input: context, output: response}",
        ),
        (  # OpenOrca
            {"id": "1", "system_prompt": "", "question": "a", "response": "b"},
            "{instruction: question, output: response, system: system_prompt}",
        ),
        ({"type": "t", "query": "a", "original_question": "o", "response": "b"}, "{prompt: query, "),
        ({"problem": "a", "generated_solution": "b", "source": "s"}, "{prompt: problem, "),
    ],
)
def test_columns_that_fit_no_format_are_offered_as_settings(
    jsonl: Write, section: Section, row: dict, columns: str
) -> None:
    path = jsonl(row)
    with pytest.raises(DataError, match="no format fits") as caught:
        contents(section(path))
    assert f"columns: {columns}" in str(caught.value)
    if "<" in columns:
        return
    for line in str(caught.value).splitlines()[2:]:  # the settings as a shell and the recipe's YAML read them
        form, mapping = (word.partition("=")[2] for word in shlex.split(line.split(": ", 1)[1].strip()))
        mapped = YAML(typ="safe", pure=True).load(mapping)
        assert contents(section(path, format=form, columns=mapped))


@pytest.mark.parametrize(
    ("row", "advice"),
    [
        ({"context": "c", "question": "q", "answers": {"text": ["a"]}}, "'answers' holds an object"),  # SQuAD
        ({"question": "q", "subject": "s", "answer": 1}, "'answer' holds a number"),
        ({"id": "1", "data": ["a", "b"]}, "'data' holds a list that no format reads: make it"),  # UltraChat
        ({"text": "a", "role": "prompter", "parent_id": None}, "These are single messages"),  # OpenAssistant
        ({"chosen": "b", "rejected": "c"}, "columns: {text: chosen}"),
        (
            {"system": "s", "question": "a", "chosen": "b", "rejected": "c"},
            "columns: {instruction: question, output: chosen, system: system}",
        ),
        ({"prompt": "a", "chosen": [{"role": "user", "content": "a"}], "rejected": []}, "{messages: chosen}"),
    ],
)
def test_columns_of_known_data_sets_that_hold_no_answers_as_they_are(
    jsonl: Write, section: Section, row: dict, advice: str
) -> None:
    with pytest.raises(DataError, match=f"(?s)no format fits.*{re.escape(advice)}"):
        contents(section(jsonl(row)))


def test_with_a_prompt_template_the_answers_column_is_offered(jsonl: Write, section: Section) -> None:
    with pytest.raises(DataError, match=r"columns: \{completion: right\}"):
        contents(section(jsonl({"left": "a", "right": "b"}), prompt_template="{left}: "))
