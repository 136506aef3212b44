"""What torch is told before anything is computed: read back from torch, in a process of its own where it is
for the whole process."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest
import torch
from simulated_gpu.fixture import SimulatedGpu
from tiny_runs import child_environment
from torch.utils._python_dispatch import TorchDispatchMode

from qlora_train.device.description import ALLOCATOR_VARIABLES
from qlora_train.device.settings import (
    determinism_of_before,
    make_deterministic,
    require_deterministic_products,
)
from qlora_train.errors import UserError

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


class Refusing(TorchDispatchMode):
    """Products fail, as on a GPU."""

    def __init__(self, message: str) -> None:
        super().__init__()
        self._message = message

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is torch.ops.aten.mm.default and torch.are_deterministic_algorithms_enabled():
            raise RuntimeError(self._message)
        return function(*args, **(kwargs or {}))


LATE = "this operation is not deterministic because it uses CuBLAS: CUBLAS_WORKSPACE_CONFIG=:4096:8"


def test_products_that_cannot_be_deterministic_any_more_are_said(simulated_gpu: SimulatedGpu) -> None:
    with Refusing(LATE), determinism_of_before():
        require_deterministic_products(simulated_gpu.device)  # nobody asks for it
        torch.use_deterministic_algorithms(True)
        require_deterministic_products(torch.device("cpu"))
        with pytest.raises(UserError, match="CUBLAS_WORKSPACE_CONFIG=:4096:8 in the environment"):
            require_deterministic_products(simulated_gpu.device)
    with Refusing("CUDA error: unspecified launch failure"), determinism_of_before():
        torch.use_deterministic_algorithms(True)
        with pytest.raises(RuntimeError, match="launch failure"):
            require_deterministic_products(simulated_gpu.device)
    with determinism_of_before():
        torch.use_deterministic_algorithms(True)
        require_deterministic_products(simulated_gpu.device)
