"""The exception tree. Every message says what is wrong, where, and what to change.

A `UserError` is something the person running the command can mend (exit code 2). Any other
`QloraTrainError` is a failure of the run itself (exit code 1). `Interrupted`, after a signal, stands apart.
Our own mistakes are `assert`s.
"""

from __future__ import annotations

from collections.abc import Sequence


class QloraTrainError(Exception):
    """Base of everything this package raises on purpose."""

    exit_code = 1


class UserError(QloraTrainError, ValueError):
    """The input is wrong: the message says where and what to change."""

    exit_code = 2


class RecipeError(UserError):
    """One or more problems in a recipe, all reported at once."""

    def __init__(self, problems: Sequence[str]) -> None:
        self.problems = tuple(problems)
        super().__init__("\n".join(self.problems))


class DataError(UserError):
    """Data that cannot be read, mapped or tokenised."""


class BaseModelError(UserError):
    """A base model folder or adapter folder that cannot be used as it is."""


class UnsupportedModelError(BaseModelError):
    """A model family that the start-up probe refuses, by name."""


class RunFolderError(UserError):
    """An output folder that holds something else, or a run that is not there."""


class ExportError(UserError):
    """An export that cannot be written as asked: overflow, disk space, wrong base."""


class TrainingFailure(QloraTrainError):
    """Training stopped by itself: non-finite gradients three times in a row, for example."""


class OutOfMemory(QloraTrainError):
    """Memory ran out and no tighter plan is left; the message says what held which bytes."""


class DiskFailure(QloraTrainError):
    """A disk or the system gave way: full, read-only, unreadable, too many open files."""


class Interrupted(BaseException):
    """Stopped by a signal, with the state saved where there was one; the exit code is the shell's, 128 +
    signal number.

    Like KeyboardInterrupt it is no `Exception`: libraries catch those where they try things out, and a
    process that was told to stop would go on."""

    def __init__(self, signal_number: int, message: str = "") -> None:
        self.signal_number = signal_number
        self.exit_code = 128 + signal_number
        super().__init__(message or f"stopped by signal {signal_number}")
