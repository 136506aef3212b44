"""Large data: tokenised by several processes, kept on disk, mapped again; the same as in one process."""

from __future__ import annotations

import errno
import gc
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qlora_train.data import open_sources, token_cache
from qlora_train.data.building import build_dataset
from qlora_train.data.tokenized_examples import ExamplesWriter, TokenizedExamples
from qlora_train.data.workers import in_processes
from qlora_train.errors import DataError, OutOfMemory, QloraTrainError
from qlora_train.recipe import DataSection
from qlora_train.weights.cache_command import clear_cache, list_cache

Section = Callable[..., DataSection]


@pytest.fixture
def examples(tmp_path: Path) -> Path:
    return write_examples(tmp_path / "rows.jsonl", 90)


def write_examples(path: Path, number: int) -> Path:
    """Examples of three kinds: good ones, some too long, some that cannot be used."""
    with path.open("w") as file:
        for n in range(number):
            example: dict[str, Any] = {
                "prompt": f"question {n}: ",
                "completion": "answer " * (n % 9),
                "id": n,
            }
            file.write(json.dumps(example) + "\n")
    return path


@pytest.fixture(autouse=True)
def small_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(token_cache, "LEAST_BYTES", 100)


def with_processors(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    monkeypatch.setattr(open_sources, "num_processors", lambda: number)


@pytest.mark.skipif(sys.platform != "linux", reason="processes are forked on Linux only")
def test_processes_give_what_one_process_gives(
    tmp_path: Path, section: Section, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = section(str(write_examples(tmp_path / "rows.jsonl", 2250)), on_bad_row="skip", eval=0.1)
    monkeypatch.setattr(open_sources, "SERIAL_BATCHES", 1)
    found = []
    for number in (1, 3):
        with_processors(monkeypatch, number)
        train, evaluation = build_dataset(data, tokenizer, seed=0)
        assert evaluation is not None
        found.append(
            (train.fingerprint(), evaluation.fingerprint(), train.report.lines(), evaluation.report.lines())
        )
    assert found[0] == found[1]
    assert "250 rows skipped (data.on_bad_row: skip):" in found[0][2]
    assert "columns not read: id" in found[0][2]
    assert train.examples.describe_example(train.example_of(0)).endswith("rows.jsonl line 2")


def test_a_second_start_maps_what_the_first_has_kept(
    examples: Path, section: Section, tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, cache = section(str(examples), on_bad_row="skip", eval=0.1), tmp_path / "cache"
    plain, _ = build_dataset(data, tokenizer, seed=0)
    first, _ = build_dataset(data, tokenizer, seed=0, cache=cache)
    monkeypatch.setattr(open_sources, "read_batch", None)  # nothing is read again
    again, evaluation = build_dataset(data, tokenizer, seed=0, cache=cache)
    assert evaluation is not None
    assert plain.fingerprint() == first.fingerprint() == again.fingerprint()
    assert plain.report == first.report == again.report
    assert isinstance(again.examples.tokens.base, memoryview) or not again.examples.tokens.flags.owndata
    batches = [data.micro_batch([0, 3]) for data in (plain, again)]
    for name in ("token_ids", "labels", "cu_seqlens"):
        np.testing.assert_array_equal(getattr(batches[0], name), getattr(batches[1], name))
    again.examples.give_pages_back()
    np.testing.assert_array_equal(again.micro_batch([0, 3]).token_ids, batches[0].token_ids)
    assert [path.name.startswith("tokens-") for path in cache.iterdir()] == [True]


def test_what_the_tokens_follow_from_is_in_the_name(
    examples: Path, section: Section, make_tokenizer: Any, tmp_path: Path
) -> None:
    cache, tokenizer = tmp_path / "cache", make_tokenizer()
    path = str(examples)

    def number_kept(data: DataSection, tokenizer: Any = tokenizer, **options: Any) -> int:
        build_dataset(data, tokenizer, seed=0, cache=cache, **options)
        return len(list(cache.iterdir()))

    keys = {"on_bad_row": "skip"}
    assert number_kept(section(path, **keys)) == 1
    assert number_kept(section(path, **keys, packing=False)) == 1  # bins are made anew
    assert number_kept(section(path, **keys, eval=0.5)) == 1
    assert number_kept(section(path, **keys, sequence_length=32)) == 2
    assert number_kept(section(path, **keys, too_long="drop")) == 3
    assert number_kept(section(path, **keys), make_tokenizer(adds_bos=True)) == 4
    assert number_kept(section(path, **keys), make_tokenizer("plain turns")) == 5
    assert number_kept(section(path, **keys), vocabulary_size=9999) == 6
    text = examples.read_text()
    stat = examples.stat()
    examples.write_text(text.replace("question 5:", "question X:"))
    os.utime(examples, ns=(stat.st_atime_ns, stat.st_mtime_ns))  # same size, same time
    assert number_kept(section(path, **keys)) == 7


def test_small_data_and_no_cache_leave_nothing(
    examples: Path, section: Section, tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(token_cache, "LEAST_BYTES", 10**9)
    build_dataset(section(str(examples), on_bad_row="skip"), tokenizer, seed=0, cache=tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


def test_a_damaged_or_half_written_folder_is_made_again(
    examples: Path, section: Section, tokenizer: Any, tmp_path: Path
) -> None:
    data, cache = section(str(examples), on_bad_row="skip"), tmp_path / "cache"
    expected = build_dataset(data, tokenizer, seed=0, cache=cache)[0].fingerprint()
    (folder,) = cache.iterdir()
    for damage in (
        lambda: (folder / "tokens").write_bytes(b"\0" * 8),
        lambda: (folder / "meta.json").unlink(),
        lambda: (folder / "meta.json").write_text("{"),
    ):
        damage()
        with pytest.raises((OSError, ValueError)):
            TokenizedExamples.opened(folder)
        assert build_dataset(data, tokenizer, seed=0, cache=cache)[0].fingerprint() == expected
    bad = section(str(examples))
    with pytest.raises(DataError, match="cannot be used"):
        build_dataset(bad, tokenizer, seed=0, cache=cache)
    assert list(cache.iterdir()) == [folder]


def test_the_cache_command_knows_tokens_and_spares_those_in_use(
    examples: Path, section: Section, tokenizer: Any, tmp_path: Path
) -> None:
    data, cache = section(str(examples), on_bad_row="skip"), tmp_path / "cache"
    used, _ = build_dataset(data, tokenizer, seed=0, cache=cache)
    (folder,) = cache.iterdir()
    leftover = cache / f"{folder.name}.partial-1234"
    leftover.mkdir()
    in_use, half = list_cache(cache)
    assert (in_use.folder, in_use.contents, in_use.is_in_use) == (folder, f"tokens of {examples}", True)
    assert (half.folder, half.contents, half.is_in_use) == (leftover, "leftover", False)
    assert clear_cache(cache) == ([half], [in_use])
    del used
    gc.collect()
    (free,) = list_cache(cache)
    assert clear_cache(cache) == ([free], []) and list(cache.iterdir()) == []


def test_leftovers_of_killed_processes_go_and_the_first_of_two_stays(
    examples: Path, section: Section, tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, cache = section(str(examples), on_bad_row="skip"), tmp_path / "cache"
    (cache / "tokens-x.partial-1234").mkdir(parents=True)
    finish, first = ExamplesWriter.finish, []

    def overtaken(self: ExamplesWriter, facts: Any) -> Any:
        if not first:
            first.append(None)
            first[0] = build_dataset(data, tokenizer, seed=0, cache=cache)[0]
            first.append(next(path.stat().st_ino for path in cache.iterdir() if ".partial-" not in path.name))
        return finish(self, facts)

    monkeypatch.setattr(ExamplesWriter, "finish", overtaken)
    second, _ = build_dataset(data, tokenizer, seed=0, cache=cache)
    assert second.fingerprint() == first[0].fingerprint()
    assert [path.stat().st_ino for path in cache.iterdir()] == [first[1]]
    (entry,) = list_cache(cache)
    assert entry.is_in_use


def test_a_damaged_token_cache_is_listed_as_such(tmp_path: Path) -> None:
    for name, meta in {
        "tokens-a": None,
        "tokens-b": "[1]",
        "tokens-c": '{"num_bytes": {"tokens": 9}}',
    }.items():
        (tmp_path / name).mkdir()
        if meta is not None:
            (tmp_path / name / "meta.json").write_text(meta)
    assert [entry.contents for entry in list_cache(tmp_path)] == ["damaged"] * 3


def test_a_cache_that_cannot_be_written_is_named(
    examples: Path, section: Section, tokenizer: Any, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(
        DataError, match=r"token cache .*file cannot be written.*QLORA_TRAIN_CACHE.*--no-cache"
    ):
        build_dataset(section(str(examples), on_bad_row="skip"), tokenizer, seed=0, cache=tmp_path / "file")


def test_a_full_disk_is_a_failure_of_the_run(
    examples: Path, section: Section, tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(self: Any, facts: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(ExamplesWriter, "finish", full)
    with pytest.raises(QloraTrainError, match="disk of the token cache .* is full") as caught:
        build_dataset(section(str(examples), on_bad_row="skip"), tokenizer, seed=0, cache=tmp_path / "cache")
    assert caught.value.exit_code == 1 and list((tmp_path / "cache").iterdir()) == []


linux = pytest.mark.skipif(sys.platform != "linux", reason="processes are forked on Linux only")


@linux
def test_workers_keep_the_order_and_hand_errors_on() -> None:
    def work(n: int) -> int:
        time.sleep(0.003 * (n % 3))
        if n == 30:
            raise DataError("the thirtieth")
        return n * n

    assert list(in_processes(work, range(20), 3)) == [n * n for n in range(20)]
    with pytest.raises(DataError, match="the thirtieth"):
        list(in_processes(work, range(25, 40), 3))


@linux
def test_a_worker_that_is_killed_is_said() -> None:
    with pytest.raises(OutOfMemory, match="a process that tokenises was killed"):
        list(in_processes(lambda n: os.kill(os.getpid(), signal.SIGKILL), range(4), 2))


ORPHANS = """
import os, time
from qlora_train.data import workers
list(workers.in_processes(lambda n: (os.write(1, b"%d\\n" % os.getpid()), time.sleep(600)), range(4), 2))
"""


@linux
def test_workers_end_with_a_parent_that_is_killed() -> None:
    parent = subprocess.Popen([sys.executable, "-c", ORPHANS], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    children = {int(parent.stdout.readline()) for _ in range(2)}
    assert len(children) == 2
    parent.kill()
    parent.wait()
    parent.stdout.close()
    deadline = time.monotonic() + 30
    while any(Path(f"/proc/{child}").exists() for child in children):
        assert time.monotonic() < deadline, "orphans are left"
        time.sleep(0.05)
