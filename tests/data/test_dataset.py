from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from qlora_train.data.chat import ChatNote, lost
from qlora_train.data.dataset import PackedDataset, build_dataset, epoch_order
from qlora_train.data.formats import Example, PlainText
from qlora_train.data.report import TokenCounts
from qlora_train.data.split import split_by_content
from qlora_train.data.tables import Origin
from qlora_train.data.tokenization import Document, TokenizedRows
from qlora_train.errors import DataError
from qlora_train.recipe import DataSection

Write = Callable[..., str]
Section = Callable[..., DataSection]


def dataset(*documents: str, length: int = 8, packing: bool = True, shuffle: bool = False) -> PackedDataset:
    """Documents as letters: capitals are supervised, token ids are the letters' codes."""
    rows = TokenizedRows(
        documents=[
            Document(np.array([ord(c) for c in text], dtype=np.int32), np.array([c.isupper() for c in text]))
            for text in documents
        ],
        counts=TokenCounts(
            num_rows=len(documents), num_documents=len(documents), num_tokens=sum(map(len, documents))
        ),
    )
    return PackedDataset(
        rows, sequence_length=length, packing=packing, pad_id=ord("."), seed=3, shuffle=shuffle
    )


def test_a_micro_batch_by_hand() -> None:
    data = dataset("abCD", "eF", "gHiJK", "l")
    assert [sorted(each) for each in data.bins] == [[1, 2, 3], [0]]
    batch = data.micro_batch([1, None, 0])
    text = "".join(map(chr, batch.token_ids))
    assert text == "abCD....|........|gHiJKeFl".replace("|", "")
    assert batch.position_ids.tolist() == [0, 1, 2, 3, 0, 1, 2, 3, *range(8), 0, 1, 2, 3, 4, 0, 1, 0]
    assert batch.cu_seqlens.tolist() == [0, 4, 8, 16, 21, 23, 24]
    labels = {i: chr(label) for i, label in enumerate(batch.labels) if label != -100}
    assert labels == {1: "C", 2: "D", 16: "H", 18: "J", 19: "K", 21: "F"}
    assert batch.supervised_positions.tolist() == sorted(labels)
    assert batch.row_ids.tolist() == [1] * 8 + [-1] * 8 + [0] * 8
    assert batch.token_offsets.tolist() == [*range(8)] * 3
    assert (batch.num_tokens, batch.num_supervised) == (12, 6)
    assert data.num_supervised([1, None, 0]) == 6
    arrays = (batch.token_ids, batch.position_ids, batch.labels, batch.supervised_positions, batch.row_ids)
    assert {array.dtype for array in arrays} == {np.dtype(np.int64)}
    assert batch.cu_seqlens.dtype == np.int32


def test_no_micro_batch_has_more_documents() -> None:
    """Exactly as many, dummy bins at the end included."""
    data = dataset(*("a" * (n % 7 + 1) + "B" for n in range(60)), shuffle=True)
    for size, num_rows in ((1, data.num_bins), (2, 3 * data.num_bins - 1), (3, 7), (5, 2), (64, 40)):
        rows = [*range(num_rows), *[None] * size]
        batches = [data.micro_batch(rows[i : i + size]) for i in range(0, num_rows, size)]
        numbers = [len(batch.cu_seqlens) - 1 for batch in batches]
        assert data.most_documents(size, num_rows) == max(numbers)


def test_splits_of_a_micro_batch_hold_the_same() -> None:
    data = dataset(*("a" + "B" * (n % 6) for n in range(1, 40)), shuffle=True)
    positions = [3, 0, None, data.num_bins + 1]
    whole, parts = data.micro_batch(positions), [data.micro_batch([p]) for p in positions]
    for name in ("token_ids", "position_ids", "labels", "row_ids", "token_offsets"):
        joined = np.concatenate([getattr(part, name) for part in parts])
        np.testing.assert_array_equal(getattr(whole, name), joined)
    bounds = [part.cu_seqlens[1:] + 8 * i for i, part in enumerate(parts)]
    np.testing.assert_array_equal(whole.cu_seqlens, np.concatenate([[0], *bounds]))
    assert (
        whole.num_supervised == sum(part.num_supervised for part in parts) == data.num_supervised(positions)
    )


def test_packing_false_gives_every_document_a_bin() -> None:
    data = dataset("aB", "cD", packing=False)
    assert data.num_bins == 2
    assert data.micro_batch([1]).cu_seqlens.tolist() == [0, 2, 8]


def test_the_order_is_a_pure_function_and_each_epoch_sees_all_bins_once() -> None:
    data = dataset(*["aBcDe"] * 50, shuffle=True)
    again = dataset(*["aBcDe"] * 50, shuffle=True)
    epochs = [[data.bin_at(50 * epoch + i) for i in range(50)] for epoch in range(3)]
    assert all(sorted(epoch) == list(range(50)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    assert [again.bin_at(p) for p in reversed(range(150))] == [
        b for epoch in reversed(epochs) for b in reversed(epoch)
    ]
    assert epoch_order(4, 0, 50).tolist() != epochs[0]


def test_the_order_is_the_same_for_ever() -> None:
    """Written down: a change breaks the resume of every run that is under way."""
    assert epoch_order(0, 0, 8).tolist() == [0, 2, 1, 5, 4, 3, 6, 7]
    assert epoch_order(7, 2, 8).tolist() == [6, 7, 4, 0, 1, 5, 3, 2]


def test_eval_is_in_the_order_of_its_bins() -> None:
    data = dataset(*["aBcDe"] * 5)
    assert [data.bin_at(p) for p in range(5)] == list(range(5))


def examples(*texts: str) -> list[Example]:
    return [Example(Origin(None, i), PlainText(t)) for i, t in enumerate(texts)]  # type: ignore[arg-type]


def test_the_split_is_by_content_seeded_and_independent_of_the_order() -> None:
    rows = examples(*(f"t{n // 3}" for n in range(300)))
    train, evaluation = split_by_content(rows, 0.1, seed=1)
    said_train, said_eval = ({e.content.text for e in side} for side in (train, evaluation))  # type: ignore[union-attr]
    assert len(evaluation) == 30
    assert len(train) == 270
    assert not said_train & said_eval
    assert [e.origin.row_index for e in train] == sorted(e.origin.row_index for e in train)
    backwards = split_by_content(rows[::-1], 0.1, seed=1)[1]
    assert {e.content.text for e in backwards} == said_eval  # type: ignore[union-attr]
    assert {e.content.text for e in split_by_content(rows, 0.1, seed=2)[1]} != said_eval  # type: ignore[union-attr]


@pytest.mark.parametrize(("texts", "share"), [(["a"] * 10, 0.5), (["a", "b"], 0.1), (["a", "b", "c"], 0.99)])
def test_no_side_of_the_split_may_be_empty(texts: list[str], share: float) -> None:
    with pytest.raises(DataError, match="Use another share, or more rows"):
        split_by_content(examples(*texts), share, seed=0)


def test_build_dataset_end_to_end(tokenizer: Any, jsonl: Write, section: Section) -> None:
    train_path = jsonl(*({"prompt": "p", "completion": f"{n}"} for n in range(40)))
    eval_path = jsonl(*({"prompt": "p", "completion": f"{n}"} for n in range(38, 45)), name="eval.jsonl")
    train, evaluation = build_dataset(section(train_path, eval=eval_path), tokenizer, seed=0)
    assert evaluation is not None
    assert train.report.tokens.num_rows == 40
    assert train.report.tokens.num_supervised == 10 * 2 + 30 * 3
    assert evaluation.report.num_rows_also_in_train == 2
    assert "2 evaluation rows are also training rows" in evaluation.report.lines()[-1]
    seen = [train.micro_batch([p]) for p in range(train.num_bins)]
    said = "".join(tokenizer.decode(batch.labels[batch.labels != -100]) for batch in seen)
    assert sorted(said.split("</s>")[:-1], key=int) == [f"{n}" for n in range(40)]


def test_build_dataset_splits_a_share_and_joins_sources(
    tokenizer: Any, jsonl: Write, section: Section
) -> None:
    first = jsonl(*({"text": f"first {n}"} for n in range(10)), name="a.jsonl")
    second = jsonl(*({"prompt": "second", "completion": f"{n}"} for n in range(10)), name="b.jsonl")
    data = section([{"path": first}, {"path": second}], eval=0.2)
    train, evaluation = build_dataset(data, tokenizer, seed=0)
    assert evaluation is not None
    assert (train.report.tokens.num_rows, evaluation.report.tokens.num_rows) == (16, 4)
    assert build_dataset(section(first), tokenizer, seed=0)[1] is None


def test_what_a_recipe_says_of_conversations_reaches_them(
    tokenizer: Any, jsonl: Write, section: Section
) -> None:
    tokenizer.chat_template = (
        "{% for m in messages %}<|start|>{{ m.role[0] }} {{ m.content.split('(/t)')[-1] }}<|end|>{% endfor %}"
        "{% if add_generation_prompt %}<|start|>a {{ '(t)' if think else '' }}{% endif %}"
    )
    row = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "x"}] * 2}
    for keys, expected in (
        ({}, ["x<|end|>x<|end|>"]),
        ({"supervise": "last_turn"}, ["x<|end|>"]),
        ({"chat_template_kwargs": {"think": True}}, ["(/t)\n\nx<|end|>"] * 2),
    ):
        data, _ = build_dataset(section(jsonl(row), **keys), tokenizer, seed=0, stop_ids=(3,))
        assert [tokenizer.decode(d.token_ids[d.supervised]) for d in data.documents] == expected
        assert ("make several texts" in "\n".join(data.report.lines())) == (len(expected) > 1)
    keys = {"chat_template_kwargs": {"think": True}, "open_thought": "refuse"}
    with pytest.raises(DataError, match=r"rows\.jsonl line 1: .*open_thought: refuse"):
        build_dataset(section(jsonl(row), **keys), tokenizer, seed=0)
    with pytest.raises(DataError, match="chat_template_kwargs is for conversations"):
        build_dataset(section(jsonl({"text": "t"}), **keys), tokenizer, seed=0)


def test_report_lines() -> None:
    counts = TokenCounts(
        num_rows=2000, num_documents=2001, num_tokens=8000, num_supervised=2000, num_overlong_rows=3,
        num_prompts_cut=2, num_answers_cut=1, num_texts_split=1, num_tokens_cut=17, num_unsupervised_rows=4,
        num_rows_saying_control_tokens=6, num_rows_quoting_control_tokens=7,
    )  # fmt: skip
    data = dataset("aB")
    report = type(data.report)(
        counts,
        num_bins=10,
        sequence_length=1000,
        notes={ChatNote.SEVERAL_TEXTS: 10, lost("name"): 1},
        amounts={ChatNote.SEVERAL_TEXTS: 2000},
        remarks=("about all",),
    )
    assert report.lines() == [
        "2,000 rows -> 2,001 documents, 8,000 tokens, 2,000 supervised (25.0%)",
        "10 bins of 1,000 tokens, 80.0% full",
        "3 rows longer than sequence_length: 2 prompts cut on the left, 1 answers cut at the end "
        "(17 tokens lost), 1 texts split",
        "4 rows without a supervised token left out",
        "about all",
        f"10 rows {ChatNote.SEVERAL_TEXTS}: 1.33 times the tokens",
        "1 row lose 'name': the chat template does not show it",
        "7 conversations hold the text of special tokens, read as plain text",
        "6 rows hold the text of special tokens, read as these tokens",
    ]
