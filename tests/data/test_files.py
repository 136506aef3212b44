"""Files as they come: packed, damaged, in other encodings, JSON and CSV in all the ways people write them."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tiny_data import examples_in

from qlora_train.data import csv_table, json_tables, tables, text_files
from qlora_train.data.arrow_tables import ArrowTable, ParquetTable
from qlora_train.data.building import build_dataset
from qlora_train.data.csv_table import CsvTable
from qlora_train.data.json_tables import JsonTable
from qlora_train.data.sources import load_source
from qlora_train.data.tables import ExampleProblem, ExampleTable
from qlora_train.errors import DataError
from qlora_train.recipe import DataSource

EXAMPLES = [{"text": f"row {n} é"} for n in range(2500)]
LINES = "".join(json.dumps(example, ensure_ascii=False) + "\n" for example in EXAMPLES).encode()


def zstd(content: bytes) -> bytes:
    half = len(content) // 2
    return b"".join(pa.compress(part, "zstd", asbytes=True) for part in (content[:half], content[half:]))


PACKERS: dict[str, Callable[[bytes], bytes]] = {
    "gz": lambda content: gzip.compress(content[:99]) + gzip.compress(content[99:]),
    "bz2": bz2.compress,
    "xz": lzma.compress,
    "zst": zstd,
}


def written(path: Path, content: bytes | str) -> Path:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def load(path: Path, split: str | None = None) -> list[ExampleTable]:
    return load_source(DataSource(path=str(path), split=split))


def examples_of(path: Path) -> list[dict]:
    return [example for table in load(path) for _, example in examples_in(table)]


@pytest.mark.parametrize("kind", PACKERS)
def test_packed_files_are_the_examples_whatever_their_name(tmp_path: Path, kind: str) -> None:
    packed = PACKERS[kind](LINES)
    assert examples_of(written(tmp_path / f"rows.jsonl.{kind}", packed)) == EXAMPLES
    assert examples_of(written(tmp_path / "rows.jsonl", packed)) == EXAMPLES
    assert examples_of(written(tmp_path / f"plain.jsonl.{kind}", LINES)) == EXAMPLES


@pytest.mark.parametrize("kind", PACKERS)
def test_damaged_archives_are_named(tmp_path: Path, kind: str) -> None:
    packed = PACKERS[kind](LINES)
    for damaged in (packed[: len(packed) // 2], packed[:40] + bytes(40) + packed[80:]):
        path = written(tmp_path / f"rows.jsonl.{kind}", damaged)
        with pytest.raises(DataError, match=r"rows\.jsonl\.\w+ (cannot be unpacked|line \d+ is not)"):
            examples_of(path)


@pytest.mark.parametrize(
    ("name", "content", "twice"),
    [("rows.jsonl", LINES, LINES.index(b"\n")), ("list.json", json.dumps(EXAMPLES).encode(), 0)],
)
def test_each_file_is_opened_once_and_scanned_once(
    tmp_path: Path,
    section: Any,
    tokenizer: Any,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    content: bytes,
    twice: int,
) -> None:
    """twice: bytes of the first line, which tells which kind of JSON it is."""
    path, parsed, opened = written(tmp_path / name, content), [], []
    real, decode = io.open, json.JSONDecoder.raw_decode

    def counting(file: Any, *args: Any, **kwargs: Any) -> Any:
        opened.append(str(file))
        return real(file, *args, **kwargs)

    def parsing(self: Any, text: str, idx: int = 0) -> Any:
        value, end = decode(self, text, idx)
        parsed.append(text[idx:end])
        return value, end

    monkeypatch.setattr("builtins.open", counting)
    monkeypatch.setattr(json.JSONDecoder, "raw_decode", parsing)
    build_dataset(section(str(path)), tokenizer, seed=0)
    assert opened.count(str(path)) == 1
    assert len("".join(parsed).encode()) <= len(content) + twice


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ('[{"a": 1},\n {"a": 2}]', [(1, 1), (2, 2)]),
        ('[\n{"a": 1}\n]\n[{"a": 2}]\n', [(1, 1), (2, 2)]),
        ('{"data": [{"a": 1}, {"a": 2}]}', [(1, 1), (2, 2)]),
        ('{\n "version": 3,\n "rows": [\n  {"a": 1}\n ]\n}', [(1, 1)]),
        ('{\n "a": 1\n}\n{\n "a": 2\n}\n', [(1, 1), (4, 2)]),
        ('{"a": 1}', [(1, 1)]),
        ('\ufeff\n{"a": 1}\r\n\r\n{"a": 2}\r\n', [(2, 1), (4, 2)]),
    ],
)
@pytest.mark.parametrize("name", ["rows.json", "rows.jsonl"])
def test_ways_to_write_examples_as_json(
    tmp_path: Path, name: str, content: str, expected: list[tuple[int, int]]
) -> None:
    (table,) = load(written(tmp_path / name, content))
    assert [(number, example["a"]) for number, example in examples_in(table)] == expected


def test_an_object_with_messages_is_an_example_and_no_wrapper(tmp_path: Path) -> None:
    example = {"messages": [{"role": "user", "content": "q"}]}
    for indent in (None, 1):
        assert examples_of(written(tmp_path / "rows.json", json.dumps(example, indent=indent))) == [example]


def test_a_long_list_is_read_value_by_value(tmp_path: Path) -> None:
    examples = [{"text": "x" * (n % 997) + '"[{', "n": [n, {"m": -1.5e3}]} for n in range(3000)]
    path = written(tmp_path / "rows.json", json.dumps(examples, indent=1))
    (table,) = load(path)
    assert [example for _, example in examples_in(table)] == examples
    assert len(list(JsonTable(str(path)).batches())) == 3
    longest = [{"text": "y" * 300_000}, {"text": "z"}]
    assert examples_of(written(tmp_path / "long.json", json.dumps(longest))) == longest


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('[{"a": 1},\n{"a": 2\n', "line 3 is not valid JSON|line 2 is not valid JSON"),
        ('[{"a": 1}\n{"a": 2}]', r"line 2 is not valid JSON: ',' is missing"),
        ('[{"a": 1}', "is not valid JSON: ',' is missing: the file ends too early"),
        ('[{"a": 1, "a": 2}]', "an object names 'a' twice"),
        ('[{"a": ' + "1" * 5000 + "}]", "line 1 is not valid JSON"),
        ('[{"a": ' + "[" * 100_000 + "]}]", "line 1 is not valid JSON: it is nested too deeply"),
        ('{"a": 1}\n{"a": ' + "[" * 100_000 + "}\n", "line 2 is not valid JSON"),
        ('[{"a": 1},\n 3]', "row 2 holds a number where a row"),
        ('[{"a": 1},\n{"b": tru}]' + " " * 99, "line 2 is not valid JSON"),
        ("hello", "line 1 is not valid JSON"),
    ],
)
def test_damaged_json_is_named_by_line(tmp_path: Path, content: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        examples_of(written(tmp_path / "rows.json", content))


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json", "rows.csv", "rows.txt"])
def test_late_bytes_that_are_not_utf8_are_named_by_line(tmp_path: Path, name: str) -> None:
    examples = {
        "rows.jsonl": b'{"text": "abc"}\n' * 2000 + b'{"text": "caf\xe9"}\n',
        "rows.json": b'[{"text": "a"},\n' + b'{"text": "abc"},\n' * 1999 + b'{"text": "caf\xe9"}]',
        "rows.csv": b"text\n" + b"abc\n" * 1999 + b"caf\xe9\n",
        "rows.txt": b"abc\n" * 2000 + b"caf\xe9\n",
    }
    with pytest.raises(DataError, match=r"line 2001 is not UTF-8: its character \d+ is the byte 0xe9"):
        examples_of(written(tmp_path / name, examples[name]))


@pytest.mark.parametrize(
    ("content", "expected", "said"),
    [
        ("q,a\nx,y\n", [("x", "y")], None),
        ("q;a\nx,1;y\n", [("x,1", "y")], "fields separated by semicolons"),
        ("q\ta\nx;1\ty\n", [("x;1", "y")], "fields separated by tabs"),
        ("q|a\nx|y\n", [("x", "y")], "fields separated by bars"),
        ('q,a\n"say \\"hi\\", you","y\\n\\\\"\n', [('say "hi", you', "y\\n\\")], "quotes escaped"),
        ('q,a\n"C:\\","say ""hi"""\n', [("C:\\", 'say "hi"')], None),
        ('q,a\r\n"two\r\nlines",y\r\n', [("two\r\nlines", "y")], None),
        ("q,a\nhe said \"hi\",y\n", [('he said "hi"', "y")], None),
    ],
)  # fmt: skip
def test_csv_dialects(
    tmp_path: Path, content: str, expected: list[tuple[str, str]], said: str | None
) -> None:
    (table,) = load(written(tmp_path / "rows.csv", content))
    assert isinstance(table, CsvTable)
    assert [(example["q"], example["a"]) for _, example in examples_in(table)] == expected
    assert (table.dialect.in_words or "").startswith(said or "") and bool(table.dialect.in_words) == bool(
        said
    )


def test_a_header_of_one_column_with_a_semicolon_in_its_name_is_one_column(tmp_path: Path) -> None:
    assert examples_of(written(tmp_path / "rows.csv", "text; plain\nx\ny\n")) == [
        {"text; plain": "x"}, {"text; plain": "y"}
    ]  # fmt: skip


def test_tsv_is_separated_by_tabs(tmp_path: Path) -> None:
    assert examples_of(written(tmp_path / "rows.tsv", "q\ta\nx, y\tz\n")) == [{"q": "x, y", "a": "z"}]
    packed = gzip.compress(b"q\ta\nx\ty\n")
    assert examples_of(written(tmp_path / "rows.tsv.gz", packed)) == [{"q": "x", "a": "y"}]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('q,a\nx,y\nx,"y\n' + "x,y\n" * 20, "begins in line 3 holds a quote that is never closed"),
        ('q,a\nx,"y\nx,"z"\nx,y\n', "begins in line 2 has text behind a closing quote in line 3"),
        ('q,a\nx,"y" z\n', "begins in line 2 has text behind a closing quote in line 2"),
        ("q,a\nx\n1,2,3\n", "line 3 has 3 fields, the header names 2"),
    ],
)
def test_damaged_csv_is_named_by_line(tmp_path: Path, content: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        examples_of(written(tmp_path / "rows.csv", content))


def test_doubled_columns_are_refused_where_they_are_read(
    tmp_path: Path, section: Any, tokenizer: Any
) -> None:
    names = ["prompt", "completion", "completion"]
    table = pa.table([pa.array(["p"]), pa.array(["good"]), pa.array(["other"])], names=names)
    pq.write_table(table, tmp_path / "twins.parquet")
    with (tmp_path / "twins.arrow").open("wb") as file, pa.ipc.new_stream(file, table.schema) as stream:
        stream.write_table(table)
    written(tmp_path / "twins.csv", "prompt,completion,completion\np,good,other\n")
    for name in ("twins.parquet", "twins.arrow", "twins.csv"):
        with pytest.raises(DataError, match=r"'completion'"):
            build_dataset(section(str(tmp_path / name)), tokenizer, seed=0)
    pq.write_table(table.rename_columns(["text", "id", "id"]), tmp_path / "ids.parquet")
    written(tmp_path / "ids.csv", "text,id,id\nab,1,2\n")
    for name in ("ids.parquet", "ids.csv"):
        (train, _) = build_dataset(section(str(tmp_path / name)), tokenizer, seed=0)
        assert "columns not read: id" in train.report.lines()


def test_columns_that_nobody_asked_for_are_not_read(tmp_path: Path, section: Any, tokenizer: Any) -> None:
    far = pa.array([2**40], pa.int64()).cast(pa.timestamp("s"))
    pq.write_table(pa.table({"text": ["ab"], "when": far}), tmp_path / "rows.parquet")
    (train, _) = build_dataset(section(str(tmp_path / "rows.parquet")), tokenizer, seed=0)
    assert train.report.num_examples == 1
    data = section(str(tmp_path / "rows.parquet"), columns={"text": "when"})
    with pytest.raises(DataError, match=r"row 1 cannot be read: its column 'when'"):
        build_dataset(data, tokenizer, seed=0)


def test_one_value_that_cannot_be_read_is_one_example(tmp_path: Path) -> None:
    when = pa.array([0, 2**40], pa.int64()).cast(pa.timestamp("s"))
    pq.write_table(pa.table({"when": when}), tmp_path / "rows.parquet")
    (first, second) = ParquetTable(str(tmp_path / "rows.parquet")).head
    assert first[1]["when"].date() == date(1970, 1, 1)  # type: ignore[index]
    assert second[0] == 2 and isinstance(second[1], ExampleProblem)


def test_arrow_files_as_streams_and_with_an_index(tmp_path: Path) -> None:
    table = pa.table({"text": [example["text"] for example in EXAMPLES], "n": list(range(2500))})
    with (tmp_path / "a.arrow").open("wb") as file, pa.ipc.new_stream(file, table.schema) as stream:
        stream.write_table(table)
    with (tmp_path / "b.feather").open("wb") as file, pa.ipc.new_file(file, table.schema) as indexed:
        indexed.write_table(table)
    for name in ("a.arrow", "b.feather"):
        found = ArrowTable(str(tmp_path / name))
        found.ask_for(["text"])
        assert [example for _, example in examples_in(found)] == EXAMPLES
        assert [number for number, _ in examples_in(found)] == list(range(1, 2501))  # read again


def test_saved_data_sets_and_clones_of_the_hub_are_read_without_their_metadata(tmp_path: Path) -> None:
    from datasets import Dataset, DatasetDict

    data = Dataset.from_list(EXAMPLES)
    data.save_to_disk(tmp_path / "saved", num_shards=3)
    assert examples_of(tmp_path / "saved") == EXAMPLES
    DatasetDict(train=data, test=data.select([0])).save_to_disk(tmp_path / "splits")
    with pytest.raises(DataError, match=r"several splits \(test, train\)"):
        load(tmp_path / "splits")
    assert [
        example for table in load(tmp_path / "splits", "test") for _, example in examples_in(table)
    ] == EXAMPLES[:1]
    clone = tmp_path / "clone"
    (clone / "data").mkdir(parents=True)
    data.to_parquet(clone / "data" / "train-00000-of-00001.parquet")
    for name in ("dataset_infos.json", "croissant.json", "LICENSE.txt", "README.txt", "notice-2.txt"):
        written(clone / name, '{"default": {}}')
    assert examples_of(clone) == EXAMPLES
    only_metadata = tmp_path / "only"
    only_metadata.mkdir()
    written(only_metadata / "dataset_info.json", "{}")
    with pytest.raises(DataError, match=r"holds no data file .*; dataset_info\.json is metadata\)"):
        load(only_metadata)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", '{"text": "' + "x" * 2000 + '"}\n', "line 1 is longer than 1,000 characters"),
        ("a.txt", "a\n" + "x" * 2000, "line 2 is longer than 1,000 characters"),
        ("a.csv", 'text\n"' + "x" * 600 + "\n" + "x" * 600 + '"', "field larger than field limit"),
        ("a.json", "[\n" + '{"text": [\n' + "1,\n" * 2000, "a value is longer than 1,000 characters"),
    ],
)
def test_a_file_is_not_unpacked_without_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, content: str, message: str
) -> None:
    for module in (text_files, json_tables):
        monkeypatch.setattr(module, "MAX_CHARACTERS", 1000)
    before = csv_table.csv.field_size_limit(1000)
    try:
        with pytest.raises(DataError, match=message):
            examples_of(written(tmp_path / f"{name}.gz", gzip.compress(content.encode())))
    finally:
        assert csv_table.csv.field_size_limit(before) == 1000
    assert before == 2**27


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv", "a.txt"])
def test_long_rows_are_tokenised_a_few_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr(tables, "_BATCH_CHARACTERS", 100)
    rows = [json.dumps({"text": "x" * 60})] * 9 if "json" in name else ["x" * 60] * 9
    content = f"[{','.join(rows)}]" if name == "a.json" else "\n".join(["text"] * (name == "a.csv") + rows)
    (table,) = load(written(tmp_path / name, content))
    assert [len(list(batch)) for batch in table.batches()] == [2, 2, 2, 2, 1]
