"""A simulated GPU as the program's own description of a device."""

from __future__ import annotations

import pytest
from simulated_gpu.fixture import SimulatedGpu

from qlora_train.device.compute import ComputeDevice
from qlora_train.device.description import DeviceDescription


@pytest.fixture
def sim(simulated_gpu: SimulatedGpu) -> ComputeDevice:
    """The device of the fixture `simulated_gpu`, without a look at which kernels run on it."""
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
