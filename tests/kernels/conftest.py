"""Triton kernels without a GPU: run by Triton's interpreter, on CPU tensors."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from types import ModuleType

import pytest


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
