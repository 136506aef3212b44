"""For all tests: packed bases go to a folder of the session, never to the user's own cache."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest
from bfloat16_products import cpu_multiplies_bfloat16
from bfloat16_products import products_in_float32 as multiply_in_float32
from simulated_gpu.registration import register as register_simulated_gpu

if TYPE_CHECKING:
    from simulated_gpu.fixture import SimulatedGpu

register_simulated_gpu()  # before any test's first backward pass, and off until one takes the fixture


@pytest.fixture(scope="session", autouse=True)
def cache_of_the_session(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    before = os.environ.get("QLORA_TRAIN_CACHE")
    os.environ["QLORA_TRAIN_CACHE"] = str(tmp_path_factory.mktemp("cache"))
    yield
    if before is None:
        del os.environ["QLORA_TRAIN_CACHE"]
    else:
        os.environ["QLORA_TRAIN_CACHE"] = before


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


def pytest_collection_finish() -> None:
    """Libraries and collected tests, half a million objects, stay: a `gc.collect` need not walk them."""
    gc.freeze()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--update-golden", action="store_true", help="write tests/runs/golden_losses.json from this code"
    )
