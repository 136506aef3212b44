"""Who waits for which copy when tensors leave for host memory and come back, on the simulated GPU.

That nobody waits too little, its hazards show in every run (tests/simulated_runs). Here: nobody waits for
more than its own copy. Work of a side stream is done there only when something waits for it."""

from __future__ import annotations

import weakref

import pytest
import torch
from simulated_gpu.fixture import SimulatedGpu
from torch import Tensor

from qlora_train.kernels.on_device import find_device
from qlora_train.walk.host_offload import HostOffloader, OffloadedGraph
from qlora_train.weights.host_memory import HostMemory

pytestmark = pytest.mark.filterwarnings("ignore:Triton does not run")


@pytest.fixture
def offload(simulated_gpu: SimulatedGpu) -> HostOffloader:
    device = find_device()
    return HostOffloader(device, HostMemory(device))


def ones(number: int, **options: bool) -> Tensor:
    return torch.ones(number, device="sim", **options)


def test_taking_waits_for_its_own_copy_and_not_for_the_next(offload: HostOffloader) -> None:
    first, second = offload.offload_all([ones(3), ones(5)])
    before = offload.stream.num_done
    first.fetch()
    second.fetch()
    num_queued = offload.stream.num_queued
    assert before < offload.stream.num_done + 2 <= num_queued  # the copies back are still to be done
    first.take()
    assert offload.stream.num_done < num_queued
    second.take()
    assert offload.stream.num_done == num_queued


def test_copies_that_came_before_one_that_is_there_are_not_waited_for(
    offload: HostOffloader, monkeypatch: pytest.MonkeyPatch
) -> None:
    waits: list[object] = []
    monkeypatch.setattr(
        type(offload.stream), "wait_event", lambda stream, event: (waits.append(1), event.wait(stream))
    )
    first, second, third = offload.offload_all([ones(3), 2 * ones(3), 3 * ones(3)])
    offload.finish_copies()
    for tensor in (first, second, third):
        tensor.fetch()
    waits.clear()
    found = [tensor.take() for tensor in (second, first, third)]
    assert len(waits) == 2 and [x.tolist() for x in found] == [[2.0] * 3, [1.0] * 3, [3.0] * 3]


def test_a_graph_that_is_fetched_early_is_not_waited_for(offload: HostOffloader) -> None:
    graphs, outputs = [], []
    for _ in range(2):
        leaf = ones(4, requires_grad=True)
        graphs.append(OffloadedGraph(offload, [leaf]))
        with graphs[-1].recording():
            outputs.append(leaf.exp().sum())
        graphs[-1].offload()
    offload.finish_copies()
    for graph in graphs:
        graph.fetch()
    num_queued = offload.stream.num_queued
    outputs[0].backward()
    assert offload.stream.num_done < num_queued
    outputs[1].backward()
    assert offload.stream.num_done == num_queued


def test_one_thing_leaves_at_a_time_and_is_held_until_it_is_waited_for(offload: HostOffloader) -> None:
    x, y = ones(3), ones(3)
    alive = [weakref.ref(x), weakref.ref(y)]
    first = offload.offload(x)
    del x
    assert alive[0]() is not None and offload.stream.num_done < offload.stream.num_queued
    second = offload.offload(y)
    del y
    assert alive[0]() is None and alive[1]() is not None
    offload.finish_copies()
    assert alive[1]() is None
    assert first.take().tolist() == second.take().tolist() == [1.0, 1.0, 1.0]


def test_when_drained_the_host_has_waited_for_all_copies(offload: HostOffloader) -> None:
    x = ones(3)
    alive = weakref.ref(x)
    offloaded = offload.offload(x)
    del x
    offloaded.fetch()
    offload.synchronize()
    assert alive() is None and offload.stream.num_done == offload.stream.num_queued
    assert offloaded.take().tolist() == [1.0, 1.0, 1.0]
