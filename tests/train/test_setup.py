"""What `make_accelerator` tells torch."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from qlora_train.recipe import Recipe
from qlora_train.train.setup import make_accelerator


@pytest.fixture
def torch_flags(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Put back what a run sets for its process."""
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", "")
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG")
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("deterministic", [True, False, "auto"])
def test_deterministic_reaches_torch_and_fills_no_memory(
    tmp_path: Path, torch_flags: None, deterministic: bool | str
) -> None:
    values = {
        "model": {"base": "somewhere"},
        "data": {"train": "rows.jsonl"},
        "training": {"deterministic": deterministic, "output_dir": str(tmp_path)},
    }
    make_accelerator(Recipe.from_dict(values))
    is_on = deterministic is True
    assert torch.are_deterministic_algorithms_enabled() is is_on
    assert ("CUBLAS_WORKSPACE_CONFIG" in os.environ) is is_on
    # True is torch's default; without deterministic algorithms it does nothing.
    assert torch.utils.deterministic.fill_uninitialized_memory is not is_on
