from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from tiny_data import packed

from qlora_train.data.building import build_dataset
from qlora_train.data.content import PlainText, content_key
from qlora_train.data.dataset import PackedDataset, epoch_order, padded_length
from qlora_train.data.documents import Document
from qlora_train.data.notes import Note, lost
from qlora_train.data.report import DatasetReport, Reading
from qlora_train.data.split import chosen_by_weight, content_groups, split_by_content
from qlora_train.errors import DataError
from qlora_train.recipe import DataSection

Write = Callable[..., str]
Section = Callable[..., DataSection]


def dataset(*documents: str, length: int = 8, packing: bool = True, shuffle: bool = False) -> PackedDataset:
    """Documents as letters: capitals are supervised, token ids are the letters' codes."""
    letters = [
        Document(np.array([ord(c) for c in text], dtype=np.int32), np.array([c.isupper() for c in text]))
        for text in documents
    ]
    return packed(letters, length=length, packing=packing, seed=3, shuffle=shuffle)


def test_a_micro_batch_by_hand() -> None:
    """Bins without what is empty in them, then as many dummies as make the example of a usual size."""
    data = dataset("abCD", "eF", "gHiJK", "l")
    assert [sorted(data.bins[i]) for i in range(2)] == [[1, 2, 3], [0]]
    batch = data.micro_batch([1, None, 0])
    assert "".join(map(chr, batch.token_ids)) == "abCD" + "gHiJKeFl" + "\0" * 4
    assert batch.position_ids.tolist() == [0, 1, 2, 3, 0, 1, 2, 3, 4, 0, 1, 0, 0, 1, 2, 3]
    assert batch.cu_seqlens.tolist() == [0, 4, 9, 11, 12, 16]
    labels = {i: chr(label) for i, label in enumerate(batch.labels) if label != -100}
    assert labels == {1: "C", 2: "D", 4: "H", 6: "J", 7: "K", 9: "F"}
    assert batch.supervised_positions.tolist() == sorted(labels)
    assert batch.row_ids.tolist() == [1] * 4 + [0] * 8 + [-1] * 4
    assert batch.token_offsets.tolist()[:12] == [*range(4), *range(8)]
    assert len(batch.supervised_positions) == 6
    assert data.num_supervised([1, None, 0]) == 6
    arrays = (batch.token_ids, batch.position_ids, batch.labels, batch.supervised_positions, batch.row_ids)
    assert {array.dtype for array in arrays} == {np.dtype(np.int64)}
    assert batch.cu_seqlens.dtype == np.int32


def test_example_sizes_are_few_and_hold_few_dummies() -> None:
    numbers = np.arange(0, 5000)
    sizes = padded_length(numbers, 4096 * 2)
    assert (sizes >= numbers).all() and (sizes[64:] <= 1.25 * numbers[64:]).all()
    assert sorted(set(sizes[:129].tolist())) == [16, 20, 24, 28, 32, 40, 48, 56, 64, 80, 96, 112, 128]
    assert padded_length(np.array([60, 61, 64]), 62).tolist() == [62, 62, 62]
    assert padded_length(np.array(2048), 2048) == 2048  # a full bin is a full bin


def test_an_empty_micro_batch_is_dummies_alone() -> None:
    batch = dataset("aB").micro_batch([None, None])
    assert batch.cu_seqlens.tolist() == [0, 16] and not len(batch.supervised_positions)


def test_what_a_token_is_does_not_depend_on_what_stands_beside_it() -> None:
    data = dataset(*("a" + "B" * (n % 6) for n in range(1, 40)), shuffle=True)

    def tokens_of(batch: Any) -> dict[tuple[int, int], tuple[int, ...]]:
        columns = (batch.token_ids, batch.position_ids, batch.labels)
        keys = zip(batch.row_ids.tolist(), batch.token_offsets.tolist(), strict=True)
        found = dict(zip(keys, zip(*(c.tolist() for c in columns), strict=True), strict=True))
        return {key: value for key, value in found.items() if key[0] >= 0}

    positions = [3, 0, None, data.num_bins + 1]
    whole, parts = data.micro_batch(positions), [data.micro_batch([p]) for p in positions]
    assert tokens_of(whole) == {k: v for part in parts for k, v in tokens_of(part).items()}
    in_whole, *in_parts = (len(batch.supervised_positions) for batch in (whole, *parts))
    assert in_whole == sum(in_parts) == data.num_supervised(positions)


def test_short_documents_without_packing_cost_no_full_bins() -> None:
    data = dataset(*["aBcDe"] * 40, length=2048, packing=False)
    assert data.num_bins == 40
    assert len(data.micro_batch([0]).token_ids) == 16
    assert len(data.micro_batch(range(8)).token_ids) == 40


def test_no_micro_batch_has_more_documents() -> None:
    """Exactly as many, dummy bins at the end included."""
    data = dataset(*("a" * (n % 7 + 1) + "B" for n in range(60)), length=24, shuffle=True)
    for size, num_examples in ((1, data.num_bins), (2, 3 * data.num_bins - 1), (3, 7), (5, 2), (64, 40)):
        examples = [*range(num_examples), *[None] * size]
        batches = [data.micro_batch(examples[i : i + size]) for i in range(0, num_examples, size)]
        numbers = [len(batch.cu_seqlens) - 1 for batch in batches]
        assert data.most_documents(size, num_examples) == max(numbers)
        assert data.most_documents(size, 10**15) >= max(numbers)  # of any order, and at once


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


def keys_of(*texts: str) -> np.ndarray:
    keys = b"".join(content_key(PlainText(text)) for text in texts)
    return np.frombuffer(keys, dtype=np.uint8).reshape(-1, 32)


def test_examples_that_say_the_same_are_one_group() -> None:
    groups, first_examples = content_groups(keys_of("b", "a", "b", "c", "a"))
    assert groups[0] == groups[2] and groups[1] == groups[4] and len(set(groups.tolist())) == 3
    assert sorted(first_examples.tolist()) == [0, 1, 3]


def test_the_split_is_by_content_seeded_and_independent_of_the_order() -> None:
    texts = [f"t{n // 3}" for n in range(300)]

    def chosen(texts: list[str], seed: int) -> list[str]:
        return [t for t, yes in zip(texts, split_by_content(keys_of(*texts), 0.1, seed), strict=True) if yes]

    said = chosen(texts, 1)
    assert len(said) == 30 and all(said.count(text) == 3 for text in said)
    assert sorted(chosen(texts[::-1], 1)) == sorted(said) != sorted(chosen(texts, 2))


def test_the_split_is_the_same_for_ever() -> None:
    """Written down: a change would move examples between training and evaluation in every run under way."""
    chosen = np.flatnonzero(split_by_content(keys_of(*map(str, range(40))), 0.1, 7))
    assert chosen.tolist() == [0, 2, 23, 24]


@pytest.mark.parametrize(("texts", "share"), [(["a"] * 10, 0.5), (["a", "b"], 0.1), (["a", "b", "c"], 0.99)])
def test_no_side_of_the_split_may_be_empty(texts: list[str], share: float) -> None:
    with pytest.raises(DataError, match="Use another share, or more rows"):
        split_by_content(keys_of(*texts), share, seed=0)


def test_weights_are_how_often_examples_are_seen() -> None:
    keys = keys_of(*map(str, range(100)))
    weights = np.repeat([0.3, 1.0, 2.0, 2.5], 25)
    times = chosen_by_weight(keys, weights, 0).reshape(4, 25)
    assert [sorted(set(part.tolist())) for part in times] == [[0, 1], [1], [2], [2, 3]]
    assert times.sum(axis=1).tolist() == [8, 25, 50, 62]
    assert (chosen_by_weight(keys, weights, 0) == times.reshape(-1)).all()
    assert (chosen_by_weight(keys, weights, 1) != times.reshape(-1)).any()


def test_sources_with_weights(tokenizer: Any, jsonl: Write, section: Section) -> None:
    often = jsonl(*({"text": f"often {n}"} for n in range(10)), name="a.jsonl")
    seldom = jsonl(*({"text": f"seldom {n}"} for n in range(10)), name="b.jsonl")
    sources = [{"path": often, "weight": 2}, {"path": seldom, "weight": 0.5}]
    train, _ = build_dataset(section(sources), tokenizer, seed=0)
    said = [tokenizer.decode(document.token_ids) for document in train.documents]
    assert sum("often" in text for text in said) == 20 and sum("seldom" in text for text in said) == 5
    assert train.report.num_documents == 25 and train.report.num_examples == 15
    assert any("a.jsonl: weight 2, its rows are seen 2 times" in line for line in train.report.lines())
    train, evaluation = build_dataset(section(sources, eval=0.2), tokenizer, seed=0)
    assert evaluation is not None and evaluation.report.num_documents == 4  # each once


def test_build_dataset_end_to_end(tokenizer: Any, jsonl: Write, section: Section) -> None:
    train_path = jsonl(*({"prompt": "p", "completion": f"{n}"} for n in range(40)))
    eval_path = jsonl(*({"prompt": "p", "completion": f"{n}"} for n in range(38, 45)), name="eval.jsonl")
    train, evaluation = build_dataset(section(train_path, eval=eval_path), tokenizer, seed=0)
    assert evaluation is not None
    assert train.report.num_examples == 40
    assert train.report.num_supervised == 10 * 2 + 30 * 3
    assert evaluation.report.num_examples_also_in_train == 2
    assert "2 evaluation rows also in train" in evaluation.report.lines()[-1]
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
    assert (train.report.num_examples, evaluation.report.num_examples) == (16, 4)
    assert build_dataset(section(first), tokenizer, seed=0)[1] is None


def test_what_a_recipe_says_of_conversations_reaches_them(
    tokenizer: Any, jsonl: Write, section: Section
) -> None:
    tokenizer.chat_template = (
        "{% for m in messages %}<|start|>{{ m.role[0] }} {{ m.content.split('(/t)')[-1] }}<|end|>{% endfor %}"
        "{% if add_generation_prompt %}<|start|>a {{ '(t)' if think else '' }}{% endif %}"
    )
    example = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "x"}] * 2}
    for keys, expected in (
        ({}, ["x<|end|>x<|end|>"]),
        ({"supervise": "last_turn"}, ["x<|end|>"]),
        ({"chat_template_kwargs": {"think": True}}, ["(/t)\n\nx<|end|>"] * 2),
    ):
        data, _ = build_dataset(section(jsonl(example), **keys), tokenizer, seed=0, stop_ids=(3,))
        assert [tokenizer.decode(d.token_ids[d.supervised]) for d in data.documents] == expected
        assert ("several texts: the chat template" in "\n".join(data.report.lines())) == (len(expected) > 1)
    keys = {"chat_template_kwargs": {"think": True}, "open_thought": "refuse"}
    with pytest.raises(DataError, match=r"rows\.jsonl line 1: .*open_thought: refuse"):
        build_dataset(section(jsonl(example), **keys), tokenizer, seed=0)
    with pytest.raises(DataError, match="chat_template_kwargs is for conversations"):
        build_dataset(section(jsonl({"text": "t"}), **keys), tokenizer, seed=0)


def test_leaving_out_much_of_the_data_is_a_warning() -> None:
    for num_rows, num_tokens, said in ((3, 1000, "0% of the rows, 11%"), (200, 800, "10% of the rows, 9%")):
        notes, amounts = {Note.TOO_LONG: num_rows}, {Note.TOO_LONG: num_tokens}
        (line,) = DatasetReport(2000, 2000, 8000, 2000, 10, 1000, True, notes, amounts).lines()[2:]
        assert line.startswith("warning: ") and f"{said} of the tokens. Raise data.sequence_length" in line
    notes, amounts = {Note.ANSWER_CUT: 1}, {Note.ANSWER_CUT: 1000, Note.PROMPT_CUT: 0}
    notes |= {Note.PROMPT_CUT: 0, Note.SPLIT: 0}
    (line,) = DatasetReport(2000, 2000, 8000, 2000, 10, 1000, True, notes, amounts).lines()[2:]
    assert line.startswith("warning: longer than") and line.endswith("Raise data.sequence_length")


def test_report_lines() -> None:
    notes = {Note.PROMPT_CUT: 2, Note.ANSWER_CUT: 1, Note.SPLIT: 1, Note.TOO_LONG: 3, Note.UNSUPERVISED: 4}
    notes |= {Note.SAYS_CONTROL_TOKENS: 6, Note.QUOTES_CONTROL_TOKENS: 1, "are odd": 8}
    notes |= {Note.SEVERAL_TEXTS: 10, lost("name"): 1}
    amounts = {Note.PROMPT_CUT: 10, Note.ANSWER_CUT: 70, Note.SPLIT: 3, Note.TOO_LONG: 800}
    amounts |= {Note.SEVERAL_TEXTS: 2000}
    reading = Reading(2, 1, 3, ("a line 1: x",), ("id", "url"), ("a.csv: fields separated by tabs",))
    report = DatasetReport(2000, 2001, 8000, 2000, 10, 1000, True, notes, amounts, reading, 9)
    assert report.lines() == [
        "2,000 rows -> 2,001 documents, 8,000 tokens, 2,000 supervised (25.0%)",
        "10 bins of 1,000 tokens, 80.0% full",
        "a.csv: fields separated by tabs",
        "columns not read: id, url",
        "2 rows empty, skipped",
        "1 row labelled as bad answers, left out",
        "3 rows skipped (data.on_bad_row: skip):",
        "  a line 1: x",
        "  ... and 2 more",
        "longer than sequence_length: 2 rows lost the beginning of the prompt, 1 the end of the answers "
        "(80 tokens, 1.0% of all); 1 split into 3 documents",
        "3 rows longer than sequence_length left out (800 tokens)",
        "4 rows without a supervised token left out",
        "8 rows are odd",
        "1 row holds the text of special tokens, read as plain text",
        "6 rows hold the text of special tokens, read as these tokens",
        "1 row loses 'name': the chat template does not show it",
        f"10 rows {Note.SEVERAL_TEXTS}: 1.33 times the tokens",
        "9 evaluation rows also in train, word for word",
    ]
    one = DatasetReport(
        1, 1, 8, 2, 1, 9, notes={Note.DEVELOPER: 1, "are odd": 1}, num_examples_also_in_train=1
    )
    assert one.lines() == [
        "1 row -> 1 document, 8 tokens, 2 supervised (25.0%)",
        "1 bin of 9 tokens, 88.9% full",
        "1 row is odd",
        "1 row has messages of the role 'developer', written as 'system'",
        "1 evaluation row also in train, word for word",
    ]
    one_each = DatasetReport(3, 3, 300, 30, 3, 1000, packing=False)
    assert one_each.lines()[1] == "3 bins of one document each (packing: false), 100 tokens on average"
