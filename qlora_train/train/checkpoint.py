"""Checkpoints: all that the next optimizer step depends on, written so that a crash leaves no half one.

    checkpoints/step-N/state.safetensors   masters, optimizer state
    checkpoints/step-N/state.json          step, data position, loss scale, counters
    checkpoints/step-N/adapter/            the masters once more, as the adapter that other tools load

The random state needs no file: masks and data order are pure functions of the seed, the step and the
position. Written under a temporary name, every file and the folder fsynced, then renamed: a name of the form
step-N is complete. No pickle.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from qlora_train.errors import RunFolderError
from qlora_train.model.atomic_folder import atomic_folder

_OPTIMIZER = "optimizer."


@dataclass
class TrainState:
    """The host side of a run after `step` optimizer steps.

    data_position: rows (bins) of the data order consumed. best_eval_loss, best_step: the best evaluation so
    far.
    """

    step: int = 0
    data_position: int = 0
    loss_scale: float = 1.0
    loss_scale_good_steps: int = 0
    num_overflows: int = 0
    num_skipped: int = 0
    skipped_in_a_row: int = 0
    best_eval_loss: float | None = None
    best_step: int | None = None
    data_fingerprint: str = ""
    base_fingerprint: str = ""


def save_checkpoint(
    folder: Path,
    state: TrainState,
    masters: Tensor,
    optimizer_state: dict[str, Tensor],
    num_kept: int,
    write_adapter: Callable[[Path], None] = lambda folder: None,
) -> None:
    """Write folder/step-N, then remove all but the newest `num_kept` checkpoints and the best by
    evaluation. write_adapter: writes the same factors for other tools into a folder."""
    target = folder / f"step-{state.step}"
    tensors = {"masters": masters} | {_OPTIMIZER + key: value for key, value in optimizer_state.items()}
    tensors = _each_its_own_memory({key: value.cpu().contiguous() for key, value in tensors.items()})
    for leftover in folder.glob("step-*.partial-*"):  # of a run that was killed while it wrote
        shutil.rmtree(leftover)
    with atomic_folder(target) as partial:
        save_file(tensors, partial / "state.safetensors")
        (partial / "state.json").write_text(json.dumps(asdict(state), indent=1) + "\n")
        write_adapter(partial / "adapter")
    for step in list_checkpoints(folder)[:-num_kept]:
        if step != state.best_step:
            shutil.rmtree(folder / f"step-{step}")


def _each_its_own_memory(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Copies of what shares memory with a tensor before it, which the format refuses: bitsandbytes gives the
    1 KiB code tables of 8-bit state to all parameters at once."""
    seen: set[int] = set()
    own = {}
    for key, value in tensors.items():
        address = value.untyped_storage().data_ptr()
        own[key] = value.clone() if address in seen else value
        seen.add(address)
    return own


def list_checkpoints(folder: Path) -> list[int]:
    """The steps that have a complete checkpoint, ascending."""
    names = [re.fullmatch(r"step-(\d+)", path.name) for path in folder.glob("step-*")]
    return sorted(int(name[1]) for name in names if name)


def load_checkpoint(folder: Path, step: int) -> tuple[TrainState, Tensor, dict[str, Tensor]]:
    """(state, masters, optimizer state) of folder/step-N, on the CPU.

    Raises `RunFolderError` when it does not read.
    """
    path = folder / f"step-{step}"
    try:
        state = TrainState(**json.loads((path / "state.json").read_text()))
        tensors = load_file(path / "state.safetensors")
        masters = tensors.pop("masters")
    except (SafetensorError, OSError, ValueError, TypeError, KeyError) as error:
        raise RunFolderError(
            f"{path}: this checkpoint does not read ({error}). Remove the folder to resume from the "
            "one before."
        ) from error
    return state, masters, {key.removeprefix(_OPTIMIZER): value for key, value in tensors.items()}
