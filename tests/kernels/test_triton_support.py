"""Where Triton does not run, that is said with the reason, and the library's kernels are used."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import Tensor

from qlora_train.kernels.triton_support import runs


def test_a_launch_that_works() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert runs(lambda one: one.add_(1), torch.zeros(1, dtype=torch.int32))


def fails(one: Tensor) -> None:
    raise RuntimeError("Failed to find C compiler")


@pytest.mark.parametrize(
    ("launch", "reason"), [(fails, "find C compiler"), (lambda one: None, "wrote nothing")]
)
def test_a_launch_that_does_not(launch, reason) -> None:
    with pytest.warns(UserWarning, match=f"Triton does not run on cpu .*{reason}.*library kernels"):
        assert not runs(launch, torch.zeros(1, dtype=torch.int32))


def test_the_probe_adds_one(interpreted) -> None:
    one = torch.zeros(1, dtype=torch.int32)
    interpreted("qlora_train.kernels.triton_probe").add_one[(1,)](one)
    assert one.item() == 1
