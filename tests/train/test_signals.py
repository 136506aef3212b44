"""The first signal is noted and answered at once; the next one does what it did before."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest

from qlora_train.train.checkpoint import TrainState
from qlora_train.train.loop import TrainLoop
from qlora_train.train.signals import StopSignal

NUMBERS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@pytest.mark.parametrize("number", NUMBERS)
def test_the_first_is_noted_and_the_second_is_not_ours(
    number: int, capfd: pytest.CaptureFixture[str]
) -> None:
    received: list[int] = []
    before = signal.signal(number, lambda n, frame: received.append(n))
    try:
        with StopSignal(lambda: "step 3 is being finished, about 7 s") as stop:
            os.kill(os.getpid(), number)
            assert stop.received == number and received == []
            said = capfd.readouterr().err
            assert (said == "\nstep 3 is being finished, about 7 s\n") is (number != signal.SIGHUP)
            os.kill(os.getpid(), number)
            assert received == [number]
    finally:
        signal.signal(number, before)


def test_an_ignored_hangup_stays_ignored() -> None:
    """nohup."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopSignal() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            assert stop.received == 0 and signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_output_after_a_hangup_goes_nowhere() -> None:
    """On a terminal that is gone writing fails; whoever prints need not know."""
    code = (
        "import os, pty, signal, sys\n"
        "master, slave = pty.openpty()\n"
        "os.dup2(slave, 1)\n"
        "from qlora_train.train.signals import StopSignal\n"
        "with StopSignal() as stop:\n"
        "    os.kill(os.getpid(), signal.SIGHUP)\n"
        "    os.close(slave); os.close(master)\n"
        "    print('lost'); sys.stdout.flush()\n"
        "sys.exit(stop.received)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == signal.SIGHUP and "Traceback" not in done.stderr, done.stderr


def test_a_signal_in_an_evaluation_says_that_it_is_finished_first() -> None:
    loop = TrainLoop.__new__(TrainLoop)
    loop._step_seconds, loop._is_evaluating, loop._state = None, True, TrainState()
    assert loop._stopping_line().startswith("stopping: the evaluation and step 1 are being finished, then")
    loop._state.step = 3
    assert loop._stopping_line().startswith("stopping: the evaluation is being finished, then")
