"""A piece of work in a process of its own: figures come back, failures become words."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from types import SimpleNamespace

import psutil
import pytest
from benchmarks import process
from benchmarks.process import run_piece

MakePiece = Callable[[str, str], str]


def test_figures_come_back_with_the_peak_of_that_process(make_piece: MakePiece) -> None:
    body = "import os\nx = bytearray(300 * 2**20)\nx[::4096] = b'x' * len(x[::4096])\n"
    body += "return {'pid': os.getpid(), 'twice': 2 * arguments['x'], 'word': os.environ['WORD']}"
    module = make_piece("works", body)
    outcome = run_piece(module, {"x": 21}, timeout_seconds=60, environment={"WORD": "a"})
    assert outcome.error is None and outcome.figures is not None
    assert outcome.figures["twice"] == 42 and outcome.figures["word"] == "a"
    assert outcome.figures["pid"] != os.getpid()
    assert 300 * 2**20 < outcome.figures["process_peak_bytes"] < 2**30
    assert outcome.seconds > 0


def test_what_others_take_of_the_processor_is_told(make_piece: MakePiece) -> None:
    module = make_piece("sleeps", "import time\ntime.sleep(2)\nreturn {}")
    spinning = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        beside_one = run_piece(module, {}, timeout_seconds=60)
    finally:
        spinning.kill()
        spinning.wait()
    assert beside_one.others_num_cores > 0.3


def test_what_this_process_and_its_children_took_is_not_others(monkeypatch: pytest.MonkeyPatch) -> None:
    subprocess.run([sys.executable, "-c", "sum(range(10**7))"], check=True)
    ours = sum(os.times()[:4])
    times = SimpleNamespace(user=ours + 30.0, system=10.0, steal=2.0, idle=500.0)
    monkeypatch.setattr(psutil, "cpu_times", lambda: times)
    assert process._others_busy_seconds() == pytest.approx(42.0, abs=0.5)


def test_a_peak_that_the_piece_took_itself_stands(make_piece: MakePiece) -> None:
    outcome = run_piece(make_piece("early", "return {'process_peak_bytes': 7}"), {}, timeout_seconds=60)
    assert outcome.figures == {"process_peak_bytes": 7}


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ("raise ValueError('the reason')", ("exit code 1", "ValueError: the reason")),
        ("import os, signal\nos.kill(os.getpid(), signal.SIGKILL)", ("killed by signal 9 (out of memory?)",)),
        ("import os\nprint('half', flush=True)\nos._exit(0)", ("ended without figures", "half")),
        ("return {'loss': float('nan')}", ("exit code 1", "ValueError")),
    ],
)
def test_a_failing_child_is_an_error_with_its_last_lines(
    body: str, words: tuple[str, ...], make_piece: MakePiece
) -> None:
    outcome = run_piece(make_piece("fails", body), {}, timeout_seconds=60)
    assert outcome.figures is None and outcome.error is not None
    assert all(word in outcome.error for word in words), outcome.error


def test_a_child_that_hangs_is_ended_with_its_children(make_piece: MakePiece) -> None:
    """Also with those that lead a group of their own, as pieces that a piece has started do."""
    body = "import subprocess, time\n"
    body += "pids = [subprocess.Popen(['sleep', '600'], start_new_session=s).pid for s in (False, True)]\n"
    body += "print('children', *pids, flush=True)\ntime.sleep(600)"
    started = time.monotonic()
    outcome = run_piece(make_piece("hangs", body), {}, timeout_seconds=10)
    assert time.monotonic() - started < 60
    assert outcome.error is not None and outcome.error.startswith("not finished after 10 s\nchildren ")
    assert "hangs.py" in outcome.error and "in measure" in outcome.error  # where it was
    for pid in map(int, outcome.error.split("\n")[1].split()[1:]):
        assert not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


def test_what_a_piece_prints_is_kept_and_its_launcher_is_whatever_starts_modules(
    make_piece: MakePiece,
) -> None:
    module = make_piece("prints", "import sys\nprint('a warning')\nreturn {'argv': sys.orig_argv[1:4]}")
    outcome = run_piece(module, {}, timeout_seconds=60, launcher=(sys.executable, "-B", "-m"))
    assert outcome.printed == "a warning"
    assert outcome.figures is not None and outcome.figures["argv"] == ["-B", "-m", module]
