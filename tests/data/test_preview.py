"""What preview shows: tokens with the supervised ones marked, and numbers about the data by hand."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from qlora_train.data.building import build_dataset
from qlora_train.data.documents import Document
from qlora_train.data.preview import as_text, preview
from qlora_train.data.statistics import (
    length_advice,
    length_lines,
    lengths_of,
    num_duplicates,
    packing_line,
    steps_advice,
    stop_tokens,
)
from qlora_train.recipe import DataSection, ModelSection, TrainingSection

Write = Callable[..., str]
Section = Callable[..., DataSection]


@pytest.fixture
def shown(tmp_path: Path, tokenizer: Any) -> Callable[..., list[str]]:
    """The lines of a preview without colours."""
    tokenizer.save_pretrained(tmp_path / "base")

    def show(data: DataSection, num_examples: int = 2, **options: Any) -> list[str]:
        recipe = SimpleNamespace(
            model=ModelSection(base=str(tmp_path / "base")),
            data=data,
            training=TrainingSection(batch_size=2),
        )
        with open("/dev/null", "w") as nowhere:
            console = Console(record=True, width=200, color_system=None, file=nowhere)
            preview(recipe, num_examples, console, **options)  # type: ignore[arg-type]
        return [line.rstrip() for line in console.export_text().splitlines()]

    return show


def test_preview(jsonl: Write, section: Section, shown: Callable[..., list[str]]) -> None:
    examples = [{"prompt": f"[b]{n}", "completion": "yes", "id": n} for n in (0, 1, 1, 2)]
    lines = shown(section(jsonl(*examples), packing=False), remarks=["a remark"])
    assert lines[0].endswith("rows.jsonl line 1") and lines[3].endswith("rows.jsonl line 2")
    assert lines[1:3] == ["[b]0[[yes</s>]]", "8 tokens, 4 supervised"]
    assert lines[6:] == [
        "── train",
        "4 rows -> 4 documents, 32 tokens, 16 supervised (50.0%)",
        "4 bins of one document each (packing: false), 8 tokens on average",
        "the base has a chat template, which prompts and completions do not use: the model will answer bare "
        "prompts, and `chat` will not work; for chats, set data.format=alpaca 'data.columns={instruction:",
        "prompt, output: completion}'",
        "columns not read: id",
        "1 row says word for word what another one says",
        "answers end with '</s>' (1) in 100%",
        "packing is off: a bin holds one document, 12.5% of sequence_length on average; what is empty is not "
        "computed (50.0% of what is computed are tokens of the data)",
        "tokens a row: p50 8, p95 8, max 8",
        "  8 to 8  ████████████████████████████████████████ 4",
        "2 optimizer steps of 2 bins, about 2 documents each",
        "advice: 2 optimizer steps are few to learn from: training.batch_size=1 makes 4 of them",
        "a remark",
    ]


def test_a_token_that_the_model_does_not_have_is_named(
    jsonl: Write, section: Section, shown: Callable[..., list[str]]
) -> None:
    from qlora_train.errors import DataError

    with pytest.raises(DataError, match=r"line 2: it holds the token '~', number \d+"):
        shown(section(jsonl({"text": "ab"}, {"text": "a~"})), vocabulary_size=90)


def test_colours_tell_each_token_from_its_neighbours(tokenizer: Any) -> None:
    ids = [*tokenizer("a\u00e9b").input_ids, tokenizer.eos_token_id]
    document = Document(np.array(ids, dtype=np.int32), np.array([False, False, False, True, True]))
    text = as_text(document, tokenizer, marked=False)
    assert text.plain == "a\u00e9b</s>"
    spans = [(text.plain[s.start : s.end], str(s.style)) for s in text.spans]
    assert spans == [
        ("a", "on grey19"),
        ("b", "bold underline green on grey19"),
        ("</s>", "bold underline green reverse"),
    ]
    assert as_text(document, tokenizer, marked=True).plain == "a\u00e9[[b</s>]]"


def test_lengths_duplicates_and_stop_tokens(tokenizer: Any, jsonl: Write, section: Section) -> None:
    texts = ["x" * n for n in [*range(1, 20), 300, 300, 300]]
    data, _ = build_dataset(section(jsonl(*({"text": text} for text in texts))), tokenizer, seed=0)
    summary, *histogram = length_lines(lengths_of(data))
    assert summary == "tokens a row: p50 12, p95 301, max 301"
    assert histogram[0] == "    2 to  31  " + "█" * 40 + " 19" and histogram[-1].endswith(" 3")
    assert [int(line.rsplit(" ", 1)[1]) for line in histogram] == [19, *[0] * 8, 3]
    assert num_duplicates(data) == 2
    assert stop_tokens(data, tokenizer).startswith(
        "answers end with '</s>' (1) in 65%"
    )  # but pieces of 64 do not
    assert length_advice(data) == [
        "advice: 13.6% of the rows are longer than sequence_length 64; 320 would hold all of them"
    ]


def test_advice_where_examples_are_short(tokenizer: Any, jsonl: Write, section: Section) -> None:
    path = jsonl(*({"text": "x" * n} for n in range(1, 50)))
    data, _ = build_dataset(section(path, sequence_length=1024), tokenizer, seed=0)
    (advice,) = length_advice(data)
    assert advice.startswith("advice: sequence_length 64 holds every row and needs 6% of the memory")
    assert packing_line(data) == (
        "packing: 49 documents in 2 bins, 62.2% full; one document a bin would be 49 bins, 2.5% full"
    )
    assert length_advice(build_dataset(section(path, sequence_length=100), tokenizer, seed=0)[0]) == []


@pytest.mark.parametrize(
    ("training", "expected"),
    [
        (
            {"batch_size": 16},
            "4 optimizer steps are few to learn.* training.batch_size=1 makes 50 of them",
        ),
        ({"batch_size": 16, "epochs": 3.0}, "10 optimizer.* training.batch_size=3 makes 50 of them"),
        ({"batch_size": 2}, None),
        (
            {"micro_batch_size": 4, "gradient_accumulation_steps": 2},
            "7 optimizer steps.* fewer bins a step make more",
        ),
        ({"batch_size": 16, "max_steps": 3}, None),
        ({"batch_size": 1, "epochs": 0.2}, None),
    ],
)
def test_advice_where_steps_are_few(
    tokenizer: Any, jsonl: Write, section: Section, training: dict[str, Any], expected: str | None
) -> None:
    path = jsonl(*({"text": "x" * 30} for _ in range(50)))
    data, _ = build_dataset(section(path, sequence_length=40), tokenizer, seed=0)
    assert data.num_bins == 50
    advice = steps_advice(data, TrainingSection(**training))
    assert bool(advice) == (expected is not None)
    assert expected is None or re.search(expected, *advice)


def test_texts_and_names_move_no_cursor_and_stay_short(
    shown: Callable[..., list[str]], jsonl: Write, section: Section
) -> None:
    evil = "\x1b[2J\u202e\r\x9b1m"
    rows = [{"prompt": evil, "completion": f"b\u200dc{evil}", evil: "d", "w" * 10**5: "e"}] * 3
    lines = shown(section(jsonl(*rows, name=f"d{evil}.jsonl"), on_bad_row="skip"))
    assert not set("".join(lines)) & set("\x1b\u202e\r\x9b")
    for wanted in ("── ", "columns not read: ", "[[b\u200dc"):
        assert any(wanted in line and r"\x1b[2J\u202e\r\x9b1m" in line for line in lines), lines
    assert max(map(len, lines)) <= 2100
