"""How far reading is, as a terminal and as a file see it."""

from __future__ import annotations

import pytest

from qlora_train.data import reading_progress as module


@pytest.mark.parametrize("is_terminal", [True, False])
def test_both_say_how_many_rows_were_read(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], is_terminal: bool
) -> None:
    monkeypatch.setattr(module, "_QUIET_SECONDS", 0.0)
    monkeypatch.setattr(module, "_LINE_SECONDS", 0.0)
    monkeypatch.setenv("FORCE_COLOR", "1" if is_terminal else "")
    monkeypatch.setenv("COLUMNS", "100")
    with module.reading_progress() as progress:
        progress(1_234, 0.25)
        progress(2_468, 0.5)
    said = capsys.readouterr()
    assert not said.out
    assert "2,468 rows" in said.err and "50%" in said.err


def test_what_is_soon_done_says_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    with module.reading_progress() as progress:
        progress(10, 1.0)
    assert capsys.readouterr() == ("", "")
