from __future__ import annotations

import os
import re
from pathlib import Path

import pytest
from tiny_data import examples_in

from qlora_train.data import sources
from qlora_train.data.sources import load_source
from qlora_train.data.tables import ExampleTable
from qlora_train.errors import DataError
from qlora_train.recipe import DataSource


def load(path: Path | str, split: str | None = None) -> list[ExampleTable]:
    return load_source(DataSource(path=str(path), split=split))


def examples_of(tables: list[ExampleTable]) -> list[dict]:
    return [example for table in tables for _, example in examples_in(table)]


def test_jsonl_keeps_values_as_they_are_and_names_physical_lines(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(
        '{"d": "2020-01-01", "n": 7}\n\n  \n{"d": "x\u2028y", "m": [1, "a"]}\n', encoding="utf-8-sig"
    )
    (table,) = load(path)
    assert list(examples_in(table)) == [
        (1, {"d": "2020-01-01", "n": 7}),
        (4, {"d": "x\u2028y", "m": [1, "a"]}),
    ]
    assert table.columns == ("d", "n", "m")
    assert table.describe(4) == f"{path} line 4"


def test_rows_of_a_json_list_are_counted(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    for written in ('[\n {"t": "a, [b"},\n {"t":\n   "c"}]', '{"v": 1, "d": [{"t": "a, [b"}, {"t": "c"}]}'):
        path.write_text(written)
        (table,) = load(path)
        assert list(examples_in(table)) == [(1, {"t": "a, [b"}), (2, {"t": "c"})]
        assert table.describe(2) == f"{path} row 2"
    path.write_text('{"t": \n"a"}\n{\n"t": "b"}')
    (table,) = load(path)
    assert [table.describe(number) for number, _ in examples_in(table)] == [
        f"{path} line {n}" for n in (1, 3)
    ]


def test_json_file_may_hold_one_object_a_line(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('{"t": "a"}\n{"t": "b"}\n')
    assert examples_of(load(tmp_path / "a.json")) == [{"t": "a"}, {"t": "b"}]


def test_csv_values_are_text_and_records_may_span_lines(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text('q,a\n"two\nlines",007\n\nx,NA\ny,\n')
    (table,) = load(path)
    assert examples_of([table]) == [
        {"q": "two\nlines", "a": "007"},
        {"q": "x", "a": "NA"},
        {"q": "y", "a": ""},
    ]
    assert [table.describe(line).rsplit(" ", 1)[1] for line, _ in examples_in(table)] == ["2", "5", "6"]


def test_a_short_csv_record_ends_in_empty_texts(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("q,a,b\nx\ny,1\n")
    assert examples_of(load(tmp_path / "a.csv")) == [
        {"q": "x", "a": "", "b": ""},
        {"q": "y", "a": "1", "b": ""},
    ]


def test_a_csv_column_without_a_name_is_no_obstacle(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text(",q,\n0,x,1\n1,y,2\n")  # pandas writes its index so
    (table,) = load(path)
    assert table.columns == ("column 1", "q", "column 3")
    assert [example["q"] for example in examples_of([table])] == ["x", "y"]


def test_csv_fields_may_be_long(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text(f"q,a\n{'long ' * 40_000},1\nx,2\n")
    (table,) = load(path)
    assert [(line, len(example["q"])) for line, example in examples_in(table)] == [(2, 200_000), (3, 1)]


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv", "a.txt", "a.parquet"])
def test_a_changed_file_is_read_again_though_its_time_is_the_same(tmp_path: Path, name: str) -> None:
    from datasets import Dataset

    path = tmp_path / name
    for value in ("one", "two"):
        if name == "a.parquet":
            Dataset.from_dict({"text": [value]}).to_parquet(path)
        else:
            lines = {"a.csv": f"text\n{value}\n", "a.txt": f"{value}\n"}
            path.write_text(lines.get(name, f'{{"text": "{value}"}}\n'))
        os.utime(path, ns=(10**18, 10**18))
        assert examples_of(load(path)) == [{"text": value}]


def test_parquet_and_text(tmp_path: Path) -> None:
    from datasets import Dataset

    Dataset.from_dict({"m": [[{"role": "user", "content": "hi"}], []]}).to_parquet(tmp_path / "a.parquet")
    (tmp_path / "b.txt").write_text("one\n\n  two \n")
    (parquet,), (text,) = load(tmp_path / "a.parquet"), load(tmp_path / "b.txt")
    assert examples_of([parquet]) == [{"m": [{"role": "user", "content": "hi"}]}, {"m": []}]
    assert parquet.describe(2).endswith("a.parquet row 2")
    assert list(examples_in(text)) == [(1, {"text": "one"}), (2, {"text": ""}), (3, {"text": "  two "})]


def test_a_folder_joins_its_files_in_sorted_order_and_nothing_is_written_beside_them(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    (folder / "sub").mkdir(parents=True)
    (folder / ".hidden").mkdir()
    (folder / "b.jsonl").write_text('{"t": "2"}\n')
    (folder / "a.jsonl").write_text('{"t": "1"}\n')
    (folder / "sub" / "c.csv").write_text("t\n3\n")
    (folder / ".hidden" / "z.jsonl").write_text('{"t": "no"}\n')
    (folder / "README.md").write_text("not data")
    before = sorted(folder.rglob("*"))
    assert [example["t"] for example in examples_of(load(folder))] == ["1", "2", "3"]
    assert sorted(folder.rglob("*")) == before


def test_a_folder_with_several_splits_wants_to_know_which(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "train-00000.jsonl").write_text('{"t": "1"}\n')
    (folder / "dev.jsonl").write_text('{"t": "2"}\n')
    with pytest.raises(DataError, match=r"several splits \(validation, train\)"):
        load(folder)
    assert examples_of(load(folder, "train")) == [{"t": "1"}]
    assert examples_of(load(folder, "validation")) == [{"t": "2"}]
    with pytest.raises(DataError, match="no split 'test'"):
        load(folder, "test")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b"", "is empty"),
        ("a.jsonl", b"\n \n", "holds no rows"),
        ("a.csv", b"q,a\n", "holds no rows"),
        ("a.json", b"[]", "holds no rows"),
        ("a.jsonl", b'{"t": 1}\n{"t": \n', r"a\.jsonl line 2 is not valid JSON"),
        ("a.jsonl", b'{"t": 1}\n["t"]\n', r"a\.jsonl line 2 holds a list"),
        ("a.json", b'[{"t": 1},\n 3]', r"a\.json row 2 holds a number"),
        ("a.json", b'[{"t": 1},\n', r"a\.json line \d is not valid JSON"),
        ("a.csv", b"q,a\n1,2,3\n", "line 2 has 3 fields, the header names 2 columns"),
        ("a.csv", b"q,a\n1,2\n1,2,3\n", "line 3 has 3 fields"),
        ("a.txt", b"\xff\xfe\x00bad", "line 1 is UTF-16"),
        ("a.parquet", b"not parquet at all", "cannot be read as parquet"),
        ("a.arrow", b"not arrow at all", "cannot be read as arrow"),
        ("a.tsv", b"q\ta\n", "holds no rows"),
        ("a.xlsx", b"q", "file type '.xlsx' is not known"),
    ],
)
def test_unreadable_files(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        examples_of(load(tmp_path / name))


def test_missing_files(tmp_path: Path) -> None:
    for path in (tmp_path / "gone.jsonl", "gone.csv", "gone.jsnol", "a/b/c"):
        with pytest.raises(DataError, match=re.escape(f"The data file {path} does not exist")):
            load(path)
    with pytest.raises(DataError, match="holds no data file"):
        load(tmp_path)


def test_a_split_of_one_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("x\n")
    with pytest.raises(DataError, match="remove `split`"):
        load(tmp_path / "a.txt", "train")
    for path in (tmp_path, tmp_path / "a.txt"):
        with pytest.raises(DataError, match="no hub data set.*remove `name`"):
            sources.load_source(DataSource(path=str(path), name="main"))


def test_hub_ids_get_the_split_and_failures_become_messages(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    asked = []

    def load_dataset(name: str, configuration: str | None, *, split: str) -> datasets.Dataset:
        asked.append((name, configuration, split))
        if name == "org/several" and configuration is None:
            raise ValueError(
                "Config name is missing.\nPlease pick one among the available configs: ['a', 'b']"
            )
        if name == "org/away":
            raise ConnectionError("no route\nto host")
        if name == "org/none":
            raise datasets.exceptions.DatasetNotFoundError("not there")
        if split == "odd":
            raise ValueError('Unknown split "odd".')
        return datasets.Dataset.from_dict({"t": ["a", "b"]})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    (table,) = load("org/name")
    assert examples_of([table]) == [{"t": "a"}, {"t": "b"}]
    assert [table.describe(example) for example, _ in examples_in(table)] == [
        "org/name [train] row 1",
        "org/name [train] row 2",
    ]
    load("name", "validation")
    sources.load_source(DataSource(path="org/several", name="b"))
    assert asked == [("org/name", None, "train"), ("name", None, "validation"), ("org/several", "b", "train")]
    for name, split, message in (
        ("org/away", None, "hub cannot be reached.*no route"),
        ("org/none", None, "no data set of that name"),
        ("org/several", None, r"several configurations \('a', 'b'\)\. Write {path: org/several, name: "),
        ("org/name", "odd", "Unknown split"),
    ):
        with pytest.raises(DataError, match=message):
            load(name, split)


def test_split_names() -> None:
    names = ("train.jsonl", "x/test/a.csv", "valid_1.txt", "trained.jsonl", "a/Dev-0.json")
    assert [sources._split_of(Path(n)) for n in names] == [
        "train",
        "test",
        "validation",
        "train",
        "validation",
    ]
