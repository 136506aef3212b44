from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from tiny_data import chat
from tokenizers import processors

from qlora_train.data.content import Chat, Completion, PlainText
from qlora_train.data.notes import Note
from qlora_train.data.prompts import encode_raw
from qlora_train.data.tables import ExampleProblem
from qlora_train.errors import DataError

MakeTokenizer = Callable[..., Any]
Show = Callable[[Any, Any], str]
Tokenize = Callable[..., Any]


def test_chat_mask_token_by_token(tokenize: Tokenize, make_tokenizer: MakeTokenizer, show: Show) -> None:
    tokenizer = make_tokenizer(bos=True)
    examples = tokenize(tokenizer, chat("s:S", "u:q", "a:no", "u:r", "a:y\n"))
    assert [show(tokenizer, document) for document in examples.documents] == [
        "<s><|start|>system\nS<|end|>\n<|start|>user\nq<|end|>\n<|start|>assistant\n[n][o][<|end|>]\n"
        "<|start|>user\nr<|end|>\n<|start|>assistant\n[y][\n][<|end|>]"
    ]
    assert examples.documents[0].token_ids.dtype == np.int32
    assert examples.documents[0].supervised.dtype == bool


def test_chat_tokens_are_the_templates_own(tokenize: Tokenize, tokenizer: Any) -> None:
    conversation = chat("u:häß 日本", "a:ok 🙂")
    (document,) = tokenize(tokenizer, conversation).documents
    expected = tokenizer.apply_chat_template(list(conversation.messages), return_dict=True)["input_ids"]
    assert document.token_ids.tolist() == expected[:-1]  # but for the line break behind the last answer
    assert tokenizer.decode(document.token_ids[document.supervised]) == "ok 🙂<|end|>"


@pytest.mark.parametrize("template", ["chatml", "plain turns", "thinking"])
def test_exactly_one_bos_though_the_tokenizer_adds_one_too(
    tokenize: Tokenize, make_tokenizer: MakeTokenizer, template: str
) -> None:
    tokenizer = make_tokenizer(template, adds_bos=True)
    contents = chat("u:q", "a:x"), Completion("p", "c"), Completion("<s>p", "c"), PlainText("<s><s>t")
    for document in tokenize(tokenizer, *contents).documents:
        assert document.token_ids[0] == tokenizer.bos_token_id
        assert np.count_nonzero(document.token_ids == tokenizer.bos_token_id) == 1
        assert not document.supervised[0]


def test_bos_only_where_the_tokenizer_puts_it(
    tokenize: Tokenize, make_tokenizer: MakeTokenizer, show: Show
) -> None:
    """A tokenizer may define one and put it before no text."""
    for tokenizer in (make_tokenizer(bos=False), make_tokenizer(bos=True)):
        examples = tokenize(tokenizer, Completion("p", "c"), PlainText("xy"))
        assert [show(tokenizer, d) for d in examples.documents] == ["p[c][</s>]", "x[y][</s>]"]
    adding = make_tokenizer(adds_bos=True)
    examples = tokenize(adding, Completion("p", "c"), PlainText("xy"))
    assert [show(adding, d) for d in examples.documents] == ["<s>p[c][</s>]", "<s>[x][y][</s>]"]


def test_whatever_the_tokenizer_puts_before_a_text(tokenize: Tokenize, tokenizer: Any, show: Show) -> None:
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<|start|> <s> $A <|end|>", special_tokens=[("<s>", 0), ("<|start|>", 2), ("<|end|>", 3)]
    )
    examples = tokenize(tokenizer, Completion("p", "c"), Completion("<|start|><s>p", "c"))
    assert [show(tokenizer, d) for d in examples.documents] == ["<|start|><s>p[c][</s>]"] * 2


def test_each_answer_has_a_text_of_its_own_where_turns_do_not_end(
    tokenize: Tokenize, make_tokenizer: MakeTokenizer, show: Show
) -> None:
    tokenizer = make_tokenizer("plain turns")
    examples = tokenize(tokenizer, chat("u:q", "a:x", "u:r", "a:y"), chat("u:q", "a:x", "u:r"))
    assert [show(tokenizer, document) for document in examples.documents] == [
        "<s>u:q\na:[x][</s>]",
        "<s>u:q\na:x\nu:r\na:[y][</s>]",
        "<s>u:q\na:[x][</s>]",
    ]
    assert examples.of_example == [0, 0, 1]
    assert examples.noted == {Note.SEVERAL_TEXTS: 1, Note.NO_STOP_TOKEN: 2, Note.UNANSWERED: 1}
    assert examples.notes[Note.SEVERAL_TEXTS] == 9  # tokens of the shorter text
    assert examples.notes[Note.NO_STOP_TOKEN] == 3


def test_turns_that_the_template_rewrites_are_trained_as_they_were_asked_for(
    tokenize: Tokenize, make_tokenizer: MakeTokenizer, show: Show
) -> None:
    tokenizer = make_tokenizer("thinking", bos=False)
    examples = tokenize(tokenizer, chat("u:q", "a:e", "u:r", "a:y"))
    assert [show(tokenizer, document) for document in examples.documents] == [
        "<|start|>u q<|end|>\n<|start|>a [(][t][h][i][n][k][)][e][<|end|>]",
        "<|start|>u q<|end|>\n<|start|>a e<|end|>\n<|start|>u r<|end|>\n<|start|>a "
        "[(][t][h][i][n][k][)][y][<|end|>]",
    ]
    (last,) = tokenize(tokenizer, chat("u:q", "a:e", "u:r", "a:y"), supervise="last_turn").documents
    assert show(tokenizer, last) == show(tokenizer, examples.documents[1])


def test_a_template_without_a_header_needs_marks(
    tokenize: Tokenize, make_tokenizer: MakeTokenizer, show: Show
) -> None:
    conversation = chat("u:q", "a:xy", "u:r", "a:z")
    with pytest.raises(ExampleProblem, match=r"(?s)\{% generation %\}.*supervise: all"):
        tokenize(make_tokenizer("counting"), conversation)
    marked = make_tokenizer("counting, marked", bos=False)
    assert [show(marked, document) for document in tokenize(marked, conversation).documents] == [
        "2:u q\na [x][y][<|end|>]",
        "4:u q\na xy<|end|>\nu r\na [z][<|end|>]",
    ]
    unmarked = make_tokenizer("counting", bos=False)
    (document,) = tokenize(unmarked, conversation, supervise="all").documents
    assert document.supervised.tolist() == [False] + [True] * (len(document) - 1)


def test_turns_that_are_not_trained_are_context(tokenize: Tokenize, tokenizer: Any, show: Show) -> None:
    messages = chat("u:q", "a:x", "u:r", "a:y").messages
    silenced = Chat((*messages[:3], {**messages[3], "train": False}))
    (document,) = tokenize(tokenizer, silenced).documents
    assert show(tokenizer, document) == "<s><|start|>user\nq<|end|>\n<|start|>assistant\n[x][<|end|>]"
    early = Chat((messages[0], {**messages[1], "train": False}, messages[2], {**messages[3], "train": True}))
    (document,) = tokenize(tokenizer, early).documents
    assert show(tokenizer, document) == (
        "<s><|start|>user\nq<|end|>\n<|start|>assistant\nx<|end|>\n"
        "<|start|>user\nr<|end|>\n<|start|>assistant\n[y][<|end|>]"
    )
    with pytest.raises(ExampleProblem, match="not to be trained on.*which data.supervise: all contradicts"):
        tokenize(tokenizer, silenced, supervise="all")
    with pytest.raises(ExampleProblem, match=r"message 1 \(user\) is to be trained on"):
        tokenize(tokenizer, Chat(({**messages[0], "train": True}, messages[1])))
    examples = tokenize(tokenizer, silenced, chat("u:q", "a:x"), supervise="last_turn")
    assert (len(examples.documents), examples.noted[Note.UNSUPERVISED]) == (1, 1)


def test_completion_mask_and_no_token_on_the_boundary(
    tokenize: Tokenize, make_tokenizer: MakeTokenizer, show: Show
) -> None:
    tokenizer = make_tokenizer(merges=("b c", "Ġ d"))
    examples = tokenize(tokenizer, Completion("ab", "cd "), Completion("a ", "d"), Completion("a", "b</s>"))
    assert [show(tokenizer, d) for d in examples.documents] == [
        "ab[c][d][ ][</s>]",
        "a [d][</s>]",
        "a[b][</s>]",
    ]
    assert examples.documents[0].token_ids[:2].tolist() == encode_raw("ab", tokenizer)


def test_supervise_all(tokenize: Tokenize, tokenizer: Any, make_tokenizer: MakeTokenizer, show: Show) -> None:
    examples = tokenize(tokenizer, Completion("p", "c"), chat("u:q"), supervise="all")
    assert show(tokenizer, examples.documents[0]) == "p[c][</s>]"
    assert show(tokenizer, examples.documents[1]) == "<s>[<|start|>][u][s][e][r][\n][q][<|end|>]"
    plain = make_tokenizer("plain turns", bos=False)
    (document,) = tokenize(plain, chat("u:q", "a:x"), supervise="all").documents
    assert show(plain, document) == "u[:][q][\n][a][:][x][</s>]"


def test_an_answer_that_nothing_asks_for_is_context(tokenize: Tokenize, tokenizer: Any, show: Show) -> None:
    examples = tokenize(tokenizer, chat("a:hi", "u:q", "a:x"))
    assert show(tokenizer, examples.documents[0]) == (
        "<s><|start|>assistant\nhi<|end|>\n<|start|>user\nq<|end|>\n<|start|>assistant\n[x][<|end|>]"
    )
    assert examples.noted == {Note.ANSWER_FIRST: 1}
    examples = tokenize(tokenizer, chat("a:x", "u:q"), chat("u:q", "a:x"))
    assert (len(examples.documents), examples.noted[Note.UNSUPERVISED]) == (1, 1)


def test_prompt_is_cut_before_the_answer(
    tokenize: Tokenize, make_tokenizer: MakeTokenizer, show: Show
) -> None:
    tokenizer = make_tokenizer(adds_bos=True)
    examples = tokenize(tokenizer, Completion("12345", "ab"), Completion("12345", "abcdefgh"), length=6)
    assert [show(tokenizer, d) for d in examples.documents] == ["<s>45[a][b][</s>]", "<s>45[a][b][c]"]
    assert examples.noted == {Note.PROMPT_CUT: 2, Note.ANSWER_CUT: 1}
    assert examples.notes[Note.PROMPT_CUT] + examples.notes[Note.ANSWER_CUT] == 3 + 9
    without_bos = make_tokenizer(bos=False)
    examples = tokenize(without_bos, Completion("12345", "abcdefgh"), length=6)
    assert show(without_bos, examples.documents[0]) == "345[a][b][c]"
    short = tokenize(
        tokenizer, Completion("1", "abcdefgh"), length=6
    )  # what is asked stays where it is short
    assert show(tokenizer, short.documents[0]) == "<s>1[a][b][c][d]" and set(short.noted) == {Note.ANSWER_CUT}


def test_a_token_without_an_example_in_the_embedding_is_a_problem_of_its_example(
    tokenize: Tokenize, tokenizer: Any
) -> None:
    number = tokenizer.convert_tokens_to_ids("<|start|>")
    tokenize(tokenizer, Completion("a", "b"), vocabulary_size=number + 1000)
    with pytest.raises(ExampleProblem, match=rf"token '~', number \d+ .*embedding has {number + 1} rows"):
        tokenize(tokenizer, Completion("~", "<|start|>"), vocabulary_size=number + 1)


@pytest.mark.parametrize("bos", [True, False])
def test_long_texts_are_split_and_nothing_is_lost(
    tokenize: Tokenize, make_tokenizer: MakeTokenizer, bos: bool, show: Show
) -> None:
    tokenizer = make_tokenizer(adds_bos=bos)
    examples = tokenize(tokenizer, PlainText("abcdefg"), PlainText("xy"), length=4)
    shown = [show(tokenizer, d) for d in examples.documents]
    if bos:
        assert shown == ["<s>[a][b][c]", "<s>[d][e][f]", "<s>[g][</s>]", "<s>[x][y][</s>]"]
    else:
        assert shown == ["a[b][c][d]", "d[e][f][g]", "g[</s>]", "x[y][</s>]"]
    assert (examples.noted, examples.notes) == ({Note.SPLIT: 1}, {Note.SPLIT: 3})
    assert examples.of_example == [0, 0, 0, 1]


def test_examples_without_supervised_tokens_are_counted(tokenize: Tokenize, tokenizer: Any) -> None:
    examples = tokenize(tokenizer, chat("u:q"), chat("u:q", "a:x"))
    assert len(examples.documents) == 1
    assert examples.noted == {Note.UNSUPERVISED: 1}


def test_chat_template_missing_or_refusing(tokenize: Tokenize, make_tokenizer: MakeTokenizer) -> None:
    tokenizer = make_tokenizer("none")
    with pytest.raises(DataError, match="no chat template.*prompt_completion"):
        tokenize(tokenizer, chat("u:q", "a:x"))
    tokenizer.chat_template = "{{ raise_exception('turns must alternate') }}"
    with pytest.raises(ExampleProblem, match="turns must alternate"):
        tokenize(tokenizer, chat("u:q", "a:x"))


def test_without_eos(tokenize: Tokenize, make_tokenizer: MakeTokenizer) -> None:
    tokenizer = make_tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(DataError, match="no EOS"):
        tokenize(tokenizer, Completion("p", "c"))


def test_many_examples_in_several_batches_keep_their_order(tokenize: Tokenize, tokenizer: Any) -> None:
    examples = tokenize(tokenizer, *(Completion("p", f"{n}") for n in range(1100)))
    said = [tokenizer.decode(d.token_ids[d.supervised]) for d in examples.documents]
    assert said == [f"{n}</s>" for n in range(1100)]
