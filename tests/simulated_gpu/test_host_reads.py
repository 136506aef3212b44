"""What makes the host wait is counted, at the line of the program that does it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from simulated_gpu import device_module as sim
from simulated_gpu.fixture import SimulatedGpu

READS: dict[str, tuple[str, Callable[[Tensor], object]]] = {
    "item": ("item", lambda x: x[0].item()),
    "float": ("item", lambda x: float(x[0])),
    "bool": ("item", lambda x: bool(x[0] > 0)),
    "if": ("item", lambda x: 1 if x.sum() > 0 else 0),
    "int": ("item", lambda x: range(int(x[0]))),
    "allclose": ("item", lambda x: torch.allclose(x, x)),
    "equal": ("equal", lambda x: torch.equal(x, x)),
    "tolist": ("copy to the host", lambda x: x.tolist()),
    "cpu": ("copy to the host", lambda x: x.cpu()),
    "print": ("copy to the host", lambda x: x.to("cpu")),
    "nonzero": ("nonzero", lambda x: x.nonzero()),
    "mask": ("nonzero", lambda x: x[x > 1]),
    "masked_select": ("masked_select", lambda x: x.masked_select(x > 1)),
    "unique": ("_unique2", lambda x: x.unique()),
    "put": ("index_put with a mask", lambda x: x.index_put_((x > 1,), x[0])),
    "repeat": ("repeat_interleave", lambda x: torch.repeat_interleave(x, x.long())),
}
NO_READS: dict[str, Callable[[Tensor], object]] = {
    "arithmetic": lambda x: (x * 2).softmax(0).clamp_(0, 1),
    "index": lambda x: x[torch.zeros(2, dtype=torch.int64, device="sim")],
    "where": lambda x: torch.where(x > 1, x, 0.0),
    "masked_fill": lambda x: x.masked_fill_(x > 1, 0),
    "set": lambda x: x.__setitem__(slice(0, 2), 1.0),
    "shape": lambda x: (x.numel(), len(x), x.is_contiguous(), x.stride()),
    "copy": lambda x: x.clone().copy_(x),
    "repeat": lambda x: torch.repeat_interleave(x, x.long(), output_size=6),
}


def device_tensor() -> Tensor:
    return torch.arange(4, device="sim").float()


@pytest.mark.parametrize("name", READS)
def test_reads_are_counted_with_their_place(simulated_gpu: SimulatedGpu, name: str) -> None:
    what, read = READS[name]
    x = device_tensor()
    read(x)
    ((kind, place),) = simulated_gpu.host_reads.values
    assert kind == what
    assert place == f"tests/simulated_gpu/test_host_reads.py:{read.__code__.co_firstlineno}"


@pytest.mark.parametrize("name", NO_READS)
def test_other_work_reads_nothing(simulated_gpu: SimulatedGpu, name: str) -> None:
    x = device_tensor()
    NO_READS[name](x)
    reads = simulated_gpu.host_reads
    assert not reads.values and not reads.copies and not reads.synchronizations


def test_copies_that_the_host_waits_for(simulated_gpu: SimulatedGpu) -> None:
    reads, x = simulated_gpu.host_reads, device_tensor()
    torch.tensor([1.0, 2.0], device="sim")
    assert [what for what, _ in reads.copies] == ["pageable memory"]
    reads.clear()
    x[torch.tensor([0, 1])]
    x[[0, 1]] = 5.0
    assert {what for what, _ in reads.copies} >= {"indices on the host"} and not reads.values
    reads.clear()
    torch.zeros(3).to("sim", non_blocking=True)
    assert [what for what, _ in reads.copies] == ["pageable memory, non_blocking"]


def test_waits_that_the_program_asks_for(simulated_gpu: SimulatedGpu) -> None:
    sim.synchronize()
    sim.current_stream().synchronize()
    sim.current_stream().record_event().synchronize()
    asked = simulated_gpu.host_reads.synchronizations
    assert [what for what, _ in asked] == ["device", "stream", "event"]
    assert all("test_host_reads.py:" in place for _, place in asked)


def test_operators_and_allocations_are_counted(simulated_gpu: SimulatedGpu) -> None:
    x = device_tensor()
    before = simulated_gpu.num_operators
    for _ in range(3):
        x.add_(1)
    assert simulated_gpu.num_calls["aten::add"] == 3 and simulated_gpu.num_operators == before + 3
