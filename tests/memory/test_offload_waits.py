"""Who waits for which copy when tensors leave for host memory and come back, with stand-ins for streams."""

from __future__ import annotations

import weakref
from collections.abc import Iterator

import pytest
import torch
from cuda_stand_ins import Streams

from qlora_train.device.compute import THE_CPU as CPU
from qlora_train.memory.host_memory import HostMemory
from qlora_train.memory.offload import HostPark, OffloadedGraph


@pytest.fixture
def streams(monkeypatch: pytest.MonkeyPatch) -> Iterator[Streams]:
    with Streams(monkeypatch) as made:
        yield made


def park_on(streams: Streams) -> HostPark:
    park = HostPark(CPU, HostMemory(CPU))
    park.stream = streams.side  # type: ignore[assignment]
    return park


def test_taking_waits_for_its_own_copy_and_not_for_the_next(streams: Streams) -> None:
    park, compute, side = park_on(streams), streams.compute, streams.side
    first, second = park.park_all([torch.ones(3), torch.ones(5)])
    first.fetch()
    second.fetch()
    assert side.num_copies == 4 and side not in compute.waits_for
    first.take()
    assert compute.waits_for[side] == 3
    second.take()
    assert compute.waits_for[side] == 4


def test_a_graph_that_is_fetched_early_is_not_waited_for(streams: Streams) -> None:
    park, graphs, outputs = park_on(streams), [], []
    for _ in range(2):
        leaf = torch.ones(4, requires_grad=True)
        graphs.append(OffloadedGraph(park, [leaf]))
        with graphs[-1].recording():
            outputs.append(leaf.exp().sum())
        graphs[-1].park()
    park.settle()
    for graph in graphs:
        graph.fetch()
    assert streams.side.num_copies == 4
    outputs[0].backward()
    assert streams.compute.waits_for[streams.side] == 3


def test_a_copy_back_begins_when_its_memory_is_free(streams: Streams) -> None:
    parked = park_on(streams).park(torch.ones(3))
    torch.empty(3).copy_(torch.ones(3))  # whatever compute does last with the memory
    parked.fetch()
    assert streams.side.waits_for[streams.compute] == streams.compute.num_copies == 1


def test_one_thing_leaves_at_a_time_and_is_held_until_it_is_waited_for(streams: Streams) -> None:
    park, compute, side = park_on(streams), streams.compute, streams.side
    x = torch.ones(3)
    first = weakref.ref(x)
    park.park(x)
    del x
    assert first() is not None and side not in compute.waits_for  # computing goes on meanwhile
    x = torch.ones(3)
    second = weakref.ref(x)
    park.park(x)
    del x
    assert first() is None and compute.waits_for[side] == 1
    assert second() is not None
    park.settle()
    assert second() is None and compute.waits_for[side] == 2
    park.settle()  # nothing to let go
    assert compute.waits_for[side] == 2


def test_when_drained_the_host_has_waited_for_all_copies(streams: Streams) -> None:
    park = park_on(streams)
    x = torch.ones(3)
    alive = weakref.ref(x)
    parked = park.park(x)
    del x
    parked.fetch()
    park.drain()
    assert alive() is None and streams.side.num_done == streams.side.num_copies == 2
