"""The tests of one file that are marked `gpu`, and what became of each.

What a test prints is kept: the comparison of plan and meter says its figures there.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest

from benchmarks.process import answer

MAX_FAILURE_CHARACTERS, MAX_PRINTED_LINES = 2000, 100


def measure(arguments: dict[str, Any]) -> dict[str, Any]:
    """arguments: file; marks: which tests, in pytest's words. Failures are problems, each with the end of its
    traceback; a file that cannot be collected is an error."""
    noted = _Noted()
    code = pytest.main(
        ["-q", "--tb=short", "-p", "no:cacheprovider", "-m", arguments["marks"], arguments["file"]],
        plugins=[noted],
    )
    expected = (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED, pytest.ExitCode.NO_TESTS_COLLECTED)
    assert code in expected, f"pytest: {code!r}"
    counts = {f"num_{outcome}": noted.counts[outcome] for outcome in ("passed", "failed", "skipped")}
    return {
        "runs": {"pytest": counts | {"test_seconds": noted.seconds}},
        "problems": noted.failures,
        "remarks": [],
        "printed_by_tests": noted.printed[-MAX_PRINTED_LINES:],
    }


class _Noted:
    """A pytest plugin. A test that fails in its set-up, or after it has passed, has failed."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.failures: list[str] = []
        self.printed: list[str] = []
        self.seconds = 0.0

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self.seconds += report.duration
        if report.when == "call":
            self.printed += report.capstdout.splitlines()
        if report.when == "call" or not report.passed:
            self.counts[report.outcome] += 1
        if report.failed:
            self.failures.append(f"{report.nodeid}\n{report.longreprtext[-MAX_FAILURE_CHARACTERS:]}")


if __name__ == "__main__":
    answer(measure)
