"""liger-kernel's kernels: when they are used, and what they give against our plain torch."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import warnings
from collections.abc import Callable
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from qlora_train.device.compute import THE_CPU, ComputeDevice
from qlora_train.device.description import planned_gpu
from qlora_train.kernels.liger import liger_for, usable_liger

TOLERANCES = {"float32": 1e-5, "bfloat16": 2e-2, "float16": 2e-3}


def backward(gradient: Any, *, needs_dw: bool) -> None:
    """Has the parameter that is looked for."""


def backward_of_old(gradient: Any) -> None:
    """As before liger-kernel 0.8.5."""


def modules(backward: Callable[..., None]) -> Callable[[str], Any]:
    return lambda name: SimpleNamespace(name=name, rms_norm_backward=backward)


def broken(name: str) -> Any:
    raise ImportError(f"{name} wants another Triton")


def test_used_where_it_can_be() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        liger = usable_liger(modules(backward))
    assert liger is not None
    assert liger.norms.name == "liger_kernel.ops.rms_norm"
    assert liger.swiglu.name == "liger_kernel.ops.swiglu"


def test_the_description_of_the_device_decides() -> None:
    gpu = replace(planned_gpu("RTX 3060", None), index=0)
    assert liger_for(THE_CPU) is None and liger_for(ComputeDevice(replace(gpu, has_liger=False))) is None
    is_installed = find_spec("liger_kernel") is not None and find_spec("triton") is not None
    assert (liger_for(ComputeDevice(replace(gpu, has_liger=True))) is not None) == is_installed


@pytest.mark.parametrize(
    ("load", "reason"),
    [
        (broken, r"cannot be imported \(liger_kernel.* another Triton\)"),
        (modules(backward_of_old), "older than"),
    ],
)
def test_an_installed_one_that_cannot_be_used_is_warned_of(load, reason: str) -> None:
    with pytest.warns(UserWarning, match=f"installed but not used: .*{reason}.*Plain torch"):
        assert usable_liger(load) is None


@pytest.fixture(scope="module")
def distances() -> dict[str, dict[str, float]]:
    """Case -> what -> distance; see interpreted_liger.py."""
    for name in ("triton", "liger_kernel"):
        if find_spec(name) is None:
            pytest.skip(f"{name} is not installed (it comes with the extra dev, on Linux)")
    program = Path(__file__).with_name("interpreted_liger.py")
    ran = subprocess.run(
        [sys.executable, str(program)],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert ran.returncode == 0, ran.stderr
    return json.loads(ran.stdout)


@pytest.mark.parametrize("what", ["norm 0.0", "norm 1.0", "silu"])
@pytest.mark.parametrize("dtype", TOLERANCES)
def test_output_and_gradients(distances: dict[str, dict[str, float]], dtype: str, what: str) -> None:
    found = {case: parts for case, parts in distances.items() if case.startswith(f"{what} {dtype} ")}
    assert len(found) == 5
    worst = {case: parts for case, parts in found.items() if max(parts.values()) > TOLERANCES[dtype]}
    assert not worst
