from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from qlora_train.data.content import Chat, Completion, PlainText
from qlora_train.data.report import Note
from qlora_train.data.tables import RowProblem
from qlora_train.errors import DataError

MakeTokenizer = Callable[..., Any]
Show = Callable[[Any, Any], str]
Tokenize = Callable[..., Any]


def chat(*turns: str) -> Chat:
    """Turns as "u:text", "a:text", "s:text"."""
    roles = {"u": "user", "a": "assistant", "s": "system"}
    return Chat(tuple({"role": roles[turn[0]], "content": turn[2:]} for turn in turns))


def test_chat_mask_token_by_token(tokenize: Tokenize, make_tokenizer: MakeTokenizer, show: Show) -> None:
    tokenizer = make_tokenizer(bos=True)
    rows = tokenize(tokenizer, chat("s:S", "u:q", "a:no", "u:r", "a:y\n"))
    assert [show(tokenizer, document) for document in rows.documents] == [
        "<s><|start|>system\nS<|end|>\n<|start|>user\nq<|end|>\n<|start|>assistant\n[n][o][<|end|>]\n"
        "<|start|>user\nr<|end|>\n<|start|>assistant\n[y][\n][<|end|>]\n"
    ]
    assert rows.documents[0].token_ids.dtype == np.int32
    assert rows.documents[0].supervised.dtype == bool


def test_chat_tokens_are_the_templates_own(tokenize: Tokenize, tokenizer: Any) -> None:
    conversation = chat("u:häß 日本", "a:ok 🙂")
    (document,) = tokenize(tokenizer, conversation).documents
    expected = tokenizer.apply_chat_template(list(conversation.messages), return_dict=True)["input_ids"]
    assert document.token_ids.tolist() == expected
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


def test_no_bos_where_there_is_none(tokenize: Tokenize, make_tokenizer: MakeTokenizer, show: Show) -> None:
    tokenizer = make_tokenizer(bos=False)
    rows = tokenize(tokenizer, Completion("p", "c"), PlainText("xy"))
    assert [show(tokenizer, d) for d in rows.documents] == ["p[c][</s>]", "x[y][</s>]"]


def test_eos_is_appended_where_a_turn_has_no_end_token(
    tokenize: Tokenize, make_tokenizer: MakeTokenizer, show: Show
) -> None:
    tokenizer = make_tokenizer("plain turns")
    rows = tokenize(tokenizer, chat("u:q", "a:x", "u:r", "a:y"), chat("u:q", "a:x", "u:r"))
    assert show(tokenizer, rows.documents[0]) == "<s>u:q\na:[x]\nu:r\na:[y][</s>]"
    assert show(tokenizer, rows.documents[1]) == "<s>u:q\na:[x][</s>]"


def test_earlier_turns_are_found_where_the_template_rewrites_them(
    tokenize: Tokenize, make_tokenizer: MakeTokenizer, show: Show
) -> None:
    tokenizer = make_tokenizer("thinking", bos=False)
    (document,) = tokenize(tokenizer, chat("u:q", "a:e", "u:r", "a:y")).documents
    assert show(tokenizer, document) == (
        "<|start|>u q<|end|>\n<|start|>a [e][<|end|>]\n<|start|>u r<|end|>\n<|start|>a "
        "[(][t][h][i][n][k][)][y][<|end|>]\n"
    )


def test_a_template_that_breaks_prefixes_needs_marks(
    tokenize: Tokenize, make_tokenizer: MakeTokenizer, show: Show
) -> None:
    conversation = chat("u:q", "a:xy", "u:r", "a:z")
    with pytest.raises(RowProblem, match=r"(?s)\{% generation %\}.*supervise: all"):
        tokenize(make_tokenizer("counting"), conversation)
    marked = make_tokenizer("counting, marked", bos=False)
    (document,) = tokenize(marked, conversation).documents
    assert show(marked, document) == "4:u q\na [x][y][<|end|>]\nu r\na [z][<|end|>]\n"
    unmarked = make_tokenizer("counting", bos=False)
    (document,) = tokenize(unmarked, conversation, supervise="all").documents
    assert document.supervised.tolist() == [False] + [True] * (len(document) - 1)


def test_turns_of_weight_0_have_no_loss(tokenize: Tokenize, tokenizer: Any, show: Show) -> None:
    turns = chat("u:q", "a:x", "u:r", "a:y").messages
    silenced = Chat((*turns[:3], {**turns[3], "train": False}))
    (document,) = tokenize(tokenizer, silenced).documents
    assert show(tokenizer, document) == (
        "<s><|start|>user\nq<|end|>\n<|start|>assistant\n[x][<|end|>]\n"
        "<|start|>user\nr<|end|>\n<|start|>assistant\ny<|end|>\n"
    )
    with pytest.raises(RowProblem, match="weight 0, which data.supervise: all contradicts"):
        tokenize(tokenizer, silenced, supervise="all")


def test_the_edge_between_prompt_and_completion_is_as_generation_meets_it(
    tokenize: Tokenize, make_tokenizer: MakeTokenizer, show: Show
) -> None:
    tokenizer = make_tokenizer(merges=("b c", "Ġ d"))
    rows = tokenize(tokenizer, Completion("ab", "cd "), Completion("a ", "d"), Completion("a", "b</s>"))
    assert [show(tokenizer, d) for d in rows.documents] == [
        "ab[c][d][ ][</s>]",
        "a [d][</s>]",
        "a[b][</s>]",
    ]
    for document, prompt in zip(rows.documents, ("ab", "a ", "a"), strict=True):
        ids = tokenizer(prompt).input_ids
        assert document.token_ids[: len(ids)].tolist() == ids


def test_plain_rows_have_the_bos_that_the_tokenizer_adds(
    tokenize: Tokenize, make_tokenizer: MakeTokenizer, show: Show
) -> None:
    contents = Completion("p", "c"), PlainText("xy"), Completion("<s>p", "c")
    for adds_bos, expected in (
        (True, ["<s>p[c][</s>]", "<s>[x][y][</s>]", "<s>p[c][</s>]"]),
        (False, ["p[c][</s>]", "x[y][</s>]", "<s>p[c][</s>]"]),
    ):
        tokenizer = make_tokenizer(adds_bos=adds_bos)
        assert [show(tokenizer, d) for d in tokenize(tokenizer, *contents).documents] == expected


def test_supervise_all(tokenize: Tokenize, tokenizer: Any, show: Show) -> None:
    rows = tokenize(tokenizer, Completion("pq", "c"), chat("u:q"), supervise="all")
    assert show(tokenizer, rows.documents[0]) == "p[q][c][</s>]"
    assert show(tokenizer, rows.documents[1]) == "<s>[<|start|>][u][s][e][r][\n][q][<|end|>][\n]"


def test_prompt_is_cut_before_the_answer(
    tokenize: Tokenize, make_tokenizer: MakeTokenizer, show: Show
) -> None:
    tokenizer = make_tokenizer(adds_bos=True)
    rows = tokenize(tokenizer, Completion("12345", "ab"), Completion("12345", "abcdefgh"), length=6)
    assert [show(tokenizer, d) for d in rows.documents] == ["<s>45[a][b][</s>]", "<s>[a][b][c][d][e]"]
    assert rows.noted == {Note.PROMPT_CUT: 2, Note.ANSWER_CUT: 1}
    assert rows.notes[Note.PROMPT_CUT] + rows.notes[Note.ANSWER_CUT] == 3 + 9
    without_bos = make_tokenizer(bos=False)
    rows = tokenize(without_bos, Completion("12345", "abcdefgh"), length=6)
    assert show(without_bos, rows.documents[0]) == "5[a][b][c][d][e]"


def test_a_cut_conversation_keeps_its_system_prompt_and_the_role_headers(
    tokenize: Tokenize, tokenizer: Any, show: Show
) -> None:
    rows = tokenize(tokenizer, chat("s:S", "u:" + "0123456789" * 8, "a:xyz"), length=80)
    assert show(tokenizer, rows.documents[0]) == (
        "<s><|start|>system\nS<|end|>\n<|start|>user\n" + ("0123456789" * 8)[-44:] + "<|end|>\n"
        "<|start|>assistant\n[x][y][z][<|end|>]\n"
    )
    assert len(rows.documents[0]) == 80 and rows.notes == {Note.PROMPT_CUT: 36}
    rows = tokenize(tokenizer, chat("u:0123456789", "a:xyz"), length=10)  # too short for its headers
    assert show(tokenizer, rows.documents[0]) == "<s>ant\n[x][y][z][<|end|>]\n"


def test_of_several_turns_the_end_is_cut_where_the_first_answer_fits(
    tokenize: Tokenize, tokenizer: Any, show: Show
) -> None:
    rows = tokenize(tokenizer, chat("u:q", "a:x", "u:" + "r" * 50, "a:y" * 20), length=60)
    shown = show(tokenizer, rows.documents[0])
    assert shown.startswith(
        "<s><|start|>user\nq<|end|>\n<|start|>assistant\n[x][<|end|>]\n<|start|>user\nrrr"
    )
    assert rows.noted == {Note.ANSWER_CUT: 1}


def test_too_long_drop_leaves_rows_out_and_counts_them(tokenize: Tokenize, tokenizer: Any) -> None:
    rows = tokenize(tokenizer, Completion("1", "ab"), PlainText("x" * 9), length=6, too_long="drop")
    assert rows.of_row == [0] and rows.notes == {Note.TOO_LONG: 10}


def test_too_long_split_gives_each_part_of_a_conversation_its_system_prompt(
    tokenize: Tokenize, tokenizer: Any, show: Show
) -> None:
    """A part is rendered as if it were a conversation of its own."""
    turns = [turn for n in range(6) for turn in (f"u:question {n}", f"a:answer {n}")]
    whole = tokenize(tokenizer, chat("s:S", *turns), length=1000).documents[0]
    rows = tokenize(tokenizer, chat("s:S", *turns), length=len(whole) // 2, too_long="split")
    parts = [tokenizer.decode(d.token_ids) for d in rows.documents]
    assert all(part.startswith("<s><|start|>system\nS<|end|>\n<|start|>user\nquestion") for part in parts)
    assert len(parts) == 3 and rows.of_row == [0] * 3
    said = [tokenizer.decode(d.token_ids[d.supervised]) for d in rows.documents]
    assert "".join(said) == "".join(f"answer {n}<|end|>" for n in range(6))
    assert rows.noted[Note.SPLIT] == 1 and not rows.notes[Note.ANSWER_CUT]


def test_too_long_split_of_one_answer_gives_pieces_and_every_target_once(
    tokenize: Tokenize, make_tokenizer: MakeTokenizer, show: Show
) -> None:
    tokenizer = make_tokenizer(adds_bos=True)
    rows = tokenize(tokenizer, Completion("123", "abcdefgh"), length=5, too_long="split")
    assert [show(tokenizer, d) for d in rows.documents] == [
        "<s>123[a]", "<s>[b][c][d][e]", "<s>[f][g][h][</s>]"
    ]  # fmt: skip
    assert rows.notes == {Note.SPLIT: 3}
    rows = tokenize(tokenizer, chat("u:q", "a:" + "x" * 60), length=40, too_long="split")
    assert sum(d.num_supervised for d in rows.documents) == 61


@pytest.mark.parametrize("bos", [True, False])
def test_long_texts_are_split_and_nothing_is_lost(
    tokenize: Tokenize, make_tokenizer: MakeTokenizer, bos: bool, show: Show
) -> None:
    tokenizer = make_tokenizer(adds_bos=bos)
    rows = tokenize(tokenizer, PlainText("abcdefg"), PlainText("xy"), length=4)
    shown = [show(tokenizer, d) for d in rows.documents]
    if bos:
        assert shown == ["<s>[a][b][c]", "<s>[d][e][f]", "<s>[g][</s>]", "<s>[x][y][</s>]"]
    else:
        assert shown == ["a[b][c][d]", "d[e][f][g]", "g[</s>]", "x[y][</s>]"]
    assert (rows.noted, rows.notes) == ({Note.SPLIT: 1}, {Note.SPLIT: 3})
    assert rows.of_row == [0, 0, 0, 1]


def test_a_token_without_a_row_in_the_embedding_is_a_problem_of_its_row(
    tokenize: Tokenize, tokenizer: Any
) -> None:
    number = tokenizer.convert_tokens_to_ids("<|start|>")
    tokenize(tokenizer, Completion("a", "b"), vocabulary_size=number + 1000)
    with pytest.raises(RowProblem, match=rf"token '~', number \d+ .*embedding has {number + 1} rows"):
        tokenize(tokenizer, Completion("~", "<|start|>"), vocabulary_size=number + 1)


def test_rows_without_supervised_tokens_are_counted(tokenize: Tokenize, tokenizer: Any) -> None:
    rows = tokenize(tokenizer, chat("u:q"), chat("u:q", "a:x"))
    assert len(rows.documents) == 1
    assert rows.noted == {Note.UNSUPERVISED: 1}


def test_chat_template_missing_or_refusing(tokenize: Tokenize, make_tokenizer: MakeTokenizer) -> None:
    tokenizer = make_tokenizer("none")
    with pytest.raises(DataError, match="no chat template.*prompt_completion"):
        tokenize(tokenizer, chat("u:q", "a:x"))
    tokenizer.chat_template = "{{ raise_exception('turns must alternate') }}"
    with pytest.raises(RowProblem, match="turns must alternate"):
        tokenize(tokenizer, chat("u:q", "a:x"))


def test_a_conversation_may_not_begin_with_the_assistant(tokenize: Tokenize, tokenizer: Any) -> None:
    with pytest.raises(RowProblem, match="begins with the assistant"):
        tokenize(tokenizer, chat("a:x", "u:q"))


def test_without_eos(tokenize: Tokenize, make_tokenizer: MakeTokenizer) -> None:
    tokenizer = make_tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(DataError, match="no EOS"):
        tokenize(tokenizer, Completion("p", "c"))


def test_many_rows_in_several_batches_keep_their_order(tokenize: Tokenize, tokenizer: Any) -> None:
    rows = tokenize(tokenizer, *(Completion("p", f"{n}") for n in range(1100)))
    said = [tokenizer.decode(d.token_ids[d.supervised]) for d in rows.documents]
    assert said == [f"{n}</s>" for n in range(1100)]
