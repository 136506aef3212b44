"""The tests of one file that are marked `gpu`, and what became of each.

What a test prints is kept: the comparison of plan and meter says its figures there.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest

from qlora_train.bench.process import answer


def measure(arguments: dict[str, Any]) -> dict[str, Any]:
    """arguments: file; marks: which tests, in pytest's words. Failures and skips are figures, not errors; a
    file that cannot be collected is an error."""
    noted = _Noted()
    code = pytest.main(
        ["-q", "-p", "no:cacheprovider", "-m", arguments["marks"], arguments["file"]], plugins=[noted]
    )
    assert code in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED), f"pytest: {code!r}"
    return {
        **{f"num_{outcome}": noted.counts[outcome] for outcome in ("passed", "failed", "skipped")},
        "failures": noted.failures,
        "printed": noted.printed,
    }


class _Noted:
    """A pytest plugin. A test that fails in its set-up, or after it has passed, has failed."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.failures: dict[str, str] = {}
        self.printed: list[str] = []

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call":
            self.printed += report.capstdout.splitlines()
        if report.when == "call" or not report.passed:
            self.counts[report.outcome] += 1
        if report.failed:
            self.failures[report.nodeid] = report.longreprtext[-2000:]


if __name__ == "__main__":
    answer(measure)
