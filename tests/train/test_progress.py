"""What is on the screen while a run goes on."""

from __future__ import annotations

import time
from typing import Any

import pytest
from rich.console import Console

from qlora_train.train import progress as progress_module
from qlora_train.train.progress import TimeLeft, TrainProgress

ROW: dict[str, Any] = {
    "step": 3,
    "loss": 1.23456,
    "learning_rate": 2e-4,
    "grad_norm": 0.51234,
    "tokens_per_second": 1234.5,
    "peak_bytes": 3 * 2**30,
}


def shown(monkeypatch: pytest.MonkeyPatch, *, width: int, is_terminal: bool) -> str:
    """The text of a run of 10 steps after its third, of which one was left out of the time left."""
    console = Console(width=width, force_terminal=is_terminal, record=True, color_system=None, quiet=False)
    monkeypatch.setattr(progress_module, "Console", lambda **_: console)
    with TrainProgress(10, 1, 1, slow_steps=1, quiet=False, peak_name="peak") as progress:
        progress.step(ROW | {"step": 2}, 0.5, 99.0)
        progress.step(ROW, 0.75, 2.0)
        if is_terminal:
            progress._bar.refresh()
            progress.show("evaluating on 7 bins")
            progress._bar.refresh()
    return console.export_text()


@pytest.mark.parametrize("has_widgets", [False, True])
def test_a_notebook_has_a_bar_where_it_has_widgets(
    monkeypatch: pytest.MonkeyPatch, has_widgets: bool
) -> None:
    console = Console(force_jupyter=True, record=True, color_system=None)
    monkeypatch.setattr(progress_module, "Console", lambda **_: console)
    monkeypatch.setattr(progress_module, "find_spec", lambda name: name if has_widgets else None)
    progress = TrainProgress(10, 1, 1, slow_steps=1, quiet=False, peak_name="peak")
    assert progress._bar.disable is not has_widgets
    monkeypatch.setattr(progress_module.TrainProgress, "log", lambda self, line: lines.append(line))
    lines: list[str] = []
    progress.step(ROW, 0.75, 2.0)
    assert len(lines) == (0 if has_widgets else 1)


@pytest.mark.parametrize("width", [60, 80, 160])
def test_the_values_of_a_step_stay_on_a_terminal(monkeypatch: pytest.MonkeyPatch, width: int) -> None:
    """Also on a narrow one, where the line breaks instead of being cut."""
    text = " ".join(shown(monkeypatch, width=width, is_terminal=True).split())
    for value in (
        "loss 1.2346",
        "lr 2.00e-04",
        "grad norm 0.512",
        "epoch 0.75",
        "1,234 tokens/s",
        "3.00 GiB",
    ):
        assert value in text
    assert "evaluating on 7 bins" in text and "3/10" in text and "ETA 0:00:14" in text and "…" not in text


def test_a_log_file_gets_a_line_a_step_and_no_time_left_that_is_not_known(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    lines = shown(monkeypatch, width=80, is_terminal=False).splitlines()
    assert lines == [
        "step 2/10  loss 1.2346  lr 2.00e-04  grad norm 0.512  epoch 0.50  1,234 tokens/s  peak 3.00 GiB",
        "step 3/10  loss 1.2346  lr 2.00e-04  grad norm 0.512  epoch 0.75  1,234 tokens/s  peak 3.00 GiB  "
        "ETA 0:00:14",
    ]


def test_the_time_left_is_of_the_median_step_and_what_is_between(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1000.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    left = TimeLeft(2)
    assert left.after(50.0, 9) is None and left.after(50.0, 8) is None
    expected = []
    for seconds, between in ((2.0, 0.0), (2.0, 6.0), (30.0, 0.0), (2.0, 0.0)):
        now += between + seconds
        expected.append(left.after(seconds, 10))
    assert expected == pytest.approx([20.0, 10 * (2 + 6 / 2), 10 * (2 + 6 / 3), 10 * (2 + 6 / 4)])
