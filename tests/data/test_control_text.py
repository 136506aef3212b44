"""The text of special tokens in messages is text; the template's own control tokens stay what they are."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from tokenizers import AddedToken, normalizers, pre_tokenizers

from qlora_train.data.content import Chat, Completion, PlainText
from qlora_train.data.notes import Note
from qlora_train.data.prompts import encode_prompt

MakeTokenizer = Callable[..., Any]
Show = Callable[[Any, Any], str]
Tokenize = Callable[..., Any]


def exchange(user: str, assistant: str) -> Chat:
    return Chat(({"role": "user", "content": user}, {"role": "assistant", "content": assistant}))


@pytest.mark.parametrize("template", ["chatml", "plain turns", "thinking", "counting, marked"])
@pytest.mark.parametrize("supervise", ["completions", "all"])
def test_quoted_control_tokens_are_text(
    tokenize: Tokenize, make_tokenizer: MakeTokenizer, template: str, supervise: str
) -> None:
    """Byte for byte what a text of the same length without any special token gives."""
    tokenizer = make_tokenizer(template, merges=("o n", "< /"))
    quoting = exchange("é </s> on <|end|>", "no</s>on<|start|> x<s>")
    other = exchange("é </$> on <!end|>", "no</$>on<!start|> x<$>")
    examples = tokenize(tokenizer, quoting, other, quoting, supervise=supervise)
    said, expected, _ = examples.documents
    assert examples.noted[Note.QUOTES_CONTROL_TOKENS] == 2
    assert examples.noted[Note.SAYS_CONTROL_TOKENS] == 0
    assert said.supervised.tolist() == expected.supervised.tolist()
    text = tokenizer.decode(said.token_ids)
    assert "no</s>on<|start|> x<s>" in text
    same = [
        a == b or {a, b} <= {"s", "$", "|", "!"}
        for a, b in zip(
            *(tokenizer.convert_ids_to_tokens(d.token_ids.tolist()) for d in (said, expected)), strict=True
        )
    ]
    assert all(same)


def test_the_turn_goes_on_behind_a_quoted_end(tokenize: Tokenize, tokenizer: Any, show: Show) -> None:
    (document,) = tokenize(tokenizer, exchange("q", "a<|end|>b")).documents
    expected = "[a][<][|][e][n][d][|][>][b][<|end|>]"
    assert show(tokenizer, document).endswith("<|start|>assistant\n" + expected)
    end_id = tokenizer.convert_tokens_to_ids("<|end|>")
    assert np.count_nonzero(document.token_ids == end_id) == 2


def test_a_prompt_quotes_as_its_training_example_does(
    tokenize: Tokenize, make_tokenizer: MakeTokenizer
) -> None:
    tokenizer = make_tokenizer(adds_bos=True)
    (document,) = tokenize(tokenizer, exchange("is </s> the end?", "x")).documents
    first_answer = document.supervised.tolist().index(True)
    assert encode_prompt("is </s> the end?", None, tokenizer) == document.token_ids[:first_answer].tolist()


def _looks_at_contents(tokenizer: Any) -> None:
    tokenizer.chat_template = tokenizer.chat_template.replace("m.content", "m.content.split('</s>')[-1]")


def _strips_the_mark(tokenizer: Any) -> None:
    tokenizer.backend_tokenizer.normalizer = normalizers.Replace("\ue001", "")
    tokenizer.add_tokens([AddedToken("<e>", normalized=True)], special_tokens=True)


def _prefixes_the_first_run(tokenizer: Any) -> None:
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Metaspace("Ġ", prepend_scheme="first")


@pytest.mark.parametrize("spoil", [_looks_at_contents, _strips_the_mark, _prefixes_the_first_run])
def test_what_cannot_be_exact_is_left_and_counted(
    tokenize: Tokenize, make_tokenizer: MakeTokenizer, spoil: Callable[[Any], None]
) -> None:
    tokenizer = make_tokenizer(bos=True)
    spoil(tokenizer)
    chat = exchange("q", "a</s><e>b")
    examples = tokenize(tokenizer, chat)
    assert (examples.noted[Note.SAYS_CONTROL_TOKENS], examples.noted[Note.QUOTES_CONTROL_TOKENS]) == (1, 0)
    expected = tokenizer.apply_chat_template(list(chat.messages), return_dict=True)["input_ids"]
    said = examples.documents[0].token_ids.tolist()
    assert said == expected[: len(said)]
    assert tokenizer.decode(expected[len(said) :]).strip() == ""  # nothing is kept behind the last answer


def test_control_tokens_in_plain_examples_stay_and_are_counted(
    tokenize: Tokenize, tokenizer: Any, show: Show
) -> None:
    examples = tokenize(tokenizer, Completion("<|start|>p", "c"), PlainText("a</s>b"), PlainText("a"))
    assert [show(tokenizer, d) for d in examples.documents[:2]] == [
        "<|start|>p[c][</s>]",
        "a[</s>][b][</s>]",
    ]
    assert examples.noted[Note.SAYS_CONTROL_TOKENS] == 2


def test_an_example_may_hold_the_mark_itself(tokenize: Tokenize, tokenizer: Any) -> None:
    for text in ("a\ue001b", "a\ue001</s>b"):
        (document,) = tokenize(tokenizer, exchange("q\ue001", text)).documents
        assert tokenizer.decode(document.token_ids[document.supervised]) == text + "<|end|>"
        (document,) = tokenize(tokenizer, PlainText(text)).documents
        assert tokenizer.decode(document.token_ids) == text + "</s>"
        prompt = encode_prompt(text, None, tokenizer)
        assert tokenizer.decode(prompt) == f"<s><|start|>user\n{text}<|end|>\n<|start|>assistant\n"
