"""What torch is told before anything is computed: read back from torch, in a process of its own where it is
for the whole process."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from simulated_gpu.fixture import SimulatedGpu
from tiny_runs import child_environment

from qlora_train.device.description import ALLOCATOR_VARIABLES
from qlora_train.device.settings import (
    determinism_of_before,
    make_deterministic,
    require_deterministic_products,
)
from qlora_train.errors import UserError
from qlora_train.kernels.on_device import find_device

READ_BACK = """
import json, torch
from qlora_train.device import settings
said = []
settings._set_allocator = said.append
settings.segments_expand = lambda: True  # whatever cards are here
settings.apply_settings()
matmul = torch.backends.cuda.matmul
print(json.dumps([
    torch.backends.cuda.cudnn_sdp_enabled(),
    bool(matmul.allow_fp16_reduced_precision_reduction),
    bool(matmul.allow_bf16_reduced_precision_reduction),
    torch.backends.cuda.flash_sdp_enabled(),
    torch.backends.cuda.mem_efficient_sdp_enabled(),
    said,
]))
"""


def read_back(**environment: str) -> list[object]:
    done = subprocess.run(
        [sys.executable, "-c", READ_BACK],
        env=child_environment(**environment),
        capture_output=True,
        text=True,
        check=True,
    )
    return json.loads(done.stdout)


def test_cudnns_attention_and_16_bit_sums_are_off_and_memory_may_grow() -> None:
    assert read_back() == [False, False, False, True, True, ["expandable_segments:True"]]


@pytest.mark.parametrize("variable", ALLOCATOR_VARIABLES)
def test_what_the_user_says_of_the_allocator_stays(variable: str) -> None:
    assert read_back(**{variable: "max_split_size_mb:128"})[-1] == []


def test_torch_takes_the_allocators_settings_also_when_it_is_imported() -> None:
    program = (
        "import torch; from qlora_train.device import settings; "
        "settings.segments_expand = lambda: True; settings.apply_settings()"
    )
    subprocess.run([sys.executable, "-c", program], env=child_environment(), check=True)


@pytest.mark.parametrize(("is_on", "only_warns"), [(False, False), (True, True), (True, False)])
def test_a_run_ends_with_the_determinism_that_it_found(
    monkeypatch: pytest.MonkeyPatch, is_on: bool, only_warns: bool
) -> None:
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    try:
        torch.use_deterministic_algorithms(is_on, warn_only=only_warns)
        with pytest.raises(ZeroDivisionError), determinism_of_before():
            make_deterministic()
            assert torch.are_deterministic_algorithms_enabled()
            assert not torch.utils.deterministic.fill_uninitialized_memory
            torch.ones(1 // 0)
        assert torch.are_deterministic_algorithms_enabled() == is_on
        assert torch.is_deterministic_algorithms_warn_only_enabled() == only_warns
        assert torch.utils.deterministic.fill_uninitialized_memory
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("said", ["before", "late", "otherwise"])
def test_products_that_cannot_be_deterministic_any_more_are_said(
    simulated_gpu: SimulatedGpu, monkeypatch: pytest.MonkeyPatch, said: str
) -> None:
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":0:0")
    if said != "otherwise":
        monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG")
    with determinism_of_before():
        if said == "late":
            x = torch.ones(2, 2, device=simulated_gpu.device)
            x @ x
            require_deterministic_products(simulated_gpu.device)  # nobody asks for it
        make_deterministic()
        require_deterministic_products(torch.device("cpu"))
        if said == "before":
            require_deterministic_products(simulated_gpu.device)
        else:
            with pytest.raises(UserError, match="CUBLAS_WORKSPACE_CONFIG=:4096:8 in the environment"):
                require_deterministic_products(simulated_gpu.device)


def test_looking_at_the_device_multiplies_nothing_there(
    simulated_gpu: SimulatedGpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    find_device(simulated_gpu.device)
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    with determinism_of_before():
        torch.use_deterministic_algorithms(True)
        require_deterministic_products(simulated_gpu.device)
