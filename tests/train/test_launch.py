"""Launches: joined as what they are, refused where they are not what they look like."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.state import AcceleratorState
from accelerate.utils.launch import prepare_simple_launcher_cmd_env

from qlora_train.device.compute import THE_CPU
from qlora_train.errors import QloraTrainError, UserError
from qlora_train.kernels.on_device import find_device
from qlora_train.train.launch import NUMBERS_OF_PROCESSES, join_launch

LAUNCH_VARIABLES = (*NUMBERS_OF_PROCESSES, "LOCAL_RANK", "RANK", "MASTER_ADDR", "ACCELERATE_DYNAMO_BACKEND")


@pytest.fixture(autouse=True)
def no_launch() -> Iterator[None]:
    """Whatever accelerate writes into the environment goes again."""
    before = dict(os.environ)
    for name in LAUNCH_VARIABLES:
        os.environ.pop(name, None)
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    os.environ.clear()
    os.environ.update(before)


def test_a_process_of_its_own_is_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert join_launch([], tmp_path).num_processes == 1
    monkeypatch.setenv("WORLD_SIZE", "1")
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "4")  # of whoever started the launcher
    assert join_launch([], tmp_path).num_processes == 1


@pytest.mark.parametrize("name", NUMBERS_OF_PROCESSES)
def test_processes_that_would_not_train_together_are_refused(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The state is that of a process which accelerate has found alone, as mpirun's are on GPUs."""
    assert join_launch([], tmp_path).num_processes == 1
    monkeypatch.setenv(name, "2")
    with pytest.raises(UserError, match=rf"{name}=2, but .* is 1: .*torchrun"):
        join_launch([], tmp_path)


def test_a_launch_that_cannot_meet_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "2")
    monkeypatch.setenv("OMPI_COMM_WORLD_RANK", "0")
    with pytest.raises(QloraTrainError, match=r"cannot be joined: .*MASTER_ADDR"):
        join_launch([], tmp_path)


def find(monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    """As if torch found an accelerator of this type."""
    found = torch.device(kind)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available=False: found)


def test_an_accelerator_that_does_not_tell_its_memory_is_not_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Apple's: accelerate would take it, too."""
    find(monkeypatch, "mps")
    monkeypatch.setattr("torch.backends.mps.is_available", lambda: True)
    assert find_device() == THE_CPU
    assert join_launch([], tmp_path).device == torch.device("cpu")


def test_what_accelerate_asks_of_a_machine_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a process of its own too: two cards of the RTX 40 series with a driver before 550.40.07."""
    monkeypatch.setattr("accelerate.state.check_cuda_p2p_ib_support", lambda: False)
    monkeypatch.setattr(
        "accelerate.state.PartialState.default_device", property(lambda self: torch.device("cuda"))
    )
    find(monkeypatch, "cuda")
    with pytest.raises(UserError, match=r'accelerate refuses .*NCCL_P2P_DISABLE="1"'):
        join_launch([], tmp_path)


@pytest.mark.parametrize("number", [1, 2])
def test_accelerate_starts_one_process_on_a_cpu_and_is_refused_where_more_were_asked(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the environment that its launcher gives to the process it starts."""
    words = ["--cpu", "--num_processes", str(number), "--num_machines", "1", "script.py"]
    arguments, *_ = _validate_launch_command(launch_command_parser().parse_args(words))
    command, environment = prepare_simple_launcher_cmd_env(arguments)
    assert command == [sys.executable, "script.py"]
    for name in LAUNCH_VARIABLES:
        if name in environment:
            monkeypatch.setenv(name, environment[name])
    if number == 1:
        assert join_launch([], tmp_path).num_processes == 1
        return
    with pytest.raises(UserError, match=r"asked for several processes and started this one alone.*torchrun"):
        join_launch([], tmp_path)
