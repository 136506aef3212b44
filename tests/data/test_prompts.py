"""encode_prompt, load_tokenizer and preview: the data package as the commands use it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from qlora_train.data.building import build_dataset, open_data
from qlora_train.data.prompts import encode_prompt, encode_raw, stop_token_ids
from qlora_train.data.tokenizer import load_tokenizer
from qlora_train.errors import BaseModelError, DataError
from qlora_train.recipe import DataSection

Write = Callable[..., str]
Section = Callable[..., DataSection]
MakeTokenizer = Callable[..., Any]


@pytest.mark.parametrize(
    ("example", "keys"),
    [
        ({"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "x"}]}, {}),
        ({"instruction": "hi", "output": "x"}, {}),
        ({"q": "hi", "a": "x"}, {"columns": {"prompt": "q", "completion": "a"}}),
        ({"q": "hi", "a": "x"}, {"columns": {"completion": "a"}, "prompt_template": "Q: {q}\nA:"}),
    ],
)
def test_a_prompt_is_how_the_training_example_begins(
    jsonl: Write, section: Section, make_tokenizer: MakeTokenizer, example: dict, keys: dict
) -> None:
    data = section(jsonl(example), **keys)
    for tokenizer in (make_tokenizer(), make_tokenizer(adds_bos=True), make_tokenizer(bos=False)):
        (document,) = build_dataset(data, tokenizer, seed=0)[0].documents
        first_answer = document.supervised.tolist().index(True)
        assert encode_prompt("hi", data, tokenizer) == document.token_ids[:first_answer].tolist()


def test_prompts_without_data(make_tokenizer: MakeTokenizer) -> None:
    tokenizer = make_tokenizer()
    assert (
        tokenizer.decode(encode_prompt("hi", None, tokenizer))
        == "<s><|start|>user\nhi<|end|>\n<|start|>assistant\n"
    )
    plain = make_tokenizer("none")
    assert plain.decode(encode_prompt("hi", None, plain)) == "hi"
    adding = make_tokenizer("none", adds_bos=True)
    assert adding.decode(encode_prompt("hi", None, adding)) == "<s>hi"
    with pytest.raises(DataError, match="prompt is empty"):
        encode_prompt("", None, make_tokenizer("none", bos=False))


def test_raw_prompts_have_one_bos_where_the_tokenizer_adds_it(make_tokenizer: MakeTokenizer) -> None:
    adding, plain = make_tokenizer(adds_bos=True), make_tokenizer()
    assert adding.decode(encode_raw("hi", adding)) == "<s>hi"
    assert adding.decode(encode_raw("<s>hi", adding)) == "<s>hi"
    assert plain.decode(encode_raw("hi", plain)) == "hi"
    with pytest.raises(DataError, match="prompt is empty"):
        encode_raw("", plain)
    for encode in (encode_raw, lambda prompt, t: encode_prompt(prompt, None, t)):
        with pytest.raises(DataError, match="half a character"):
            encode("a\ud800", plain)


def test_an_answer_ends_with_eos_or_the_turn_end_of_the_template(make_tokenizer: MakeTokenizer) -> None:
    chatml = make_tokenizer()
    assert chatml.convert_ids_to_tokens(list(stop_token_ids(chatml, ()))) == ["</s>", "<|end|>"]
    for template in ("plain turns", "none"):
        assert stop_token_ids(make_tokenizer(template), ()) == (chatml.eos_token_id,)


def test_prompts_for_a_template_of_several_columns(section: Section, tokenizer: Any) -> None:
    data = section("gone.jsonl", prompt_template="{a}-{b}\n")
    assert tokenizer.decode(encode_prompt('{"a": "x", "b": "y"}', data, tokenizer)) == "x-y\n"
    for prompt in ("x", '["x"]', '{"a": "x"}'):
        with pytest.raises(DataError, match=r"several columns \(a, b\)"):
            encode_prompt(prompt, data, tokenizer)


def test_prompts_when_auto_cannot_tell(section: Section, tokenizer: Any) -> None:
    with pytest.raises(DataError, match=r"^The data file gone\.jsonl does not exist[^\n]*$"):
        encode_prompt("x", section("gone.jsonl"), tokenizer)


def test_sources_of_several_formats_stay_auto(jsonl: Write, section: Section, tokenizer: Any) -> None:
    messages = {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "x"}]}
    chat, text, pair = (
        jsonl(example, name=f"{number}.jsonl")
        for number, example in enumerate((messages, {"text": "t"}, {"prompt": "p", "completion": "c"}))
    )
    for sources, eval_sources, found in (
        ([text, pair], None, "auto"),
        ([text], [pair], "auto"),
        ([text], 0.5, "text"),
        ([chat], None, "messages"),
    ):
        data = section(sources, eval=eval_sources)
        assert open_data(data).section_with_format.format == found
    mixed = section([text, chat, pair])
    (*_, answer) = (d for d in build_dataset(mixed, tokenizer, seed=0)[0].documents if len(d) > 10)
    prompt = encode_prompt("hi", mixed, tokenizer)
    assert prompt == answer.token_ids[: len(prompt)].tolist()
    assert tokenizer.decode(encode_prompt("hi", section([text, pair]), tokenizer)) == "hi"


CHATS = "data.format=alpaca 'data.columns={instruction: question, output: answer}'"


def test_pairs_that_pass_by_the_chat_template_are_said_with_the_way_to_chats(
    jsonl: Write, section: Section, make_tokenizer: MakeTokenizer
) -> None:
    from qlora_train.generate.model_folder import ModelSource

    columns = {"prompt": "question", "completion": "answer"}
    data = section(jsonl({"question": "hi", "answer": "x"}), columns=columns)

    def said(data: DataSection, tokenizer: Any = None) -> str:
        train = build_dataset(data, tokenizer or make_tokenizer(), seed=0)[0]
        return "\n".join(line for line in train.report.lines() if "has a chat template" in line)

    def refusal(data: DataSection, tokenizer: Any = None) -> str:
        source = SimpleNamespace(data=data, tokenizer=tokenizer or make_tokenizer())
        with pytest.raises(DataError, match="prompts are plain text.* use generate --prompt") as caught:
            ModelSource.encode_messages(source, [{"role": "user", "content": "hi"}])  # type: ignore[arg-type]
        return str(caught.value)

    assert "the model will answer bare prompts" in said(data) and said(data).endswith(CHATS)
    assert refusal(data).endswith(f"set {CHATS}.")
    as_chats = section(data.train, format="alpaca", columns={"instruction": "question", "output": "answer"})
    assert said(as_chats) == ""
    others = {"prompt": "hi", "completion": "x", "label": 7}
    unlabelled = section(jsonl(others, name="labels.jsonl"), columns={"label": None})
    assert said(unlabelled).endswith("'data.columns={instruction: prompt, output: completion, label: null}'")
    filled = section(data.train, columns={"completion": "answer"}, prompt_template="{question}: ")
    for known, tokenizer in ((data, make_tokenizer("none")), (filled, None)):
        assert "alpaca" not in said(known, tokenizer) + refusal(known, tokenizer)
    by_hand = {"prompt": "<|start|>user\nhi<|end|>\n<|start|>assistant\n", "completion": "x<|end|>"}
    assert said(section(jsonl(by_hand, name="by_hand.jsonl"))) == ""


def test_load_tokenizer(tmp_path: Path, tokenizer: Any) -> None:
    tokenizer.save_pretrained(tmp_path / "base")
    loaded = load_tokenizer(str(tmp_path / "base"))
    assert loaded.chat_template == tokenizer.chat_template
    assert loaded("a<|end|>").input_ids == tokenizer("a<|end|>").input_ids
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "tokenizer.json").write_text("{")
    (tmp_path / "file").write_text("")
    for name, message in (("empty", "holds no tokenizer"), ("gone", "no folder"), ("file", "is a file")):
        with pytest.raises(BaseModelError, match=message):
            load_tokenizer(str(tmp_path / name))
    with pytest.raises(BaseModelError, match="cannot be read"):
        load_tokenizer(str(tmp_path / "broken"))
