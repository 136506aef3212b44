"""plan.json of a run: what was planned, what was measured, and every change since.

A run begins with one execution plan; running out of memory may change it (memory/tighten.py). A change can
alter the order of sums, so a resume must make it at the same step: it is written here, before the step is
tried again, and rows of metrics.jsonl say by number which plan they ran by (0: the first). The file is sealed
(model/sealed_json.py), as a resume does what it says.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from qlora_train.boundary import reason_of
from qlora_train.errors import RunFolderError
from qlora_train.memory.execution import ExecutionPlan
from qlora_train.model.sealed_json import seal, unseal
from qlora_train.train.checkpoint import list_checkpoints


class PlanLog:
    """checkpoints: the folder of the run's. writes: False on ranks that only read."""

    def __init__(self, file: Path, checkpoints: Path, *, writes: bool = True) -> None:
        self._file, self._checkpoints, self._writes = file, checkpoints, writes
        self._content: dict[str, Any] = {}

    def read(self) -> ExecutionPlan | None:
        """The plan that an earlier part of this run began with, if it came so far.

        Raises `RunFolderError` where plan.json does not read, or is gone from a run that has checkpoints."""
        if not self._file.is_file() and not list_checkpoints(self._checkpoints):
            return None
        try:
            self._content = unseal(self._file)
        except (OSError, ValueError) as error:
            raise RunFolderError(
                f"{self._file}: does not read ({reason_of(error)}), and without it a resume could not "
                "repeat the order of sums. Start a new run."
            ) from error
        return ExecutionPlan.from_dict(self._content["execution"])

    def begin(self, plan: dict[str, Any], execution: ExecutionPlan) -> None:
        """plan: `Plan.to_dict`. What an earlier part of the run wrote stays as it is."""
        if not self._content:
            self._content = plan | {"execution": execution.to_dict(), "changes": []}
            self._write()

    def change(self, from_step: int, execution: ExecutionPlan, reason: str) -> None:
        """From this step on, another plan."""
        self._content["changes"].append(
            {"from_step": from_step, "reason": reason, "execution": execution.to_dict()}
        )
        self._write()

    def measured(self, step_bytes: int, reserved_bytes: int | None) -> None:
        """Peaks of the first steps on the device: of tensors, and of what the allocator held of it,
        workspaces and holes included; None on the CPU."""
        self._content["measured_step_vram_bytes"] = step_bytes
        self._content["measured_step_reserved_bytes"] = reserved_bytes
        self._write()

    def in_force(self, step: int) -> tuple[int, ExecutionPlan]:
        """Number and plan that a step runs by."""
        number, values = 0, self._content["execution"]
        for i, change in enumerate(self._content["changes"], 1):
            if change["from_step"] <= step:
                number, values = i, change["execution"]
        return number, ExecutionPlan.from_dict(values)

    def _write(self) -> None:
        if self._writes:
            partial = self._file.with_suffix(".partial")
            partial.write_text(seal(self._content), encoding="utf-8")
            partial.replace(self._file)
