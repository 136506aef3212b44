"""Tells torch that a device "sim" exists, once per process: before the first backward pass of the process,
because autograd's engine counts devices then and never again.

That is all that CPU tests of the same process get of it: `torch.sim.is_available()` and
`torch.accelerator.is_available()` are False until a simulation is on. It takes some milliseconds; kernels are
registered when the device is switched on first (install.py).
"""

from __future__ import annotations

import functools

import torch


def obstacle() -> str | None:
    """Why this machine can have no simulated GPU."""
    if torch.cuda.is_available():
        return "a real GPU is here: the simulated one would take its place in torch.accelerator"
    return None


@functools.cache
def register() -> None:
    """Nothing where there is an obstacle, or where this torch lacks what the simulation is built on: that is
    said by the fixture, to the tests that need the device, when it imports the same."""
    if obstacle() is not None:
        return
    try:
        from simulated_gpu.hooks import register_device
    except ImportError:
        return
    register_device()
