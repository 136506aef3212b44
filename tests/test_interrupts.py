"""A signal ends a command wherever it comes, even where its exception goes missing."""

from __future__ import annotations

import contextlib
import os
import signal

import pytest

from qlora_train.errors import Interrupted, UserError
from qlora_train.interrupts import RaisesInterrupted, lost_signal
from qlora_train.train.signals import StopSignal

SIGNALS = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]


def send(number: int) -> None:
    os.kill(os.getpid(), number)


@pytest.mark.parametrize("number", SIGNALS)
def test_it_is_raised_through_what_libraries_catch(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    with pytest.raises(Interrupted) as caught, RaisesInterrupted():
        try:
            send(number)
        except Exception:  # as libraries do around an optional import
            pytest.fail("caught")
    assert caught.value.exit_code == 128 + number
    assert signal.getsignal(number) is before


@pytest.mark.parametrize("number", SIGNALS)
def test_one_that_went_missing_ends_the_command_all_the_same(number: signal.Signals) -> None:
    went_on = []
    with pytest.raises(Interrupted) as caught, RaisesInterrupted():
        try:
            send(number)
        except:  # noqa: E722  # what is tried
            went_on.append(lost_signal())
    assert went_on == [number] and caught.value.exit_code == 128 + number


def test_one_that_was_turned_into_another_error_too() -> None:
    with pytest.raises(Interrupted), RaisesInterrupted():
        try:
            send(signal.SIGTERM)
        except BaseException as error:
            raise UserError("an optional library is missing") from error


def test_training_asks_for_one_that_went_missing() -> None:
    with pytest.raises(Interrupted), RaisesInterrupted():
        with contextlib.suppress(BaseException):
            send(signal.SIGTERM)
        with StopSignal() as stop:
            assert stop.received == signal.SIGTERM


def test_a_hangup_that_is_ignored_stays_so() -> None:
    """nohup."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with RaisesInterrupted():
            send(signal.SIGHUP)
            assert lost_signal() == 0
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_no_signal_no_interrupt() -> None:
    with RaisesInterrupted():
        assert lost_signal() == 0
        with StopSignal() as stop:
            assert stop.received == 0
    with pytest.raises(UserError, match="as it was"), RaisesInterrupted():
        raise UserError("as it was")


def test_the_first_signal_in_training_is_noted_the_second_raises() -> None:
    with pytest.raises(Interrupted), RaisesInterrupted(), StopSignal() as stop:
        send(signal.SIGTERM)
        assert stop.received == signal.SIGTERM
        send(signal.SIGTERM)
