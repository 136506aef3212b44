"""Files and pageable RAM on their way to the device, a simulated GPU: through two pinned pieces in turn."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from simulated_gpu.fixture import SimulatedGpu
from torch import Tensor

from qlora_train.device.compute import ComputeDevice
from qlora_train.model.vocab_matrix import ResidentMatrix, TokenIds
from qlora_train.weights import stores
from qlora_train.weights.host_memory import HostMemory
from qlora_train.weights.ring import Ring
from qlora_train.weights.stores import FilePart, HostRows, ItemReader
from qlora_train.weights.streaming import StreamedMatrix
from qlora_train.weights.uploads import Uploads

PIECE = 4096
SIZES = [1, PIECE - 1, PIECE, PIECE + 1, 2 * PIECE, 5 * PIECE + 13]


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stores, "STAGING_BYTES", PIECE)


def random_bytes(num_bytes: int) -> Tensor:
    generator = torch.Generator().manual_seed(num_bytes)
    return torch.randint(0, 256, (num_bytes,), dtype=torch.uint8, generator=generator)


def waits(gpu: SimulatedGpu) -> list[tuple[str, str]]:
    """What the host waited for."""
    reads = gpu.host_reads
    return [*reads.values, *reads.copies, *reads.synchronizations]


def source_of(kind: str, content: Tensor, host: HostMemory, folder: Path) -> Tensor | FilePart:
    if kind == "file":
        path = folder / f"{len(content)}.bin"
        path.write_bytes(bytes(7) + content.numpy().tobytes() + b"behind")
        return FilePart(path, 7, len(content))
    buffer = host.empty(len(content), gives_way=True)
    buffer.copy_(content)
    return buffer


@pytest.mark.parametrize("kind", ["pinned", "pageable", "file"])
def test_items_arrive_whole_whatever_their_size(
    simulated_gpu: SimulatedGpu, sim: ComputeDevice, kind: str, tmp_path: Path
) -> None:
    """One after another on a side stream, whose copies are late: a piece that is filled again too early shows
    as another item's bytes."""
    host = HostMemory(sim)
    reader = ItemReader(sim, host)
    if kind == "pageable":
        simulated_gpu.refuse_pinning()
    contents = [random_bytes(size) for size in SIZES]
    reader.items |= {i: source_of(kind, content, host, tmp_path) for i, content in enumerate(contents)}
    assert bool(host.num_unpinned_bytes) == (kind == "pageable")
    slots = torch.zeros(len(SIZES), max(SIZES) + 5, dtype=torch.uint8, device=sim.torch)
    stream = sim.side_stream()
    stream.wait_stream(sim.current_stream())
    with sim.on(stream):
        for item in reader.items:
            reader.read(item, slots[item])
    sim.current_stream().wait_stream(stream)
    for slot, content in zip(slots.cpu(), contents, strict=True):
        assert torch.equal(slot[: len(content)], content) and not slot[len(content) :].any()
    assert reader.num_bytes_read == sum(SIZES)
    reader.close()


def test_pinned_ram_is_copied_at_once_and_nobody_waits(
    simulated_gpu: SimulatedGpu, sim: ComputeDevice
) -> None:
    host = HostMemory(sim)
    reader = ItemReader(sim, host)
    reader.items[0] = source_of("pinned", random_bytes(5 * PIECE), host, Path())
    slot = torch.zeros(5 * PIECE, dtype=torch.uint8, device=sim.torch)
    simulated_gpu.host_reads.clear()
    calls = simulated_gpu.num_calls["aten::copy_"]
    reader.read(0, slot)
    assert simulated_gpu.num_calls["aten::copy_"] == calls + 1
    assert waits(simulated_gpu) == []
    sim.wait()  # before the buffer goes


@pytest.mark.parametrize("is_refused", [False, True])
def test_where_not_even_pieces_are_pinned_the_driver_copies(
    simulated_gpu: SimulatedGpu, sim: ComputeDevice, is_refused: bool
) -> None:
    host = HostMemory(sim)
    if is_refused:
        simulated_gpu.refuse_pinning()
    reader = ItemReader(sim, host)
    simulated_gpu.refuse_pinning()
    content = random_bytes(5 * PIECE)
    reader.items[0] = source_of("pageable", content, host, Path())
    slot = torch.zeros(5 * PIECE, dtype=torch.uint8, device=sim.torch)
    calls = simulated_gpu.num_calls["aten::copy_"]
    reader.read(0, slot)
    assert simulated_gpu.num_calls["aten::copy_"] - calls == (1 if is_refused else 5)
    assert torch.equal(slot.cpu(), content)


def test_pieces_are_pinned_before_weights(simulated_gpu: SimulatedGpu, sim: ComputeDevice) -> None:
    simulated_gpu.refuse_pinning(beyond_bytes=4 * PIECE)
    host = HostMemory(sim)
    weights = [host.empty(2 * PIECE, gives_way=True) for _ in range(2)]
    assert all(map(host.is_pinned, weights))
    reader = ItemReader(sim, host)  # late, as after an unlucky order: weights give way
    reader.items[0] = weights[1]
    assert [host.is_pinned(w) for w in weights] == [True, False]
    assert simulated_gpu.pinned_bytes == 4 * PIECE


def test_a_ring_reads_files_and_weights_that_gave_way(
    simulated_gpu: SimulatedGpu, sim: ComputeDevice, tmp_path: Path
) -> None:
    """A zigzag over items of both kinds, slots poisoned; offload buffers take the pinned pages meanwhile."""
    host = HostMemory(sim)
    reader = ItemReader(sim, host)
    contents = [random_bytes(3 * PIECE + i) for i in range(6)]
    kinds = ["pinned", "file", "pinned", "pinned", "file", "pinned"]
    reader.items |= {
        i: source_of(kind, content, host, tmp_path)
        for i, (kind, content) in enumerate(zip(kinds, contents, strict=True))
    }
    simulated_gpu.refuse_pinning(beyond_bytes=simulated_gpu.pinned_bytes)
    ring = Ring(reader, 2, reader.largest_bytes, sim, poison=True)
    order = [*range(6), *reversed(range(6))]
    ring.set_schedule(order)
    offloaded = []
    for turn, item in enumerate(order):
        _, slot = ring.acquire(item)
        found = slot[: len(contents[item])].clone()
        ring.release(item)
        if turn % 3 == 2:
            offloaded.append(host.empty(2 * PIECE))
        assert torch.equal(found.cpu(), contents[item])
    assert all(map(host.is_pinned, offloaded)) and host.num_unpinned_bytes > 0
    ring.close()
    reader.close()


@pytest.mark.parametrize("kind", ["pinned", "file"])
@pytest.mark.parametrize("ids", [[0], [8, 3, 3, 0, 8], [], list(range(9))], ids=str)
def test_rows_are_gathered_into_memory_that_the_device_copies_from(
    simulated_gpu: SimulatedGpu, sim: ComputeDevice, kind: str, ids: list[int], tmp_path: Path
) -> None:
    matrix = torch.randn(9, 30, generator=torch.Generator().manual_seed(1)).to(torch.bfloat16)
    host = HostMemory(sim)
    at = source_of(kind, matrix.view(torch.uint8).reshape(-1), host, tmp_path)
    streamed = StreamedMatrix((9, 30), torch.bfloat16, Uploads(sim, host), HostRows(at, 60), None, [], 9)
    wanted = TokenIds.of(np.array(ids, dtype=np.int64), "cpu")
    expected = ResidentMatrix(matrix, 9).gather(wanted)
    simulated_gpu.host_reads.clear()
    found = [streamed.gather(wanted) for _ in range(3)]
    assert waits(simulated_gpu) == []
    for rows in found:
        assert rows.device == sim.torch and torch.equal(rows.cpu(), expected)
