"""CPU tests in the same process do not notice: what is off costs nothing and changes nothing."""

from __future__ import annotations

import ast
import os
import sys
from pathlib import Path

import bitsandbytes.functional
import bitsandbytes.optim.optimizer
import pytest
import torch

from simulated_gpu import install, private_names, registration
from simulated_gpu.fixture import ACCELERATE_DEVICE, SimulatedGpu, simulated_gpu_of_test


def things_that_are_replaced() -> list[object]:
    return [
        bitsandbytes.functional.lib,
        bitsandbytes.optim.optimizer.sync_gpu,
        torch.backends.cuda.is_flash_attention_available,
        torch.distributed.barrier,
        os.environ.get(ACCELERATE_DEVICE),
    ]


def test_everything_is_as_before_afterwards() -> None:
    before = things_that_are_replaced()
    with simulated_gpu_of_test():
        assert things_that_are_replaced() != before
    assert things_that_are_replaced() == before


def test_everything_is_as_before_after_a_failure() -> None:
    before = things_that_are_replaced()
    with pytest.raises(ZeroDivisionError), simulated_gpu_of_test():
        torch.ones(1 // 0)
    assert things_that_are_replaced() == before and not torch.accelerator.is_available()


def test_accelerate_finds_the_device_and_forgets_it(simulated_gpu: SimulatedGpu) -> None:
    from accelerate import Accelerator

    assert Accelerator().device == torch.device("sim"), "without an index, as it says for CUDA"


def test_accelerate_finds_no_device_when_it_is_off() -> None:
    from accelerate import Accelerator

    with simulated_gpu_of_test():
        Accelerator()
    assert Accelerator().device == torch.device("cpu")


def test_cpu_work_does_not_come_by() -> None:
    """No kernel of CPU tensors goes through Python: none of ours is called, and the same operators run."""
    install.install()
    x = torch.ones(4, 4, requires_grad=True)
    calls = []
    sys.setprofile(
        lambda frame, event, _: calls.append(frame.f_code.co_filename) if event == "call" else None
    )
    try:
        (torch.nn.functional.silu(x @ x) * 2).sum().backward()
        torch.empty(3).fill_(0).copy_(torch.ones(3)).to(torch.float16).resize_(5)
        torch.nn.functional.scaled_dot_product_attention(x[None], x[None], x[None])
    finally:
        sys.setprofile(None)
    assert not [file for file in calls if "simulated_gpu" in file and "test_off" not in file]


def test_a_backward_pass_before_is_no_obstacle() -> None:
    x = torch.ones(2, requires_grad=True)
    x.sum().backward()
    with simulated_gpu_of_test():
        y = torch.ones(2, device="sim", requires_grad=True)
        y.sum().backward()
        assert y.grad is not None and y.grad.tolist() == [1, 1]


def test_seeds_still_seed_the_cpu() -> None:
    torch.manual_seed(0)
    first = torch.rand(2)
    torch.manual_seed(0)
    assert torch.equal(first, torch.rand(2))


def test_a_torch_that_lacks_a_private_name_is_named() -> None:
    names = {"ours": "torch._C._no_such_name", "other": "torch.ops.aten._no_such_operator.default"}
    with pytest.raises(
        ImportError, match=r"cannot work with torch .*_no_such_name, no torch.ops.aten._no_such_op"
    ):
        private_names.find(names, ())
    everything = {"operator_names": private_names.NAMES["operator_names"]}
    with pytest.raises(ImportError, match="aten::gone"):
        private_names.find(everything, ("aten::gone", "aten::view"))


def test_other_tests_run_on_such_a_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "simulated_gpu.hooks", None)
    registration.register.__wrapped__()


def test_private_names_of_torch_are_in_one_place() -> None:
    for file in sorted(Path(private_names.__file__).parent.glob("[!_]*.py")):
        if file.name == "private_names.py" or file.name.startswith("test_"):
            continue
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Attribute):
                source = ast.unparse(node)
                private = [part for part in source.split(".") if part.startswith("_") and part[1:2] != "_"]
                assert not (source.startswith("torch.") and private), f"{file.name}:{node.lineno}: {source}"
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("torch"):
                assert not any(part.startswith("_") for part in (node.module or "").split("."))
