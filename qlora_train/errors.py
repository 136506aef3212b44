"""The exceptions of this package. Every message says what is wrong, where, and what to change.

A `UserError` can be corrected by the user (exit code 2). Any other `QloraTrainError` is a failure of the run
(exit code 1). `Interrupted`, after a signal, is separate. Bugs are found by `assert`.
"""

from __future__ import annotations

from collections.abc import Sequence


class QloraTrainError(Exception):
    """Base class of all errors that this package raises for its users."""

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
    """A model family that the start-up probe refuses; the message names it."""


class RunFolderError(UserError):
    """An output folder that holds something else, or a run that is not there."""


class ExportError(UserError):
    """An export that cannot be written as asked: overflow, disk space, wrong base."""


class TrainingFailure(QloraTrainError):
    """Training cannot go on, for example after non-finite gradients in three steps in a row."""


class OutOfMemory(QloraTrainError):
    """Memory ran out and no plan with less memory is left; the message lists what held how many bytes."""


class DiskFailure(QloraTrainError):
    """A failure of the disk or the system: full, read-only, unreadable, too many open files."""


class Interrupted(BaseException):
    """The command was stopped by a signal, its state saved if there is any; the exit code is 128 + signal
    number.

    Like KeyboardInterrupt it is no `Exception`, as libraries catch those, and the process would go on."""

    def __init__(self, signal_number: int, message: str = "") -> None:
        self.signal_number = signal_number
        self.exit_code = 128 + signal_number
        super().__init__(message or f"stopped by signal {signal_number}")
