"""Who is at work in a folder, and what is left when nobody is."""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tiny_runs import child_environment

from qlora_train.files import folder_lock
from qlora_train.files.atomic_folder import atomic_folder
from qlora_train.files.folder_lock import lock_folder, remove_if_free, remove_leftovers

WRITER = """
import sys, time
from pathlib import Path
from qlora_train.files.atomic_folder import atomic_folder
with atomic_folder(Path(sys.argv[1])) as partial:
    (partial / "half").write_text("x")
    print(partial.name, flush=True)
    time.sleep(600)
"""
HOLDER = """
import sys, time
from pathlib import Path
from qlora_train.files.folder_lock import lock_folder
lock = lock_folder(Path(sys.argv[1]))
print(lock is not None, flush=True)
time.sleep(600)
"""
FORKING_HOLDER = """
import os, sys, time
from pathlib import Path
from qlora_train.files.folder_lock import lock_folder
lock = lock_folder(Path(sys.argv[1]))
if not os.fork():
    print(os.getpid(), flush=True)
time.sleep(600)
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "folder"
    path.mkdir()
    return path


def start_writer(target: Path) -> tuple[subprocess.Popen[str], Path]:
    """A process in the middle of writing `target`, and its partial folder."""
    command = [sys.executable, "-c", WRITER, str(target)]
    process = subprocess.Popen(command, env=child_environment(), stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    return process, target.parent / process.stdout.readline().strip()


def test_a_child_of_a_killed_process_holds_no_lock(folder: Path) -> None:
    """It may live on for a moment, or for as long as it works."""
    command = [sys.executable, "-c", FORKING_HOLDER, str(folder)]
    process = subprocess.Popen(command, env=child_environment(), stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    child = int(process.stdout.readline())
    try:
        assert lock_folder(folder) is None
        process.kill()
        process.wait()
        os.kill(child, 0)  # is there
        lock = lock_folder(folder)
        assert lock is not None
        lock.close()
    finally:
        os.kill(child, signal.SIGKILL)
        process.stdout.close()


def test_a_folder_is_locked_once_until_it_is_released(folder: Path) -> None:
    lock = lock_folder(folder)
    assert lock is not None and lock.is_certain
    assert lock_folder(folder) is None
    lock.close()
    again = lock_folder(folder)
    assert again is not None
    again.close()


def test_readers_share_and_keep_a_writer_out(folder: Path) -> None:
    first, second = lock_folder(folder, shared=True), lock_folder(folder, shared=True)
    assert first is not None and second is not None
    assert lock_folder(folder) is None and not remove_if_free(folder)
    first.close()
    second.close()
    assert remove_if_free(folder) and not folder.exists()


def test_what_is_not_there_cannot_be_locked(tmp_path: Path) -> None:
    assert lock_folder(tmp_path / "absent") is None
    (tmp_path / "file").write_text("x")
    with pytest.raises(NotADirectoryError):
        lock_folder(tmp_path / "file")


def test_a_folder_that_its_owner_removed_meanwhile_is_not_locked(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between opening and locking: the lock would be on a folder that no name leads to."""
    flock = fcntl.flock

    def remove_first(descriptor: int, operation: int) -> None:
        folder.rmdir()
        folder.mkdir()
        flock(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", remove_first)
    assert lock_folder(folder) is None


def test_where_there_are_no_locks_nothing_is_removed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unsupported(descriptor: int, operation: int) -> None:
        raise OSError(errno.EBADF, "as NFS says for a folder")

    monkeypatch.setattr(fcntl, "flock", unsupported)
    lock = lock_folder(folder)
    assert lock is not None and not lock.is_certain
    lock.close()
    assert not remove_if_free(folder) and folder.exists()


def test_a_live_writer_is_left_alone_and_a_dead_one_cleared_up(tmp_path: Path) -> None:
    target = tmp_path / "step-3"
    process, partial = start_writer(target)
    try:
        remove_leftovers(tmp_path)
        assert (partial / "half").exists()
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert partial.exists()  # as a power cut leaves it
    remove_leftovers(tmp_path)
    assert os.listdir(tmp_path) == []


def test_only_leftovers_are_removed(tmp_path: Path) -> None:
    for name in ("step-3", "step-3.partial-0a", "step-3.old-0a", "adapter.partial-0b", "notes"):
        (tmp_path / name).mkdir()
    (tmp_path / "file.partial-0c").write_text("x")
    remove_leftovers(tmp_path)
    assert sorted(os.listdir(tmp_path)) == ["file.partial-0c", "notes", "step-3"]
    remove_leftovers(tmp_path / "absent")


def test_two_writers_of_one_folder_never_share_a_partial_one(tmp_path: Path) -> None:
    target = tmp_path / "x"
    with atomic_folder(target) as first:
        (first / "a").write_text("first")
        with atomic_folder(target) as second:  # as another container's process 1 would
            (second / "a").write_text("second")
        assert first != second and (first / "a").read_text() == "first"
        assert (target / "a").read_text() == "second"
    assert (target / "a").read_text() == "first" and os.listdir(tmp_path) == ["x"]


def test_a_partial_folder_that_was_taken_for_a_leftover_is_made_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Someone who clears up comes between making the folder and locking it."""
    really, calls = folder_lock.lock_folder, []

    def lock(path: Path) -> folder_lock.FolderLock | None:
        calls.append(path)
        if len(calls) == 1:
            path.rmdir()
        return really(path)

    monkeypatch.setattr("qlora_train.files.atomic_folder.lock_folder", lock)
    with atomic_folder(tmp_path / "x") as partial:
        assert partial == calls[1] != calls[0]
        (partial / "a").write_text("a")
    assert os.listdir(tmp_path) == ["x"]


def test_the_lock_ends_with_the_process(folder: Path) -> None:
    command = [sys.executable, "-c", HOLDER, str(folder)]
    process = subprocess.Popen(command, env=child_environment(), stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "True\n"
    assert lock_folder(folder) is None
    process.kill()
    process.wait()
    for _ in range(100):
        if (lock := lock_folder(folder)) is not None:
            lock.close()
            return
        time.sleep(0.01)
    pytest.fail("still locked")
