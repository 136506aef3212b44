"""Checkpoints: whole or not there, the right ones kept, damage named."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from qlora_train.device.compute import THE_CPU
from qlora_train.errors import RunFolderError
from qlora_train.files import atomic_folder
from qlora_train.files.sealed_json import seal, unseal
from qlora_train.model.linear import FrozenLinear
from qlora_train.model.lora_parameters import LoraParameters
from qlora_train.train.checkpoint import (
    Expected,
    TrainState,
    list_checkpoints,
    load_checkpoint,
    newest_valid,
    save_checkpoint,
)
from qlora_train.walk.optimizer import FlatOptimizer


def masters(step: int) -> Tensor:
    return torch.full((100,), float(step))


def save(folder: Path, step: int, num_kept: int = 2, best_step: int | None = None) -> None:
    state = TrainState(step=step, best_step=best_step)
    save_checkpoint(folder, state, masters(step), {"0.step": torch.tensor(step)}, num_kept)


def files_under(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def test_round_trip_of_everything(tmp_path: Path) -> None:
    state = TrainState(
        step=7,
        loss_scale=4096.0,
        loss_scale_good_steps=5,
        num_overflows=1,
        num_skipped=2,
        skipped_in_a_row=1,
        best_eval_loss=1.25,
        best_step=6,
        base_fingerprint="abc",
    )
    optimizer_state = {"0.state1": torch.arange(100, dtype=torch.uint8), "0.step": torch.tensor(7)}
    save_checkpoint(tmp_path, state, masters(7), optimizer_state, 2)
    loaded, loaded_masters, loaded_optimizer = load_checkpoint(tmp_path, 7)
    assert loaded == state
    assert torch.equal(loaded_masters, masters(7))
    assert loaded_optimizer.keys() == optimizer_state.keys()
    for key, value in optimizer_state.items():
        assert torch.equal(loaded_optimizer[key], value) and loaded_optimizer[key].dtype == value.dtype
    assert files_under(tmp_path) == ["step-7/state.json", "step-7/state.safetensors"]  # and no pickle


def test_8bit_state_of_several_groups_shares_its_code_tables(tmp_path: Path) -> None:
    """LoRA+ has two parameter groups, and bitsandbytes one table for both."""

    def make_optimizer() -> tuple[FlatOptimizer, LoraParameters]:
        linears = {f"layer{i}": FrozenLinear(f"layer{i}", 160, 96) for i in range(3)}
        lora = LoraParameters(
            linears, rank=16, scaling=1.0, dropout=0.0, seed=0, dtype=torch.float32, device="cpu"
        )
        return FlatOptimizer("paged_adamw_8bit", lora, THE_CPU, lora_b_lr_ratio=4.0, weight_decay=0.0), lora

    def run(optimizer: FlatOptimizer, lora: LoraParameters, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        lora.gradient.copy_(torch.randn(lora.gradient.shape, generator=generator))
        optimizer.step(1e-2)

    straight, lora = make_optimizer()
    run(straight, lora, 0)
    tables = [value.data_ptr() for key, value in straight.state().items() if key.endswith("qmap1")]
    assert len(tables) == 2 and len(set(tables)) == 1
    save_checkpoint(tmp_path, TrainState(step=1), lora.masters, straight.state(), 2)
    _, saved_masters, saved_state = load_checkpoint(tmp_path, 1)
    assert saved_state.keys() == straight.state().keys()

    resumed, resumed_factors = make_optimizer()
    resumed_factors.masters.copy_(saved_masters)
    resumed.load_state(saved_state)
    run(straight, lora, 1)
    run(resumed, resumed_factors, 1)
    assert torch.equal(resumed_factors.masters, lora.masters)


def test_a_crash_before_the_rename_leaves_the_checkpoint_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tmp_path, 3)

    def crash(source: Path, target: Path) -> None:
        assert {path.name for path in Path(source).iterdir()} == {"state.json", "state.safetensors"}
        raise SystemExit("power cut")

    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(os, "rename", crash)
        save(tmp_path, 6)
    assert list_checkpoints(tmp_path) == [3]
    assert torch.equal(load_checkpoint(tmp_path, 3)[1], masters(3))
    save(tmp_path, 6)  # what the crash left does not stand in the way, and is gone afterwards
    assert list_checkpoints(tmp_path) == [3, 6]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-3", "step-6"]


def test_contents_reach_the_disk_before_the_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []
    real_fsync, real_rename = atomic_folder.sync_to_disk, os.rename

    def fsync(path: Path) -> None:
        events.append(path.name)
        real_fsync(path)

    def rename(source: Path, target: Path) -> None:
        events.append("rename")
        real_rename(source, target)

    monkeypatch.setattr(atomic_folder, "sync_to_disk", fsync)
    monkeypatch.setattr(os, "rename", rename)
    save(tmp_path, 1)
    assert sorted(events[:2]) == ["state.json", "state.safetensors"]
    assert events[2].startswith("step-1.partial-") and events[3:] == ["rename", tmp_path.name]


def test_the_newest_stay(tmp_path: Path) -> None:
    for step in (2, 9, 10, 100):  # by number, not by name
        save(tmp_path, step, num_kept=3)
    assert list_checkpoints(tmp_path) == [9, 10, 100]


def test_the_best_by_evaluation_stays_too(tmp_path: Path) -> None:
    save(tmp_path, 2)
    for step in (4, 6, 8):
        save(tmp_path, step, num_kept=1, best_step=4)
    assert list_checkpoints(tmp_path) == [4, 8]
    save(tmp_path, 10, num_kept=1, best_step=10)
    assert list_checkpoints(tmp_path) == [10]


def test_no_folder_is_no_checkpoint(tmp_path: Path) -> None:
    assert list_checkpoints(tmp_path / "absent") == []


@pytest.mark.parametrize("name", ["state.safetensors", "state.json"])
@pytest.mark.parametrize("damage", ["truncated", "missing", "not what it says", "a bit", "a folder", "empty"])
def test_damage_is_named(tmp_path: Path, name: str, damage: str) -> None:
    save(tmp_path, 5)
    file = tmp_path / "step-5" / name
    data = file.read_bytes()
    file.unlink()
    if damage == "a folder":
        file.mkdir()
    elif damage != "missing":
        bit = bytes([data[-9] ^ 1])
        damaged = {
            "truncated": data[:-20],
            "not what it says": b"[1]" + data,
            "a bit": data[:-9] + bit + data[-8:],
            "empty": b"",
        }
        file.write_bytes(damaged[damage])
    with pytest.raises(RunFolderError, match=r"step-5: this checkpoint does not read"):
        load_checkpoint(tmp_path, 5)


@pytest.mark.parametrize("damage", ["a bit", "missing", "one too many", "the folder"])
def test_the_adapter_beside_it_is_hashed_too(tmp_path: Path, damage: str) -> None:
    def write_adapter(folder: Path) -> None:
        folder.mkdir()
        for name in ("adapter_config.json", "adapter_model.safetensors"):
            (folder / name).write_text(name, encoding="utf-8")

    save_checkpoint(tmp_path, TrainState(step=5), masters(5), {}, 2, write_adapter)
    assert load_checkpoint(tmp_path, 5).state.step == 5
    adapter = tmp_path / "step-5" / "adapter"
    weights = adapter / "adapter_model.safetensors"
    if damage == "a bit":
        weights.write_bytes(bytes([weights.read_bytes()[0] ^ 1]) + weights.read_bytes()[1:])
    elif damage == "missing":
        weights.unlink()
    elif damage == "one too many":
        (adapter / "more").mkdir()
    else:
        shutil.rmtree(adapter)
    with pytest.raises(RunFolderError, match=r"step-5: this checkpoint does not read"):
        load_checkpoint(tmp_path, 5)


OPTIMIZER = {"0.step": torch.tensor(4), "0.state1": torch.arange(100, dtype=torch.uint8)}
EXPECTED = Expected(10, 100, {key: (value.dtype, tuple(value.shape)) for key, value in OPTIMIZER.items()})


def save_whole(folder: Path, step: int, **changes: Any) -> None:
    """A checkpoint that is what was written, whatever it says."""
    values: dict[str, Any] = {"step": step} | changes
    tensors = {"masters": values.pop("masters", masters(step)), "state": values.pop("state", OPTIMIZER)}
    place = values.pop("place", step)
    save_checkpoint(folder, TrainState(**values), tensors["masters"], tensors["state"], 9)
    if place != step:
        (folder / f"step-{step}").rename(folder / f"step-{place}")


def newest(folder: Path) -> tuple[int | None, list[str]]:
    said: list[str] = []
    found = newest_valid(folder, EXPECTED, said.append)
    return (None if found is None else found.state.step), said


def test_the_newest_whole_one_is_taken(tmp_path: Path) -> None:
    assert newest(tmp_path) == (None, []) and newest(tmp_path / "absent") == (None, [])
    for step in (2, 4, 10):
        save_whole(tmp_path, step)
    assert newest(tmp_path) == (10, [])


WRONG: dict[str, dict[str, Any]] = {
    "beyond the schedule": {"step": 11},
    "another step's folder": {"place": 7},
    "step 0": {"step": 0, "place": 6},
    "a negative count": {"loss_scale_good_steps": -4},
    "a count that is no whole number": {"loss_scale_good_steps": 2.5},
    "a scale that is text": {"loss_scale": "1"},
    "a scale that is no power of two": {"loss_scale": 3.0},
    "a scale of zero": {"loss_scale": 0.0},
    "a best step to come": {"best_step": 9, "best_eval_loss": 1.0},
    "a best loss that is text": {"best_eval_loss": "x"},
    "a loss to improve that is text": {"loss_to_improve": "x"},
    "more evaluations than steps": {"evals_without_improvement": 8},
    "more skipped than done": {"num_skipped": 7},
    "a count that is missing": {"num_skipped": None},
    "masters that broadcast": {"masters": torch.ones(1)},
    "masters too short": {"masters": torch.ones(99)},
    "masters in 16 bits": {"masters": torch.ones(100, dtype=torch.float16)},
    "masters NaN": {"masters": torch.full((100,), float("nan"))},
    "masters infinite": {"masters": torch.full((100,), float("inf"))},
    "no optimizer state": {"state": {}},
    "an optimizer tensor missing": {"state": {"0.step": OPTIMIZER["0.step"]}},
    "an optimizer tensor too many": {"state": OPTIMIZER | {"1.step": torch.tensor(1)}},
    "an optimizer tensor of another shape": {
        "state": OPTIMIZER | {"0.state1": torch.zeros(1, dtype=torch.uint8)}
    },
    "an optimizer tensor of another dtype": {"state": OPTIMIZER | {"0.state1": torch.zeros(100)}},
}


@pytest.mark.parametrize("changes", WRONG.values(), ids=WRONG.keys())
def test_one_that_fits_no_such_run_is_passed_over_and_named(tmp_path: Path, changes: dict[str, Any]) -> None:
    save_whole(tmp_path, 4)
    save_whole(tmp_path, **{"step": 6} | changes)
    step, said = newest(tmp_path)
    assert step == 4 and len(said) == 1
    assert "is not one of this run" in said[0] and said[0].endswith("Going on from step-4 instead.")


def test_before_the_first_applied_step_there_is_no_optimizer_state(tmp_path: Path) -> None:
    save_whole(tmp_path, 3, state={}, num_skipped=1, num_overflows=2)
    assert newest(tmp_path) == (3, [])


def test_one_of_an_older_version_is_taken(tmp_path: Path) -> None:
    """It says where in the data it is, too."""
    save_whole(tmp_path, 4)
    file = tmp_path / "step-4" / "state.json"
    file.write_text(seal(unseal(file) | {"data_position": 16}), encoding="utf-8")
    assert newest(tmp_path) == (4, [])


def test_every_damaged_one_is_named(tmp_path: Path) -> None:
    for step in (2, 4, 6):
        save_whole(tmp_path, step)
    for step in (4, 6):
        (tmp_path / f"step-{step}" / "state.json").unlink()
    step, said = newest(tmp_path)
    assert step == 2 and ["step-6" in said[0], "step-4" in said[1]] == [True, True]
    (tmp_path / "step-2" / "state.json").write_text("{}")
    with pytest.raises(RunFolderError, match=r"(?s)step-6.*step-4.*step-2.*No checkpoint is left"):
        newest(tmp_path)


def test_a_damaged_newer_one_does_not_push_out_what_is_saved(tmp_path: Path) -> None:
    for step in (2, 8):
        save(tmp_path, step)
    save(tmp_path, 3, num_kept=1)
    assert list_checkpoints(tmp_path) == [3, 8]


def test_only_folders_of_a_plain_number_are_checkpoints(tmp_path: Path) -> None:
    save(tmp_path, 5)
    (tmp_path / "step-9").write_text("a file")
    for name in ("step-007", "step-x", "step-6.partial-ab", "astep-6"):
        (tmp_path / name).mkdir()
    assert list_checkpoints(tmp_path) == [5]
