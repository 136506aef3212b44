"""Small files are replaced whole, and are on the disk before they get their name."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from qlora_train.files.atomic_file import replace_text


def test_the_text_is_on_the_disk_before_the_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "plan.json"
    file.write_text("old", encoding="utf-8")
    seen: list[str] = []
    real_fsync = os.fsync

    def fsync(descriptor: int) -> None:
        synced = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        seen.append(f"{'folder' if synced.is_dir() else synced.read_text()}, the file has {file.read_text()}")
        real_fsync(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    replace_text(file, "new")
    assert seen == ["new, the file has old", "folder, the file has new"]
    assert [path.name for path in tmp_path.iterdir()] == ["plan.json"]
