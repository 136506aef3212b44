"""Devices that are only described: what a plan takes as given of a card, and what train sets."""

from __future__ import annotations

import os
from dataclasses import replace

import pytest
import torch

from qlora_train.device import description as target
from qlora_train.device.description import CPU, DeviceDescription, planned_gpu, varlen_of_version
from qlora_train.kernels.on_device import find_device

AMPERE = DeviceDescription("cuda", (8, 6), 28, "grouped heads", has_liger=True, cublas_workspace=None)


def test_a_cpu_has_no_flash_and_no_workspaces() -> None:
    assert not CPU.flash_serves(2, 64) and CPU.workspace_bytes(deterministic=True) == 0


@pytest.mark.parametrize(
    ("version", "varlen"),
    [
        ("2.10.0", "none"),
        ("2.11.0+cu130", "grouped heads"),
        ("2.13.0+cpu", "grouped heads"),
        ("3.0.0a0", "grouped heads"),
    ],
)
def test_varlen_of_a_version_that_is_only_planned_for(version, varlen) -> None:
    assert varlen_of_version(version) == varlen


@pytest.mark.parametrize(
    ("name", "capability", "expected"),
    [
        ("NVIDIA GeForce RTX 4090", (8, 9), ((8, 9), 128)),
        ("NVIDIA H100 80GB HBM3", (9, 0), ((9, 0), 132)),
        ("Tesla T4", None, ((7, 5), 40)),
        ("NVIDIA L40S", (8, 9), ((8, 9), target.MOST_MULTIPROCESSORS)),  # no L4
        ("NVIDIA Something New", (13, 0), ((13, 0), target.MOST_MULTIPROCESSORS)),
        (None, None, ((8, 6), 28)),
    ],
)
def test_a_card_without_torch(name, capability, expected) -> None:
    found = planned_gpu(name, capability)
    assert (found.capability, found.num_multiprocessors) == expected


@pytest.mark.parametrize(
    ("capability", "config", "deterministic", "expected_mib"),
    [
        ((8, 6), None, False, 2 * (8 + 1 / 8)),
        ((8, 6), None, True, 64),
        ((9, 0), None, False, 64),
        ((12, 0), None, False, 64),
        ((8, 6), ":16:8", True, 2 / 8),
        ((9, 0), ":4096:2:16:8", False, 2 * (8 + 1 / 8)),
        ((8, 6), "nonsense", False, 2 * (8 + 1 / 8)),
    ],
)
def test_workspaces(capability, config, deterministic, expected_mib) -> None:
    planned = replace(AMPERE, capability=capability, cublas_workspace=config)
    assert planned.workspace_bytes(deterministic=deterministic) == expected_mib * 2**20


def test_what_train_sets_is_what_is_planned(monkeypatch: pytest.MonkeyPatch) -> None:
    from qlora_train.recipe import Recipe
    from qlora_train.train.setup import make_accelerator

    monkeypatch.setenv(target.WORKSPACE_VARIABLE, "")
    monkeypatch.delenv(target.WORKSPACE_VARIABLE)
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    sections = {"model": {"base": "x"}, "data": {"train": "x"}, "training": {"deterministic": True}}
    try:
        make_accelerator(Recipe.from_dict(sections))
        assert os.environ[target.WORKSPACE_VARIABLE] == target.DETERMINISTIC_WORKSPACE
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_workspaces_of_this_gpu() -> None:
    """In a fresh process: they are made once."""
    import subprocess
    import sys

    program = (
        "from qlora_train.kernels.on_device import find_device\n"
        "from qlora_train.device.context import make_workspaces\n"
        "device = find_device(); make_workspaces(device)\n"
        "print(device.allocated_bytes)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert int(done.stdout) <= find_device().description.workspace_bytes(deterministic=False)
