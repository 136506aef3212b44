"""For all tests: caches are in a folder of the session, not the user's, and hold stated rates of the CPU."""

from __future__ import annotations

import gc
import importlib.util
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

import pytest
from bfloat16_products import cpu_multiplies_bfloat16
from bfloat16_products import products_in_float32 as multiply_in_float32
from simulated_gpu.registration import register as register_simulated_gpu

if TYPE_CHECKING:
    from simulated_gpu.fixture import SimulatedGpu

    from qlora_train.device.compute import ComputeDevice

_no_hub_cache = tempfile.TemporaryDirectory(prefix="qlora_train-tests-hub-")
os.environ["HF_HOME"] = _no_hub_cache.name  # before anything reads it: what a developer has there is not seen
register_simulated_gpu()  # before any test's first backward pass, and off until one takes the fixture


@pytest.fixture(scope="session", autouse=True)
def cache_of_the_session(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    before = os.environ.get("QLORA_TRAIN_CACHE")
    cache = tmp_path_factory.mktemp("cache")
    os.environ["QLORA_TRAIN_CACHE"] = str(cache)
    _keep_stated_rates(cache)
    yield
    if before is None:
        del os.environ["QLORA_TRAIN_CACHE"]
    else:
        os.environ["QLORA_TRAIN_CACHE"] = before


def _keep_stated_rates(cache: Path) -> None:
    """Plans of runs on the CPU do not depend on how busy this machine is: their sums have one order."""
    import torch

    from qlora_train.device.description import CPU
    from qlora_train.plan.measured_rates import keep_rates, rates_key
    from qlora_train.plan.time_model import stated_rates

    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for num_ranks in (1, 2):
            keep_rates(cache, rates_key(CPU, dtype, num_ranks), stated_rates(CPU))


@pytest.fixture(autouse=not cpu_multiplies_bfloat16())
def products_in_float32() -> Iterator[None]:
    """Where 16-bit products would take a hundred times as long."""
    with multiply_in_float32():
        yield


@pytest.fixture
def simulated_gpu() -> Iterator[SimulatedGpu]:
    """A simulated GPU, `torch.device("sim", 0)`, for one test: tests/simulated_gpu."""
    from simulated_gpu.fixture import simulated_gpu_of_test

    with simulated_gpu_of_test() as gpu:
        yield gpu


@pytest.fixture
def sim(simulated_gpu: SimulatedGpu) -> ComputeDevice:
    """The program's own description of that device, without a look at which kernels run on it."""
    from qlora_train.device.compute import ComputeDevice
    from qlora_train.device.description import DeviceDescription

    return ComputeDevice(
        DeviceDescription(
            type="sim",
            capability=simulated_gpu.settings.capability,
            num_multiprocessors=simulated_gpu.settings.num_multiprocessors,
            varlen="none",
            has_liger=False,
            cublas_workspace=None,
            has_bfloat16=True,
            index=0,
            name=simulated_gpu.settings.name,
        )
    )


def pytest_collection_finish() -> None:
    """Libraries and collected tests, half a million objects, stay: a `gc.collect` need not walk them."""
    gc.freeze()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--update-golden", action="store_true", help="write tests/runs/golden_losses.json from this code"
    )


@pytest.fixture(scope="session")
def interpreted() -> Callable[[str], ModuleType]:
    """Module name -> a second copy of the module, whose kernels the interpreter runs.

    Triton decides that when a kernel is decorated, so the setting is on while the copy is made and no longer.
    Kernels meant for this use no helpers that triton.language itself decorates (cdiv, sum, ...): those were
    decorated before. The interpreter cuts off where hardware rounds to bfloat16.
    """
    triton = pytest.importorskip("triton")

    def load(name: str) -> ModuleType:
        found = importlib.util.find_spec(name)
        assert found is not None and found.origin is not None
        spec = importlib.util.spec_from_file_location(f"{name}_interpreted", found.origin)
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module  # dataclasses look for their module there
        with triton.knobs.runtime.scope():
            triton.knobs.runtime.interpret = True
            spec.loader.exec_module(module)
        return module

    return load
