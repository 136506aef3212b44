"""What becomes of rows that are too long."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from typing import Any

import pytest
from chat_kinds import TEMPLATES
from chat_kinds import make_tokenizer as tokenizer_of
from tiny_data import chat

from qlora_train.data.chat.chat_format import ChatFormat
from qlora_train.data.content import Chat, Completion, PlainText
from qlora_train.data.notes import Note

MakeTokenizer = Callable[..., Any]
Show = Callable[[Any, Any], str]
Tokenize = Callable[..., Any]


def test_a_cut_conversation_keeps_its_system_prompt_and_the_role_headers(
    tokenize: Tokenize, tokenizer: Any, show: Show
) -> None:
    examples = tokenize(tokenizer, chat("s:S", "u:" + "0123456789" * 8, "a:xyz"), length=80)
    assert show(tokenizer, examples.documents[0]) == (
        "<s><|start|>system\nS<|end|>\n<|start|>user\n" + ("0123456789" * 8)[-45:] + "<|end|>\n"
        "<|start|>assistant\n[x][y][z][<|end|>]"
    )
    assert len(examples.documents[0]) == 80 and examples.noted == {Note.PROMPT_CUT: 1}
    assert examples.notes[Note.PROMPT_CUT] == 35
    examples = tokenize(tokenizer, chat("u:0123456789", "a:xyz"), length=10)  # too short for its headers
    assert show(tokenizer, examples.documents[0]) == "<s>tant\n[x][y][z][<|end|>]"


def test_of_several_turns_the_end_is_cut_where_the_first_answer_fits(
    tokenize: Tokenize, tokenizer: Any, show: Show
) -> None:
    examples = tokenize(tokenizer, chat("u:q", "a:x", "u:" + "r" * 50, "a:y" * 20), length=60)
    shown = show(tokenizer, examples.documents[0])
    assert shown.startswith(
        "<s><|start|>user\nq<|end|>\n<|start|>assistant\n[x][<|end|>]\n<|start|>user\nrrr"
    )
    assert examples.noted == {Note.ANSWER_CUT: 1}


def test_too_long_drop_leaves_examples_out_and_counts_them(tokenize: Tokenize, tokenizer: Any) -> None:
    examples = tokenize(tokenizer, Completion("1", "ab"), PlainText("x" * 9), length=6, too_long="drop")
    assert examples.of_example == [0] and examples.notes == {Note.TOO_LONG: 10}


def test_too_long_split_gives_each_part_of_a_conversation_its_system_prompt(
    tokenize: Tokenize, tokenizer: Any, show: Show
) -> None:
    """A part is rendered as if it were a conversation of its own."""
    turns = [turn for n in range(6) for turn in (f"u:question {n}", f"a:answer {n}")]
    whole = tokenize(tokenizer, chat("s:S", *turns), length=1000).documents[0]
    examples = tokenize(tokenizer, chat("s:S", *turns), length=len(whole) // 2, too_long="split")
    parts = [tokenizer.decode(d.token_ids) for d in examples.documents]
    assert all(part.startswith("<s><|start|>system\nS<|end|>\n<|start|>user\nquestion") for part in parts)
    assert len(parts) == 3 and examples.of_example == [0] * 3
    said = [tokenizer.decode(d.token_ids[d.supervised]) for d in examples.documents]
    assert "".join(said) == "".join(f"answer {n}<|end|>" for n in range(6))
    assert examples.noted[Note.SPLIT] == 1 and not examples.notes[Note.ANSWER_CUT]


def test_too_long_split_of_one_answer_gives_pieces_and_every_target_once(
    tokenize: Tokenize, make_tokenizer: MakeTokenizer, show: Show
) -> None:
    tokenizer = make_tokenizer(adds_bos=True)
    examples = tokenize(tokenizer, Completion("123", "abcdefgh"), length=5, too_long="split")
    assert [show(tokenizer, d) for d in examples.documents] == [
        "<s>3[a][b][c]", "<s>[d][e][f][g]", "<s>[h][</s>]"
    ]  # fmt: skip
    assert examples.notes == {Note.SPLIT: 3, Note.PROMPT_CUT: 2}
    examples = tokenize(tokenizer, Completion("1234567", "abc"), length=7, too_long="split")
    assert [show(tokenizer, d) for d in examples.documents] == ["<s>67[a][b][c][</s>]"]
    examples = tokenize(tokenizer, chat("u:q", "a:" + "x" * 60), length=40, too_long="split")
    assert sum(d.num_supervised for d in examples.documents) == 61


ASKED = ["Why is it so?", "And what comes then, after all that?", "How long will that take?"]


@pytest.mark.parametrize("kind", sorted(TEMPLATES.keys() - {"drops the system message"}))
def test_shorter_conversations_are_still_the_templates(tokenize: Tokenize, kind: str) -> None:
    """Whatever the template: no word of a question is trained, each part shows the system prompt and ends in
    an answer behind what generation would be handed, and `split` trains every answer once."""
    tokenizer = tokenizer_of(TEMPLATES[kind])
    said = chat("s:Short.", *(turn for n in range(3) for turn in (f"u:{ASKED[n]}", f"a:Ok{n}.")))
    options: dict[str, Any] = {"chat_format": ChatFormat(tokenizer, ())}
    for options["supervise"] in ("completions", "last_turn"):
        whole = tokenize(tokenizer, said, length=1000, **options).documents
        shows_system = all("Short." in tokenizer.decode(d.token_ids) for d in whole)
        longest = max(map(len, whole))
        for length, too_long in product((longest - 4, longest * 2 // 3, longest // 2), ("cut", "split")):
            documents = tokenize(tokenizer, said, length=length, too_long=too_long, **options).documents
            texts = [tokenizer.decode(d.token_ids[d.supervised]) for d in documents]
            assert max(map(len, documents)) <= length
            assert not any(word in text for text in texts for word in ("it", "all", "take", "?", "Short"))
            if shows_system:
                assert all("Short." in tokenizer.decode(d.token_ids) for d in documents)
            trained = [n for n in range(3) for text in texts if f"Ok{n}." in text]
            if options["supervise"] == "last_turn":
                assert trained == [2]
            elif too_long == "split":
                assert trained == [0, 1, 2]


def test_a_cut_question_keeps_headers_and_calls(tokenize: Tokenize) -> None:
    tokenizer = tokenizer_of(TEMPLATES["calls"])
    function = {"type": "function", "function": {"name": "look", "arguments": {"k": "v"}}}
    messages = (
        {"role": "user", "content": "q" * 30},
        {"role": "assistant", "content": "", "tool_calls": [function], "train": False},
        {"role": "tool", "content": "r" * 30},
        {"role": "assistant", "content": "Two."},
    )
    (whole,) = tokenize(tokenizer, Chat(messages)).documents
    text = tokenizer.decode(whole.token_ids)
    for num_cut in (5, 30, 45):
        (document,) = tokenize(tokenizer, Chat(messages), length=len(whole) - num_cut).documents
        kept = text.replace("q", "", min(num_cut, 30)).replace("r" * max(num_cut - 30, 0), "", 1)
        assert tokenizer.decode(document.token_ids) == kept
        assert tokenizer.decode(document.token_ids[document.supervised]) == "Two.<|end|>"
