"""plan.json of a run: the plan, measured peaks, and every later change of the execution plan.

A run begins with one execution plan. Running out of memory may change it (walk/oom_fallback.py), and so does
a resume on another machine (`Setting`), which plans anew. A change can alter the order of sums, so a resume
must make it at the same step: it is written here before the step is tried again, and rows of metrics.jsonl
have the number of their plan (0: the first). The file is sealed (files/sealed_json.py), as a resume follows
it.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil

from qlora_train.boundary import reason_of
from qlora_train.device.description import DeviceDescription
from qlora_train.errors import RunFolderError
from qlora_train.files.atomic_file import replace_text
from qlora_train.files.sealed_json import seal, unseal
from qlora_train.plan.split import Split
from qlora_train.plan.words import gib
from qlora_train.recipe import Recipe
from qlora_train.train.checkpoint import list_checkpoints
from qlora_train.weights.execution_plan import ExecutionPlan

RUN_FORMAT = 2
"""Version of the files in a run's folder; a run of another version cannot be resumed."""
TELLABLE_SHARE = 0.03
"""Relative difference of memory sizes that counts: systems report slightly different sizes at each start."""


@dataclass(frozen=True)
class SavedPlan:
    """The plan that a run follows. execution: the plan made at its start, before any out-of-memory change."""

    execution: ExecutionPlan
    split: Split

    def to_dict(self) -> dict[str, Any]:
        return {"execution": self.execution.to_dict(), "split": asdict(self.split)}

    @staticmethod
    def from_dict(values: dict[str, Any]) -> SavedPlan:
        return SavedPlan(ExecutionPlan.from_dict(values["execution"]), Split(**values["split"]))


@dataclass(frozen=True)
class Setting:
    """The machine and settings that a plan was made for. device: its name, or its type. device_bytes,
    ram_bytes: total sizes. memory: the recipe's memory section and training.micro_batch_size, which may
    change in a resume."""

    device: str
    device_bytes: int
    ram_bytes: int
    num_ranks: int
    memory: dict[str, str]

    @staticmethod
    def of(recipe: Recipe, device: DeviceDescription, num_ranks: int) -> Setting:
        """The setting of this machine."""
        sizes = (device.memory_bytes, psutil.virtual_memory().total)
        keys = {f"memory.{key}": value for key, value in recipe.memory.model_dump().items()}
        keys["training.micro_batch_size"] = str(recipe.training.micro_batch_size)
        return Setting(device.name or device.type, *sizes, num_ranks, keys)

    def differences(self, before: Setting) -> list[str]:
        """A message for each difference from an earlier setting."""
        messages = []
        if self.device != before.device:
            messages.append(f"{self.device} instead of {before.device}")
        for name, now, then in (
            ("device memory", self.device_bytes, before.device_bytes),
            ("RAM", self.ram_bytes, before.ram_bytes),
        ):
            if abs(now - then) > TELLABLE_SHARE * max(now, then):
                messages.append(f"{gib(now)} of {name} instead of {gib(then)}")
        if self.num_ranks != before.num_ranks:
            messages.append(f"processes: {self.num_ranks} instead of {before.num_ranks}")
        return messages + [
            f"{key}={value} instead of {before.memory.get(key)}"
            for key, value in self.memory.items()
            if value != before.memory.get(key)
        ]


class PlanLog:
    """Reads and writes plan.json. checkpoints: the run's folder of them. setting: the current one. writes:
    False on ranks that only read. moved: differences of the setting, for which a resume plans anew."""

    def __init__(self, file: Path, checkpoints: Path, setting: Setting, *, writes: bool = True) -> None:
        self._file, self._checkpoints, self._writes = file, checkpoints, writes
        self._setting = setting
        self._content: dict[str, Any] = {}
        self.moved: list[str] = []

    def read(self) -> SavedPlan | None:
        """The plan of an earlier part of this run, to be followed; None: there is none, or it was made for
        another setting.

        Raises `RunFolderError` where plan.json does not read, is of another format, or is gone from a run
        that has checkpoints."""
        if not self._file.is_file() and not list_checkpoints(self._checkpoints):
            return None
        try:
            self._content = unseal(self._file)
        except (OSError, ValueError) as error:
            raise RunFolderError(
                f"{self._file}: does not read ({reason_of(error)}), and without it a resume could not "
                "repeat the order of sums. Start a new run."
            ) from error
        if self._content.get("run_format") != RUN_FORMAT:
            raise RunFolderError(
                f"{self._file.parent}: another version of qlora_train began this run (run format "
                f"{self._content.get('run_format', 1)}, this version has {RUN_FORMAT}) and cannot be "
                "resumed. Start a new run; with lora.init_from it goes on from this run's adapter."
            )
        newest = self._newest()
        self.moved = self._setting.differences(Setting(**newest["setting"]))
        return None if self.moved else SavedPlan.from_dict(newest)

    def _newest(self) -> dict[str, Any]:
        """The entry with the newest plan made at a start, not by running out of memory."""
        return ([self._content] + [c for c in self._content["changes"] if "setting" in c])[-1]

    def begin(self, plan: dict[str, Any], saved: SavedPlan, first_step: int = 1) -> None:
        """Store the plan of this start. plan: `Plan.to_dict`. saved: what is followed from `first_step` on.
        If the run continues the plan of an earlier part, the changes of that part stay."""
        made_for = saved.to_dict() | {"setting": asdict(self._setting)}
        if not self._content:
            self._content = plan | made_for | {"run_format": RUN_FORMAT, "changes": []}
        elif self.moved:
            self._plan_anew(plan, made_for, first_step)
        elif first_step < self._newest().get("from_step", 0):  # a checkpoint was damaged
            self._begin_newest_at(first_step)
        else:
            return
        self._write()

    def _plan_anew(self, plan: dict[str, Any], made_for: dict[str, Any], first_step: int) -> None:
        """Add the plan made for another setting as a change; the one that the run began with stays."""
        change = {"from_step": first_step, "reason": f"planned anew: {', '.join(self.moved)}"} | made_for
        began = {key: self._content[key] for key in ("run_format", "execution", "split", "setting")}
        self._content = plan | began | {"changes": [*self._changes_before(first_step), change]}

    def _begin_newest_at(self, first_step: int) -> None:
        """Let the newest plan made at a start begin earlier, without what came between."""
        newest, changes = self._newest(), self._content["changes"]
        later = changes[changes.index(newest) :]
        newest["from_step"] = first_step
        self._content["changes"] = [*self._changes_before(first_step), *later]

    def _changes_before(self, step: int) -> list[dict[str, Any]]:
        return [change for change in self._content["changes"] if change["from_step"] < step]

    def change(self, from_step: int, execution: ExecutionPlan, reason: str) -> None:
        """Store that steps from `from_step` on follow another plan."""
        self._content["changes"].append(
            {"from_step": from_step, "reason": reason, "execution": execution.to_dict()}
        )
        self._write()

    def measured(self, step_bytes: int, reserved_bytes: int | None) -> None:
        """Store measured peaks of the first steps on the device. step_bytes: the peak of tensors.
        reserved_bytes: that of the allocator, with workspaces and fragmentation; None on the CPU."""
        self._content["measured_step_vram_bytes"] = step_bytes
        self._content["measured_step_reserved_bytes"] = reserved_bytes
        self._write()

    def in_force(self, step: int) -> tuple[int, ExecutionPlan]:
        """(number, plan) that a step follows."""
        number, values = 0, self._content["execution"]
        for i, change in enumerate(self._content["changes"], 1):
            if change["from_step"] <= step:
                number, values = i, change["execution"]
        return number, ExecutionPlan.from_dict(values)

    def _write(self) -> None:
        if self._writes:
            replace_text(self._file, seal(self._content))
