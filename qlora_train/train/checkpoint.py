"""Checkpoints: all state that the next optimizer step depends on, written atomically.

    checkpoints/step-N/state.safetensors   masters, optimizer state
    checkpoints/step-N/state.json          step, loss scale, counters, hashes of the rest
    checkpoints/step-N/adapter/            the masters again, as an adapter that other tools load

The random state needs no file: dropout masks and data order are pure functions of the seed, the step and the
position. A checkpoint is written under a temporary name, fsynced and renamed, so a folder named step-N is
complete. No pickle.

Files get damaged later, and most damage still loads: a flipped bit, a tensor of one number that broadcasts.
So a checkpoint is loaded only if it is byte for byte what was written and fits a run of this recipe;
`newest_valid` falls back to the newest one that is.
"""

from __future__ import annotations

import math
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file
from torch import Tensor

from qlora_train.boundary import parsing, reason_of
from qlora_train.errors import RunFolderError
from qlora_train.files.atomic_folder import atomic_folder
from qlora_train.files.hashed_file import FileEntry, HashingFile, entry_of
from qlora_train.files.sealed_json import seal, unseal
from qlora_train.files.shards import write_tensors
from qlora_train.recipe import EarlyStopping
from qlora_train.walk.step_state import StepState

_STATE, _TENSORS, _ADAPTER = "state.json", "state.safetensors", "adapter"
_MASTERS, _OPTIMIZER = "masters", "optimizer."


@dataclass(kw_only=True)
class TrainState(StepState):
    """The state of a run after `step` optimizer steps, apart from tensors.

    best_eval_loss, best_step: loss and step of the best evaluation so far. loss_to_improve: the loss of the
    last evaluation that improved, as early stopping sees it; evals_without_improvement: the evaluations
    since. Both are counted only with early stopping.
    """

    step: int = 0
    best_eval_loss: float | None = None
    best_step: int | None = None
    loss_to_improve: float | None = None
    evals_without_improvement: int = 0
    data_fingerprint: str = ""
    base_fingerprint: str = ""

    def count_evaluation(self, eval_loss: float, stopping: EarlyStopping | None) -> bool:
        """Take in the evaluation after this step; True if its loss is the best so far, which one that is not
        finite never is."""
        if stopping is not None:
            before = math.inf if self.loss_to_improve is None else self.loss_to_improve
            self.evals_without_improvement += 1
            if eval_loss < before - stopping.min_delta:
                self.loss_to_improve, self.evals_without_improvement = eval_loss, 0
        best = math.inf if self.best_eval_loss is None else self.best_eval_loss
        if not eval_loss < best:  # NaN is not less either
            return False
        self.best_eval_loss, self.best_step = eval_loss, self.step
        return True

    def stops_early(self, stopping: EarlyStopping | None) -> bool:
        """Whether the run ends after this step, as its evaluations no longer improve."""
        return stopping is not None and self.evals_without_improvement >= stopping.patience

    def early_end_line(self, num_steps: int) -> str:
        """A line about a run that stopped early, instead of after `num_steps` steps."""
        if self.best_eval_loss is None:
            best = "none gave a finite loss"
        else:
            best = f"the best was {self.best_eval_loss:.4f} after step {self.best_step}"
        return (
            f"stopped early after step {self.step} of {num_steps}: {self.evals_without_improvement} "
            f"evaluations without improvement; {best}"
        )


class Checkpoint(NamedTuple):
    """The content of a checkpoint: state, fp32 masters, and the optimizer's state by name, on the CPU."""

    state: TrainState
    masters: Tensor
    optimizer_state: dict[str, Tensor]


@dataclass(frozen=True)
class Expected:
    """What every checkpoint of a run must have. num_steps: the length of the schedule. num_masters: the
    number of LoRA parameters. optimizer: dtype and shape of each tensor of its state; a checkpoint has no
    state before the first applied step."""

    num_steps: int
    num_masters: int
    optimizer: Mapping[str, tuple[torch.dtype, tuple[int, ...]]]


def save_checkpoint(
    folder: Path,
    state: TrainState,
    masters: Tensor,
    optimizer_state: dict[str, Tensor],
    num_kept: int,
    write_adapter: Callable[[Path], None] = lambda folder: None,
) -> None:
    """Write folder/step-N, then remove all but the newest `num_kept` and the best by evaluation.
    write_adapter: writes the adapter for other tools into a folder."""
    named = {_MASTERS: masters} | {_OPTIMIZER + key: value for key, value in optimizer_state.items()}
    with atomic_folder(folder / f"step-{state.step}") as partial:
        with HashingFile(partial / _TENSORS) as file:
            write_tensors(file, {key: value.cpu().contiguous() for key, value in named.items()}, {})
        write_adapter(partial / _ADAPTER)
        hashes = {_TENSORS: file.entry, _ADAPTER: _entries(partial / _ADAPTER)}
        (partial / _STATE).write_text(seal(asdict(state) | hashes), encoding="utf-8")
    older = [step for step in list_checkpoints(folder) if step <= state.step]
    for step in older[:-num_kept]:
        if step != state.best_step:
            shutil.rmtree(folder / f"step-{step}")


def list_checkpoints(folder: Path) -> list[int]:
    """The steps that have a checkpoint in a folder, ascending."""
    names = [re.fullmatch(r"step-(0|[1-9]\d*)", path.name) for path in folder.glob("step-*") if path.is_dir()]
    return sorted(int(name[1]) for name in names if name)


def newest_valid(folder: Path, expected: Expected, log: Callable[[str], None]) -> Checkpoint | None:
    """The newest checkpoint that is undamaged and fits the run; None where there is none at all.

    log: called with a line for each that was passed over. Raises `RunFolderError` where there are some and
    none is valid."""
    refused: list[str] = []
    for step in reversed(list_checkpoints(folder)):
        try:
            checkpoint = load_checkpoint(folder, step)
            _check(folder / f"step-{step}", checkpoint, step, expected)
        except RunFolderError as error:
            refused.append(str(error))
            continue
        for reason in refused:
            log(f"{reason} Going on from step-{step} instead.")
        return checkpoint
    if refused:
        listed = "\n".join(refused)
        raise RunFolderError(f"{listed}\nNo checkpoint is left to resume from: start a new run.")
    return None


def load_checkpoint(folder: Path, step: int) -> Checkpoint:
    """Load the checkpoint in folder/step-N. Raises `RunFolderError` unless its files are as written."""
    path = folder / f"step-{step}"
    try:
        values = unseal(path / _STATE)
        if entry_of(path / _TENSORS) != values.pop(_TENSORS):
            raise ValueError(f"{_TENSORS} is not what was written: its hash differs")
        if _entries(path / _ADAPTER) != values.pop(_ADAPTER):
            raise ValueError(f"{_ADAPTER} is not what was written: its hashes differ")
        values.pop("data_position", None)  # written by older versions; it follows from the step
        if values.keys() != {field.name for field in fields(TrainState)}:
            raise ValueError("another version of qlora_train wrote it")
    except (OSError, ValueError, KeyError) as error:
        raise RunFolderError(f"{path}: this checkpoint does not read ({reason_of(error)}).") from error
    with parsing(path / _TENSORS, RunFolderError, "It is whole: this is a mistake in qlora_train."):
        tensors = load_file(path / _TENSORS)
    optimizer_state = {key.removeprefix(_OPTIMIZER): t for key, t in tensors.items() if key != _MASTERS}
    return Checkpoint(TrainState(**values), tensors[_MASTERS], optimizer_state)


def _entries(folder: Path) -> dict[str, FileEntry]:
    """Size and hash of every file in a folder, by name; none where there is no folder."""
    if not folder.is_dir():
        return {}
    return {path.name: entry_of(path) for path in sorted(folder.iterdir())}


def _check(path: Path, checkpoint: Checkpoint, step: int, expected: Expected) -> None:
    """Raise `RunFolderError` unless the checkpoint fits this run."""
    wrong = [
        *_wrong_numbers(asdict(checkpoint.state), step, expected.num_steps),
        *_wrong_tensors(checkpoint, expected),
    ]
    if wrong:
        raise RunFolderError(f"{path}: this checkpoint is not one of this run ({'; '.join(wrong[:3])}).")


def _wrong_numbers(values: dict[str, Any], step: int, num_steps: int) -> list[str]:
    """A message for each value that a run cannot have after `step` of `num_steps` steps."""
    wrong = [] if 1 <= step <= num_steps else [f"step {step} of {num_steps}"]
    most = {
        "step": num_steps,
        "num_skipped": step,
        "num_overflows": step,
        "skipped_in_a_row": step,
        "best_step": step,
        "evals_without_improvement": step + 1,
    }
    for name in ("loss_scale_good_steps", *most):
        value = values[name]
        optional = name == "best_step" and value is None
        if not optional and not (type(value) is int and 0 <= value <= most.get(name, value)):
            wrong.append(f"{name} is {value!r}")
    if values["step"] != step:
        wrong.append(f"it is in the folder of step {step} and says step {values['step']!r}")
    scale = values["loss_scale"]
    if not (isinstance(scale, float) and 1 <= scale < math.inf and math.frexp(scale)[0] == 0.5):
        wrong.append(f"loss_scale is {scale!r}, no power of two")
    for name in ("best_eval_loss", "loss_to_improve"):
        if not (values[name] is None or isinstance(values[name], float)):
            wrong.append(f"{name} is {values[name]!r}")
    return wrong


def _wrong_tensors(checkpoint: Checkpoint, expected: Expected) -> list[str]:
    """A message for each tensor that is missing, odd, of another dtype or shape, or not finite."""
    tensors = {_MASTERS: checkpoint.masters} | checkpoint.optimizer_state
    wanted = dict(expected.optimizer) if checkpoint.optimizer_state else {}
    wanted[_MASTERS] = (torch.float32, (expected.num_masters,))
    state = checkpoint.state
    if not checkpoint.optimizer_state and state.num_skipped + state.num_overflows < state.step:
        return ["it holds no optimizer state"]
    if tensors.keys() != wanted.keys():
        odd = ", ".join(sorted(tensors.keys() ^ wanted.keys()))
        return [f"it holds the state of another optimizer than training.optimizer: {odd}"]
    wrong = []
    for name, tensor in tensors.items():
        dtype, shape = wanted[name]
        if tensor.dtype != dtype or tuple(tensor.shape) != shape:
            wrong.append(f"{name} is {tensor.dtype} {list(tensor.shape)}, not {dtype} {list(shape)}")
        elif not is_finite(tensor):
            wrong.append(f"{name} holds values that are not finite")
    return wrong


def is_finite(tensor: Tensor) -> bool:
    """Whether every number in a tensor is finite."""
    return not tensor.is_floating_point() or bool(torch.isfinite(tensor).all())
